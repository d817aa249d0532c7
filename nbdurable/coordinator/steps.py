"""Steps: decisions with their reason, commits, failures.

Owns that a commit is one event, and that a repeated one gets the first answer; never looks into a manifest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nbdurable import contract
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Core
from nbdurable.coordinator.fold import COMMITS, Kind, StepState
from nbdurable.coordinator.state import Live
from nbdurable.errors import NotFound, NotRestorable
from nbdurable.models import Attempt, Run, Wait, WaitKind, WaitStatus
from nbdurable.policies import span

RETRY = "retry:"  # how the key of a timer begins that stands between two tries of a step


class Steps:
    """What drivers say about steps."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.BEGIN_STEP: self.begin_step,
            contract.COMMIT_STEP: self.commit_step,
            contract.FAIL_STEP: self.fail_step,
            contract.CHECKPOINTS: self.checkpoints,
            contract.GET_STEP: self.get_step,
            contract.STATE: self.state,
        }

    async def begin_step(self, wanted: contract.BeginStep) -> contract.Begun:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            fold = await self._core.fold(live)
            state = fold.get(wanted.step)
            tried = state.tried if state is not None and wanted.goes_on else ()
            reason = wanted.reason + (_after(tried[-1]) if tried and wanted.action != "restore" else "")
            data: dict[str, Any] = {"reason": reason, "cell_id": wanted.cell_id}
            if wanted.goes_on and (due_in_s := self._due_in_s(live, wanted.step)) is not None:
                return contract.Begun(attempt=0, seq=0, failed=tried, again_in_s=due_in_s)
            if wanted.action == "restore":
                attempt, kind = (
                    (state.attempts[-1].number if state and state.attempts else 0),
                    Kind.STEP_RESTORED,
                )
            else:
                running = state.running if state is not None else None
                if state and running and running.epoch == wanted.epoch and state.reason == reason:
                    seq = state.started.get(running.number, 0)
                    calls = len(state.calls)
                    return contract.Begun(attempt=running.number, seq=seq, calls=calls, failed=tried)
                attempt, kind = (state.next_attempt if state is not None else 1), Kind.STEP_STARTED
                data["goes_on"] = wanted.goes_on
            sentence = f"{wanted.step}: {wanted.action} ({reason})"
            data |= {"attempt": attempt} | ({"fresh": True} if wanted.fresh else {})
            event = self._core.step_event(live.run, kind, wanted.step, sentence, data)
            obsolete = []
            # nobody comes back to the gates of the body that ran before
            if wanted.action == "execute" and not tried:
                open_ones = (wait for wait in self._core.open_waits(live.run.id) if wait.step == wanted.step)
                obsolete = [w.model_copy(update={"status": WaitStatus.CANCELLED}) for w in open_ones]
            (seq,) = await self._core.commit(live, (event,), waits=obsolete)
            calls = 0 if state is None or wanted.fresh else len(state.calls)
            return contract.Begun(attempt=attempt, seq=seq, calls=calls, failed=tried)

    def _due_in_s(self, live: Live, step: str) -> float | None:
        """Return when the next try of a step is due, None where nothing keeps it from beginning now."""
        timers = [w for w in self._core.open_waits(live.run.id) if w.step == step and w.key.startswith(RETRY)]
        return max((max(0.0, (w.due_at or 0.0) - self._core.clock.now()) for w in timers), default=None)

    async def commit_step(self, wanted: contract.CommitStep) -> contract.Committed:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            state = await self._state(live, wanted.step)
            if state is not None and (known := state.committed.get(wanted.manifest.signature)):
                return contract.Committed(seq=known)
            data = {
                "attempt": wanted.attempt,
                "status": wanted.status,
                "variables": [variable.model_dump(mode="json") for variable in wanted.variables],
                "line": wanted.line,
                "signature": wanted.manifest.signature,
                "calls": wanted.calls,
                "replayed": wanted.replayed,
            }
            sentence = f"{wanted.step}: {wanted.sentence or wanted.status}"
            event = self._core.step_event(
                live.run, COMMITS[wanted.status][0], wanted.step, sentence, data, manifest=wanted.manifest
            )
            (seq,) = await self._core.commit(live, (event,))
            return contract.Committed(seq=seq)

    async def fail_step(self, wanted: contract.FailStep) -> contract.Nothing:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            state = await self._state(live, wanted.step)
            known = (
                {attempt.number: attempt.status for attempt in state.attempts} if state is not None else {}
            )
            if known.get(wanted.attempt) != "failed":
                error = wanted.error
                data = {
                    "attempt": wanted.attempt,
                    "error": error.model_dump(mode="json"),
                    "replayed": wanted.replayed,
                    "again_in_s": wanted.again_in_s,
                    "pauses": wanted.pauses,
                }
                then = f"; {wanted.sentence}" if wanted.sentence else ""
                sentence = f"{wanted.step}: failed with {error.name}: {error.message[:200]}{then}"
                events = [self._core.step_event(live.run, Kind.STEP_FAILED, wanted.step, sentence, data)]
                waits: list[Wait] = []
                if wanted.gives_back and wanted.again_in_s is not None:
                    timer = await self._retry_timer(wanted.run_id, wanted, wanted.again_in_s)
                    about = {"wait_id": timer.id, "key": timer.key}
                    said = f"waits {span(wanted.again_in_s)}: {timer.title}"
                    events.append(self._core.step_event(live.run, Kind.WAIT_OPENED, wanted.step, said, about))
                    waits.append(timer)
                await self._core.commit(live, events, waits=waits)
        return contract.Nothing()

    async def _retry_timer(self, run_id: str, wanted: contract.FailStep, again_in_s: float) -> Wait:
        at = self._core.clock.now()
        return Wait(
            id=await self._core.new_wait_id(),
            run_id=run_id,
            key=f"{RETRY}{wanted.step}:{wanted.attempt}",
            kind=WaitKind.TIMER,
            title=f"the next try of {wanted.step}",
            step=wanted.step,
            created_at=at,
            due_at=at + again_in_s,
        )

    async def _state(self, live: Live, step: str) -> StepState | None:
        return (await self._core.fold(live)).get(step)

    async def checkpoints(self, wanted: contract.ByRun) -> contract.Checkpoints:
        run_id = await self._core.resolve(wanted.run_id)
        return contract.Checkpoints(
            checkpoints=tuple(await self._core.read(self._core.store.checkpoints, run_id))
        )

    async def state(self, wanted: contract.ReadState) -> contract.State:
        run = await self._core.current(wanted.run_id)
        until = None
        if wanted.step is None:
            gone = next((step for step in (await self._core.read_fold(run.id)).steps() if step.removed), None)
            if gone is not None:
                raise _removed(run, gone.name, gone.removed)
        else:
            found = await self._known(run, wanted.step)
            until = found.checkpoint_seq
            if until is None:
                raise NotRestorable(
                    f"step `{wanted.step}` of run {run.short} has no checkpoint: it is {found.status}",
                    todo=f"`nbdurable show {run.short}` lists what each step left",
                )
            if found.removed:
                raise _removed(run, wanted.step, found.removed)
        checkpoints = await self._core.read(self._core.store.checkpoints, run.id, until)
        return contract.State(run=run, checkpoints=tuple(checkpoints))

    async def _known(self, run: Run, step: str) -> StepState:
        live = self._core.runs.get(run.id)
        fold = live.fold if live is not None and live.fold is not None else await self._core.read_fold(run.id)
        state = fold.get(step)
        if state is None:
            names = ", ".join(step.name for step in fold.steps()) or "none yet"
            raise NotFound(f"run {run.short} has no step {step!r}", todo=f"its steps: {names}")
        return state

    async def get_step(self, wanted: contract.ReadStep) -> contract.StepDetail:
        run = await self._core.current(wanted.run_id)
        state = await self._known(run, wanted.step)
        checkpoint = await self._core.read(self._core.store.checkpoint, run.id, wanted.step)
        return contract.StepDetail(step=state.step(), checkpoint=checkpoint)


def _after(failed: Attempt) -> str:
    """Say of a try that it follows a failed one."""
    what = failed.error.name if failed.error is not None else "a failure"
    return f"; tried again after {what}, waited {span(failed.again_in_s or 0.0)}"


def _removed(run: Run, step: str, why: str) -> NotRestorable:
    return NotRestorable(
        f"step `{step}` of run {run.short} can't be restored: {why}", todo="run the notebook again"
    )
