"""Changing the past from the command line: forks, repairs, replays, samples, and runs that change hands.

Owns what is kept and what runs again, shown as a plan before anything happens; the coordinator only carries it out.
The verdicts are the kernel's own (`kernel/foresight.py`). "Before a step" is by the order of the cells in the version
of the notebook that will run.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdurable import lifecycle
from nbdurable.checkpoint.manifest import CodeFacts, Manifest, seal
from nbdurable.checkpoint.watched import Watcher
from nbdurable.cli.plans import manifests
from nbdurable.client import Client
from nbdurable.contract import (
    FORK_RUN,
    GET_RUN,
    LIST_RUNS,
    REPAIR_RUN,
    RESUME_RUN,
    ByRun,
    ForkRun,
    ListRuns,
    Mark,
    RepairRun,
    ResumeRun,
    Version,
)
from nbdurable.errors import Conflict, NotebookError, NotFound, NotRestorable, UsageError
from nbdurable.models import DriverKind, HandSet, Run, RunDetail, RunStatus, StepStatus
from nbdurable.security import load_key
from nbdurable.settings import find_project

if TYPE_CHECKING:
    from nbdurable.kernel.foresight import Foreseen
    from nbdurable.notebooks import Prepared

MAX_SAMPLES = 100
_DONE = (StepStatus.COMPLETED, StepStatus.REPLAY)
_ALL = 10_000


@dataclass(frozen=True)
class Change:
    """What would happen: a plan, what is odd about it, and how it is carried out."""

    source: RunDetail
    plan: tuple[Foreseen, ...]
    notes: tuple[str, ...]
    carry_out: Callable[[], Run]


# Each change -----------------------------------------------------------------------------------------------


def fork(
    client: Client,
    typed: str,
    *,
    start: str | None,
    notebook: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    given: Sequence[str] = (),
    output: Path | None = None,
    until: str | None = None,
    tags: tuple[str, ...] = (),
    by: str,
) -> Change:
    """Plan a new run that shares the checkpoints before the step `start` (None: the one at which the run stopped)."""
    from nbdurable.notebooks import check_output, keep

    source = client.call(GET_RUN, ByRun(run_id=typed))
    path, prepared = _version(client, source, notebook, parameters)
    start = _start(source, prepared, start)
    if start is None:
        raise _no_start(source, prepared)
    before = prepared.steps[: prepared.steps.index(start)]
    _check_there(source, before)
    if output is not None:
        output = output.expanduser().absolute()
        check_output(output, path)
    hand_set = _merged(source.hand_set, hand_sets(given, start, by))
    found = manifests(client, source, load_key(client.home))
    kept = {step: found[step] for step in before if step in found and found[step].resume_at is None}
    asked = f"asked for (--from {start})"
    plan = tuple(
        replace(step, reason=asked)
        if step.action == "run" and step.step in found and step.step not in kept
        else step
        for step in _plan(client, source, path, prepared, kept, hand_set, until)
    )
    notes = [*prepared.warnings, *_lost(source, prepared, found), *_unread(prepared, given, start)]

    def carry_out() -> Run:
        question = ForkRun(
            source=source.id,
            forked_at=start,
            share=tuple(kept),
            notebook=str(path),
            kind=DriverKind.HEADLESS,
            snapshot=keep(client.home, prepared),
            parameters=prepared.parameters,
            steps_mode=source.steps_mode,
            output=None if output is None else str(output),
            kernel_name=prepared.kernel_name,
            cwd=source.cwd,
            retries=source.retries,
            on_exhausted=source.on_exhausted,
            timeout_s=source.timeout_s,
            budget=source.budget,
            tags=(*source.tags, *tags),
            steps_total=prepared.steps_total,
            until=until,
            hand_set=hand_set,
        )
        return client.call(FORK_RUN, question)

    return Change(source, plan, tuple(notes), carry_out)


def replay(client: Client, source: RunDetail, parameters: Mapping[str, Any] | None = None) -> Change:
    """Plan a new run of the same version of the notebook, with the same parameters or some edited ones."""
    from nbdurable.notebooks import keep

    if source.snapshot is None:
        raise Conflict(
            f"run {source.short} is interactive and has no snapshot of its notebook: it can't be replayed",
            todo=f"run the notebook as it is now: `nbdurable run {source.notebook}`",
        )
    path, prepared = _version(client, source, None, parameters, snapshot=True)

    def carry_out() -> Run:
        question = ForkRun(
            source=source.id,
            notebook=str(path),
            kind=DriverKind.HEADLESS,
            snapshot=keep(client.home, prepared),
            parameters=prepared.parameters,
            steps_mode=source.steps_mode,
            kernel_name=prepared.kernel_name,
            cwd=source.cwd,
            retries=source.retries,
            on_exhausted=source.on_exhausted,
            timeout_s=source.timeout_s,
            budget=source.budget,
            tags=source.tags,
            steps_total=prepared.steps_total,
            until=source.until,
        )
        return client.call(FORK_RUN, question)

    plan = _plan(client, source, path, prepared, {}, (), source.until)
    return Change(source, plan, prepared.warnings, carry_out)


def repair(
    client: Client,
    typed: str,
    *,
    start: str | None,
    notebook: Path | None,
    given: Sequence[str],
    marked: Sequence[str],
    comment: str,
    by: str,
) -> Change:
    """Plan a change of a run's own past: another version of its notebook, steps that run again, values set by hand."""
    from nbdurable.notebooks import keep

    source = client.call(GET_RUN, ByRun(run_id=typed))
    lifecycle.move(source.status, lifecycle.Happening.REPAIR, run=f"run {source.short}")
    if start is None and notebook is None and not given and not marked:
        raise UsageError(
            "nothing to repair was named",
            todo=f"`--notebook {source.notebook}` takes that file as it is now, `--from STEP` runs steps again, "
            "`--set NAME=JSON` gives a variable a value, `--mark-done STEP` counts a step as done",
        )
    path, prepared = _version(client, source, notebook, None)
    steps = prepared.steps
    aside: tuple[str, ...] = ()
    if start is not None:
        _start(source, prepared, start)
        aside = steps[steps.index(start) :]
    elif source.status is RunStatus.COMPLETED:
        raise UsageError(
            f"run {source.short} is completed: say from which step it runs again",
            todo=f"--from STEP; its steps: {', '.join(steps) or 'none'}",
        )
    place = _start(source, prepared, start)
    if given and place is None:
        raise _no_start(source, prepared)
    marks = _marks(client, source, steps, aside, marked, comment, by)
    _check_there(source, [s for s in steps if s not in aside and s not in marks])
    hand_set = hand_sets(given, place or "", by)
    known = {
        step: manifest
        for step, manifest in manifests(client, source, load_key(client.home)).items()
        if step not in aside
    } | marks
    all_set = _merged(source.hand_set, hand_set)
    plan = [
        replace(step, action="mark")
        if step.step in marks
        else replace(step, reason=f"asked for (--from {start})", cause=None)
        if step.step in aside and step.action == "run"
        else step
        for step in _plan(client, source, path, prepared, known, all_set, source.until)
    ]
    notes = [*prepared.warnings, *_lost(source, prepared, known), *_unread(prepared, given, place)]
    nonce = uuid.uuid4().hex

    def carry_out() -> Run:
        key = load_key(client.home)
        question = RepairRun(
            run_id=source.id,
            by=by,
            nonce=nonce,
            expected_epoch=source.epoch,
            version=_as_version(path, prepared, keep(client.home, prepared)),
            set_aside=tuple(step for step in aside if any(step == one.name for one in source.steps)),
            hand_set=hand_set,
            marks=tuple(
                Mark(step=step, reason=manifest.by_hand, manifest=seal(manifest, key))
                for step, manifest in marks.items()
            ),
        )
        return client.call(REPAIR_RUN, question)

    return Change(source, tuple(plan), tuple(notes), carry_out)


