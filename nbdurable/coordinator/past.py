"""Changing the past: forks, repairs, and runs that change hands between a kernel and the workers.

Owns that each is one transaction which history tells, and that nothing is taken out of history: a fork has events of
its own that carry the checkpoints it shares, so that it outlives the run it comes from; a repair sets checkpoints
aside. What is kept and what runs is decided by who asks, who has shown it to a person; never looks into a manifest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from nbdurable import contract, processes
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Core, label
from nbdurable.coordinator.creation import Creation
from nbdurable.coordinator.fold import Fold, Kind
from nbdurable.coordinator.state import Live
from nbdurable.errors import Conflict, LeaseHeld, NotRestorable, UsageError
from nbdurable.lifecycle import Happening
from nbdurable.models import DriverKind, Run, RunStatus, SignedManifest, StepStatus
from nbdurable.store.port import NewEvent
from nbdurable.telemetry import fault_point

_BATCH_BYTES = 8 << 20  # of manifests in one submission: the store refuses more than 32 MB


class Past:
    """What is asked about the past of runs."""

    def __init__(self, core: Core, creation: Creation) -> None:
        self._core, self._creation = core, creation

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.FORK_RUN: self.fork_run,
            contract.REPAIR_RUN: self.repair_run,
            contract.RESUME_RUN: self.resume_run,
        }

    # Forks -------------------------------------------------------------------------------------------------

    async def fork_run(self, wanted: contract.ForkRun) -> Run:
        if wanted.kind is not DriverKind.HEADLESS or wanted.snapshot is None:
            raise UsageError("a fork is headless, and needs a snapshot", todo="write it as a blob first")
        source_id = await self._core.resolve(wanted.source)
        async with self._core.creating:
            if wanted.idempotency_key is not None:
                known = await self._creation.known([wanted.idempotency_key])
                if (first := known.get(wanted.idempotency_key)) is not None:
                    return first
            async with self._core.locked(source_id) as source:  # no clean-up gets in between
                return await self._fork(source, wanted)

    async def _fork(self, source: Live, wanted: contract.ForkRun) -> Run:
        origin = source.run
        kept, result = await self._shared(source, wanted.share)
        how = f"forked from run {origin.short} at `{wanted.forked_at}`" if wanted.forked_at else ""
        how = how or f"replay of run {origin.short}"
        made = self._creation.new(wanted, wanted.idempotency_key).live.run
        reason = f"{how}; waits for a worker"
        run = made.model_copy(update={"reason": reason, "forked_from": origin.id, "result": result})
        created = self._core.event(
            run, Kind.RUN_CREATED, f"created; {run.reason}", source=origin.id, step=wanted.forked_at
        )
        why = f"shared with run {origin.short}"
        events = [
            self._kept(run, Kind.STEP_SHARED, step, why, manifest, **data) for step, manifest, data in kept
        ]
        live = Live(run)
        async with live.lock:
            self._core.runs[run.id] = live
            try:
                *first, last = _batches([*events, created])
                for batch in first:  # without the run's row nobody sees them
                    await self._core.commit(live, batch)
                await self._core.commit(live, last, run=run)
            except BaseException:
                del self._core.runs[run.id]
                raise
        fault_point("past-changed")
        return run

    async def _shared(
        self, source: Live, share: tuple[str, ...]
    ) -> tuple[list[tuple[str, SignedManifest, dict[str, Any]]], Any]:
        """Return the checkpoints that a fork keeps, and the run's result where only they can have set it."""
        if not share:
            return [], None
        run, fold = source.run, await self._core.fold(source)
        _check_there(run, fold, share, "forked from here", todo="fork from an earlier step (--from)")
        found = {one.step: one for one in await self._core.read(self._core.store.checkpoints, run.id)}
        kept = []
        for step in share:
            state, checkpoint = fold.get(step), found.get(step)
            if state is None or checkpoint is None or state.checkpoint is not StepStatus.COMPLETED:
                raise Conflict(
                    f"step `{step}` of run {run.short} is not committed: a fork can't share it",
                    todo=f"`nbdurable show {run.short}` lists its steps",
                )
            data = {"variables": state.variables, "cell_id": state.cell_id, "calls": state.step().calls}
            kept.append((step, checkpoint.manifest, data))
        last = max(found[step].seq for step in share)
        later = [e async for e in self._core.history(run.id) if e.kind == Kind.RESULT_SET and e.seq > last]
        return kept, None if later else run.result

    def _kept(
        self, run: Run, kind: Kind, step: str, reason: str, manifest: SignedManifest, **data: Any
    ) -> NewEvent:
        data = {"variables": [], "signature": manifest.signature, "reason": reason, **data}
        return self._core.step_event(run, kind, step, f"{step}: {reason}", data, manifest)

    # Repairs -----------------------------------------------------------------------------------------------

    async def repair_run(self, wanted: contract.RepairRun) -> Run:
        async with self._core.locked(await self._core.resolve(wanted.run_id)) as live:
            run = live.run
            async for event in self._core.history(run.id):
                if event.kind == Kind.RUN_REPAIRED and event.data.get("nonce") == wanted.nonce:
                    return run  # asked for before
            changes, versions = _renewed(run, wanted.version)
            set_ = {(one.step, one.name): one for one in (*run.hand_set, *wanted.hand_set)}
            reason = f"{_told(wanted, versions)}; waits for a worker"
            after, _ = self._core.moved(
                run,
                Happening.REPAIR,
                reason,
                hand_set=tuple(set_.values()),
                kind=DriverKind.HEADLESS,
                **changes,
            )
            if run.epoch != wanted.expected_epoch:
                raise Conflict(
                    f"run {run.short} went on since its repair was planned", todo="look at the plan again"
                )
            if after.snapshot is None:
                raise _no_snapshot(run)
            fold = await self._core.fold(live)
            again = {*wanted.set_aside, *(mark.step for mark in wanted.marks)}
            staying = [step.name for step in fold.steps() if step.name not in again]
            _check_there(run, fold, staying, "repaired so", todo="repair it from an earlier step (--from)")
            why = f"asked for by the repair of {wanted.by}"
            events = [
                self._core.step_event(
                    after, Kind.STEP_SET_ASIDE, step, f"{step}: set aside ({why})", {"reason": why}
                )
                for step in wanted.set_aside
                if fold.get(step) is not None
            ]
            events += [
                self._kept(after, Kind.STEP_MARKED, mark.step, mark.reason, mark.manifest)
                for mark in wanted.marks
            ]
            data = {
                "nonce": wanted.nonce,
                "set": [one.model_dump(mode="json") for one in wanted.hand_set],
                **versions,
            }
            events.append(self._core.event(after, Kind.RUN_REPAIRED, reason, **data))
            await self._core.commit(live, events, run=after)
            fault_point("past-changed")
            return after

    # Changing hands ----------------------------------------------------------------------------------------

    async def resume_run(self, wanted: contract.ResumeRun) -> Run:
        async with self._core.locked(await self._core.resolve(wanted.run_id)) as live:
            run, driver = live.run, live.run.driver
            reason = "resumed by hand; waits for a worker"
            if run.status is RunStatus.QUEUED and run.reason == reason:
                return run  # asked for before
            happening, kind = Happening.RESUME, Kind.RUN_RESUMED
            if driver is not None and driver.kind is DriverKind.INTERACTIVE:
                happening, kind = Happening.HAND_OVER, Kind.RUN_HANDED_OVER
                if processes.is_alive(driver.process) and not wanted.take_over:
                    raise LeaseHeld(
                        f"run {run.short} is driven by {label(driver)} now",
                        todo="`%durable release` there gives it back; "
                        f"`nbdurable resume {run.short} --take-over` takes it from that kernel, which is told so",
                    )
            changes, versions = _renewed(run, wanted.version)
            resumed, _ = self._core.moved(run, happening, reason, kind=DriverKind.HEADLESS, **changes)
            if resumed.snapshot is None or (run.kind is DriverKind.INTERACTIVE and wanted.version is None):
                raise _no_snapshot(run)
            fold = await self._core.fold(live)
            names = [step.name for step in fold.steps()]
            _check_there(run, fold, names, "resumed", todo=f"start a new run of {run.notebook}")
            await self._core.commit(live, [self._core.event(resumed, kind, reason, **versions)], run=resumed)
            fault_point("past-changed")
            return resumed


