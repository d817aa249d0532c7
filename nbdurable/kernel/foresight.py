"""What would happen to each step of a notebook, without running it: `%durable plan` and `nbdurable plan`.

Owns how a notebook's cells are read and walked; the verdicts are `checkpoint/plan.py`'s own.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from nbdurable.checkpoint import analysis
from nbdurable.checkpoint.manifest import CodeFacts, InputFact, Manifest
from nbdurable.checkpoint.modules import fact_of_file
from nbdurable.checkpoint.plan import Origins, decide
from nbdurable.checkpoint.reasons import Cause
from nbdurable.checkpoint.sources import code_digest as digest_of
from nbdurable.checkpoint.sources import parameters_source
from nbdurable.checkpoint.watched import Watched, Watcher
from nbdurable.errors import StepUsageError, UsageError
from nbdurable.kernel.rewrite import rewrite_lines, take_marker, why_again
from nbdurable.models import HandSet
from nbdurable.stepline import StepOptions, is_step, parse_step_line

INJECTED = "injected-parameters"  # papermill's tag of the cell that gives a run its parameters


@dataclass(frozen=True)
class NotebookCell:
    """A code cell as it stands in the file; `options` where it is a step."""

    id: str
    source: str
    options: StepOptions | None
    problem: str = ""  # why its `%%step` line can't be used
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Foreseen:
    """What would happen to a step, and why."""

    step: str
    action: str  # restore, continue, run, replay (it runs each time)
    reason: str
    cause: Cause | None = None  # what changed, where that makes it run


def read_cells(notebook: Path) -> list[NotebookCell]:
    """Read the code cells of a notebook file; empty where there is none that can be read."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return parse_cells(cells)


def parse_cells(cells: Sequence[Mapping[str, object]]) -> list[NotebookCell]:
    """Turn the cells of a notebook's JSON into code cells with their step options."""
    found = []
    for index, cell in enumerate(cells):
        if cell.get("cell_type") != "code":
            continue
        text = cell.get("source", "")
        source = text if isinstance(text, str) else "".join(text)  # type: ignore[arg-type]
        options, problem = None, ""
        if is_step(source):
            try:
                options = parse_step_line(source.lstrip().splitlines()[0])
            except StepUsageError as error:
                problem = error.message
        metadata = cell.get("metadata")
        tags = metadata.get("tags", ()) if isinstance(metadata, dict) else ()
        cell_id = str(cell.get("id") or f"cell-{index}")
        found.append(NotebookCell(cell_id, source, options, problem, tuple(map(str, tags))))
    return found


def with_parameters(cells: Sequence[NotebookCell], values: Mapping[str, Any]) -> list[NotebookCell]:
    """Return the cells with a run's parameters put in, as its headless executions have them."""
    if not values:
        return list(cells)
    tagged = next((number for number, cell in enumerate(cells, 1) if "parameters" in cell.tags), 0)
    given = NotebookCell(INJECTED, parameters_source(values), None, tags=(INJECTED,))
    return [*cells[:tagged], given, *cells[tagged:]]


