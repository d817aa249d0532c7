"""A notebook on its way to a headless run: read, checked, with its parameters, as the run's snapshot.

Owns what a notebook must be, which parameters may be passed, and where the output goes. Starts no kernel.
"""

from __future__ import annotations

import ast
import datetime
import json
import keyword
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from nbdurable import spending
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.sources import parameters_source
from nbdurable.client import Client
from nbdurable.contract import CREATE_RUN, KEY_LIFE_S, MAX_KEY_LIFE_S, CreateRun
from nbdurable.errors import (
    CheckpointError,
    NotebookError,
    NotFound,
    ParameterError,
    StepUsageError,
    UsageError,
)
from nbdurable.models import Budget, DriverKind, Run
from nbdurable.policies import Retry, seconds
from nbdurable.security import load_key
from nbdurable.settings import Home
from nbdurable.stepline import read_step

INJECTED = "injected-parameters"  # papermill's tag, and the id that the cell has in every run
_NAME_BYTES = 230  # of the 255 of a file's name, since a draft has a longer one
_STEM_BYTES = 180
_CELL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
StepsMode = Literal["marked", "all"]
Cell = dict[str, Any]
Notebook = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A notebook that can be run: its snapshot (JSON, UTF-8), and what was found out about it."""

    snapshot: bytes
    kernel_name: str
    parameters: dict[str, Any]
    steps: tuple[str, ...]  # names of the steps, in order
    warnings: tuple[str, ...] = ()

    @property
    def steps_total(self) -> int:
        return len(self.steps)


def create_headless(
    client: Client,
    notebook: Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    output: Path | None = None,
    steps_mode: StepsMode = "marked",
    kernel_name: str | None = None,
    cwd: Path | None = None,
    tags: tuple[str, ...] = (),
    idempotency_key: str | None = None,
    retries: int = 0,
    on_exhausted: str = "fail",
    timeout: str | float | timedelta | None = None,
    delay: str | float | timedelta = 0.0,
    ttl: str | float | timedelta | None = None,
    questions: bool = True,
    until: str | None = None,
    budget: str | float | Budget | None = None,
    begins: Mapping[str, Any] | None = None,
    warn: Callable[[str], object] | None = None,
) -> Run:
    """Create a queued run of a notebook as it is now; `warn` gets what people should know about it.

    `retries`: how often it is begun again after it has failed, its steps kept. `timeout`: how long it may be driven,
    waits apart. `delay`: it begins so much later; `ttl`: and expires, if nobody has begun it by so much after that.
    `begins`: what `conditions` returned. `budget`: what its model calls may take, where they are recorded
    (`durable.ledger`). Raises NotebookError, StepUsageError, ParameterError or UsageError for what can't be run, before
    anything is created.
    """
    question, warnings = request(
        lambda prepared: keep(client.home, prepared),
        notebook,
        parameters=parameters,
        output=output,
        steps_mode=steps_mode,
        questions=questions,
        kernel_name=kernel_name,
        cwd=cwd,
        tags=tags,
        idempotency_key=idempotency_key,
        retries=retries,
        on_exhausted=on_exhausted,
        timeout=timeout,
        delay=delay,
        ttl=ttl,
        until=until,
        budget=budget,
    )
    if warn is not None:
        for sentence in warnings:
            warn(sentence)
    run = client.call(CREATE_RUN, question.model_copy(update=dict(begins or {})))
    if warn is not None and (said := other_than_asked(run, question)):
        warn(said)
    return run


def conditions(
    *,
    key_ttl: str | float | timedelta = KEY_LIFE_S,
    debounce: str | float | timedelta | None = None,
    debounce_key: str | None = None,
    debounce_mode: str = "leading",
    debounce_max: str | float | timedelta | None = None,
    singleton: str | None = None,
    singleton_key: str | None = None,
) -> dict[str, Any]:
    """Return, as a question has them, the conditions under which a run begins; raises UsageError."""
    for what, given, known in (
        ("debounce_mode", debounce_mode, ("leading", "trailing")),
        ("singleton", singleton, (None, "skip", "cancel", "queue")),
    ):
        if given not in known:
            words = ", ".join(repr(word) for word in known if word is not None)
            raise UsageError(f"{what}={given!r} is not known", todo=f"use one of {words}")
    if (debounce is None) != (debounce_key is None):
        raise UsageError(
            "a run that is debounced has a time and a key", todo="give both, e.g. 30s and the key user-7"
        )
    if debounce is None and debounce_max is not None:
        raise UsageError("a longest delay without a debounce", todo="say how long nobody may ask: debounce")
    if singleton is None and singleton_key is not None:
        raise UsageError(
            "a singleton's key without a singleton", todo="say what happens: skip, cancel or queue"
        )
    key_ttl_s = seconds(key_ttl)
    if not 0 < key_ttl_s <= MAX_KEY_LIFE_S:
        raise UsageError(f"{key_ttl!r} can't be the life of a key", todo="give a time up to 365d")
    return {
        "key_ttl_s": key_ttl_s,
        "debounce_s": _some("debounce", debounce),
        "debounce_key": debounce_key,
        "debounce_mode": debounce_mode,
        "debounce_max_s": _some("debounce_max", debounce_max),
        "singleton": singleton,
        "singleton_key": singleton_key,
    }


def request(
    write: Callable[[Prepared], str],
    notebook: Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    output: Path | None = None,
    steps_mode: StepsMode = "marked",
    questions: bool = True,
    kernel_name: str | None = None,
    cwd: Path | None = None,
    tags: tuple[str, ...] = (),
    idempotency_key: str | None = None,
    retries: int = 0,
    on_exhausted: str = "fail",
    timeout: str | float | timedelta | None = None,
    delay: str | float | timedelta = 0.0,
    ttl: str | float | timedelta | None = None,
    until: str | None = None,
    budget: str | float | Budget | None = None,
) -> tuple[CreateRun, tuple[str, ...]]:
    """Return the question that asks for a run of a notebook as it is now, and what people should know about it.

    `write` writes its snapshot, and returns the digest. The other arguments are those of `create_headless`.
    """
    policy = Retry.of(retries, on_exhausted=on_exhausted)
    timeout_s, ttl_s = _some("timeout", timeout), _some("ttl", ttl)
    delay_s = seconds(delay)
    notebook = notebook.expanduser().absolute()
    prepared = prepare(notebook, parameters or {}, steps_mode=steps_mode, kernel_name=kernel_name)
    if until is not None and until not in prepared.steps:
        raise NotFound(
            f"{notebook} has no step {until!r}", todo=f"its steps: {', '.join(prepared.steps) or 'none'}"
        )
    if output is not None:
        output = output.expanduser().absolute()
        check_output(output, notebook)
    if cwd is not None and not cwd.is_dir():
        raise NotebookError(
            f"the working directory {cwd} is no folder", todo="create it, or name another one"
        )
    question = CreateRun(
        notebook=str(notebook),
        kind=DriverKind.HEADLESS,
        snapshot=write(prepared),
        parameters=prepared.parameters,
        steps_mode=steps_mode,
        questions=questions,
        output=None if output is None else str(output),
        kernel_name=prepared.kernel_name,
        cwd=None if cwd is None else str(cwd.absolute()),
        tags=tags,
        idempotency_key=idempotency_key,
        steps_total=prepared.steps_total,
        retries=policy.retries,
        on_exhausted=policy.on_exhausted,
        timeout_s=timeout_s,
        budget=None if budget is None else spending.budget(budget),
        delay_s=delay_s,
        ttl_s=ttl_s,
        until=until,
    )
    return question, prepared.warnings


def other_than_asked(run: Run, question: CreateRun) -> str:
    """Say that a key returned a run of something else than what was asked for; "" where it did not."""
    asked = (question.notebook, question.snapshot, question.parameters)
    if question.idempotency_key is None or (run.notebook, run.snapshot, run.parameters) == asked:
        return ""
    return (
        f"the key {question.idempotency_key!r} belongs to run {run.short} of {Path(run.notebook).name}, which is "
        "returned: its notebook or its parameters are others than those given now"
    )


def _some(what: str, duration: str | float | timedelta | None) -> float | None:
    """Return a duration that must be some, in seconds."""
    if duration is None:
        return None
    if not (found := seconds(duration)):
        raise UsageError(
            f"a {what} of 0 would let nothing run", todo=f"leave the {what} out, or give it time"
        )
    return found


def keep(home: Home, prepared: Prepared) -> str:
    """Write a snapshot as a blob, durably, and return its digest."""
    load_key(home.create())  # refused before anything is written where the store is not trusted
    blobs = LocalBlobs(home.blobs)
    digest = blobs.put(prepared.snapshot)
    blobs.sync()
    return digest


def read_snapshot(home: Home, run: Run) -> Notebook:
    """Return a run's notebook as it was when the run began; raises CheckpointError, NotebookError."""
    if run.snapshot is None:
        raise NotebookError(f"run {run.short} has no snapshot of its notebook", todo="create a new run")
    try:
        found: Notebook = json.loads(bytes(LocalBlobs(home.blobs).read(run.snapshot)))
    except CheckpointError as error:
        raise type(error)(
            f"the notebook of run {run.short}, as it was when the run began, can't be read: {error.message}",
            todo="put the file back and resume the run, or begin a new one; its steps are kept",
        ) from None
    return found


