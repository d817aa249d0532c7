"""Attach: a run that stopped elsewhere comes into this kernel with its exact variables, and goes on here.

Owns how its state is brought: as a headless execution of the run's own version brings it, by its cells in order. Plain
cells run, steps are restored, and it ends before the first step that would run. So every variable has the value and the
origin that it would have there, and what is committed here is kept by whoever drives the run next.
"""

from __future__ import annotations

import json
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from IPython.utils.capture import capture_output

from nbdurable import lifecycle
from nbdurable.checkpoint.restore import restore
from nbdurable.errors import CheckpointError, NotRestorable, UsageError
from nbdurable.kernel import display, extension
from nbdurable.kernel.foresight import INJECTED, NotebookCell, parse_cells, read_cells
from nbdurable.kernel.session import Session
from nbdurable.models import RunDetail, RunStatus, StepStatus


def attach(session: Session, shell: Any, typed: str, *, take_over: bool = False) -> str:
    """Bring a failed, waiting, paused or cancelled run into this kernel, which drives it from now on; say how it went.

    Raises LeaseHeld where somebody drives it (unless `take_over`), IllegalMove for a completed run, NotRestorable where
    a checkpoint was removed; nothing is changed then.
    """
    if session.headless:
        raise UsageError("a headless run can't attach another one", todo="attach it in a notebook")
    run = session.detail(typed)
    if run.status is not RunStatus.RUNNING:
        lifecycle.move(run.status, lifecycle.Happening.ATTACH, run=f"run {run.short}")
    if gone := [step for step in run.steps if step.removed]:
        raise NotRestorable(
            f"run {run.short} can't be attached: the checkpoint of {gone[0].name} is gone ({gone[0].removed})",
            todo=f"`nbdurable fork {run.short} --from {gone[0].name}` runs it again",
        )
    cells = _cells(session, run)
    session.attach(run, take_over=take_over)
    assert session.run is not None
    kept, where = _bring(session, shell, run, cells)
    lines = [
        f"⇥ run {run.short} of {Path(run.notebook).name} is driven from here · "
        f"kept: {display.few(kept) or 'no step yet'}",
        where,
    ]
    if run.parameters:
        given = ", ".join(f"{name}={value!r}" for name, value in run.parameters.items())
        lines.append(f"its parameters are set: {given}")
    if session.run.notebook != str(session.notebook):
        lines.append(f"it stays a run of {session.run.notebook}: put what you change into that file, too")
    if edited := _edited(session, run, cells):
        lines.append(
            f"{session.notebook.name} is another version than the run's by now ({display.few(edited)}): "
            "`%durable plan` says what would run"
        )
    lines.append(
        f"`nbdurable resume {run.short} --take-over` hands it back with the notebook as it is saved then"
    )
    return "\n  ".join(lines)


def _cells(session: Session, run: RunDetail) -> list[NotebookCell]:
    """Return the cells of the run's own version: its snapshot, or the file of a run that was always interactive."""
    if run.snapshot is None:
        return read_cells(Path(run.notebook))
    try:
        return parse_cells(json.loads(bytes(session.blobs.read(run.snapshot)))["cells"])
    except CheckpointError as error:
        raise type(error)(
            f"the notebook of run {run.short}, as it was when the run began, can't be read: {error.message}",
            todo=f"`nbdurable fork {run.short} --notebook {run.notebook}` begins anew with what is kept",
        ) from None


def _edited(session: Session, run: RunDetail, cells: Sequence[NotebookCell]) -> list[str]:
    """Name the cells that differ between the run's version and its file as it is now, where that is open here."""
    if run.notebook != str(session.notebook) or run.snapshot is None:
        return []
    now = {cell.id: cell.source for cell in read_cells(session.notebook)}
    return [
        cell.options.name if cell.options else cell.id
        for cell in cells
        if INJECTED not in cell.tags and now.get(cell.id) != cell.source
    ]


def _bring(
    session: Session, shell: Any, run: RunDetail, cells: Sequence[NotebookCell]
) -> tuple[list[str], str]:
    """Execute cells until a step would run; return the steps that were restored, and where and why it ended."""
    steps = extension.steps()
    assert steps is not None
    kept: list[str] = []
    for number, cell in enumerate(cells, start=1):
        if not cell.source.strip() or "skip-execution" in cell.tags:
            continue
        name = cell.options.name if cell.options else cell.id if run.steps_mode == "all" else None
        transformed = shell.transform_cell(cell.source)
        if cell.options is None and shell.should_run_async(cell.source, transformed_cell=transformed):
            return kept, f"cell {number} awaits something: run it and the cells below it yourself"
        with steps.apart(), capture_output(), _without_tracebacks(shell):
            execution = shell.run_cell_async(
                cell.source, store_history=False, transformed_cell=transformed, cell_id=cell.id
            )
            result = _at_once(execution)
        if steps.stopped is not None:
            step, verdict, known = steps.stopped
            if verdict.action == "continue" and known is not None:
                restore(known, session.values, session.blobs)
            return kept, _stopped(run, step, verdict.reason, verdict.action)
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            what = f"step {name}" if name else f"cell {number}"
            said = _line(str(error))
            return kept, f"stopped at {what}, which raised {type(error).__name__}: {said}"
        if name is not None:
            kept.append(name)
    return kept, "every cell of its notebook is done: add cells, or hand it back"


def _stopped(run: RunDetail, step: str, reason: str, action: str) -> str:
    """Say at which step a run stands, and what is to be done about it."""
    known = next((one for one in run.steps if one.name == step), None)
    error = known.attempts[-1].error if known is not None and known.attempts else None
    if known is not None and known.status is StepStatus.FAILED and error is not None:
        why = f"which failed with {error.name}: {_line(error.message)}"
        return f"stopped before {step}, {why} · fix the cell and run it"
    if action == "continue":
        return f"stopped at {step}, which waits: what it did above its gate is here; run the cell to wait on"
    return f"stopped before {step} ({reason}) · run the cell to go on"


def _line(text: str) -> str:
    return (text.splitlines() or [""])[0]


def _at_once(cell: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that awaits nothing to its end: a kernel's loop runs already, and can't be entered again."""
    try:
        cell.send(None)
    except StopIteration as done:
        return done.value
    raise UsageError("a cell of the run awaits something", todo="run the cells yourself, from the top")


@contextmanager
def _without_tracebacks(shell: Any) -> Iterator[None]:
    """Keep the tracebacks of cells that raise to ourselves: the person sees them when they run the cell."""
    shell._showtraceback = lambda *_: None
    try:
        yield
    finally:
        del shell._showtraceback
