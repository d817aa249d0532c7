"""What the coordinator does: answers each question of the contract, and acts when time passes (`tick`).

Owns the state of open runs in memory, rebuilt from the store at start. Every move is checked, made durable
with the sentence that tells why, then applied to memory, then answered. Knows nothing of HTTP, and never
imports the runner.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from nbdurable import __version__, contract, lifecycle, processes
from nbdurable.contract import Endpoint
from nbdurable.coordinator.fold import COMMITS, Fold, Kind, StepState
from nbdurable.coordinator.names import as_run_id, as_wait_id, new_run_id, new_wait_id
from nbdurable.coordinator.state import Clock, Lease, Live, Signal, SystemClock
from nbdurable.coordinator.workers import WorkerPool
from nbdurable.errors import (
    AlreadyAnswered,
    Conflict,
    Fenced,
    LeaseHeld,
    NotFound,
    UsageError,
)
from nbdurable.lifecycle import Effect, Happening
from nbdurable.models import (
    Driver,
    DriverKind,
    Event,
    ProcessIdentity,
    Run,
    RunDetail,
    RunStatus,
    SignedManifest,
    Wait,
    WaitAnswer,
    WaitKind,
    WaitStatus,
)
from nbdurable.settings import Home, Settings
from nbdurable.store.port import Changes, NewEvent, Store

T = TypeVar("T")

KEY_LIFE_S = 30 * 86_400.0  # how long an idempotency key returns the first run
_FORCE_S = 5.0  # beyond `cancel_grace_s`, after which the coordinator itself ends a cancelled run's processes
_END_GRACE_S = 1.0  # what orphans of a lost driver get to end by themselves
_PAGE = 1000
_ALL = 1_000_000_000

_log = logging.getLogger("nbdurable.coordinator")

_ENDINGS: dict[str, tuple[Happening, Kind]] = {
    "complete": (Happening.COMPLETE, Kind.RUN_COMPLETED),
    "fail": (Happening.FAIL, Kind.RUN_FAILED),
    "suspend": (Happening.SUSPEND, Kind.RUN_SUSPENDED),
    "release": (Happening.RELEASE, Kind.RUN_RELEASED),
    "cancel": (Happening.CANCEL, Kind.RUN_CANCELLED),
    "leave": (Happening.LEAVE, Kind.RUN_LEFT),
}
_LOSSES = {
    Happening.LOSE: Kind.RUN_LOST,
    Happening.LEAVE: Kind.RUN_LEFT,
    Happening.POISON: Kind.RUN_POISONED,
}


class Engine:
    """The coordinator without its HTTP. All methods run on one event loop.

    `clock`: injected in tests. `workers`: None where runs are only taken by workers from elsewhere.
    `on_shutdown`: called when a client asks the coordinator to end.
    """

    def __init__(
        self,
        store: Store,
        home: Home,
        settings: Settings,
        *,
        clock: Clock | None = None,
        workers: WorkerPool | None = None,
        on_shutdown: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._home = home
        self._settings = settings
        self._clock = clock or SystemClock()
        self._workers = workers or WorkerPool(home, self._clock, None)
        self._on_shutdown = on_shutdown
        self._started_at = self._clock.now()
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="store-reader")
        self._runs: dict[str, Live] = {}
        self._loading = asyncio.Lock()
        self._creating = asyncio.Lock()
        self._queue: dict[str, None] = {}  # ids of queued runs, first in, first out
        self._queued = Signal()
        self._waits: dict[str, Wait] = {}  # open ones
        self._waits_of: dict[str, set[str]] = {}  # run id → ids of its open waits
        self._timers: dict[str, float] = {}  # wait id → when it is over
        self._stopping = False
        self._rebuild()

    # Memory ------------------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        """Take up what the store knows: drivers get `lease_s` to be heard of, unless they are dead."""
        beat = self._clock.elapsed()
        runs = sorted(self._store.open_runs(), key=lambda run: run.updated_at)
        for run in runs:
            live = self._runs[run.id] = Live(run)
            if run.status is RunStatus.RUNNING and run.driver is not None:
                live.lease = self._new_lease(run.driver, beat)
                if run.cancel_requested:
                    live.lease.cancel_by = self._cancel_deadline()
            elif run.status is RunStatus.QUEUED:
                self._queue[run.id] = None
        for wait in self._store.open_waits():
            self._keep_wait(wait)

    def _new_lease(self, driver: Driver, beat: float | None = None) -> Lease:
        return Lease(driver, self._clock.elapsed() if beat is None else beat)

    def _cancel_deadline(self) -> float:
        return self._clock.elapsed() + self._settings.cancel_grace_s + _FORCE_S

    def _keep_wait(self, wait: Wait) -> None:
        """Remember a wait's newest version; only open ones stay in memory."""
        if wait.status is WaitStatus.OPEN:
            self._waits[wait.id] = wait
            self._waits_of.setdefault(wait.run_id, set()).add(wait.id)
            if wait.due_at is not None:
                self._timers[wait.id] = wait.due_at
        else:
            self._waits.pop(wait.id, None)
            self._timers.pop(wait.id, None)
            if (ids := self._waits_of.get(wait.run_id)) is not None:
                ids.discard(wait.id)
                if not ids:
                    del self._waits_of[wait.run_id]

    def _open_waits(self, run_id: str) -> list[Wait]:
        return [self._waits[wait_id] for wait_id in self._waits_of.get(run_id, ())]

    async def _read(self, function: Callable[..., T], *arguments: Any) -> T:
        """Ask the store without holding up the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    async def _resolve(self, typed: str) -> str:
        """Return the id of the run that `typed` names: whole, or a unique beginning or end of it."""
        if typed in self._runs:
            return typed
        wanted = as_run_id(typed)
        if len(wanted) == 32:
            if wanted in self._runs or await self._read(self._store.run, wanted) is not None:
                return wanted
            raise NotFound(f"there is no run {wanted}", todo="`nbdurable ls` lists the runs of this project")
        if len(wanted) < 4:
            raise NotFound(
                f"{typed!r} is too short to name a run: at least four characters of its id are needed",
                todo="`nbdurable ls` lists the runs of this project",
            )
        found = await self._read(self._store.runs_matching, wanted)
        if not found:
            raise NotFound(
                f"there is no run whose id begins or ends with {wanted!r}",
                todo="`nbdurable ls` lists the runs of this project",
            )
        if len(found) > 1:
            names = ", ".join(found)
            raise NotFound(
                f"{wanted!r} names {len(found)} runs: {names}", todo="type more of the one you mean"
            )
        return found[0]

    @asynccontextmanager
    async def _locked(self, run_id: str) -> AsyncIterator[Live]:
        """Hold a run, in memory; one that has ended is brought there for as long as it is held."""
        while True:
            live = self._runs.get(run_id)
            if live is None:
                async with self._loading:
                    live = self._runs.get(run_id)
                    if live is None:
                        run = await self._read(self._store.run, run_id)
                        if run is None:
                            raise NotFound(f"there is no run {run_id}", todo="`nbdurable ls` lists the runs")
                        live = self._runs[run_id] = Live(run)
            await live.lock.acquire()
            if self._runs.get(run_id) is live:
                break
            live.lock.release()  # it ended while this one waited: look again
        try:
            yield live
        finally:
            live.lock.release()
            if live.run.status.is_final:
                self._runs.pop(run_id, None)

    @asynccontextmanager
    async def _driven(self, run_id: str, epoch: int) -> AsyncIterator[Live]:
        """Hold a run for its driver; raises Fenced for whoever is not, or no longer."""
        async with self._locked(run_id) as live:
            _fence(live.run, epoch)
            if live.lease is not None:
                live.lease.beat = self._clock.elapsed()
            yield live

    async def _fold(self, live: Live) -> Fold:
        """Return the steps of a run, kept in memory while it is driven."""
        if live.fold is not None:
            return live.fold
        fold = await self._read_fold(live.run.id)
        if live.lease is not None:
            live.fold = fold
        return fold

    async def _read_fold(self, run_id: str) -> Fold:
        fold = Fold()
        async for event in self._history(run_id):
            fold.apply(event)
        return fold

    async def _history(self, run_id: str) -> AsyncIterator[Event]:
        after = 0
        while True:
            page = await self._read(self._store.events, run_id, after, _PAGE)
            for event in page:
                yield event
            if len(page) < _PAGE:
                return
            after = page[-1].seq

    # Changing ----------------------------------------------------------------------------------------------

    def _event(self, run: Run, kind: Kind, sentence: str, **data: Any) -> NewEvent:
        return NewEvent(self._clock.now(), run.id, run.epoch, kind, sentence, data=data)

    async def _commit(
        self, live: Live, events: Iterable[NewEvent], *, run: Run | None = None, waits: Iterable[Wait] = ()
    ) -> tuple[int, ...]:
        """Make a change durable, then apply it to memory; return the events' sequence numbers."""
        events, waits = tuple(events), tuple(waits)
        ticket = self._store.submit(Changes(events, (run,) if run is not None else (), waits))
        await asyncio.wrap_future(ticket.done)
        if run is not None:
            self._replace(live, run)
        for wait in waits:
            self._keep_wait(wait)
            if live.waits is not None:
                live.waits[wait.key] = wait
        if live.fold is not None:
            for seq, event in zip(ticket.seqs, events, strict=True):
                live.fold.apply(_numbered(event, seq))
        if live.lease is None:
            live.fold = None
        live.changed.notify()
        return ticket.seqs

    def _replace(self, live: Live, run: Run) -> None:
        """Put the newest version of a run into memory, and what hangs on its status."""
        live.run = run
        if run.driver is None:
            if live.lease is not None:
                self._workers.worked(live.lease.driver.process)
            live.lease = None
        elif live.lease is None or live.lease.driver is not run.driver:
            live.lease = self._new_lease(run.driver)
        if run.status is RunStatus.QUEUED:
            if run.id not in self._queue:
                self._queue[run.id] = None
                self._queued.notify()
                if not self._stopping:
                    self._workers.provide()
        else:
            self._queue.pop(run.id, None)

    def _moved(
        self, run: Run, happening: Happening, reason: str, *, driver: Driver | None = None, **changes: Any
    ) -> tuple[Run, list[Wait]]:
        """Return the run after a move, and the waits that the move cancels; raises IllegalMove."""
        move = lifecycle.move(run.status, happening, run=f"run {run.short}")
        at, effects = self._clock.now(), move.effects
        changes |= {"status": move.to, "reason": reason, "updated_at": at}
        if Effect.NEW_EPOCH in effects:
            changes |= {"epoch": run.epoch + 1, "driver": driver, "started_at": run.started_at or at}
        if Effect.DROP_DRIVER in effects:
            changes["driver"] = None
        if Effect.COUNT_RECOVERY in effects:
            changes["recoveries"] = run.recoveries + 1
        if Effect.RESET_RECOVERIES in effects:  # somebody begins anew with it
            changes |= {"recoveries": 0, "error": None, "cancel_requested": False}
        if Effect.FLAG_CANCEL in effects:
            changes["cancel_requested"] = True
        changes["ended_at"] = at if Effect.END in effects else None
        cancelled: list[Wait] = []
        if Effect.CANCEL_WAITS in effects:
            cancelled = [
                wait.model_copy(update={"status": WaitStatus.CANCELLED}) for wait in self._open_waits(run.id)
            ]
        return run.model_copy(update=changes), cancelled

    async def _move(
        self,
        live: Live,
        happening: Happening,
        kind: Kind,
        reason: str,
        *,
        data: dict[str, Any] | None = None,
        driver: Driver | None = None,
        **changes: Any,
    ) -> Run:
        run, waits = self._moved(live.run, happening, reason, driver=driver, **changes)
        await self._commit(live, [self._event(run, kind, reason, **(data or {}))], run=run, waits=waits)
        return run

    # Runs --------------------------------------------------------------------------------------------------

    async def create_run(self, wanted: contract.CreateRun) -> Run:
        headless = wanted.kind is DriverKind.HEADLESS
        if headless and wanted.snapshot is None:
            raise UsageError(
                "a headless run needs the snapshot of its notebook", todo="write it as a blob first"
            )
        if headless != (wanted.driver is None):
            raise UsageError(
                "an interactive run is created by its driver, a headless one without", todo="mend `driver`"
            )
        async with self._creating:
            if wanted.idempotency_key is not None:
                since = self._clock.now() - KEY_LIFE_S
                first = await self._read(self._store.run_with_key, wanted.idempotency_key, since)
                if first is not None:
                    live = self._runs.get(first.id)
                    return first if live is None else live.run
            at = self._clock.now()
            fields = {name: value for name, value in wanted if name != "driver"}
            reason = f"{_label(wanted.driver)} drives it" if wanted.driver else "waits for a worker"
            run = Run(
                id=new_run_id(at),
                status=RunStatus.QUEUED if headless else RunStatus.RUNNING,
                reason=reason,
                epoch=0 if headless else 1,
                driver=None if headless else wanted.driver,
                created_at=at,
                started_at=None if headless else at,
                updated_at=at,
                **fields,
            )
            live = Live(run, fold=None if headless else Fold())
            async with live.lock:
                if not headless and wanted.driver is not None:
                    live.lease = self._new_lease(wanted.driver)
                self._runs[run.id] = live
                try:
                    await self._commit(
                        live, [self._event(run, Kind.RUN_CREATED, f"created; {reason}")], run=run
                    )
                except BaseException:
                    del self._runs[run.id]
                    raise
            return run

    async def list_runs(self, wanted: contract.ListRuns) -> contract.Runs:
        if wanted.before is not None:
            wanted = wanted.model_copy(update={"before": await self._resolve(wanted.before)})
        return contract.Runs(runs=tuple(await self._read(self._store.runs, wanted)))

    async def _current(self, typed: str) -> Run:
        run_id = await self._resolve(typed)
        live = self._runs.get(run_id)
        run = live.run if live is not None else await self._read(self._store.run, run_id)
        if run is None:
            raise NotFound(f"there is no run {run_id}", todo="`nbdurable ls` lists the runs of this project")
        return run

    async def get_run(self, wanted: contract.ByRun) -> RunDetail:
        run = await self._current(wanted.run_id)
        live = self._runs.get(run.id)
        fold = live.fold if live is not None and live.fold is not None else await self._read_fold(run.id)
        waits = await self._read(
            self._store.waits, contract.ListWaits(run_id=run.id, status=None, limit=_ALL)
        )
        return RunDetail(**dict(run), steps=fold.steps(), waits=tuple(waits))

    async def read_events(self, wanted: contract.ReadEvents) -> contract.Events:
        run = await self._current(wanted.run_id)
        deadline = _deadline(wanted.hold_s)
        while True:
            live = self._runs.get(run.id)
            changed = live.changed.next() if live is not None else None
            events = await self._read(self._store.events, run.id, wanted.after, wanted.limit)
            run = await self._current(run.id)
            if events or changed is None or run.status.is_final or not await self._hold(changed, deadline):
                return contract.Events(events=tuple(events), run=run)

    async def read_log(self, wanted: contract.ReadLog) -> contract.Log:
        run_id = await self._resolve(wanted.run_id)
        return await self._read(_read_log, self._home.run_log(run_id), wanted.offset, wanted.limit)

    async def cancel_run(self, wanted: contract.ByRun) -> Run:
        async with self._locked(await self._resolve(wanted.run_id)) as live:
            run = live.run
            if run.status is RunStatus.CANCELLED or (
                run.status is RunStatus.RUNNING and run.cancel_requested
            ):
                return run  # asked for before
            happening = lifecycle.cancellation(run.status, run.driver.kind if run.driver else run.kind)
            if happening is Happening.REQUEST_CANCEL:
                reason = "asked to cancel; its worker stops it"
                run = await self._move(live, happening, Kind.RUN_CANCEL_REQUESTED, reason)
                if live.lease is not None:
                    live.lease.cancel_by = self._cancel_deadline()
                return run
            return await self._move(live, happening, Kind.RUN_CANCELLED, "cancelled by hand")

    async def resume_run(self, wanted: contract.ByRun) -> Run:
        async with self._locked(await self._resolve(wanted.run_id)) as live:
            run = live.run
            reason = "resumed by hand; waits for a worker"
            if run.status is RunStatus.QUEUED and run.reason == reason:
                return run  # asked for before
            resumed, _ = self._moved(run, Happening.RESUME, reason)
            if run.snapshot is None:
                raise Conflict(
                    f"run {run.short} has no snapshot of its notebook: it can't go on headless",
                    todo=f"open {run.notebook} and load the extension: it takes the run up",
                )
            await self._commit(live, [self._event(resumed, Kind.RUN_RESUMED, reason)], run=resumed)
            return resumed

    async def close_run(self, wanted: contract.CloseRun) -> Run:
        async with self._locked(await self._resolve(wanted.run_id)) as live:
            run = live.run
            if run.status is RunStatus.COMPLETED and run.epoch == wanted.epoch:
                return run  # asked for before
            if run.status is RunStatus.RUNNING or run.epoch != wanted.epoch:
                _fence(run, wanted.epoch)
            return await self._move(live, Happening.CLOSE, Kind.RUN_CLOSED, wanted.reason)

    # Driving -----------------------------------------------------------------------------------------------

    async def lease_run(self, wanted: contract.LeaseRun) -> Run:
        async with self._locked(await self._resolve(wanted.run_id)) as live:
            run, driver = live.run, wanted.driver
            reason = f"{_label(driver)} drives it"
            if run.status is not RunStatus.RUNNING or run.driver is None:
                return await self._move(live, Happening.LEASE, Kind.RUN_LEASED, reason, driver=driver)
            former = run.driver
            if former.process == driver.process:
                reason += " on"
            elif processes.is_alive(former.process) and not wanted.take_over:
                raise LeaseHeld(
                    f"run {run.short} is driven by {_label(former)} now",
                    todo="end that kernel, take the run over (it is told so), or start another run",
                )
            else:
                reason += f"; it took over from {_label(former)}"
                if former.kind is DriverKind.HEADLESS:
                    await self._end_processes(live)
            return await self._move(live, Happening.TAKE_OVER, Kind.RUN_TAKEN_OVER, reason, driver=driver)

    async def lease_work(self, wanted: contract.LeaseWork) -> contract.Work:
        worker = wanted.driver.process
        self._workers.polled(worker)
        deadline = _deadline(wanted.hold_s)
        while True:
            queued = self._queued.next()
            leased: list[Run] = []
            if not self._stopping and processes.is_alive(worker):
                leased = await self._hand_out(wanted)
            if leased:
                return contract.Work(runs=tuple(leased))
            idle = self._workers.idle_s(worker) >= self._settings.idle_exit_s
            if (idle or self._stopping) and not self._leased_to(worker):
                self._workers.dismissed(worker)
                return contract.Work(runs=(), stop=True)
            if not await self._hold(queued, deadline, at_most_s=max(0.05, self._settings.idle_exit_s)):
                return contract.Work(runs=())

    def _leased_to(self, worker: ProcessIdentity) -> list[str]:
        return [
            run_id
            for run_id, live in self._runs.items()
            if live.lease is not None and live.lease.driver.process == worker
        ]

    async def _hand_out(self, wanted: contract.LeaseWork) -> list[Run]:
        """Lease queued runs to a worker, up to its slots; those that it never heard of come first."""
        leased: list[Run] = []
        worker, reason = wanted.driver.process, f"{_label(wanted.driver)} executes it"
        if wanted.holding is not None:
            unheard = [run_id for run_id in self._leased_to(worker) if run_id not in wanted.holding]
            for run_id in unheard[: wanted.slots]:
                async with self._locked(run_id) as live:
                    if live.lease is not None and live.lease.driver.process == worker:
                        move, kind = Happening.TAKE_OVER, Kind.RUN_TAKEN_OVER
                        leased.append(await self._move(live, move, kind, reason, driver=wanted.driver))
        while len(leased) < wanted.slots and self._queue:
            run_id = next(iter(self._queue))
            del self._queue[run_id]  # nobody else takes it while this is on its way to the disk
            async with self._locked(run_id) as live:
                if live.run.status is not RunStatus.QUEUED:
                    continue
                try:
                    run = await self._move(
                        live, Happening.LEASE, Kind.RUN_LEASED, reason, driver=wanted.driver
                    )
                except BaseException:
                    self._queue = {run_id: None, **self._queue}
                    if leased:
                        break
                    raise
                leased.append(run)
        return leased

    async def heartbeat(self, wanted: contract.Heartbeat) -> contract.Orders:
        live = self._runs.get(wanted.run_id)
        if live is None or live.lease is None or live.run.epoch != wanted.epoch:
            _fence(await self._current(wanted.run_id), wanted.epoch)
        elif live.run.status is RunStatus.RUNNING:
            live.lease.beat = self._clock.elapsed()
            live.lease.processes = wanted.processes
            return contract.Orders(cancel=live.run.cancel_requested)
        return contract.Orders()

    async def end_lease(self, wanted: contract.EndLease) -> Run:
        async with self._locked(await self._resolve(wanted.run_id)) as live:
            run = live.run
            try:
                _fence(run, wanted.epoch)
            except Fenced:
                if await self._ended_before(wanted):
                    return run
                raise
            if wanted.how == "lose":
                return await self._lose(live, wanted.reason)
            if run.cancel_requested and wanted.how in ("suspend", "release"):
                return await self._cancelled(live, "cancelled", how=wanted.how)
            happening, kind = _ENDINGS[wanted.how]
            after, waits = self._moved(run, happening, wanted.reason, error=wanted.error)
            events = [self._event(after, kind, wanted.reason, how=wanted.how)]
            if happening is Happening.SUSPEND and not self._open_waits(run.id):
                reason = "what it waited for was there already; waits for a worker"
                after, _ = self._moved(after, Happening.WAKE, reason)
                events.append(self._event(after, Kind.RUN_WOKEN, reason))
            await self._commit(live, events, run=after, waits=waits)
            return after

    async def _ended_before(self, wanted: contract.EndLease) -> bool:
        """Tell whether this very end was recorded before, and only its answer was lost."""
        async for event in self._history(wanted.run_id):
            if event.epoch == wanted.epoch and event.data.get("how") == wanted.how:
                return True
        return False

    async def _lose(self, live: Live, what: str) -> Run:
        """Do what the death of its driver means for a run that is held."""
        await self._end_processes(live)
        run = live.run
        if run.cancel_requested:
            return await self._cancelled(live, f"cancelled; {what}", how="lose")
        happening = lifecycle.loss(run.driver.kind if run.driver else run.kind, run.recoveries)
        if happening is Happening.LOSE:
            reason = f"{what}; recovered for the {_ordinal(run.recoveries + 1)} time"
        elif happening is Happening.LEAVE:
            reason = f"{what}; open the notebook again and it goes on"
        else:
            reason = f"{what}; given up after {run.recoveries} recoveries, `nbdurable resume` tries it again"
        return await self._move(live, happening, _LOSSES[happening], reason, data={"how": "lose"})

    async def _cancelled(self, live: Live, reason: str, **data: Any) -> Run:
        return await self._move(live, Happening.CANCEL, Kind.RUN_CANCELLED, reason, data=data)

    async def _end_processes(self, live: Live) -> None:
        """End what a driver left behind, so that nothing of it works on when the next one begins."""
        for process in live.lease.processes if live.lease is not None else ():
            await asyncio.to_thread(processes.end_tree, process, _END_GRACE_S)

    async def set_result(self, wanted: contract.SetResult) -> contract.Nothing:
        async with self._driven(wanted.run_id, wanted.epoch) as live:
            run = live.run.model_copy(update={"result": wanted.result, "updated_at": self._clock.now()})
            await self._commit(live, [self._event(run, Kind.RESULT_SET, "its result was set")], run=run)
        return contract.Nothing()

    # Steps -------------------------------------------------------------------------------------------------

    async def begin_step(self, wanted: contract.BeginStep) -> contract.Begun:
        async with self._driven(wanted.run_id, wanted.epoch) as live:
            fold = await self._fold(live)
            state = fold.get(wanted.step)
            data: dict[str, Any] = {"reason": wanted.reason, "cell_id": wanted.cell_id}
            if wanted.action == "restore":
                attempt, kind = (
                    (state.attempts[-1].number if state and state.attempts else 0),
                    Kind.STEP_RESTORED,
                )
            else:
                running = state.running if state is not None else None
                if state and running and running.epoch == wanted.epoch and state.reason == wanted.reason:
                    return contract.Begun(attempt=running.number, seq=state.started.get(running.number, 0))
                attempt, kind = (state.next_attempt if state is not None else 1), Kind.STEP_STARTED
            sentence = f"{wanted.step}: {wanted.action} ({wanted.reason})"
            event = self._step_event(live.run, kind, wanted.step, sentence, {**data, "attempt": attempt})
            ticket = self._store.submit(Changes(events=(event,)))
            fold.apply(_numbered(event, ticket.seqs[0]))
            self._notify_when_done(live, ticket.done)
            return contract.Begun(attempt=attempt, seq=ticket.seqs[0])

    def _notify_when_done(self, live: Live, done: Future[None]) -> None:
        loop = asyncio.get_running_loop()

        def tell(future: Future[None]) -> None:
            if (error := future.exception()) is not None:
                _log.warning("a decision was not recorded: %s", error)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(live.changed.notify)

        done.add_done_callback(tell)

    def _step_event(
        self,
        run: Run,
        kind: Kind,
        step: str | None,
        sentence: str,
        data: dict[str, Any],
        manifest: SignedManifest | None = None,
    ) -> NewEvent:
        return NewEvent(self._clock.now(), run.id, run.epoch, kind, sentence, step, data, manifest)

    async def commit_step(self, wanted: contract.CommitStep) -> contract.Committed:
        async with self._driven(wanted.run_id, wanted.epoch) as live:
            state = await self._state(live, wanted.step)
            if state is not None and (wanted.attempt, wanted.status) in state.committed:
                return contract.Committed(seq=state.committed[wanted.attempt, wanted.status])
            data = {
                "attempt": wanted.attempt,
                "status": wanted.status,
                "variables": [variable.model_dump(mode="json") for variable in wanted.variables],
                "line": wanted.line,
            }
            sentence = f"{wanted.step}: {wanted.sentence or wanted.status}"
            event = self._step_event(
                live.run, COMMITS[wanted.status][0], wanted.step, sentence, data, manifest=wanted.manifest
            )
            (seq,) = await self._commit(live, (event,))
            return contract.Committed(seq=seq)

    async def fail_step(self, wanted: contract.FailStep) -> contract.Nothing:
        async with self._driven(wanted.run_id, wanted.epoch) as live:
            state = await self._state(live, wanted.step)
            known = (
                {attempt.number: attempt.status for attempt in state.attempts} if state is not None else {}
            )
            if known.get(wanted.attempt) != "failed":
                error = wanted.error
                data = {"attempt": wanted.attempt, "error": error.model_dump(mode="json")}
                sentence = f"{wanted.step}: failed with {error.name}: {error.message[:200]}"
                event = self._step_event(live.run, Kind.STEP_FAILED, wanted.step, sentence, data)
                await self._commit(live, (event,))
        return contract.Nothing()

    async def _state(self, live: Live, step: str) -> StepState | None:
        return (await self._fold(live)).get(step)

    async def checkpoints(self, wanted: contract.ByRun) -> contract.Checkpoints:
        run_id = await self._resolve(wanted.run_id)
        return contract.Checkpoints(checkpoints=tuple(await self._read(self._store.checkpoints, run_id)))

    async def get_step(self, wanted: contract.ReadStep) -> contract.StepDetail:
        run = await self._current(wanted.run_id)
        live = self._runs.get(run.id)
        fold = live.fold if live is not None and live.fold is not None else await self._read_fold(run.id)
        state = fold.get(wanted.step)
        if state is None:
            names = ", ".join(step.name for step in fold.steps()) or "none yet"
            raise NotFound(f"run {run.short} has no step {wanted.step!r}", todo=f"its steps: {names}")
        checkpoint = await self._read(self._store.checkpoint, run.id, wanted.step)
        return contract.StepDetail(step=state.step(), checkpoint=checkpoint)

    # Waits -------------------------------------------------------------------------------------------------

    async def open_wait(self, wanted: contract.OpenWait) -> Wait:
        timer = wanted.kind is WaitKind.TIMER
        if timer != (wanted.due_in_s is not None):
            raise UsageError(
                "a timer, and only a timer, has a time after which it is over", todo="set `due_in_s`"
            )
        async with self._driven(wanted.run_id, wanted.epoch) as live:
            if live.waits is None:
                query = contract.ListWaits(run_id=live.run.id, status=None, limit=_ALL)
                live.waits = {wait.key: wait for wait in await self._read(self._store.waits, query)}
            known = live.waits.get(wanted.key)
            if known is not None and known.status is not WaitStatus.CANCELLED:
                return known
            at = self._clock.now()
            wait_id = new_wait_id()
            while wait_id in self._waits or await self._read(self._store.wait, wait_id) is not None:
                wait_id = new_wait_id()
            wait = Wait(
                id=wait_id,
                created_at=at,
                due_at=at + wanted.due_in_s if wanted.due_in_s is not None else None,
                **{name: value for name, value in wanted if name not in ("epoch", "due_in_s")},
            )
            sentence = (
                f"waits {wanted.due_in_s:g} s: {wait.title}" if timer else f"asks for approval: {wait.title}"
            )
            event = self._step_event(
                live.run, Kind.WAIT_OPENED, wanted.step, sentence, {"wait_id": wait.id, "key": wait.key}
            )
            await self._commit(live, (event,), waits=(wait,))
            return wait

    async def list_waits(self, wanted: contract.ListWaits) -> contract.Waits:
        if wanted.run_id is not None:
            wanted = wanted.model_copy(update={"run_id": await self._resolve(wanted.run_id)})
        return contract.Waits(waits=tuple(await self._read(self._store.waits, wanted)))

    async def _wait(self, typed: str) -> Wait:
        wait_id = as_wait_id(typed)
        wait = self._waits.get(wait_id) or await self._read(self._store.wait, wait_id)
        if wait is None:
            raise NotFound(f"there is no wait {typed!r}", todo="`nbdurable waits` lists those that are open")
        return wait

    async def get_wait(self, wanted: contract.ReadWait) -> Wait:
        deadline = _deadline(wanted.hold_s)
        while True:
            wait = await self._wait(wanted.wait_id)
            live = self._runs.get(wait.run_id)
            if live is None or wait.status is not WaitStatus.OPEN:
                return wait
            changed = live.changed.next()
            if wait.id in self._waits and not await self._hold(changed, deadline):
                return wait

    async def answer_wait(self, wanted: contract.AnswerWait) -> Wait:
        run_id = (await self._wait(wanted.wait_id)).run_id
        async with self._locked(run_id) as live:
            wait = await self._wait(wanted.wait_id)
            if wait.kind is WaitKind.TIMER:
                raise Conflict(
                    f"{wait.id} is a timer: it is over by itself", todo="cancel the run to end it now"
                )
            if wait.status is WaitStatus.CANCELLED:
                raise Conflict(f"{wait.id} is cancelled: run {live.run.short} is {live.run.status}")
            if wait.answer is not None:
                if await self._nonce(wait) == wanted.nonce:
                    return wait
                raise AlreadyAnswered(
                    _answered(wait, self._clock.now()), todo="an answer stands; nothing was changed"
                )
            answer = WaitAnswer(
                approved=wanted.approved,
                value=wanted.value if wanted.edited else wait.value,
                edited=wanted.edited,
                by=wanted.by,
                comment=wanted.comment,
                at=self._clock.now(),
            )
            return await self._settle(live, wait, answer, wanted.nonce)

    async def _nonce(self, wait: Wait) -> str | None:
        async for event in self._history(wait.run_id):
            if event.kind == Kind.WAIT_ANSWERED and event.data.get("wait_id") == wait.id:
                return str(event.data.get("nonce"))
        return None

    async def _settle(self, live: Live, wait: Wait, answer: WaitAnswer, nonce: str) -> Wait:
        """Record the one answer to a wait, and wake its run with it if nothing else is open."""
        settled = wait.model_copy(update={"status": WaitStatus.ANSWERED, "answer": answer})
        how = "is over" if wait.kind is WaitKind.TIMER else f"was {_verdict(answer)} by {answer.by}"
        data = {"wait_id": wait.id, "nonce": nonce, "approved": answer.approved}
        sentence = f"{wait.title} {how}"
        events = [self._step_event(live.run, Kind.WAIT_ANSWERED, wait.step, sentence, data)]
        run = None
        if live.run.status is RunStatus.WAITING and len(self._waits_of.get(wait.run_id, ())) <= 1:
            reason = f"{wait.title!r} {how}; waits for a worker"
            run, _ = self._moved(live.run, Happening.WAKE, reason)
            events.append(self._event(run, Kind.RUN_WOKEN, reason))
        await self._commit(live, events, run=run, waits=(settled,))
        return settled

    # The store, and the coordinator itself -----------------------------------------------------------------

    async def sql(self, wanted: contract.Query) -> contract.Table:
        return await asyncio.to_thread(self._store.query, wanted)

    async def health(self, _: contract.Nothing) -> contract.Health:
        return contract.Health(
            pid=os.getpid(),
            version=__version__,
            home=str(self._home.root),
            started_at=self._started_at,
            open_runs=len(self._runs),
            workers=self._workers.alive(),
        )

    async def shutdown(self, _: contract.Nothing) -> contract.Nothing:
        self._on_shutdown()
        return contract.Nothing()

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.HEALTH: self.health,
            contract.SHUTDOWN: self.shutdown,
            contract.CREATE_RUN: self.create_run,
            contract.LIST_RUNS: self.list_runs,
            contract.GET_RUN: self.get_run,
            contract.READ_EVENTS: self.read_events,
            contract.READ_LOG: self.read_log,
            contract.CANCEL_RUN: self.cancel_run,
            contract.RESUME_RUN: self.resume_run,
            contract.CLOSE_RUN: self.close_run,
            contract.LEASE_RUN: self.lease_run,
            contract.LEASE_WORK: self.lease_work,
            contract.HEARTBEAT: self.heartbeat,
            contract.END_LEASE: self.end_lease,
            contract.SET_RESULT: self.set_result,
            contract.BEGIN_STEP: self.begin_step,
            contract.COMMIT_STEP: self.commit_step,
            contract.FAIL_STEP: self.fail_step,
            contract.CHECKPOINTS: self.checkpoints,
            contract.GET_STEP: self.get_step,
            contract.OPEN_WAIT: self.open_wait,
            contract.LIST_WAITS: self.list_waits,
            contract.GET_WAIT: self.get_wait,
            contract.ANSWER_WAIT: self.answer_wait,
            contract.SQL: self.sql,
        }

    async def _hold(
        self, changed: asyncio.Event, deadline: float, at_most_s: float = contract.HOLD_S
    ) -> bool:
        """Wait for a change, a while at most; return whether it is worth looking again."""
        remaining_s = deadline - asyncio.get_running_loop().time()
        if self._stopping or remaining_s <= 0:
            return False
        try:
            async with asyncio.timeout(min(remaining_s, at_most_s)):
                await changed.wait()
        except TimeoutError:
            return deadline > asyncio.get_running_loop().time()
        return not self._stopping

    # Time --------------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Act on what time brings: timers that are over, drivers that died, cancelled runs that go on."""
        now, elapsed = self._clock.now(), self._clock.elapsed()
        for wait_id in [wait_id for wait_id, due_at in self._timers.items() if due_at <= now]:
            await self._time_over(wait_id)
        for run_id, live in list(self._runs.items()):
            if live.lease is not None:
                await self._look_after(run_id, live.lease, live.run.epoch, elapsed)
        if self._queue and not self._stopping:
            self._workers.provide()
            await self._tell_trouble()

    async def _time_over(self, wait_id: str) -> None:
        if (wait := self._waits.get(wait_id)) is None:
            return  # cancelled while others were seen to
        async with self._locked(wait.run_id) as live:
            if (wait := self._waits.get(wait_id)) is not None:
                answer = WaitAnswer(approved=True, value=wait.value, by="timer", at=self._clock.now())
                await self._settle(live, wait, answer, "timer")

    async def _look_after(self, run_id: str, lease: Lease, epoch: int, elapsed: float) -> None:
        what = self._death(lease, elapsed)
        overdue = lease.cancel_by is not None and elapsed >= lease.cancel_by
        if what is None and not overdue:
            return
        async with self._locked(run_id) as live:
            if live.lease is not lease or live.run.epoch != epoch:
                return
            if what is not None:
                _log.warning("run %s: %s", run_id, what)
                await self._lose(live, what)
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
            return f"its {_label(driver)} died"
        watched = processes.is_local(driver.process) and driver.kind is DriverKind.INTERACTIVE
        if not watched and silent_s > self._settings.lease_s:
            return f"its {_label(driver)} was not heard of for {silent_s:.0f} s"
        return None

    async def _tell_trouble(self) -> None:
        """Say in the queued runs' reason what keeps workers from living, once."""
        trouble = self._workers.trouble
        if trouble is None:
            return
        reason = f"waits for a worker: {trouble}"
        for run_id in list(self._queue):
            async with self._locked(run_id) as live:
                if live.run.status is RunStatus.QUEUED and live.run.reason != reason:
                    run = live.run.model_copy(update={"reason": reason})
                    await self._commit(live, [self._event(run, Kind.RUN_DELAYED, reason)], run=run)

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing is driven, queued or timed, so that the coordinator may end."""
        return not (
            self._queue
            or self._timers
            or any(live.run.status is RunStatus.RUNNING for live in self._runs.values())
        )

    def stop(self) -> None:
        """Answer all long polls now, and hand out no more work; runs stay as they are."""
        self._stopping = True
        self._queued.notify()
        for live in self._runs.values():
            live.changed.notify()

    def close(self) -> None:
        """End the readers' threads."""
        self._readers.shutdown()


