"""What would happen to each step of a notebook or a run, and why, before anything happens.

Owns which run a notebook is compared with; the verdicts are the kernel's own (`kernel/foresight.py`). Starts no kernel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbdurable.checkpoint.manifest import Manifest, unseal
from nbdurable.checkpoint.watched import Watcher
from nbdurable.cli.project import connect
from nbdurable.cli.screen import Line, Screen, warn
from nbdurable.client import Client
from nbdurable.contract import CHECKPOINTS, GET_RUN, LIST_RUNS, ByRun, ListRuns
from nbdurable.errors import NotebookError
from nbdurable.models import JSON, DriverKind, Run, StepStatus
from nbdurable.security import load_key
from nbdurable.settings import find_project

if TYPE_CHECKING:
    from nbdurable.kernel.foresight import Foreseen

_STYLES = {
    "restore": "cyan",
    "keep": "cyan",
    "mark": "cyan",
    "continue": "cyan",
    "run": "yellow",
    "replay": "dim",
}


def print_plan(target: str, screen: Screen) -> None:
    """Print for each step whether it would be restored or run, with the reason.

    `target`: a notebook, as its file is now, compared with its newest run; or a run, as it would be resumed.
    """
    from nbdurable.kernel.foresight import foresee, parse_cells

    path = Path(target)
    if path.suffix == ".ipynb" or path.is_file():
        notebook = path.absolute()
        client = connect(notebook, existing=False)
        newest = _newest(client, notebook)
        cells = _cells_now(notebook, newest)
    else:
        client = connect()
        detail = client.call(GET_RUN, ByRun(run_id=target))
        for sentence in sorted({step.removed for step in detail.steps if step.removed}):
            warn(("note: ", "yellow"), f"this run can't be resumed: {sentence}")
        newest = detail
        notebook = Path(newest.notebook)
        if newest.snapshot is not None and newest.kind is DriverKind.HEADLESS:
            from nbdurable.notebooks import read_snapshot

            cells = list(read_snapshot(client.home, newest)["cells"])
        else:
            cells = _cells_now(notebook, newest)
    key = (
        bytes(32) if newest is None else load_key(client.home)
    )  # without a run there is no checkpoint to compare
    known = {} if newest is None else manifests(client, newest, key)
    every_cell = newest is not None and newest.steps_mode == "all"
    watcher = Watcher(notebook.parent, key)
    foreseen = foresee(
        parse_cells(cells),
        known,
        find_project(notebook),
        watcher,
        every_cell=every_cell,
        hand_set=newest.hand_set if newest else (),
    )
    if screen.json_mode:
        screen.data([as_json(step) for step in foreseen])
        return
    compared: Line = (
        (f"  compared with run {newest.short}, {newest.status}",) if newest else ("  it has no run yet",)
    )
    screen.say((notebook.name, "bold"), *compared)
    if not foreseen:
        screen.say("it has no steps: begin a cell with %%step NAME, or run it with --steps all")
        return
    print_steps(foreseen, screen)


def print_steps(foreseen: Sequence[Foreseen], screen: Screen) -> None:
    """Print a line per step: what happens to it, and why."""
    width = max((len(step.step) for step in foreseen), default=0)
    for step in foreseen:
        screen.say(
            f" {step.step:<{width}}  ",
            (f"{step.action:<8}", _STYLES.get(step.action, "")),
            f"  {step.reason}",
        )


def as_json(step: Foreseen) -> dict[str, JSON]:
    """Return a step's line for scripts."""
    cause = step.cause
    parts: dict[str, JSON] | None = None
    if cause is not None:
        parts = {"kind": cause.kind, "name": cause.name, "cell": cause.cell, "line": cause.line}
    return {"name": step.step, "action": step.action, "reason": step.reason, "cause": parts}


def _newest(client: Client, notebook: Path) -> Run | None:
    """Return the newest run of a notebook; nothing is started for one that can't have a run."""
    if not client.home.root.is_dir():
        return None
    runs = client.call(LIST_RUNS, ListRuns(notebook=str(notebook), limit=1)).runs
    return runs[0] if runs else None


def _cells_now(notebook: Path, run: Run | None) -> list[dict[str, object]]:
    """Return the cells of a notebook's file, with the parameters of a headless run put in as it had them."""
    if run is None or run.kind is DriverKind.HEADLESS or run.parameters:
        from nbdurable.notebooks import prepare

        found = prepare(
            notebook, run.parameters if run else {}, steps_mode=run.steps_mode if run else "marked"
        )
        return _cells(found.snapshot)
    try:
        return _cells(notebook.read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotebookError(
            f"{notebook} can't be read as a notebook: {error}", todo="check the path"
        ) from None


def _cells(notebook: bytes) -> list[dict[str, object]]:
    return list(json.loads(notebook)["cells"])


def manifests(client: Client, run: Run, key: bytes) -> dict[str, Manifest]:
    """Return the verified manifests of a run's steps; those that run again on resume count as not there."""
    return {
        found.step: unseal(found.manifest, key, of=f"step `{found.step}` of run {run.short}")
        for found in client.call(CHECKPOINTS, ByRun(run_id=run.id)).checkpoints
        if found.status is not StepStatus.REPLAY
    }
