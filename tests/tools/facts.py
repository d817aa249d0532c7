"""A process that says what a step would stand on: it runs plain cells, and collects facts as the kernel does.

One line of JSON in, one out: `{"cells": […], "step": "…"}` → `{"code": …, "inputs": …}`.
"""

from __future__ import annotations

import ast
import json
import linecache
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

from nbdurable.checkpoint.analysis import analyse, uses
from nbdurable.checkpoint.manifest import CodeFacts, InputFact
from nbdurable.checkpoint.plan import Origins
from nbdurable.checkpoint.sources import code_digest
from nbdurable.checkpoint.track import Tracker

Facts = tuple[CodeFacts, dict[str, InputFact]]
_numbers = count()


def collect(cells: list[str], step: str, folder: Path) -> dict[str, Any]:
    """Run plain cells in a namespace of their own, and return the facts of a step that would follow."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    origins = Origins()
    files = []
    for number, source in enumerate(cells, start=1):
        files.append(f"<cell {next(_numbers)}>")
        linecache.cache[files[-1]] = (len(source), None, source.splitlines(keepends=True), files[-1])
        exec(compile(source, files[-1], "exec"), namespace)
        origins.plain_cell(analyse(ast.parse(source)), code_digest(source), "", f"cell {number}")
    names = analyse(ast.parse(step))
    used = uses(names.loads, namespace, folder, imports=names.imports)
    code = CodeFacts(
        source=step,
        digest=code_digest(step),
        helpers=used.helpers,
        imports=used.imports,
        modules=used.modules,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
    )
    tracker = Tracker(namespace)
    inputs = {
        name: InputFact(
            value=tracker.fingerprint(name),
            origin=origins[name].digest,
            cell=origins[name].cell,
            line=origins[name].line,
            via=via,
        )
        for name, via in used.inputs.items()
    }
    for file in files:
        del linecache.cache[file]
    return {"code": code.model_dump(), "inputs": {name: fact.model_dump() for name, fact in inputs.items()}}


class Elsewhere:
    """Another process, with a hash seed of its own."""

    def __init__(self, seed: int, folder: Path, python: str = sys.executable) -> None:
        self._process = subprocess.Popen(
            [python, "-m", "tests.tools.facts", str(folder)],
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parents[2])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def facts(self, cells: list[str], step: str) -> Facts:
        """Return the facts of a step behind some plain cells."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"cells": cells, "step": step}) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        inputs = {name: InputFact.model_validate(fact) for name, fact in found["inputs"].items()}
        return CodeFacts.model_validate(found["code"]), inputs

    def close(self) -> None:
        self._process.communicate("", timeout=30)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(collect(**json.loads(line), folder=Path(sys.argv[1]))), flush=True)
