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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.client import Client
from nbdurable.contract import CREATE_RUN, CreateRun
from nbdurable.errors import NotebookError, ParameterError, StepUsageError
from nbdurable.models import DriverKind, Run
from nbdurable.settings import Home

INJECTED = "injected-parameters"  # papermill's tag, and the id that the cell has in every run
_STEP = "%%step"
StepsMode = Literal["marked", "all"]


@dataclass(frozen=True)
class Prepared:
    """A notebook that can be run: its snapshot (JSON, UTF-8), and what was found out about it."""

    snapshot: bytes
    kernel_name: str
    parameters: dict[str, Any]
    steps_total: int
    warnings: tuple[str, ...] = ()


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
    warn: Callable[[str], object] | None = None,
) -> Run:
    """Create a queued run of a notebook as it is now; `warn` gets what people should know about it.

    Raises NotebookError, StepUsageError or ParameterError for what can't be run, before anything is created.
    """
    notebook = notebook.expanduser().absolute()
    prepared = prepare(notebook, parameters or {}, steps_mode=steps_mode, kernel_name=kernel_name)
    if output is not None:
        output = output.expanduser().absolute()
        check_output(output, notebook)
    if cwd is not None and not cwd.is_dir():
        raise NotebookError(
            f"the working directory {cwd} is no folder", todo="create it, or name another one"
        )
    client.home.create()
    blobs = LocalBlobs(client.home.blobs)
    digest = blobs.put(prepared.snapshot)
    blobs.sync()
    question = CreateRun(
        notebook=str(notebook),
        kind=DriverKind.HEADLESS,
        snapshot=digest,
        parameters=prepared.parameters,
        steps_mode=steps_mode,
        output=None if output is None else str(output),
        kernel_name=prepared.kernel_name,
        cwd=None if cwd is None else str(cwd.absolute()),
        tags=tags,
        idempotency_key=idempotency_key,
        steps_total=prepared.steps_total,
    )
    if warn is not None:
        for sentence in prepared.warnings:
            warn(sentence)
    return client.call(CREATE_RUN, question)


def output_path(home: Home, run: Run) -> Path:
    """Return where a run's output notebook stands: where the run says, else among the project's outputs."""
    if run.output is not None:
        return Path(run.output)
    return home.root / "outputs" / f"{Path(run.notebook).stem}-{run.short}.ipynb"


def check_output(output: Path, notebook: Path) -> None:
    """Raise NotebookError if the output notebook could not be written there."""
    todo = "name another file with -o, or leave -o out: the output then goes to `.nbdurable/outputs/`"
    if output.is_dir():
        raise NotebookError(f"the output {output} is a folder", todo=todo)
    if not output.parent.is_dir():
        raise NotebookError(
            f"the output {output} can't be written: there is no folder {output.parent}", todo=todo
        )
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
) -> Prepared:
    """Read and check a notebook, and put its parameters in.

    The snapshot has an id on every cell (its own, else one that is the same in each run), and no outputs.
    Raises NotebookError, StepUsageError, ParameterError.
    """
    nb = _read(notebook)
    warnings: list[str] = []
    kernel, language = _kernel(nb, notebook, kernel_name, warnings)
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nb.metadata.pop("papermill", None)
    nb.metadata.pop("widgets", None)
    names = step_cells(nb, notebook)
    values = {name: _plain(value, name) for name, value in parameters.items()}
    if values:
        _check_names(nb, notebook, values, warnings)
        nb = _inject(nb, values, kernel, language)
    runnable = [cell for cell in nb.cells if is_executed(cell)]
    return Prepared(
        snapshot=json.dumps(nb, ensure_ascii=False, sort_keys=True, indent=1).encode(),
        kernel_name=kernel,
        parameters=values,
        steps_total=len(names) if steps_mode == "marked" else len(runnable),
        warnings=tuple(warnings),
    )


def is_executed(cell: Any) -> bool:
    """Tell whether a cell is sent to the kernel."""
    tags = cell.metadata.get("tags", [])
    return bool(cell.cell_type == "code" and cell.source.strip() and "skip-execution" not in tags)


def step_name(source: str) -> str | None:
    """Return the name on a cell's `%%step` line; None where there is none (the kernel says what is wrong)."""
    words = source.lstrip().partition("\n")[0].split()
    if len(words) < 2 or words[0] != _STEP or words[1].startswith("-"):
        return None
    return words[1]


