"""Waits: opened once, answered once, by a person, an event or time.

Owns the rules of guarantee 5; an answer, what it cancels, and the run's waking are one transaction. An event is made
durable first and taken by each run for itself; what a crash left undone of that is done at the next start.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from hashlib import sha256
from typing import Any

from nbdurable import contract
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Change, Core, hold_deadline
from nbdurable.coordinator.creation import Creation, Made
from nbdurable.coordinator.families import stands, started
from nbdurable.coordinator.fits import bad_schema, matches, misfit
from nbdurable.coordinator.fold import Kind
from nbdurable.coordinator.mailbox import Kept, Mailbox, data_of
from nbdurable.coordinator.names import as_wait_id
from nbdurable.coordinator.state import Live
from nbdurable.errors import AlreadyAnswered, Conflict, NotFound, StoreError, UsageError
from nbdurable.lifecycle import Happening, outcome
from nbdurable.models import (
    Run,
    RunStatus,
    Sent,
    Wait,
    WaitAnswer,
    WaitKind,
    WaitStatus,
)
from nbdurable.policies import size, span
from nbdurable.security import digest_of
from nbdurable.store.port import NewEvent
from nbdurable.telemetry import fault_point

MAX_PAYLOAD_BYTES = 1_000_000
_ALL = 1_000_000_000
_APART_S = 1e-6  # waits that are opened together are listed in their order
_PROJECT = ""  # whose history holds the sent events: no run's


class Waits:
    """What is asked about waits, events that are sent, and timers."""

    def __init__(self, core: Core, creation: Creation) -> None:
        self._core, self._creation = core, creation
        core.awaiting = self._awaiting
        now = core.clock.now()
        since = now - contract.MAX_EVENT_LIFE_S
        self._mailbox = Mailbox(core.store.sent_events(since), core.store.taken_events(since), now)
        self._sending = asyncio.Lock()
        self._secrets: dict[
            str, tuple[str, str]
        ] = {}  # wait id → its run, and the answer that is kept nowhere else
        core.to_offer |= {
            wait.id for wait in core.waits.values() if wait.kind in (WaitKind.EVENT, WaitKind.CHILD)
        }

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.OPEN_WAIT: self.open_wait,
            contract.OPEN_GATE: self.open_gate,
            contract.LIST_WAITS: self.list_waits,
            contract.GET_WAIT: self.get_wait,
            contract.ANSWER_WAIT: self.answer_wait,
            contract.ANSWER_CALLBACK: self.answer_callback,
            contract.SEND_EVENT: self.send_event,
        }

    # Opening ---------------------------------------------------------------------------------------------------

    async def open_wait(self, wanted: contract.OpenWait) -> Wait:
        spec = contract.WaitSpec(**{name: value for name, value in wanted if name not in ("run_id", "epoch")})
        gate = contract.OpenGate(run_id=wanted.run_id, epoch=wanted.epoch, waits=(spec,))
        return (await self.open_gate(gate)).waits[0]

    async def open_gate(self, wanted: contract.OpenGate) -> contract.Waits:
        for spec in wanted.waits:
            _check(spec)
        has_children = any(spec.kind is WaitKind.CHILD for spec in wanted.waits)
        async with (
            self._core.creating if has_children else nullcontext(),
            self._core.driven(wanted.run_id, wanted.epoch) as live,
        ):
            known = await self._known(live)
            keys = [spec.key for spec in wanted.waits]
            found = [known.get(key) for key in keys]
            answered = wanted.first and any(wait is not None and wait.answer is not None for wait in found)
            lacking = [
                spec
                for spec, wait in zip(wanted.waits, found, strict=True)
                if not (wait is not None and (answered or await self._is_usable(wait)))
            ]
            if lacking:
                group = wanted.waits[0].key if wanted.first and len(wanted.waits) > 1 else None
                await self._open(live, lacking, group)
            known = await self._known(live)
            return contract.Waits(waits=tuple(self._told(known[key]) for key in keys))

    async def _known(self, live: Live) -> dict[str, Wait]:
        """Return all waits of a run by key, the newest of each."""
        if live.waits is None:
            query = contract.ListWaits(run_id=live.run.id, status=None, limit=_ALL)
            live.waits = {wait.key: wait for wait in await self._core.read(self._core.store.waits, query)}
        return live.waits

    async def _is_usable(self, wait: Wait) -> bool:
        """Tell whether a wait need not be opened anew.

        It is where it was cancelled, where a restart forgot its secret answer, and where its child failed and was
        resumed since.
        """
        if wait.child is not None and not stands(wait, await self._core.current(wait.child)):
            return False
        forgotten = wait.is_secret and wait.answer is not None and wait.answer.approved
        return wait.status is not WaitStatus.CANCELLED and not (forgotten and wait.id not in self._secrets)

    def _told(self, wait: Wait) -> Wait:
        """Return a wait as its own run sees it: with a secret answer."""
        if wait.answer is None or wait.id not in self._secrets:
            return wait
        return wait.model_copy(
            update={"answer": wait.answer.model_copy(update={"value": self._secrets[wait.id][1]})}
        )

    async def _open(self, live: Live, specs: Iterable[contract.WaitSpec], group: str | None) -> None:
        """Open waits in one transaction; then answer those for which what they wait for is there already."""
        specs, at = list(specs), self._core.clock.now()
        children = await self._start(live, specs)
        waits, events, new = [], [], []
        for place, (spec, child) in enumerate(zip(specs, children, strict=True)):
            wait = await self._made(live, spec, group, at, child.run.id if child is not None else None)
            wait = wait.model_copy(update={"created_at": at + place * _APART_S})
            if child is not None and child.change is not None:
                new.append(child.change)
                said, facts = started(child.run)
                events.append(self._core.step_event(live.run, Kind.CHILD_STARTED, wait.step, said, facts))
            data = {"wait_id": wait.id, "key": wait.key}
            waits.append(wait)
            events.append(self._core.step_event(live.run, Kind.WAIT_OPENED, wait.step, _asks(wait, at), data))
        async with self._core.born(change.live for change in new):
            await self._core.commit_all([Change(live, tuple(events), waits=tuple(waits)), *new])
        for wait in waits:
            if wait.id not in self._core.waits:
                continue  # one of its group was there before it
            if wait.kind in (WaitKind.EVENT, WaitKind.CHILD):
                await self._offer(live, wait)
            elif wait.due_at is not None and wait.due_at <= at:
                await self.settle(live, wait, WaitAnswer(approved=True, by="timer", at=at), "timer")

    async def _start(self, live: Live, specs: list[contract.WaitSpec]) -> list[Made | None]:
        """Return the runs that waits are for: new ones, or those that were there before."""
        wanted = [spec.start for spec in specs if spec.start is not None]
        step = next((spec.step for spec in specs if spec.start is not None), None)
        made = iter(
            await self._creation.make(wanted, await self._creation.parent(live, step)) if wanted else ()
        )
        found: list[Made | None] = []
        for spec in specs:
            if spec.start is not None:
                found.append(next(made))
            elif spec.child is not None:
                found.append(Made(await self._core.current(spec.child), None))
            else:
                found.append(None)
        for one in found:
            if one is not None:
                self._refuse_circle(live.run, one.run)
        return found

    def _refuse_circle(self, run: Run, child: Run) -> None:
        """Refuse a wait for a run that waits, itself or by way of others, for the one that would wait."""
        ahead, seen = [child.id], set[str]()
        while ahead:
            if (run_id := ahead.pop()) == run.id:
                raise Conflict(
                    f"run {run.short} can't wait for run {child.short}, which waits for it: neither would ever end",
                    todo="let one go on without the other: `trigger` starts a run and waits for nothing",
                )
            if run_id not in seen:
                seen.add(run_id)
                ahead += [wait.child for wait in self._core.open_waits(run_id) if wait.child is not None]

    async def _made(
        self, live: Live, spec: contract.WaitSpec, group: str | None, at: float, child: str | None
    ) -> Wait:
        wait_id = await self._core.new_wait_id()
        deadline_at = spec.deadline_at if spec.deadline_in_s is None else at + spec.deadline_in_s
        if deadline_at is not None and deadline_at <= at:
            raise UsageError(
                f"the deadline of {spec.title!r} was {span(at - deadline_at)} ago",
                todo="give `timeout` a time to come; a datetime without a zone is local time",
            )
        moved = ("due_in_s", "due_at", "deadline_in_s", "deadline_at", "child", "start")
        return Wait(
            id=wait_id,
            run_id=live.run.id,
            created_at=at,
            due_at=spec.due_at if spec.due_in_s is None else at + spec.due_in_s,
            deadline_at=deadline_at,
            remind_at=at + spec.remind_every_s if spec.remind_every_s else None,
            group=group,
            child=child,
            **{name: value for name, value in spec if name not in moved},
        )

    # Reading ---------------------------------------------------------------------------------------------------

    async def list_waits(self, wanted: contract.ListWaits) -> contract.Waits:
        if wanted.run_id is not None:
            wanted = wanted.model_copy(update={"run_id": await self._core.resolve(wanted.run_id)})
        return contract.Waits(waits=tuple(await self._core.read(self._core.store.waits, wanted)))

    async def _wait(self, typed: str) -> Wait:
        wait_id = as_wait_id(typed)
        wait = self._core.waits.get(wait_id) or await self._core.read(self._core.store.wait, wait_id)
        if wait is None:
            raise NotFound(f"there is no wait {typed!r}", todo="`nbdurable waits` lists those that are open")
        return wait

    async def get_wait(self, wanted: contract.ReadWait) -> Wait:
        deadline = hold_deadline(wanted.hold_s)
        while True:
            wait = await self._wait(wanted.wait_id)
            live = self._core.runs.get(wait.run_id)
            if live is None or wait.status is not WaitStatus.OPEN:
                return wait
            changed = live.changed.next()
            if wait.id in self._core.waits and not await self._core.hold(changed, deadline):
                return wait

    # Answering -------------------------------------------------------------------------------------------------

    async def answer_wait(self, wanted: contract.AnswerWait) -> Wait:
        run_id = (await self._wait(wanted.wait_id)).run_id
        async with self._core.locked(run_id) as live:
            wait = await self._wait(wanted.wait_id)
            if not wait.kind.is_for_people:
                raise Conflict(
                    f"{wait.id} is {_a(wait.kind)}: {_BY_ITSELF[wait.kind]}", todo=_ENDS[wait.kind]
                )
            now = self._core.clock.now()
            if wait.status is WaitStatus.OPEN and wait.deadline_at is not None and wait.deadline_at <= now:
                wait = await self._time_out(
                    live, wait
                )  # the tick comes later than the answer, and the time before
            if wait.status is WaitStatus.CANCELLED:
                why = (
                    "another wait came first" if wait.group else f"run {live.run.short} is {live.run.status}"
                )
                raise Conflict(f"{wait.id} is cancelled: {why}")
            if wait.answer is not None:
                if await self._nonce(wait) == wanted.nonce:
                    return wait
                raise AlreadyAnswered(_answered(wait, now), todo="an answer stands; nothing was changed")
            _check_answer(wait, wanted)
            value = wanted.value if wanted.edited else wait.value
            if wait.is_secret and wanted.approved:
                self._secrets[wait.id], value = (wait.run_id, str(value)), None
            answer = WaitAnswer(
                approved=wanted.approved,
                value=value,
                edited=wanted.edited,
                by=wanted.by,
                comment=wanted.comment,
                at=now,
            )
            return await self.settle(live, wait, answer, wanted.nonce)

    async def answer_callback(self, wanted: contract.AnswerCallback) -> contract.Nothing:
        digest = digest_of(wanted.secret)
        wait = next((wait for wait in self._core.waits.values() if wait.callback == digest), None)
        if wait is None:
            raise NotFound(
                "nothing waits for an answer at this address (any more)",
                todo="each callback URL answers one wait, once",
            )
        answer = {name: value for name, value in wanted if name != "secret"}
        await self.answer_wait(contract.AnswerWait(wait_id=wait.id, nonce=f"callback-{digest}", **answer))
        return contract.Nothing()

    async def _nonce(self, wait: Wait) -> str | None:
        async for event in self._core.history(wait.run_id):
            if event.kind == Kind.WAIT_ANSWERED and event.data.get("wait_id") == wait.id:
                return str(event.data.get("nonce"))
        return None

    async def settle(self, live: Live, wait: Wait, answer: WaitAnswer, nonce: str) -> Wait:
        """Record the one answer to a wait, cancel the others of its group, and wake its run if nothing else is open."""
        change = self._settlement(live, [(wait, answer, nonce)])
        await self._core.commit_all([change])
        fault_point("wait-answered")
        if answer.event_seq is not None:
            self._mailbox.take(answer.event_seq, wait.run_id)
        return change.waits[0]

    def _settlement(self, live: Live, answered: list[tuple[Wait, WaitAnswer, str]]) -> Change:
        """Return what answers to waits of a run bring with them."""
        left = {wait.id: wait for wait in self._core.open_waits(live.run.id)}
        events: list[NewEvent] = []
        waits: list[Wait] = []
        said = ""
        for wait, answer, nonce in answered:
            if left.pop(wait.id, None) is None:
                continue  # another one of its group was answered before it
            how = _how(wait, answer)
            data: dict[str, Any] = {"wait_id": wait.id, "nonce": nonce, "approved": answer.approved}
            events.append(
                self._core.step_event(live.run, Kind.WAIT_ANSWERED, wait.step, f"{wait.title} {how}", data)
            )
            said = f"{wait.title!r} {how}"
            update = {"status": WaitStatus.ANSWERED, "answer": answer, "remind_at": None}
            waits.append(wait.model_copy(update=update))
            if wait.group is None:
                continue
            for other in [other for other in left.values() if other.group == wait.group]:
                del left[other.id]
                sentence = f"{other.title} is not waited for any more: {wait.title} came first"
                data = {"wait_id": other.id}
                events.append(
                    self._core.step_event(live.run, Kind.WAIT_CANCELLED, other.step, sentence, data)
                )
                waits.append(other.model_copy(update={"status": WaitStatus.CANCELLED}))
        run = None
        if live.run.status is RunStatus.WAITING and not left:
            reason = f"{said}; waits for a worker"
            run, _ = self._core.moved(live.run, Happening.WAKE, reason)
            events.append(self._core.event(run, Kind.RUN_WOKEN, reason))
        return Change(live, tuple(events), run, tuple(waits))

    # Children ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _awaiting(self, child: Run) -> AsyncIterator[list[Change]]:
        """Hold the runs that wait for a child which ends, and give what its end answers.

        Locks are taken from a child towards those that wait for it; `_refuse_circle` keeps that from biting itself.
        """
        waiting = {self._core.waits[wait_id].run_id for wait_id in self._core.awaited.get(child.id, ())}
        answer = outcome(child, self._core.clock.now())
        async with AsyncExitStack() as held:
            changes = []
            for run_id in sorted(waiting):
                live = await held.enter_async_context(self._core.locked(run_id))
                for_child = [wait for wait in self._core.open_waits(run_id) if wait.child == child.id]
                if for_child:
                    answered = [(wait, answer, _nonce_of(child)) for wait in for_child]
                    changes.append(self._settlement(live, answered))
            yield changes

    # Time --------------------------------------------------------------------------------------------------------

    async def time_over(self, wait_id: str) -> None:
        """Do what time has to do with a wait now: it is over, its deadline has come, or somebody is reminded."""
        if (wait := self._core.waits.get(wait_id)) is None:
            return  # cancelled while others were seen to
        async with self._core.locked(wait.run_id) as live:
            if (wait := self._core.waits.get(wait_id)) is None:
                return
            now = self._core.clock.now()
            if wait.due_at is not None and wait.due_at <= now:
                answer = WaitAnswer(approved=True, value=wait.value, by="timer", at=now)
                await self.settle(live, wait, answer, "timer")
            elif wait.deadline_at is not None and wait.deadline_at <= now:
                await self._time_out(live, wait)
            elif wait.remind_at is not None and wait.remind_at <= now:
                await self._remind(live, wait, now)

    async def _time_out(self, live: Live, wait: Wait) -> Wait:
        """Let time answer a wait: with its default, or with none."""
        default, at = wait.default, self._core.clock.now()
        if default is None:
            answer = WaitAnswer(approved=False, by="deadline", at=at, timed_out=True)
        else:
            value = default.value if default.edited else wait.value
            answer = WaitAnswer(
                approved=default.approved, value=value, edited=default.edited, by="deadline", at=at
            )
        return await self.settle(live, wait, answer, "deadline")

    async def _remind(self, live: Live, wait: Wait, now: float) -> None:
        every_s = wait.remind_every_s or 0.0
        reminded = wait.model_copy(update={"reminders": wait.reminders + 1, "remind_at": now + every_s})
        whom = f" ({', '.join(wait.reviewers)})" if wait.reviewers else ""
        sentence = (
            f"reminder {reminded.reminders}: {wait.title}{whom} waits for {span(now - wait.created_at)}"
        )
        event = self._core.step_event(live.run, Kind.WAIT_REMINDED, wait.step, sentence, {"wait_id": wait.id})
        await self._core.commit(live, (event,), waits=(reminded,))

    # Events ------------------------------------------------------------------------------------------------------

    async def send_event(self, wanted: contract.SendEvent) -> Sent:
        text = json.dumps(wanted.payload, sort_keys=True)
        if len(text) > MAX_PAYLOAD_BYTES:
            raise UsageError(
                f"the payload of {wanted.event!r} has {size(len(text))}; at most {size(MAX_PAYLOAD_BYTES)} can be sent",
                todo="put it into a file, and send where it is",
            )
        digest, now = sha256(text.encode()).hexdigest(), self._core.clock.now()
        async with self._sending:  # keys are looked up and recorded one after the other
            self._mailbox.forget(now)
            kept = self._mailbox.with_key(wanted.event, wanted.idempotency_key, now)
            if kept is not None and kept.digest != digest:
                raise Conflict(
                    f"the idempotency key {wanted.idempotency_key!r} of {wanted.event!r} was used with another "
                    f"payload {span(now - kept.at)} ago",
                    todo="give another event another key; nothing was sent",
                )
            if kept is None:
                self._refuse_misfit(wanted)
                kept = await self._keep(wanted, digest, now)
        for wait in self._waiting_for(wanted.event):
            try:
                async with self._core.locked(wait.run_id) as live:
                    await self._give(live, wait, kept, wanted.payload)
            except StoreError:  # it is sent all the same; the next ticks try again
                self._core.to_offer.add(wait.id)
        return kept.sent()

    async def _keep(self, wanted: contract.SendEvent, digest: str, now: float) -> Kept:
        """Make an event durable, and remember it."""
        key, expires_at = wanted.idempotency_key, now + wanted.ttl_s
        data = data_of(wanted.event, wanted.payload, key, digest, expires_at, wanted.by)
        sentence = f"event {wanted.event} was sent" + (f" by {wanted.by}" if wanted.by else "")
        event = NewEvent(now, _PROJECT, 0, Kind.EVENT_SENT, sentence, data=data)
        kept = Kept(await self._core.record(event), wanted.event, now, expires_at, key, digest)
        self._mailbox.keep(kept)
        fault_point("event-sent")
        return kept

    def _waiting_for(self, event: str) -> list[Wait]:
        """Return the open waits for an event, oldest first."""
        found = (wait for wait in self._core.waits.values() if wait.event == event)
        return sorted(found, key=lambda wait: (wait.created_at, wait.id))

    def _refuse_misfit(self, wanted: contract.SendEvent) -> None:
        """Refuse an event that runs wait for, but as nobody can use it."""
        waiting = [w for w in self._waiting_for(wanted.event) if matches(wanted.payload, w.match)]
        said = [misfit(wanted.payload, wait.form) if wait.form is not None else "" for wait in waiting]
        if said and all(said):
            run = waiting[0].run_id[-8:]
            raise UsageError(
                f"the payload of {wanted.event!r} is not what run {run} waits for: {said[0]}",
                todo=f"nothing was sent; `nbdurable waits --json` shows the schema of {waiting[0].id}",
            )

    async def _offer(self, live: Live, wait: Wait) -> None:
        """Let a wait take what is there already: its child's end, or the oldest event that was sent and fits it."""
        if wait.child is not None:
            child = await self._core.current(wait.child)
            if child.status.is_final:
                await self.settle(live, wait, outcome(child, self._core.clock.now()), _nonce_of(child))
            return
        assert wait.event is not None
        for kept in self._mailbox.for_run(wait.event, wait.run_id, self._core.clock.now()):
            (stored,) = await self._core.read(self._core.store.events, _PROJECT, kept.seq - 1, 1)
            await self._give(live, wait, kept, stored.data["payload"])
            if wait.id not in self._core.waits:
                return

    async def _give(self, live: Live, wait: Wait, kept: Kept, payload: Any) -> None:
        """Answer an open wait with an event, if its run has not taken that one yet and it fits."""
        if (current := self._core.waits.get(wait.id)) is None or wait.run_id in kept.runs:
            return
        if not matches(payload, current.match):
            return
        now = self._core.clock.now()
        if current.deadline_at is not None and current.deadline_at <= now:
            return  # the next tick says so
        if current.form is not None and (said := misfit(payload, current.form)):
            await self._note_misfit(live, current, kept, said)
            return
        answer = WaitAnswer(approved=True, value=payload, by="event", at=now, event_seq=kept.seq)
        await self.settle(live, current, answer, f"event-{kept.seq}")

    async def _note_misfit(self, live: Live, wait: Wait, kept: Kept, said: str) -> None:
        if kept.seq <= wait.misfit_seq:
            return  # it was said before the coordinator restarted
        sentence = f"{wait.title}: an event was kept out, its payload is not what is waited for: {said}"
        data = {"wait_id": wait.id, "event_seq": kept.seq}
        event = self._core.step_event(live.run, Kind.WAIT_MISFIT, wait.step, sentence, data)
        noted = wait.model_copy(update={"misfit_seq": kept.seq})
        await self._core.commit(live, (event,), waits=(noted,))

    async def catch_up(self) -> None:
        """Let waits that were open at the start take what was there before it: a crash may have come between.

        Secret answers of runs that have ended are forgotten.
        """
        for wait_id in [one for one, (run_id, _) in self._secrets.items() if run_id not in self._core.runs]:
            del self._secrets[wait_id]
        while self._core.to_offer:
            wait_id = next(iter(self._core.to_offer))
            if (wait := self._core.waits.get(wait_id)) is not None:
                async with self._core.locked(wait.run_id) as live:
                    await self._offer(live, wait)
            self._core.to_offer.discard(wait_id)