def resume(client: Client, typed: str, *, take_over: bool) -> Change:
    """Plan that a run goes on headless: one that was driven interactively with its notebook as it is now."""
    from nbdurable.notebooks import keep, read_snapshot

    source = client.call(GET_RUN, ByRun(run_id=typed))
    driven = source.driver is not None and source.driver.kind is DriverKind.INTERACTIVE
    if not driven and source.status is not RunStatus.QUEUED:
        lifecycle.move(source.status, lifecycle.Happening.RESUME, run=f"run {source.short}")
    known = manifests(client, source, load_key(client.home))
    if source.kind is DriverKind.HEADLESS:
        nb = read_snapshot(client.home, source)
        plan = _foresee(client, source, Path(source.notebook), nb["cells"], known, source.hand_set)
        question = ResumeRun(run_id=source.id, take_over=take_over)
        return Change(source, plan, (), lambda: client.call(RESUME_RUN, question))
    path, prepared = _version(client, source, None, None)
    plan = _plan(client, source, path, prepared, known, source.hand_set, source.until)
    notes = list(prepared.warnings)
    changed = [step.step for step in plan if step.action == "run" and step.step in known]
    if changed:
        notes.append(
            f"{path.name}, as it is on disk, lets {', '.join(changed)} run again, though the run has "
            f"committed {'it' if len(changed) == 1 else 'them'}: is what you changed in the kernel saved?"
        )

    def carry_out() -> Run:
        version = _as_version(path, prepared, keep(client.home, prepared))
        return client.call(RESUME_RUN, ResumeRun(run_id=source.id, version=version, take_over=take_over))

    return Change(source, plan, tuple(notes), carry_out)