def step_cells(nb: Any, notebook: Path) -> dict[str, str]:
    """Return the names of a notebook's steps with the ids of their cells.

    Raises StepUsageError, naming both cells, if a name occurs twice.
    """
    found: dict[str, tuple[int, str]] = {}
    for number, cell in enumerate(nb.cells, start=1):
        name = step_name(cell.source) if is_executed(cell) else None
        if name is None:
            continue
        if name in found:
            first, first_id = found[name]
            raise StepUsageError(
                f"two cells of {notebook} are the step {name!r}: cell {first} (id {first_id}) "
                f"and cell {number} (id {cell.id})",
                todo="give one of them another name: a step's name is its identity in the run",
            )
        found[name] = (number, cell.id)
    return {name: cell_id for name, (_, cell_id) in found.items()}


def _read(notebook: Path) -> Any:
    """Return a notebook as nbformat 4.5 with an id on every cell."""
    import nbformat

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
    cells = raw.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise NotebookError(f"{notebook} is not a valid notebook: it has no cells", todo="restore the file")
    _give_ids(cells)
    minor = raw.get("nbformat_minor")
    raw["nbformat_minor"] = max(5, minor) if isinstance(minor, int) else 5
    nb = nbformat.from_dict(raw)
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        raise NotebookError(
            f"{notebook} is not a valid notebook: {str(error).splitlines()[0]}",
            todo="open it in Jupyter and save it again",
        ) from None
    for cell in nb.cells:
        if isinstance(cell.source, list):  # as files have it
            cell.source = "".join(cell.source)
    return nb


def _give_ids(cells: list[dict[str, Any]]) -> None:
    """Give each cell without an id of its own one that follows from its place."""
    taken: set[str] = set()
    for cell in cells:
        if cell.get("id") in taken:
            del cell["id"]
        elif isinstance(cell.get("id"), str):
            taken.add(cell["id"])
    for number, cell in enumerate(cells, start=1):
        if "id" not in cell:
            name = f"cell-{number}"
            while name in taken:
                name += "-again"
            taken.add(name)
            cell["id"] = name


def _kernel(nb: Any, notebook: Path, wanted: str | None, warnings: list[str]) -> tuple[str, str]:
    """Return the kernel that runs a notebook, and its language."""
    from jupyter_client.kernelspec import KernelSpecManager

    specs = KernelSpecManager().get_all_specs()
    there = ", ".join(sorted(specs)) or "none"
    name = wanted or nb.metadata.get("kernelspec", {}).get("name")
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
    return str(name), language


def kernel_names() -> list[str]:
    """Return the kernels that are installed here, by name."""
    from jupyter_client.kernelspec import KernelSpecManager

    return sorted(KernelSpecManager().find_kernel_specs())


# Parameters ------------------------------------------------------------------------------------------------


def _plain(value: Any, name: str) -> Any:
    """Return a parameter as JSON: dates and times become ISO text, tuples and sets lists (sets sorted)."""
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
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


def _check_names(nb: Any, notebook: Path, values: Mapping[str, Any], warnings: list[str]) -> None:
    """Raise ParameterError for a name that the cell tagged `parameters` does not have."""
    for name in values:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ParameterError(
                f"{name!r} can't be the name of a parameter", todo="a Python variable's name can"
            )
    cell = next((cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])), None)
    if cell is None:
        warnings.append(
            f"{notebook.name} has no cell tagged `parameters`: the parameters go to its top, and a cell that "
            "assigns the same names overwrites them"
        )
        return
    known = list(_assigned(cell.source, notebook))
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


def _inject(nb: Any, values: Mapping[str, Any], kernel: str, language: str) -> Any:
    """Put papermill's cell with the parameters in, with an id that is the same in each run."""
    from papermill.parameterize import parameterize_notebook

    nb.metadata["papermill"] = {}
    bare = [cell for cell in nb.cells if "tags" not in cell.metadata]
    for cell in bare:
        cell.metadata["tags"] = []
    if not any("parameters" in cell.metadata.tags for cell in nb.cells):
        import logging

        logging.getLogger("papermill.parameterize").setLevel(logging.ERROR)  # we warn ourselves
    nb = parameterize_notebook(nb, dict(values), kernel_name=kernel, language=language)
    for cell in nb.cells:
        if INJECTED in cell.metadata.tags:
            cell["id"] = INJECTED
    for cell in bare:
        del cell.metadata["tags"]
    del nb.metadata["papermill"]
    return nb
