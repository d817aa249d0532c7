"""Cells and whole notebooks, run and restored, each time in a process that has run nothing yet.

`python -m tests.tools.fresh PACKAGE …` imports packages, reads jobs as JSON lines and forks a process for each, which
inherits these packages and nothing of a notebook. `Trial` compares generated notebooks: one that was resumed must end
as one that never stopped.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from nbdurable.checkpoint.fingerprint import fingerprint
from nbdurable.models import SignedManifest
from tests.tools.cells import Cells
from tests.tools.programs import SETUP, Program
from tests.tools.same import describe, difference

_HELPERS = {
    "collections",
    "copy",
    "dataclasses",
    "enum",
    "functools",
    "operator",
    "random",
    "types",
    "np",
    "pd",
}
Listed = list[tuple[bool, list[str]]]


class Broken(Exception):
    """A statement of the notebook raises."""

    def __init__(self, cell: int, statement: int) -> None:
        super().__init__(cell, statement)
        self.place = (cell, statement)


class Fresh:
    """Processes in which nothing has run: each job has one of its own."""

    def __init__(self, hash_seed: int, *packages: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.tools.fresh", *packages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.getcwd()},
        )

    def __call__(self, job: str, **fields: Any) -> Any:
        """Do a job; raises Broken where the notebook itself raises, AssertionError where we do."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"job": job, **fields}) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        if "broken" in answer:
            raise Broken(*answer["broken"])
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()


class Trial:
    """Runs notebooks in two worlds of different hash seeds, and compares what their variables are."""

    def __init__(self) -> None:
        self._first, self._second = Fresh(1), Fresh(2)

    def close(self) -> None:
        self._first.close()
        self._second.close()

    def runnable(self, program: Program) -> Program:
        """Return a notebook without the statements that raise."""
        while program.cells:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    self._first("prepare", program=_listed(program), folder=folder)
                except Broken as broken:
                    program = program.without(*broken.place)
                else:
                    break
        return program

    def flaw(self, program: Program, kept: int) -> str:
        """Return what is wrong if the notebook dies behind its first `kept` cells and is resumed; "" if nothing is."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                whole = self._first("whole", program=_listed(program), folder=folder)
                known = {"manifests": whole["manifests"], "kept": kept}
                parts = self._second("resumed", program=_listed(program), folder=folder, **known)
            except Broken as broken:
                return f"resumed, it raises at {broken.place}"
            except AssertionError as error:
                return str(error)
        unsaved = parts["unsaved"]
        for number, now in enumerate(parts["after"]):
            then = whole["after"][number]
            if now is None:
                continue
            if now.keys() != then.keys() - unsaved.keys():
                return f"behind cell {number} there are {sorted(now)}, instead of {sorted(then)}; unsaved: {unsaved}"
            for name in (
                now if not unsaved else ()
            ):  # the numbers of objects count those that were not saved, too
                if place := difference(then[name], now[name]):
                    return f"behind cell {number}, `{name}` {place}"
        return ""

    def smallest(self, program: Program, kept: int, flaw: str) -> str:
        """Leave out statements for as long as something is wrong; return the notebook, and what that is."""
        for cell in reversed(range(len(program.cells))):
            for statement in reversed(range(len(program.cells[cell].statements))):
                smaller = program.without(cell, statement)
                fewer = kept - (len(smaller.cells) < len(program.cells) and cell < kept)
                if self.runnable(smaller) == smaller and (found := self.flaw(smaller, fewer)):
                    return self.smallest(smaller, fewer, found)
        return f"resumed behind {kept} cells:\n\n{program}\n\n{flaw}"


def _listed(program: Program) -> Listed:
    return [(cell.is_step, list(cell.statements)) for cell in program.cells]


def user_names(cells: Cells) -> list[str]:
    names = (name for name in cells.namespace if not name.startswith("__") and name not in _HELPERS)
    return sorted(names)


def _run(cells: Cells, number: int, statements: list[str]) -> None:
    """Run a cell as one piece of code; find the statement that raises, where one does."""
    source = "\n".join(statements)
    try:
        cells.run(source)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next(frame.lineno or 0 for frame in frames if frame.filename.startswith("<cell "))
        at = 0
        for place, text in enumerate(statements):
            at += text.count("\n") + 1
            if line <= at:
                raise Broken(number, place) from error
        raise


def prepare(folder: Path, program: Listed, **_: Any) -> None:
    """Run a notebook, to see whether it runs."""
    cells = Cells(folder, SETUP)
    for number, (_, statements) in enumerate(program):
        _run(cells, number, statements)


def whole(folder: Path, program: Listed, **_: Any) -> dict[str, Any]:
    """Run a notebook with checkpoints; return them, and what its variables were behind each cell."""
    cells = Cells(folder, SETUP)
    manifests: list[dict[str, Any] | None] = []
    after = []
    for number, (is_step, statements) in enumerate(program):
        if is_step:
            signed = cells.step("\n".join(statements), f"step{number}")
            manifests.append(signed.model_dump())
        else:
            manifests.append(None)
            _run(cells, number, statements)
        after.append(describe(cells.namespace, user_names(cells)))
    return {"manifests": manifests, "after": after}


def resumed(folder: Path, program: Listed, manifests: list[Any], kept: int, **_: Any) -> dict[str, Any]:
    """Restore the steps among the first `kept` cells, run the other cells; return what there was behind each.

    Where a variable was not saved, nothing is run: what a cell would do with it is no more known.
    """
    cells = Cells(folder, SETUP)
    after: list[Any] = []
    unsaved: dict[str, str] = {}
    for number, (is_step, statements) in enumerate(program):
        if number < kept and is_step:
            manifest = cells.restore(SignedManifest.model_validate(manifests[number]))
            for variable in manifest.variables:
                unsaved.pop(variable.name, None)
                if variable.state == "unsaved":
                    unsaved[variable.name] = variable.reason
        else:
            if unsaved:
                break
            _run(cells, number, statements)
        names = [name for name in user_names(cells) if name not in unsaved]
        after.append(describe(cells.namespace, names) if number >= kept - 1 else None)
    return {"after": after, "unsaved": unsaved}


def saved(folder: Path, plain: str, make: str, **_: Any) -> dict[str, Any]:
    """Run a plain cell and a step; return the step's checkpoint, and the type of `v`."""
    cells = Cells(folder, plain)
    signed = cells.step(make)
    return {"signed": signed.model_dump(), "type": type(cells["v"]).__qualname__}