def matching(
    client: Client,
    status: RunStatus | None,
    notebook: Path | None,
    tag: str | None,
    since_s: float | None,
    limit: int,
) -> list[RunDetail]:
    """Return the runs that a bulk replay is about, newest first."""
    wanted = ListRuns(
        status=status,
        notebook=str(notebook.expanduser().absolute()) if notebook else None,
        tag=tag,
        limit=_ALL if since_s is not None else limit,
    )
    runs = client.call(LIST_RUNS, wanted).runs
    if since_s is not None:
        runs = tuple(run for run in runs if run.created_at >= time.time() - since_s)
    return [RunDetail(**dict(run)) for run in runs[:limit]]


# Parts -----------------------------------------------------------------------------------------------------


def _version(
    client: Client,
    source: Run,
    notebook: Path | None,
    parameters: Mapping[str, Any] | None,
    *,
    snapshot: bool = False,
) -> tuple[Path, Prepared]:
    """Return the version of the notebook that will run: an edited file, else the run's own.

    That of a run which was driven interactively is its file as it is now, unless its `snapshot` is asked for.
    """
    from nbdurable.notebooks import prepare, read_snapshot

    values = {**source.parameters, **(parameters or {})}
    path = Path(source.notebook) if notebook is None else notebook.expanduser().absolute()
    nb = None
    if notebook is None and (source.kind is DriverKind.HEADLESS or snapshot):
        nb = read_snapshot(client.home, source)
    elif path.suffix != ".ipynb":
        raise NotebookError(
            f"run {source.short} is of {path}, which is no notebook: it can't run headless",
            todo="name the notebook that has its cells: --notebook NB",
        )
    prepared = prepare(path, values, steps_mode=source.steps_mode, kernel_name=source.kernel_name, nb=nb)
    return path, prepared


def _as_version(path: Path, prepared: Prepared, snapshot: str) -> Version:
    return Version(
        notebook=str(path),
        snapshot=snapshot,
        kernel_name=prepared.kernel_name,
        steps_total=prepared.steps_total,
    )


def _start(source: RunDetail, prepared: Prepared, wanted: str | None) -> str | None:
    """Return the step from which to go: the one asked for, else the first that is not done."""
    if wanted is not None:
        if wanted not in prepared.steps:
            raise NotFound(
                f"the notebook of run {source.short} has no step {wanted!r}",
                todo=f"its steps: {', '.join(prepared.steps) or 'none'}",
            )
        return wanted
    done = {step.name for step in source.steps if step.status in _DONE}
    return next((step for step in prepared.steps if step not in done), None)


def _no_start(source: RunDetail, prepared: Prepared) -> UsageError:
    return UsageError(
        f"every step of run {source.short} is done: say from which one to go",
        todo=f"--from STEP; its steps: {', '.join(prepared.steps) or 'none'}",
    )


def _check_there(source: RunDetail, steps: Sequence[str]) -> None:
    if gone := [step for step in source.steps if step.removed and step.name in steps]:
        raise NotRestorable(
            f"run {source.short} has the checkpoints of {', '.join(step.name for step in gone)} no more: "
            f"{gone[0].removed}",
            todo=f"go from {gone[0].name} or an earlier step (--from), which runs it again",
        )