# Rules -----------------------------------------------------------------------------------------------------------

_BY_ITSELF = {
    WaitKind.TIMER: "it is over by itself",
    WaitKind.EVENT: "it waits for something that is sent",
    WaitKind.CHILD: "it is over when that run is",
}
_ENDS = {
    WaitKind.TIMER: "cancel the run to end it now",
    WaitKind.EVENT: "`nbdurable send EVENT [JSON]` sends it",
    WaitKind.CHILD: "see to that run",
}


def _nonce_of(child: Run) -> str:
    return f"child-{child.id}-{child.epoch}"


def _a(kind: WaitKind) -> str:
    return {WaitKind.EVENT: "a wait for an event", WaitKind.CHILD: "a wait for another run"}.get(
        kind, f"a {kind}"
    )


def _check(spec: contract.WaitSpec) -> None:
    """Refuse a wait that could never be answered rightly; raises UsageError."""
    timer = spec.kind is WaitKind.TIMER
    if timer != (spec.due_in_s is not None or spec.due_at is not None):
        raise UsageError(
            "a timer, and only a timer, has a time after which it is over", todo="set `due_in_s`"
        )
    if (spec.kind is WaitKind.EVENT) != (spec.event is not None):
        raise UsageError("a wait for an event, and only that, names an event", todo="set `event`")
    if (spec.kind is WaitKind.CHILD) != (spec.child is not None or spec.start is not None):
        raise UsageError("a wait for a run, and only that, names one", todo="set `child` or `start`")
    if spec.form is not None:
        if said := bad_schema(spec.form):
            raise UsageError(f"the form of {spec.title!r} is no JSON schema: {said}")
        default = spec.default
        if default is not None and default.approved:
            value = default.value if default.edited else spec.value
            if said := misfit(value, spec.form):
                raise UsageError(
                    f"what the deadline of {spec.title!r} would answer does not fit: {said}",
                    todo="let `default` fit what is asked for",
                )


