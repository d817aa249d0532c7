"""Who drives a run: leases, heartbeats, ends, and what the loss of a driver means.

Owns the rules of guarantee 4: one driver at a time, and nothing of a former one works on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from nbdurable import contract, lifecycle, processes
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Core, active_s, fence, hold_deadline, label, log
from nbdurable.coordinator.fold import Kind
from nbdurable.coordinator.state import Lease, Live
from nbdurable.errors import Fenced, LeaseHeld
from nbdurable.lifecycle import Happening
from nbdurable.models import DriverKind, ErrorInfo, ProcessIdentity, Run, RunStatus
from nbdurable.policies import Retry, is_useless, span

_END_GRACE_S = 1.0  # what orphans of a lost driver get to end by themselves

_ENDINGS: dict[str, tuple[Happening, Kind]] = {
    "complete": (Happening.COMPLETE, Kind.RUN_COMPLETED),
    "fail": (Happening.FAIL, Kind.RUN_FAILED),
    "suspend": (Happening.SUSPEND, Kind.RUN_SUSPENDED),
    "release": (Happening.RELEASE, Kind.RUN_RELEASED),
    "cancel": (Happening.CANCEL, Kind.RUN_CANCELLED),
    "leave": (Happening.LEAVE, Kind.RUN_LEFT),
    "pause": (Happening.PAUSE, Kind.RUN_PAUSED),
    "time_out": (Happening.TIME_OUT, Kind.RUN_TIMED_OUT),
}
_LOSSES = {
    Happening.LOSE: Kind.RUN_LOST,
    Happening.LEAVE: Kind.RUN_LEFT,
    Happening.POISON: Kind.RUN_POISONED,
}


class Driving:
    """What drivers say, and what becomes of runs whose driver says nothing any more."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.LEASE_RUN: self.lease_run,
            contract.LEASE_WORK: self.lease_work,
            contract.HEARTBEAT: self.heartbeat,
            contract.END_LEASE: self.end_lease,
        }

    async def lease_run(self, wanted: contract.LeaseRun) -> Run:
        async with self._core.locked(await self._core.resolve(wanted.run_id)) as live:
            run, driver, reason = live.run, wanted.driver, f"{label(wanted.driver)} drives it"
            happening, kind = Happening.ATTACH if wanted.attach else Happening.LEASE, Kind.RUN_LEASED
            if run.status is RunStatus.RUNNING and (former := run.driver) is not None:
                happening, kind = Happening.TAKE_OVER, Kind.RUN_TAKEN_OVER
                if former.process == driver.process:
                    reason += " on"
                elif processes.is_alive(former.process) and not wanted.take_over:
                    raise LeaseHeld(
                        f"run {run.short} is driven by {label(former)} now",
                        todo="end that kernel, take the run over (it is told so), or start another run",
                    )
                else:
                    reason += f"; it took over from {label(former)}"
                    if former.kind is DriverKind.HEADLESS:
                        await self._end_processes(live)
            notebook = wanted.notebook or run.notebook
            leased, waits = self._core.moved(
                run, happening, reason, driver=driver, notebook=notebook, kind=DriverKind.INTERACTIVE
            )
            await self._core.commit(live, [self._core.event(leased, kind, reason)], run=leased, waits=waits)
            return leased

    async def lease_work(self, wanted: contract.LeaseWork) -> contract.Work:
        worker = wanted.driver.process
        self._core.workers.polled(worker)
        deadline = hold_deadline(wanted.hold_s)
        while True:
            queued = self._core.queued.next()
            leased: list[Run] = []
            if not self._core.stopping and processes.is_alive(worker):
                leased = await self._hand_out(wanted)
            if leased:
                return contract.Work(runs=tuple(leased))
            idle = self._core.workers.idle_s(worker) >= self._core.settings.idle_exit_s
            if (idle or self._core.stopping) and not self._leased_to(worker):
                self._core.workers.dismissed(worker)
                return contract.Work(runs=(), stop=True)
            if not await self._core.hold(
                queued, deadline, at_most_s=max(0.05, self._core.settings.idle_exit_s)
            ):
                return contract.Work(runs=())

    def _leased_to(self, worker: ProcessIdentity) -> list[str]:
        return [
            run_id
            for run_id, live in self._core.runs.items()
            if live.lease is not None and live.lease.driver.process == worker
        ]

    async def _hand_out(self, wanted: contract.LeaseWork) -> list[Run]:
        """Lease queued runs to a worker, up to its slots; those that it never heard of come first."""
        leased: list[Run] = []
        worker, reason = wanted.driver.process, f"{label(wanted.driver)} executes it"
        if wanted.holding is not None:
            unheard = [run_id for run_id in self._leased_to(worker) if run_id not in wanted.holding]
            for run_id in unheard[: wanted.slots]:
                async with self._core.locked(run_id) as live:
                    if live.lease is not None and live.lease.driver.process == worker:
                        move, kind = Happening.TAKE_OVER, Kind.RUN_TAKEN_OVER
                        leased.append(await self._core.move(live, move, kind, reason, driver=wanted.driver))
        while len(leased) < wanted.slots and self._core.queue:
            run_id = next(iter(self._core.queue))
            del self._core.queue[run_id]  # nobody else takes it while this is on its way to the disk
            async with self._core.locked(run_id) as live:
                if live.run.status is not RunStatus.QUEUED:
                    continue
                try:
                    run = await self._core.move(
                        live, Happening.LEASE, Kind.RUN_LEASED, reason, driver=wanted.driver
                    )
                except BaseException:
                    self._core.queue = {run_id: None, **self._core.queue}
                    if leased:
                        break
                    raise
                leased.append(run)
        return leased

    async def heartbeat(self, wanted: contract.Heartbeat) -> contract.Orders:
        live = self._core.runs.get(wanted.run_id)
        if live is None or live.lease is None or live.run.epoch != wanted.epoch:
            fence(await self._core.current(wanted.run_id), wanted.epoch)
        elif live.run.status is RunStatus.RUNNING:
            live.lease.beat = self._core.clock.elapsed()
            live.lease.processes = wanted.processes
            return contract.Orders(cancel=live.run.cancel_requested, time_out=live.lease.timed_out)
        return contract.Orders()

    async def end_lease(self, wanted: contract.EndLease) -> Run:
        async with self._core.locked(await self._core.resolve(wanted.run_id)) as live:
            run = live.run
            try:
                fence(run, wanted.epoch)
            except Fenced:
                if await self._ended_before(wanted):
                    return run
                raise
            if wanted.how == "lose":
                return await self._lose(live, wanted.reason)
            if run.cancel_requested and wanted.how in ("suspend", "pause", "release"):
                return await self._cancelled(live, "cancelled", how=wanted.how)
            if (
                live.lease is not None
                and live.lease.timed_out
                and wanted.how in ("suspend", "pause", "release", "fail")
            ):
                return await self._timed_out(live, how=wanted.how)
            happening, kind = _ENDINGS[wanted.how]
            reason = wanted.reason
            changes: dict[str, Any] = {}
            if happening is Happening.FAIL:
                happening, kind, reason, changes = await self.after_failure(live, reason, wanted.error)
            after, waits = self._core.moved(run, happening, reason, error=wanted.error, **changes)
            events = [self._core.event(after, kind, reason, how=wanted.how)]
            if happening is Happening.SUSPEND and not self._core.open_waits(run.id):
                reason = "what it waited for was there already; waits for a worker"
                after, _ = self._core.moved(after, Happening.WAKE, reason)
                events.append(self._core.event(after, Kind.RUN_WOKEN, reason))
            await self._core.commit(live, events, run=after, waits=waits)
            return after

    async def after_failure(
        self, live: Live, reason: str, error: ErrorInfo | None
    ) -> tuple[Happening, Kind, str, dict[str, Any]]:
        """Say what a failure means for a run: whether it is begun again, or paused, or has failed."""
        run, spent = live.run, "its attempts are spent"
        pauses = (await self._core.fold(live)).pauses
        if run.retries and not pauses:
            failures = run.failures + 1
            name = error.name if error is not None else ""
            if failures <= run.retries and not is_useless(name):
                wait_s = Retry.of(run.retries).wait_s(failures, self._core.draw())
                begins_at = self._core.clock.now() + wait_s
                tries = f"attempt {failures} of {run.retries + 1}"
                reason = f"{reason} ({tries}); begins again in {span(wait_s)}"
                changes = {"failures": failures, "begins_at": begins_at}
                return Happening.RETRY, Kind.RUN_RETRIED, reason, changes
            spent = f"its {run.retries + 1} attempts are spent"
            pauses = run.on_exhausted == "pause" and failures > run.retries
        if pauses:
            reason = f"{reason}; {spent}, `nbdurable resume {run.short}` tries it again"
            return Happening.PAUSE, Kind.RUN_PAUSED, reason, {}
        return Happening.FAIL, Kind.RUN_FAILED, reason, {}

    async def due(self, run_id: str) -> None:
        """Queue a run whose delay is over."""
        async with self._core.locked(run_id) as live:
            if live.run.status is RunStatus.DELAYED:
                reason = "its delay is over; waits for a worker"
                await self._core.move(live, Happening.DUE, Kind.RUN_DUE, reason, begins_at=None)

    async def expire(self, run_id: str) -> None:
        """End a run that nobody has begun in time."""
        async with self._core.locked(run_id) as live:
            run = live.run
            if run_id in self._core.expiring:
                reason = (
                    f"nobody had begun it by its time to live; `nbdurable resume {run.short}` queues it again"
                )
                await self._core.move(live, Happening.EXPIRE, Kind.RUN_EXPIRED, reason)

    async def _timed_out(self, live: Live, **data: Any) -> Run:
        reason = f"it was driven for the {span(live.run.timeout_s or 0.0)} that it may be"
        return await self._core.move(live, Happening.TIME_OUT, Kind.RUN_TIMED_OUT, reason, data=data)

    async def _ended_before(self, wanted: contract.EndLease) -> bool:
        """Tell whether this very end was recorded before, and only its answer was lost."""
        async for event in self._core.history(wanted.run_id):
            if event.epoch == wanted.epoch and event.data.get("how") == wanted.how:
                return True
        return False

    async def _lose(self, live: Live, what: str) -> Run:
        """Do what the death of its driver means for a run that is held."""
        await self._end_processes(live)
        run = live.run
        if run.cancel_requested:
            return await self._cancelled(live, f"cancelled; {what}", how="lose")
        if live.lease is not None and live.lease.timed_out:
            return await self._timed_out(live, how="lose")
        happening = lifecycle.loss(run.driver.kind if run.driver else run.kind, run.recoveries)
        if happening is Happening.LOSE:
            reason = f"{what}; recovered for the {_ordinal(run.recoveries + 1)} time"
        elif happening is Happening.LEAVE:
            reason = f"{what}; open the notebook again and it goes on"
        else:
            reason = f"{what}; given up after {run.recoveries} recoveries, `nbdurable resume` tries it again"
        return await self._core.move(live, happening, _LOSSES[happening], reason, data={"how": "lose"})

    async def _cancelled(self, live: Live, reason: str, **data: Any) -> Run:
        return await self._core.move(live, Happening.CANCEL, Kind.RUN_CANCELLED, reason, data=data)

    async def _end_processes(self, live: Live) -> None:
        """End what a driver left behind, so that nothing of it works on when the next one begins."""
        for process in live.lease.processes if live.lease is not None else ():
            await asyncio.to_thread(processes.end_tree, process, _END_GRACE_S)

    async def look_after(self, run_id: str, lease: Lease, epoch: int, elapsed: float) -> None:
        """Recover a run whose driver is dead, and end one that was cancelled and goes on for too long."""
        what = self._death(lease, elapsed)
        run = self._core.runs[run_id].run
        if run.timeout_s is not None and lease.cancel_by is None and lease.driver.kind is DriverKind.HEADLESS:
            lease.timed_out = active_s(run, self._core.clock.now()) >= run.timeout_s
            if lease.timed_out:
                lease.cancel_by = self._core.cancel_deadline()
        overdue = lease.cancel_by is not None and elapsed >= lease.cancel_by
        if what is None and not overdue:
            return
        async with self._core.locked(run_id) as live:
            if live.lease is not lease or live.run.epoch != epoch:
                return
            if what is not None:
                await self._lose(live, what)
                log.warning("run %s: %s", run_id, what)
            elif lease.timed_out and not live.run.cancel_requested:
                await self._end_processes(live)
                await self._timed_out(live)
            else:
                await self._end_processes(live)
                await self._cancelled(
                    live, "cancelled; its worker did not stop it in time, so its processes were ended"
                )

    def _death(self, lease: Lease, elapsed: float) -> str | None:
        """Say how a driver is known to be dead, or None.

        A kernel of this host is watched by its process alone: it may be busy for long without a sign of life.
        A worker is not, so its silence counts as well.
        """
        driver, silent_s = lease.driver, elapsed - lease.beat
        if not processes.is_alive(driver.process):
            return f"its {label(driver)} died"
        watched = processes.is_local(driver.process) and driver.kind is DriverKind.INTERACTIVE
        if not watched and silent_s > self._core.settings.lease_s:
            return f"its {label(driver)} was not heard of for {silent_s:.0f} s"
        return None

    async def tell_trouble(self) -> None:
        """Say in the queued runs' reason what keeps workers from living, once."""
        trouble = self._core.workers.trouble
        if trouble is None:
            return
        reason = f"waits for a worker: {trouble}"
        for run_id in list(self._core.queue):
            async with self._core.locked(run_id) as live:
                if live.run.status is RunStatus.QUEUED and live.run.reason != reason:
                    run = live.run.model_copy(update={"reason": reason})
                    await self._core.commit(live, [self._core.event(run, Kind.RUN_DELAYED, reason)], run=run)


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