def hand_sets(given: Sequence[str], step: str, by: str) -> tuple[HandSet, ...]:
    """Return what `--set NAME=JSON` words say; raises UsageError for one that can't be read."""
    found = []
    for word in given:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--set {word!r} is not NAME=JSON", todo="""for example --set 'limit=3'""")
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--set {name}: {text!r} is not JSON: {error}",
                todo=f"""nothing was changed. Text needs its own quotes: --set '{name}="text"'""",
            ) from None
        found.append(HandSet(step=step, name=name, value=value, by=by, at=time.time()))
    return tuple(found)


def _merged(before: Sequence[HandSet], now: Sequence[HandSet]) -> tuple[HandSet, ...]:
    return tuple({(one.step, one.name): one for one in (*before, *now)}.values())


def _no_constant(name: str) -> Any:
    raise ValueError(f"JSON does not have {name}")


def _marks(
    client: Client,
    source: RunDetail,
    steps: Sequence[str],
    aside: Sequence[str],
    marked: Sequence[str],
    comment: str,
    by: str,
) -> dict[str, Manifest]:
    """Return the checkpoints of steps that a person did by hand: without variables, with who and when."""
    done = {step.name for step in source.steps if step.status in _DONE} - set(aside)
    found = {}
    for step in marked:
        if step not in steps:
            raise NotFound(
                f"the notebook of run {source.short} has no step {step!r}",
                todo=f"its steps: {', '.join(steps) or 'none'}",
            )
        if step in done:
            raise UsageError(
                f"step `{step}` of run {source.short} is committed: there is nothing to mark",
                todo=f"`--from {step}` sets its checkpoint aside",
            )
        at = time.time()
        found[step] = Manifest(
            run_id=source.id,
            step=step,
            created_at=at,
            duration_s=0.0,
            code=CodeFacts(source="", digest=""),
            by_hand=f"marked done by {by}, {time.strftime('%Y-%m-%d %H:%M', time.localtime(at))}"
            + (f": {comment}" if comment else ""),
        )
    return found


def _plan(
    client: Client,
    source: RunDetail,
    path: Path,
    prepared: Prepared,
    known: Mapping[str, Manifest],
    hand_set: Sequence[HandSet],
    until: str | None,
) -> tuple[Foreseen, ...]:
    cells = json.loads(prepared.snapshot)["cells"]
    plan = _foresee(client, source, path, cells, known, hand_set)
    last = next((number for number, step in enumerate(plan, 1) if step.step == until), None)
    return plan[:last]


def _foresee(
    client: Client,
    source: RunDetail,
    path: Path,
    cells: Sequence[Mapping[str, object]],
    known: Mapping[str, Manifest],
    hand_set: Sequence[HandSet],
) -> tuple[Foreseen, ...]:
    """Return what would happen to each step, in the words of a change: what is restored is kept."""
    from nbdurable.kernel.foresight import foresee, parse_cells

    found = foresee(
        parse_cells(cells),
        known,
        find_project(path),
        Watcher(path.parent, load_key(client.home)),
        every_cell=source.steps_mode == "all",
        hand_set=hand_set,
    )
    return tuple(replace(step, action="keep") if step.action == "restore" else step for step in found)


def _lost(source: RunDetail, prepared: Prepared, found: Mapping[str, Manifest]) -> list[str]:
    """Say which committed steps the notebook does not have any more, and what became of their cells."""
    from nbdurable.kernel.foresight import parse_cells

    cells = parse_cells(json.loads(prepared.snapshot)["cells"])
    now = {cell.id: cell.options.name for cell in cells if cell.options is not None}
    notes = []
    for step in source.steps:
        if step.name in found and step.name not in prepared.steps:
            other = now.get(step.cell_id or "")
            renamed = f"; its cell is the step `{other}` now, which is another step and runs" if other else ""
            notes.append(
                f"the notebook has no step `{step.name}` any more: what it left is not kept{renamed}"
            )
    return notes


def _unread(prepared: Prepared, given: Sequence[str], start: str | None) -> list[str]:
    """Say which names that are set by hand no cell from `start` on reads."""
    from nbdurable.kernel.foresight import names_read, parse_cells

    names = {word.partition("=")[0] for word in given}
    if not names:
        return []
    cells = parse_cells(json.loads(prepared.snapshot)["cells"])
    unread = sorted(names - names_read(cells, start))
    return [f"no cell from `{start}` on reads `{name}`, which is set by hand" for name in unread]