def names_read(cells: Sequence[NotebookCell], start: str | None) -> set[str]:
    """Return the names that the cells from a step on read, and those that any function of the notebook does."""
    found: set[str] = set()
    begun = start is None
    for cell in cells:
        begun = begun or start == (cell.options.name if cell.options else cell.id)
        if (tree := _tree(cell.source)[1]) is None:
            continue
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
        roots = [tree] if begun else [node for node in ast.walk(tree) if isinstance(node, functions)]
        found |= {
            node.id
            for root in roots
            for node in ast.walk(root)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
    return found


def foresee(
    cells: Sequence[NotebookCell],
    known: Mapping[str, Manifest],
    project: Path,
    watcher: Watcher,
    *,
    every_cell: bool = False,
    hand_set: Sequence[HandSet] = (),
) -> list[Foreseen]:
    """Say for each step of a notebook whether it would be restored or run, in a new kernel, and why.

    `known`: the verified manifests of a run's steps. `watcher`: looks at what steps watch. Values
    that only a run can make are taken as unchanged. `hand_set`: what a person gives variables before steps.
    """
    origins = Origins()
    sources: list[tuple[str, str]] = []  # place for people and transformed text of each cell so far
    running: set[str] = set()
    foreseen: list[Foreseen] = []
    for number, cell in enumerate(cells, start=1):
        place = f"cell {number}"
        text, tree = _tree(cell.source)
        if tree is None:
            if cell.options is not None or cell.problem:
                name = cell.options.name if cell.options else cell.id
                foreseen.append(Foreseen(name, "run", cell.problem or "its code has a syntax error"))
            continue
        take_marker(tree)
        name = cell.options.name if cell.options else cell.id
        names = analysis.analyse(tree, cell.source)
        code_digest = digest_of(ast.unparse(tree))
        if cell.problem:
            foreseen.append(Foreseen(name, "run", cell.problem))
            continue
        if cell.options is None and not every_cell:
            sources.append((place, text))
            origins.plain_cell(names, code_digest, label_of(cell.source), place)
            continue
        options = cell.options or StepOptions(name)
        again = why_again(options, tree, marked=cell.options is not None, every_cell=every_cell)
        if again is not None:
            sources.append((place, text))
            origins.plain_cell(names, code_digest, label_of(cell.source), place)
            foreseen.append(Foreseen(name, "replay", again))
            continue
        origins.by_hand({one.name: one.value for one in hand_set if one.step == name})
        recorded = known.get(name)
        if recorded is None:
            verdict_action, reason, cause = "run", "it has no checkpoint yet", None
            fingerprints = dict.fromkeys(names.stores, "")
        else:
            try:
                watched = watcher.look(options.watch)
            except UsageError as error:
                foreseen.append(Foreseen(name, "run", error.message))
                continue
            code = _facts(cell, code_digest, names, recorded.code, sources, project, watched)
            inputs = {n: _input(n, fact, origins, running) for n, fact in recorded.inputs.items()}
            verdict = decide(
                recorded,
                code,
                lambda inputs=inputs: inputs,  # type: ignore[misc]
                step=name,
                visited=False,
                on_drift="rerun",
                forced="forced by --force" if options.force else None,
            )
            verdict_action = "run" if verdict.action == "execute" else verdict.action
            reason, cause = _reason(verdict.drifted, recorded, running) or verdict.reason, verdict.cause
            fingerprints = dict(recorded.fingerprints)
        if verdict_action == "run":
            running.add(name)
            fingerprints = {**fingerprints, **dict.fromkeys(names.stores, "")}
        origins.step(name, fingerprints, recorded.deleted if recorded else ())
        sources.append((place, text))
        foreseen.append(Foreseen(name, verdict_action, reason, cause))
    return foreseen


def _facts(
    cell: NotebookCell,
    digest: str,
    names: analysis.CellNames,
    recorded: CodeFacts,
    sources: Sequence[tuple[str, str]],
    project: Path,
    watched: Watched,
) -> CodeFacts:
    """Return the facts of a step's code as it stands; what only a running kernel can know is as recorded."""
    helpers = analysis.helpers_in_source(sources, {*recorded.helpers, *names.loads})
    modules = {name: fact_of_file(project / was.file, project) for name, was in recorded.modules.items()}
    return CodeFacts(
        source=cell.source.lstrip().partition("\n")[2] if cell.options else cell.source,
        first_line=2 if cell.options else 1,
        digest=digest,
        helpers={**{n: fact for n, fact in recorded.helpers.items() if n not in helpers}, **helpers},
        imports=analysis.imports_in_source(sources, recorded.imports),
        modules={name: fact for name, fact in modules.items() if fact is not None},
        watched=watched,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
    )


def _input(name: str, fact: InputFact, origins: Origins, running: set[str]) -> InputFact:
    """Return an input's fact now: its value is as recorded if its origin is, and no step before will run for it."""
    origin = origins[name]
    if origin.step in running:
        return InputFact(value="", origin=fact.origin, label=origin.label)
    same = origin.digest == fact.origin
    return InputFact(
        value=fact.value if same else "",
        origin=origin.digest,
        label=origin.label,
        cell=origin.cell,
        line=origin.line,
        via=fact.via,
    )


def _reason(drifted: tuple[str, ...], recorded: Manifest, running: set[str]) -> str:
    if not drifted:
        return ""
    step = recorded.inputs[drifted[0]].label.removeprefix("step ")
    return f"its input `{drifted[0]}` comes from {step}" if step in running else ""


def label_of(source: str) -> str:
    """Name a plain cell for people, by its first line."""
    if source.startswith("# Parameters\n"):  # as papermill injects them
        return "the parameters"
    first = next((line.strip() for line in source.splitlines() if line.strip()), "")
    return f"the cell `{first if len(first) <= 40 else first[:39] + '…'}`"


def _tree(source: str) -> tuple[str, ast.Module | None]:
    """Return a cell's text as IPython transforms it, and its tree; None where it can't be parsed."""
    manager = TransformerManager()
    manager.cleanup_transforms.append(rewrite_lines)
    try:
        text = str(manager.transform_cell(source))
        return text, ast.parse(text)
    except (SyntaxError, ValueError, StepUsageError):
        return "", None
