"""The runs in memory, and the one way in which they change: checked, made durable, applied, answered.

Owns the state of open runs, rebuilt from the store at start, their locks, the queue and the open waits. Each
change goes through `commit`: the row and the sentence that tells why are on disk before memory follows.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from nbdurable import contract, lifecycle
from nbdurable.coordinator.fold import Fold, Kind
from nbdurable.coordinator.names import as_run_id, new_wait_id
from nbdurable.coordinator.state import Clock, Lease, Live, Signal, SystemClock
from nbdurable.coordinator.workers import WorkerPool
from nbdurable.errors import Fenced, NotFound, StoreError
from nbdurable.lifecycle import Effect, Happening
from nbdurable.models import Driver, DriverKind, Event, Run, RunStatus, SignedManifest, Wait, WaitStatus
from nbdurable.settings import Home, Settings
from nbdurable.store.port import Changes, NewEvent, Store, Ticket

T = TypeVar("T")

_FORCE_S = 5.0  # beyond `cancel_grace_s`, after which the coordinator itself ends a cancelled run's processes
_PAGE = 1000

log = logging.getLogger("nbdurable.coordinator")


@dataclass(frozen=True)
class Change:
    """What becomes of one run that is held: events, its new row, rows of its waits."""

    live: Live
    events: tuple[NewEvent, ...]
    run: Run | None = None
    waits: tuple[Wait, ...] = ()

    @property
    def ends(self) -> bool:
        """Tell whether the run ends by it."""
        return self.run is not None and self.run.status.is_final and not self.live.run.status.is_final


@asynccontextmanager
async def _nobody(_: Run) -> AsyncIterator[list[Change]]:
    yield []


class Core:
    """What the parts of the coordinator share. All methods run on one event loop."""

    def __init__(
        self,
        store: Store,
        home: Home,
        settings: Settings,
        *,
        clock: Clock | None = None,
        workers: WorkerPool | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.store = store
        self.home = home
        self.settings = settings
        self.clock = clock or SystemClock()
        self.draw = draw
        self.workers = workers or WorkerPool(home, self.clock, None)
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="store-reader")
        self.runs: dict[str, Live] = {}
        self._loading = asyncio.Lock()
        self.creating = asyncio.Lock()
        self.queue: dict[str, None] = {}  # ids of queued runs, first in, first out
        self.queued = Signal()
        self.waits: dict[str, Wait] = {}  # open ones
        self.waits_of: dict[str, set[str]] = {}  # run id → ids of its open waits
        self.timers: dict[str, float] = {}  # wait id → when time has something to do with it
        self.delayed: dict[str, float] = {}  # run id → when it begins
        self.expiring: dict[str, float] = {}  # run id → when it expires
        self.awaited: dict[str, set[str]] = {}  # run id → ids of the open waits for its end
        self.singletons: dict[str, set[str]] = {}  # key → ids of its open runs
        self.held: dict[str, None] = {}  # ids of queued runs that another one of their kind goes before
        self.to_offer: set[str] = set()  # ids of open waits that may have missed what they wait for
        self.children: dict[str, set[str]] = {}  # run id → ids of its open children
        self.fallen: dict[
            str, None
        ] = {}  # ids of runs whose end, or cancelling, their children have to hear of
        self.awaiting: Callable[[Run], AbstractAsyncContextManager[list[Change]]] = _nobody
        """Holds the runs that wait for one which ends, and gives what its end means to them."""
        self.stopping = False
        self.trouble = ""  # why the newest change could not be stored
        self._rebuild()

    def _rebuild(self) -> None:
        """Take up what the store knows: drivers get `lease_s` to be heard of, unless they are dead."""
        beat = self.clock.elapsed()
        runs = sorted(self.store.open_runs(), key=lambda run: run.updated_at)
        for run in runs:
            live = self.runs[run.id] = Live(run)
            if run.status is RunStatus.RUNNING and run.driver is not None:
                live.lease = self.new_lease(run.driver, beat)
                if run.cancel_requested:
                    live.lease.cancel_by = self.cancel_deadline()
            elif run.status is RunStatus.QUEUED:
                (self.held if run.singleton and not run.epoch else self.queue)[run.id] = None
            if run.singleton_key is not None:
                self.singletons.setdefault(run.singleton_key, set()).add(run.id)
            self._time(run)
            if run.parent_id is not None:
                self.children.setdefault(run.parent_id, set()).add(run.id)
                self.fallen[run.parent_id] = None  # a crash may have come before they heard of it
        self._let_go()
        for wait in self.store.open_waits():
            self.keep_wait(wait)

    def _time(self, run: Run) -> None:
        """Remember what time will bring for a run."""
        begins_at = run.begins_at if run.status is RunStatus.DELAYED else None
        waiting = run.status in (RunStatus.DELAYED, RunStatus.QUEUED) and run.epoch == 0
        expires_at = run.expires_at if waiting else None
        for times, at in ((self.delayed, begins_at), (self.expiring, expires_at)):
            if at is None:
                times.pop(run.id, None)
            else:
                times[run.id] = at

    def new_lease(self, driver: Driver, beat: float | None = None) -> Lease:
        """Return a lease that was heard of at `beat` (default: now)."""
        return Lease(driver, self.clock.elapsed() if beat is None else beat)

    def cancel_deadline(self) -> float:
        """Return when a run that is cancelled now is ended by force, by `Clock.elapsed`."""
        return self.clock.elapsed() + self.settings.cancel_grace_s + _FORCE_S

    def keep_wait(self, wait: Wait) -> None:
        """Remember a wait's newest version; only open ones stay in memory."""
        if wait.status is WaitStatus.OPEN:
            self.waits[wait.id] = wait
            self.waits_of.setdefault(wait.run_id, set()).add(wait.id)
            if wait.child is not None:
                self.awaited.setdefault(wait.child, set()).add(wait.id)
            if (at := wait.next_at) is not None:
                self.timers[wait.id] = at
            else:
                self.timers.pop(wait.id, None)
        else:
            self.waits.pop(wait.id, None)
            self.timers.pop(wait.id, None)
            _discard(self.waits_of, wait.run_id, wait.id)
            if wait.child is not None:
                _discard(self.awaited, wait.child, wait.id)

    async def new_wait_id(self) -> str:
        """Return an id that no wait has had."""
        while True:
            wait_id = new_wait_id()
            if wait_id not in self.waits and await self.read(self.store.wait, wait_id) is None:
                return wait_id

    def open_waits(self, run_id: str) -> list[Wait]:
        """Return what a run waits for."""
        return [self.waits[wait_id] for wait_id in self.waits_of.get(run_id, ())]

    async def read(self, function: Callable[..., T], *arguments: Any) -> T:
        """Ask the store without holding up the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    async def resolve(self, typed: str) -> str:
        """Return the id of the run that `typed` names: whole, or a unique beginning or end of it."""
        if typed in self.runs:
            return typed
        wanted = as_run_id(typed)
        if len(wanted) == 32:
            if wanted in self.runs or await self.read(self.store.run, wanted) is not None:
                return wanted
            raise NotFound(f"there is no run {wanted}", todo="`nbdurable ls` lists the runs of this project")
        if len(wanted) < 4:
            raise NotFound(
                f"{typed!r} is too short to name a run: at least four characters of its id are needed",
                todo="`nbdurable ls` lists the runs of this project",
            )
        found = await self.read(self.store.runs_matching, wanted)
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

    async def current(self, typed: str) -> Run:
        """Return the run that `typed` names, as it is now."""
        run_id = await self.resolve(typed)
        live = self.runs.get(run_id)
        run = live.run if live is not None else await self.read(self.store.run, run_id)
        if run is None:
            raise NotFound(f"there is no run {run_id}", todo="`nbdurable ls` lists the runs of this project")
        return run

    @asynccontextmanager
    async def locked(self, run_id: str) -> AsyncIterator[Live]:
        """Hold a run, in memory; one that has ended is brought there for as long as it is held."""
        while True:
            live = self.runs.get(run_id)
            if live is None:
                async with self._loading:
                    live = self.runs.get(run_id)
                    if live is None:
                        run = await self.read(self.store.run, run_id)
                        if run is None:
                            raise NotFound(f"there is no run {run_id}", todo="`nbdurable ls` lists the runs")
                        live = self.runs[run_id] = Live(run)
            await live.lock.acquire()
            if self.runs.get(run_id) is live:
                break
            live.lock.release()  # it ended while this one waited: look again
        try:
            yield live
        finally:
            live.lock.release()
            if live.run.status.is_final:
                self.runs.pop(run_id, None)

    @asynccontextmanager
    async def driven(self, run_id: str, epoch: int) -> AsyncIterator[Live]:
        """Hold a run for its driver; raises Fenced for whoever is not, or no longer."""
        async with self.locked(run_id) as live:
            fence(live.run, epoch)
            if live.lease is not None:
                live.lease.beat = self.clock.elapsed()
            yield live

    async def fold(self, live: Live) -> Fold:
        """Return the steps of a run, kept in memory while it is driven."""
        if live.fold is not None:
            return live.fold
        fold = await self.read_fold(live.run.id)
        if live.lease is not None:
            live.fold = fold
        return fold

    async def read_fold(self, run_id: str) -> Fold:
        """Return the steps of a run as its history on disk tells them."""
        fold = Fold()
        async for event in self.history(run_id):
            fold.apply(event)
        return fold

    async def history(self, run_id: str) -> AsyncIterator[Event]:
        """Yield all events of a run."""
        after = 0
        while True:
            page = await self.read(self.store.events, run_id, after, _PAGE)
            for event in page:
                yield event
            if len(page) < _PAGE:
                return
            after = page[-1].seq

    def event(self, run: Run, kind: Kind, sentence: str, **data: Any) -> NewEvent:
        """Return an event of a run, as of now."""
        return NewEvent(self.clock.now(), run.id, run.epoch, kind, sentence, data=data)

    def step_event(
        self,
        run: Run,
        kind: Kind,
        step: str | None,
        sentence: str,
        data: dict[str, Any],
        manifest: SignedManifest | None = None,
    ) -> NewEvent:
        """Return an event of one of a run's steps, as of now."""
        return NewEvent(self.clock.now(), run.id, run.epoch, kind, sentence, step, data, manifest)

    async def commit(
        self, live: Live, events: Iterable[NewEvent], *, run: Run | None = None, waits: Iterable[Wait] = ()
    ) -> tuple[int, ...]:
        """Make a change durable, then apply it to memory; return the events' sequence numbers."""
        events = tuple(events)
        seqs = await self.commit_all([Change(live, events, run, tuple(waits))])
        return seqs[: len(events)]

    async def commit_all(self, changes: Iterable[Change]) -> tuple[int, ...]:
        """Make changes of several runs durable together, with what the end of one means to those that wait for it."""
        changes = list(changes)
        async with AsyncExitStack() as held:
            for run in [change.run for change in changes if change.ends]:
                assert run is not None
                if run.id in self.awaited:
                    changes += await held.enter_async_context(self.awaiting(run))
            events = [event for change in changes for event in change.events]
            runs = [change.run for change in changes if change.run is not None]
            ticket = self.store.submit(
                Changes(events, runs, [wait for change in changes for wait in change.waits])
            )
            await self._stored(ticket)
            numbers = iter(ticket.seqs)
            ended = [change.live.run.id for change in changes if change.ends]
            for change in changes:
                self._apply(change, [next(numbers) for _ in change.events])
            for run_id in ended:  # a wait may have opened while this was on its way to the disk
                self.to_offer |= self.awaited.get(run_id, set())
        return ticket.seqs

    def _apply(self, change: Change, seqs: list[int]) -> None:
        """Let memory follow what is durable."""
        live = change.live
        if change.run is not None:
            self._replace(live, change.run)
        for wait in change.waits:
            self.keep_wait(wait)
            if live.waits is not None:
                live.waits[wait.key] = wait
        if live.fold is not None:
            for seq, event in zip(seqs, change.events, strict=True):
                live.fold.apply(numbered(event, seq))
        if live.lease is None:
            live.fold = None
        live.changed.notify()

    @asynccontextmanager
    async def born(self, lives: Iterable[Live]) -> AsyncIterator[None]:
        """Hold runs that are about to be made; they are forgotten where that fails."""
        lives = list(lives)
        for live in lives:
            await live.lock.acquire()
            self.runs[live.run.id] = live
        try:
            yield
        except BaseException:
            for live in lives:
                del self.runs[live.run.id]
            raise
        finally:
            for live in lives:
                live.lock.release()

    async def record(self, event: NewEvent) -> int:
        """Make an event of the project's own history durable; return its sequence number."""
        ticket = self.store.submit(Changes((event,)))
        await self._stored(ticket)
        return ticket.seqs[0]

    async def _stored(self, ticket: Ticket) -> None:
        """Wait until a change is durable; trouble is logged once, not at each try."""
        try:
            await asyncio.wrap_future(ticket.done)
        except StoreError as error:
            if str(error) != self.trouble:
                self.trouble = str(error)
                log.error("%s", error)
            raise
        if self.trouble:
            self.trouble = ""
            log.info("the store can be written again")

    def _replace(self, live: Live, run: Run) -> None:
        """Put the newest version of a run into memory, and what hangs on its status."""
        live.run = run
        self._time(run)
        self._relate(run)
        if run.driver is None:
            if live.lease is not None:
                self.workers.worked(live.lease.driver.process)
            live.lease = None
        elif live.lease is None or live.lease.driver is not run.driver:
            live.lease = self.new_lease(run.driver)
        if run.status is RunStatus.QUEUED:
            if run.singleton_key is not None and not run.epoch:
                self.held[run.id] = None
            else:
                self._queue(run.id)
        else:
            self.queue.pop(run.id, None)
            self.held.pop(run.id, None)
        if run.singleton_key is not None:
            if run.status.is_final:
                _discard(self.singletons, run.singleton_key, run.id)
            else:
                self.singletons.setdefault(run.singleton_key, set()).add(run.id)
            self._let_go()

    def _queue(self, run_id: str) -> None:
        if run_id not in self.queue:
            self.queue[run_id] = None
            self.queued.notify()
            if not self.stopping:
                self.workers.provide()

    def ahead_of(self, run: Run) -> list[Run]:
        """Return the open runs that a run which has not begun waits for, since it is a singleton."""
        if run.singleton is None or run.epoch:
            return []
        others = [
            self.runs[one].run for one in self.singletons.get(str(run.singleton_key), ()) if one != run.id
        ]
        mine = (run.created_at, run.id)
        return [
            one
            for one in others
            if one.status is not RunStatus.DELAYED or one.epoch
            if one.id not in self.held or (one.created_at, one.id) < mine
        ]

    def _let_go(self) -> None:
        """Queue the held runs that no other one of their kind goes before any more."""
        for run_id in [one for one in self.held if not self.ahead_of(self.runs[one].run)]:
            del self.held[run_id]
            self._queue(run_id)

    def _relate(self, run: Run) -> None:
        """Remember whose child a run is while it is open, and whether its own children have to hear of it."""
        if run.parent_id is not None:
            if run.status.is_final:
                _discard(self.children, run.parent_id, run.id)
            else:
                self.children.setdefault(run.parent_id, set()).add(run.id)
                parent = self.runs.get(run.parent_id)
                if parent is not None and parent.run.cancel_requested:
                    self.fallen[run.parent_id] = None
        if run.id in self.children and (run.status.is_final or run.cancel_requested):
            self.fallen[run.id] = None

    def moved(
        self, run: Run, happening: Happening, reason: str, *, driver: Driver | None = None, **changes: Any
    ) -> tuple[Run, list[Wait]]:
        """Return the run after a move, and the waits that the move cancels; raises IllegalMove."""
        move = lifecycle.move(run.status, happening, run=f"run {run.short}")
        at, effects = self.clock.now(), move.effects
        changes |= {"status": move.to, "reason": reason, "updated_at": at}
        if {Effect.NEW_EPOCH, Effect.DROP_DRIVER} & effects:
            changes |= {"active_s": active_s(run, at), "driven_since": None}
        if Effect.NEW_EPOCH in effects:
            changes |= {"epoch": run.epoch + 1, "driver": driver, "started_at": run.started_at or at}
            changes["driven_since"] = at
        if Effect.DROP_DRIVER in effects:
            changes["driver"] = None
        if Effect.COUNT_RECOVERY in effects:
            changes["recoveries"] = run.recoveries + 1
        if Effect.RESET_RECOVERIES in effects:  # somebody begins anew with it
            changes |= {"recoveries": 0, "error": None, "cancel_requested": False}
            changes |= {"failures": 0, "active_s": 0.0, "begins_at": None, "expires_at": None}
            if run.status is RunStatus.CANCELLED or run.cancel_with_parent:
                changes["is_tied"] = False  # what became of its parent was known to whoever resumes it
        if Effect.FLAG_CANCEL in effects:
            changes["cancel_requested"] = True
        changes["ended_at"] = at if Effect.END in effects else None
        cancelled: list[Wait] = []
        if Effect.CANCEL_WAITS in effects:
            cancelled = [
                wait.model_copy(update={"status": WaitStatus.CANCELLED}) for wait in self.open_waits(run.id)
            ]
        return run.model_copy(update=changes), cancelled

    async def move(
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
        """Make a move of a run that is held, told by one event whose sentence is the run's new reason."""
        run, waits = self.moved(live.run, happening, reason, driver=driver, **changes)
        await self.commit(live, [self.event(run, kind, reason, **(data or {}))], run=run, waits=waits)
        return run

    async def hold(self, changed: asyncio.Event, deadline: float, at_most_s: float = contract.HOLD_S) -> bool:
        """Wait for a change, a while at most; return whether it is worth looking again."""
        remaining_s = deadline - asyncio.get_running_loop().time()
        if self.stopping or remaining_s <= 0:
            return False
        try:
            async with asyncio.timeout(min(remaining_s, at_most_s)):
                await changed.wait()
        except TimeoutError:
            return deadline > asyncio.get_running_loop().time()
        return not self.stopping

    def stop(self) -> None:
        """Answer all long polls now, and hand out no more work; runs stay as they are."""
        self.stopping = True
        self.queued.notify()
        for live in self.runs.values():
            live.changed.notify()

    def close(self) -> None:
        """End the readers' threads."""
        self._readers.shutdown()


def _discard(sets: dict[str, set[str]], key: str, member: str) -> None:
    """Take a member out of one of several sets; an empty one goes."""
    if (found := sets.get(key)) is not None:
        found.discard(member)
        if not found:
            del sets[key]


def numbered(event: NewEvent, seq: int) -> Event:
    """Return an event with its number, unchecked: it was made here."""
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


def active_s(run: Run, now: float) -> float:
    """Return how long a run was driven headless."""
    if run.driven_since is None or run.driver is None or run.driver.kind is not DriverKind.HEADLESS:
        return run.active_s
    return run.active_s + max(0.0, now - run.driven_since)


def fence(run: Run, epoch: int) -> None:
    """Refuse whoever does not drive the run; say who does, or what became of it."""
    if run.status is not RunStatus.RUNNING or run.driver is None:
        raise Fenced(
            f"run {run.short} is {run.status} and not driven from here any more: {run.reason}",
            todo=f"`nbdurable show {run.short}` tells its story; in a notebook, load the extension again",
        )
    if run.epoch != epoch:
        raise Fenced(
            f"run {run.short} is driven by {label(run.driver)} now (lease {run.epoch}, not {epoch})",
            todo="nothing more of this one is kept; in a notebook, `%durable takeover` takes the run back",
        )


def label(driver: Driver) -> str:
    """Name a driver for people."""
    return driver.label or f"{driver.process.role} {driver.process.pid}"


def hold_deadline(hold_s: float) -> float:
    """Return until when, by the loop's clock, a question may be held."""
    return asyncio.get_running_loop().time() + min(hold_s, contract.HOLD_S)
