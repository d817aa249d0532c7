"""Waits: opened once, answered once, by a person or by time.

Owns the rules of guarantee 5; an answer and the run's waking are one transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nbdurable import contract
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Core, hold_deadline
from nbdurable.coordinator.fold import Kind
from nbdurable.coordinator.names import as_wait_id, new_wait_id
from nbdurable.coordinator.state import Live
from nbdurable.errors import AlreadyAnswered, Conflict, NotFound, UsageError
from nbdurable.lifecycle import Happening
from nbdurable.models import (
    RunStatus,
    Wait,
    WaitAnswer,
    WaitKind,
    WaitStatus,
)

_ALL = 1_000_000_000


class Waits:
    """What is asked about waits, and timers."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.OPEN_WAIT: self.open_wait,
            contract.LIST_WAITS: self.list_waits,
            contract.GET_WAIT: self.get_wait,
            contract.ANSWER_WAIT: self.answer_wait,
        }

    async def open_wait(self, wanted: contract.OpenWait) -> Wait:
        timer = wanted.kind is WaitKind.TIMER
        if timer != (wanted.due_in_s is not None):
            raise UsageError(
                "a timer, and only a timer, has a time after which it is over", todo="set `due_in_s`"
            )
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            if live.waits is None:
                query = contract.ListWaits(run_id=live.run.id, status=None, limit=_ALL)
                live.waits = {wait.key: wait for wait in await self._core.read(self._core.store.waits, query)}
            known = live.waits.get(wanted.key)
            if known is not None and known.status is not WaitStatus.CANCELLED:
                return known
            at = self._core.clock.now()
            wait_id = new_wait_id()
            while (
                wait_id in self._core.waits
                or await self._core.read(self._core.store.wait, wait_id) is not None
            ):
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
            event = self._core.step_event(
                live.run, Kind.WAIT_OPENED, wanted.step, sentence, {"wait_id": wait.id, "key": wait.key}
            )
            await self._core.commit(live, (event,), waits=(wait,))
            return wait

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

    async def answer_wait(self, wanted: contract.AnswerWait) -> Wait:
        run_id = (await self._wait(wanted.wait_id)).run_id
        async with self._core.locked(run_id) as live:
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
                    _answered(wait, self._core.clock.now()), todo="an answer stands; nothing was changed"
                )
            answer = WaitAnswer(
                approved=wanted.approved,
                value=wanted.value if wanted.edited else wait.value,
                edited=wanted.edited,
                by=wanted.by,
                comment=wanted.comment,
                at=self._core.clock.now(),
            )
            return await self._settle(live, wait, answer, wanted.nonce)

    async def _nonce(self, wait: Wait) -> str | None:
        async for event in self._core.history(wait.run_id):
            if event.kind == Kind.WAIT_ANSWERED and event.data.get("wait_id") == wait.id:
                return str(event.data.get("nonce"))
        return None

    async def _settle(self, live: Live, wait: Wait, answer: WaitAnswer, nonce: str) -> Wait:
        """Record the one answer to a wait, and wake its run with it if nothing else is open."""
        settled = wait.model_copy(update={"status": WaitStatus.ANSWERED, "answer": answer})
        how = "is over" if wait.kind is WaitKind.TIMER else f"was {_verdict(answer)} by {answer.by}"
        data = {"wait_id": wait.id, "nonce": nonce, "approved": answer.approved}
        sentence = f"{wait.title} {how}"
        events = [self._core.step_event(live.run, Kind.WAIT_ANSWERED, wait.step, sentence, data)]
        run = None
        if live.run.status is RunStatus.WAITING and len(self._core.waits_of.get(wait.run_id, ())) <= 1:
            reason = f"{wait.title!r} {how}; waits for a worker"
            run, _ = self._core.moved(live.run, Happening.WAKE, reason)
            events.append(self._core.event(run, Kind.RUN_WOKEN, reason))
        await self._core.commit(live, events, run=run, waits=(settled,))
        return settled

    async def time_over(self, wait_id: str) -> None:
        if (wait := self._core.waits.get(wait_id)) is None:
            return  # cancelled while others were seen to
        async with self._core.locked(wait.run_id) as live:
            if (wait := self._core.waits.get(wait_id)) is not None:
                answer = WaitAnswer(approved=True, value=wait.value, by="timer", at=self._core.clock.now())
                await self._settle(live, wait, answer, "timer")


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