def _renewed(run: Run, version: contract.Version | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what another version of its notebook changes of a run, and what history tells of it: both digests."""
    if version is None or (version.snapshot, version.notebook) == (run.snapshot, run.notebook):
        return {}, {}
    changes = {name: value for name, value in version if value is not None}
    earlier = (run.snapshot,) if run.snapshot not in (None, version.snapshot) else ()
    changes["earlier_snapshots"] = (*run.earlier_snapshots, *earlier)
    return changes, {"before": run.snapshot, "after": version.snapshot}


def _told(wanted: contract.RepairRun, versions: dict[str, Any]) -> str:
    """Say in one sentence what a repair changed."""
    told = []
    if versions:
        before = f"{versions['before'][:8]} → " if versions["before"] else ""
        told.append(f"its notebook is another version ({before}{versions['after'][:8]})")
    if wanted.set_aside:
        told.append(f"again from {wanted.set_aside[0]}")
    told += [f"{one.name} set by hand before {one.step}" for one in wanted.hand_set]
    told += [f"{mark.step} marked done" for mark in wanted.marks]
    return f"repaired by {wanted.by}" + (f": {', '.join(told)}" if told else "")


def _check_there(run: Run, fold: Fold, steps: Iterable[str], what: str, *, todo: str) -> None:
    """Raise NotRestorable where the checkpoint of one of these steps was removed."""
    states = [state for step in steps if (state := fold.get(step)) is not None]
    if gone := [state.name for state in states if state.removed]:
        raise NotRestorable(
            f"run {run.short} can't be {what}: the checkpoints of {', '.join(gone)} were removed by a clean-up",
            todo=todo,
        )


def _no_snapshot(run: Run) -> Conflict:
    return Conflict(
        f"run {run.short} is interactive and has no snapshot of its notebook as it is now: it can't go on headless so",
        todo=f"`nbdurable resume {run.short}` takes one; or open {run.notebook} and load the extension, "
        "which takes the run up",
    )


def _batches(events: list[NewEvent]) -> Iterator[list[NewEvent]]:
    """Yield events in pieces that the store takes at once; the last one has the last event."""
    batch: list[NewEvent] = []
    size = 0
    for event in events:
        added = len(event.manifest.text) if event.manifest else 0
        if batch and size + added > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += added
    yield batch