def output_path(home: Home, run: Run) -> Path:
    """Return where a run's output notebook stands: where the run says, else among the project's outputs."""
    if run.output is not None:
        return Path(run.output)
    stem = Path(run.notebook).stem.encode()[:_STEM_BYTES].decode(errors="ignore")
    return home.root / "outputs" / f"{stem}-{run.short}.ipynb"


def check_output(output: Path, notebook: Path) -> None:
    """Raise NotebookError if the output notebook could not be written there."""
    todo = "name another file with -o, or leave -o out: the output then goes to `.nbdurable/outputs/`"
    if not output.parent.is_dir():
        raise NotebookError(
            f"the output {output} can't be written: there is no folder {output.parent}", todo=todo
        )
    if len(os.fsencode(output.name)) > _NAME_BYTES:
        raise NotebookError(
            f"the output {output.name[:40]}… can't be written: its name is longer than {_NAME_BYTES} bytes",
            todo=todo,
        )
    if output.is_dir():
        raise NotebookError(f"the output {output} is a folder", todo=todo)
    if not os.access(output.parent, os.W_OK) or (output.exists() and not os.access(output, os.W_OK)):
        raise NotebookError(f"the output {output} can't be written: permission denied", todo=todo)
    if output.exists() and notebook.exists() and output.samefile(notebook):
        raise NotebookError(f"the output would overwrite the notebook {notebook} itself", todo=todo)