def restored(folder: Path, plain: str, signed: dict[str, str], holds: str, **_: Any) -> dict[str, Any]:
    """Restore a step; return why variables were not saved, which came back unequal, and whether `holds` does."""
    cells = Cells(folder, plain)
    manifest = cells.restore(SignedManifest.model_validate(signed))
    unsaved = {item.name: item.reason for item in manifest.variables if item.state != "saved"}
    digests = manifest.fingerprints.items()
    unequal = [name for name, digest in digests if fingerprint(cells[name], cells.namespace) != digest]
    return {
        "unsaved": unsaved,
        "unequal": unequal,
        "type": type(cells["v"]).__qualname__,
        "holds": not unsaved and bool(eval(holds, cells.namespace)),
    }


JOBS = {job.__name__: job for job in (prepare, whole, resumed, saved, restored)}


def main() -> None:
    """Serve jobs until the input ends."""
    for package in sys.argv[1:]:
        importlib.import_module(package)
    for line in sys.stdin:
        fields = json.loads(line)
        job, folder = JOBS[fields.pop("job")], Path(fields.pop("folder"))
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            try:
                answer = {"result": job(folder, **fields)}
            except Broken as broken:
                answer = {"broken": broken.place}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with os.fdopen(writer, "w") as pipe:
                json.dump(answer, pipe, default=repr)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        print(text or json.dumps({"error": "the process died"}), flush=True)


if __name__ == "__main__":
    main()