def _numbered(event: NewEvent, seq: int) -> Event:
    return Event.model_construct(
        seq=seq,
        at=event.at,
        run_id=event.run_id,
        epoch=event.epoch,
        kind=event.kind,
        step=event.step,
        sentence=event.sentence,
        data=event.data,
    )


def _fence(run: Run, epoch: int) -> None:
    """Refuse whoever does not drive the run; say who does, or what became of it."""
    if run.status is not RunStatus.RUNNING or run.driver is None:
        raise Fenced(
            f"run {run.short} is {run.status} and not driven from here any more: {run.reason}",
            todo=f"`nbdurable show {run.short}` tells its story; in a notebook, load the extension again",
        )
    if run.epoch != epoch:
        raise Fenced(
            f"run {run.short} is driven by {_label(run.driver)} now (lease {run.epoch}, not {epoch})",
            todo="nothing more of this one is kept; `%durable attach` takes the run back",
        )


def _label(driver: Driver) -> str:
    return driver.label or f"{driver.process.role} {driver.process.pid}"


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _verdict(answer: WaitAnswer) -> str:
    if not answer.approved:
        return "rejected"
    return "approved with changes" if answer.edited else "approved"


def _answered(wait: Wait, now: float) -> str:
    answer = wait.answer
    assert answer is not None
    ago_s = max(0, round(now - answer.at))
    comment = f", saying {answer.comment!r}" if answer.comment else ""
    return f"{wait.id} ({wait.title}) was {_verdict(answer)} by {answer.by} {ago_s} s ago{comment}"


def _deadline(hold_s: float) -> float:
    return asyncio.get_running_loop().time() + min(hold_s, contract.HOLD_S)


def _read_log(path: os.PathLike[str], offset: int, limit: int) -> contract.Log:
    """Read a piece of a log, cut at whole characters."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, offset))
            data = file.read(max(0, limit))
    except FileNotFoundError:
        data = b""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return contract.Log(text=text, next_offset=offset + len(data) - len(decoder.getstate()[0]))