def prepare(
    notebook: Path,
    parameters: Mapping[str, Any],
    *,
    steps_mode: StepsMode = "marked",
    kernel_name: str | None = None,
    nb: Notebook | None = None,
) -> Prepared:
    """Read and check a notebook, and put its parameters in. `nb`: the version of a run, instead of the file.

    The snapshot has an id on every cell (its own, else one that is the same in each run), and no outputs.
    Raises NotebookError, StepUsageError, ParameterError.
    """
    nb = nb or _read(notebook)
    warnings: list[str] = []
    kernel = _kernel(nb, notebook, kernel_name, warnings)
    names = step_cells(nb, notebook)
    values = plain(parameters)
    if values:
        _check_names(nb, notebook, values, warnings)
        _inject(nb, values)
    every = tuple(step_name(cell["source"]) or cell["id"] for cell in nb["cells"] if is_executed(cell))
    return Prepared(
        snapshot=json.dumps(nb, ensure_ascii=False, sort_keys=True, indent=1).encode(),
        kernel_name=kernel,
        parameters=values,
        steps=tuple(names) if steps_mode == "marked" else every,
        warnings=tuple(warnings),
    )


def is_executed(cell: Mapping[str, Any]) -> bool:
    """Tell whether a cell is sent to the kernel."""
    return bool(
        cell["cell_type"] == "code" and cell["source"].strip() and "skip-execution" not in _tags(cell)
    )


def _tags(cell: Mapping[str, Any]) -> list[str]:
    tags: list[str] = cell["metadata"].get("tags", [])
    return tags


def step_name(source: str) -> str | None:
    """Return the name on a cell's `%%step` line; None where there is none, or it can't be used."""
    try:
        step = read_step(source)
    except StepUsageError:
        return None
    return step.name if step is not None else None


def step_cells(nb: Notebook, notebook: Path) -> dict[str, str]:
    """Return the names of a notebook's steps with the ids of their cells.

    Raises StepUsageError for a step cell that can't run, naming it, and if a name occurs twice, naming both cells.
    """
    found: dict[str, tuple[int, str]] = {}
    for number, cell in enumerate(nb["cells"], start=1):
        if not is_executed(cell):
            continue
        try:
            step = read_step(cell["source"])
        except StepUsageError as error:
            raise StepUsageError(
                f"cell {number} (id {cell['id']}) of {notebook}: {error.message}", todo=error.todo
            ) from None
        if step is None:
            continue
        name = step.name
        if name in found:
            first, first_id = found[name]
            raise StepUsageError(
                f"two cells of {notebook} are the step {name!r}: cell {first} (id {first_id}) "
                f"and cell {number} (id {cell['id']})",
                todo="give one of them another name: a step's name is its identity in the run",
            )
        found[name] = (number, cell["id"])
    return {name: cell_id for name, (_, cell_id) in found.items()}