def _check_answer(wait: Wait, wanted: contract.AnswerWait) -> None:
    """Refuse an answer by somebody who was not asked, or whose value does not fit; raises UsageError."""
    name = wanted.by.removesuffix(" (dashboard)")
    if wait.reviewers and name not in wait.reviewers:
        raise UsageError(
            f"{name or 'nobody'} is not asked for {wait.title!r}: its reviewers are {', '.join(wait.reviewers)}",
            todo="nothing was answered; `--by NAME` says who you are",
        )
    if wait.form is None or not wanted.approved:
        return
    if said := misfit(wanted.value if wanted.edited else wait.value, wait.form):
        shown = "" if wait.is_secret else f": {said}"
        raise UsageError(
            f"this is no answer to {wait.title!r}{shown}",
            todo=f'nothing was answered; `nbdurable answer {wait.id} "TEXT"` takes text'
            if wait.kind is WaitKind.QUESTION
            else f"nothing was answered; `nbdurable approve {wait.id} --value JSON` takes what fits",
        )


def _asks(wait: Wait, now: float) -> str:
    match wait.kind:
        case WaitKind.TIMER:
            sentence = f"waits {max(0.0, (wait.due_at or now) - now):g} s: {wait.title}"
        case WaitKind.EVENT:
            sentence = f"waits for the event {wait.event}"
        case WaitKind.QUESTION:
            sentence = f"asks: {wait.title}"
        case WaitKind.CHILD:
            sentence = f"waits for a run: {wait.title}"
        case WaitKind.APPROVAL:
            sentence = f"asks for approval: {wait.title}"
    return sentence


def _how(wait: Wait, answer: WaitAnswer) -> str:
    """Say how a wait ended."""
    if answer.timed_out:
        return "was not answered in time"
    match wait.kind:
        case WaitKind.TIMER:
            return "is over"
        case WaitKind.CHILD:
            return "has completed" if answer.approved else f"is {(answer.value or {}).get('status', 'over')}"
        case WaitKind.EVENT:
            return "came" if answer.by == "event" else "did not come in time: its default counts"
        case WaitKind.QUESTION:
            return f"was {'answered' if answer.approved else 'rejected'} by {answer.by}"
        case WaitKind.APPROVAL:
            return f"was {_verdict(answer)} by {answer.by}"


def _verdict(answer: WaitAnswer) -> str:
    if not answer.approved:
        return "rejected"
    return "approved with changes" if answer.edited else "approved"


def _answered(wait: Wait, now: float) -> str:
    answer = wait.answer
    assert answer is not None
    ago_s = max(0, round(now - answer.at))
    comment = f", saying {answer.comment!r}" if answer.comment else ""
    return f"{wait.id} ({wait.title}) {_how(wait, answer)} {ago_s} s ago{comment}"