def _read(notebook: Path) -> Notebook:
    """Return a notebook as nbformat 4.5: what is executed of it, with an id on every cell, and no outputs.

    The check is our own: nbformat's takes 0.6 s to import, and names a place in a schema instead of a cell.
    """
    if notebook.is_dir():
        raise NotebookError(f"{notebook} is a folder", todo="name the .ipynb file in it")
    try:
        raw = json.loads(notebook.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotebookError(f"there is no notebook {notebook}", todo="check the path") from None
    except OSError as error:
        raise NotebookError(
            f"{notebook} can't be read: {error.strerror}", todo="check its permissions"
        ) from None
    except ValueError as error:
        raise NotebookError(
            f"{notebook} is not JSON, so it is no notebook: {error}",
            todo="open it in Jupyter and save it again, or restore it from version control",
        ) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("nbformat"), int):
        raise NotebookError(
            f"{notebook} is JSON, but no notebook: it does not say its nbformat", todo="is it another file?"
        )
    if raw["nbformat"] < 4:
        raise NotebookError(
            f"{notebook} is of the old format nbformat {raw['nbformat']}",
            todo=f"convert it: jupyter nbconvert --to notebook --nbformat 4 --inplace {notebook}",
        )
    if raw["nbformat"] > 4:
        raise NotebookError(
            f"{notebook} is of a newer format, nbformat {raw['nbformat']}",
            todo="upgrade nbformat and nbdurable",
        )
    todo = "open it in Jupyter and save it again, or restore it from version control"
    cells, metadata = raw.get("cells"), raw.get("metadata", {})
    if not isinstance(cells, list) or not isinstance(metadata, dict):
        raise NotebookError(f"{notebook} is not a valid notebook: it has no cells or metadata", todo=todo)
    found: list[Cell] = []
    taken = {cell["id"] for cell in cells if isinstance(cell, dict) and _is_id(cell.get("id"))}
    used: set[str] = set()
    for number, cell in enumerate(cells, start=1):
        read = _read_cell(cell)
        if read is None:
            raise NotebookError(f"{notebook} is not a valid notebook: cell {number} is damaged", todo=todo)
        cell_id = cell.get("id")
        if not _is_id(cell_id) or cell_id in used:
            cell_id = f"cell-{number}"
            while cell_id in taken:
                cell_id += "-again"
        used.add(cell_id)
        taken.add(cell_id)
        found.append({"id": cell_id} | read)
    kept = {name: value for name, value in metadata.items() if name not in ("papermill", "widgets")}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": kept, "cells": found}


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _CELL_ID.fullmatch(value) is not None


def _read_cell(cell: Any) -> Cell | None:
    """Return what a run keeps of a cell; None where it is not one."""
    match cell:
        case {"cell_type": "code" | "markdown" | "raw" as kind, "source": str() | list() as source}:
            metadata = cell.get("metadata", {})
        case _:
            return None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tags", []), list):
        return None
    if isinstance(source, list):  # as files have it
        if not all(isinstance(line, str) for line in source):
            return None
        source = "".join(source)
    kept = {name: value for name, value in metadata.items() if name not in ("papermill", "execution")}
    read: Cell = {"cell_type": kind, "metadata": kept, "source": source}
    if kind == "code":
        return read | {"outputs": [], "execution_count": None}
    return read | ({"attachments": cell["attachments"]} if "attachments" in cell else {})


def kernel_names() -> list[str]:
    """Return the names of the kernels that are installed."""
    return sorted(_kernel_specs())


def _kernel_specs() -> dict[str, Any]:
    from jupyter_client.kernelspec import KernelSpecManager

    specs: dict[str, Any] = KernelSpecManager().get_all_specs()
    return specs


def _kernel(nb: Notebook, notebook: Path, wanted: str | None, warnings: list[str]) -> str:
    """Return the name of the kernel that runs a notebook."""
    specs = _kernel_specs()
    there = ", ".join(sorted(specs)) or "none"
    spec = nb["metadata"].get("kernelspec")
    name = wanted or (spec.get("name") if isinstance(spec, dict) else None)
    if name is None:
        name = "python3"
        warnings.append(f"{notebook.name} names no kernel: {name} is used")
    if name not in specs:
        raise NotebookError(
            f"there is no kernel {name!r} for {notebook}; those there are: {there}",
            todo=f"choose one with --kernel, or install it: python -m ipykernel install --user --name {name}",
        )
    language = str(specs[name]["spec"].get("language", "python")).lower()
    if language != "python":
        raise NotebookError(
            f"the kernel {name!r} of {notebook} runs {language}; nbdurable runs Python",
            todo="choose another kernel",
        )
    return str(name)


# Parameters ------------------------------------------------------------------------------------------------


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as JSON; raises ParameterError for one that can't be passed."""
    return {name: _plain(value, name) for name, value in parameters.items()}


def _plain(value: Any, name: str) -> Any:
    """Return a parameter as JSON: dates and times become ISO text, tuples and sets lists (sets sorted)."""
    match value:
        case None | bool():
            return value
        case int():  # an IntEnum too (and below, NumPy's float64): the value, not what it calls itself
            return int(value)
        case str():
            return str.__str__(value)
        case float() if math.isfinite(value):
            return float(value)
        case float():
            raise ParameterError(
                f"the parameter {name!r} is {value}, which JSON does not have",
                todo="pass it as text and write `float(…)` in the notebook, or pass null",
            )
        case datetime.date() | datetime.time():  # datetime is a date
            return value.isoformat()
        case list() | tuple():
            return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
        case set() | frozenset():
            items = [_plain(item, name) for item in value]
            return sorted(items, key=lambda item: (type(item).__name__, json.dumps(item)))
        case dict():
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ParameterError(
                    f"the parameter {name!r} has the key {wrong[0]!r}, which is not text",
                    todo="use text as keys",
                )
            return {key: _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    raise ParameterError(
        f"the parameter {name!r} is a {type(value).__name__}, which can't be passed",
        todo="pass text, numbers, true, false, null, lists and objects of those, dates or times; "
        "for anything else pass the name of a file",
    )


def _check_names(nb: Notebook, notebook: Path, values: Mapping[str, Any], warnings: list[str]) -> None:
    """Raise ParameterError for a name that the cell tagged `parameters` does not have."""
    for name in values:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ParameterError(
                f"{name!r} can't be the name of a parameter", todo="a Python variable's name can"
            )
    cell = next((cell for cell in nb["cells"] if "parameters" in _tags(cell)), None)
    if cell is None:
        warnings.append(
            f"{notebook.name} has no cell tagged `parameters`: the parameters go to its top, and a cell that "
            "assigns the same names overwrites them"
        )
        return
    known = list(_assigned(cell["source"], notebook))
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ParameterError(
            f"{notebook} has no parameter {', '.join(map(repr, unknown))}; "
            f"those there are: {', '.join(known) or 'none'}",
            todo="check the name, or add it with a default to the cell tagged `parameters`",
        )


def _assigned(source: str, notebook: Path) -> Iterator[str]:
    """Yield the names that a parameters cell assigns at its top level."""
    lines = ["" if line.startswith(("%", "!")) else line for line in source.splitlines()]
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError as error:
        raise NotebookError(
            f"the `parameters` cell of {notebook} is not valid Python: {error.msg} (line {error.lineno})",
            todo="mend the cell",
        ) from None
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=targets):
                found: list[ast.expr] = targets
            case ast.AnnAssign(target=annotated):
                found = [annotated]
            case _:
                continue
        for target in found:
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id


def _inject(nb: Notebook, values: Mapping[str, Any]) -> None:
    """Put a cell with the parameters where papermill would, with an id that is the same in each run.

    Below the cell tagged `parameters`, in place of one that was put in before, or at the top.
    """
    cells: list[Cell] = nb["cells"]
    source = parameters_source(values)
    code: Cell = {"cell_type": "code", "source": source, "outputs": [], "execution_count": None}
    injected = code | {"id": INJECTED, "metadata": {"tags": [INJECTED]}}
    for number, cell in enumerate(cells):
        if INJECTED in _tags(cell):
            cells[number] = injected
            return
    place = next((number for number, cell in enumerate(cells, start=1) if "parameters" in _tags(cell)), 0)
    cells.insert(place, injected)
