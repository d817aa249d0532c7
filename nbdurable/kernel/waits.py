"""Gates in a notebook: a person's approval, or a moment in time.

Owns `approve`, `sleep` and `Decision`. Before a gate opens, what the cell did so far is checkpointed, so that
nothing above the gate's statement runs twice. Headless, the gate suspends the run and gives the kernel back;
interactive, the cell waits, and any route may answer (CLI, page, API).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from nbdurable import contract
from nbdurable.checkpoint.fingerprint import Unfingerprintable, fingerprint
from nbdurable.checkpoint.plan import digest
from nbdurable.checkpoint.preview import describe
from nbdurable.errors import DurableError, Suspended
from nbdurable.kernel import display, extension
from nbdurable.kernel.execution import TICK_S, Execution
from nbdurable.kernel.session import Session, required
from nbdurable.kernel.step import shown_as, uninterrupted
from nbdurable.models import Wait, WaitKind, WaitStatus
from nbdurable.policies import seconds
from nbdurable.telemetry import fault_point

_HOLD_S = 5.0
_IN_PLACE_S = 2.0  # a shorter sleep costs less than another kernel
_MAX_VALUE_BYTES = 256_000  # of a value shown whole to whoever decides


@dataclass(frozen=True)
class Decision:
    """A person's answer to an approval; true if approved.

    `value` is the proposed value, or the edited one. `by`, `comment`, `at`: who decided, why, and when.
    """

    approved: bool
    value: Any
    by: str
    comment: str
    at: datetime

    def __bool__(self) -> bool:
        return self.approved


def approve(value: Any, *, title: str = "Approve?", tags: Iterable[str] = ()) -> Decision:
    """Ask a person to approve a value, and wait for the answer.

    Headless, the run is suspended (status `waiting`) and its kernel is given back; once somebody answers, the run
    goes on at the statement that holds this call. Interactive, the cell waits; interrupted, the approval stays
    open, and the next run of the cell picks the answer up. `value` is shown to the person, and may be edited if it
    is JSON. Raises UsageError outside a notebook with `%load_ext nbdurable`.
    """
    gate = _Gate.approval(value, title, tags)
    wait = gate.open()
    if wait.status is WaitStatus.OPEN:
        gate.show(wait)
        gate.suspend_if_headless(wait, f"waits for approval {title!r}  →  nbdurable approve {wait.id}")
        wait = _watch(gate.session, wait).result()
    return gate.decision(wait, value)


async def approve_async(value: Any, *, title: str = "Approve?", tags: Iterable[str] = ()) -> Decision:
    """Ask a person to approve a value; other tasks of the cell go on meanwhile. See `approve`."""
    gate = _Gate.approval(value, title, tags)
    wait = gate.open()
    if wait.status is WaitStatus.OPEN:
        gate.show(wait)
        gate.suspend_if_headless(wait, f"waits for approval {title!r}  →  nbdurable approve {wait.id}")
        wait = await _watch(gate.session, wait).result_async()
    return gate.decision(wait, value)


def sleep(duration: str | float | timedelta) -> None:
    """Wait for a time that survives crashes and restarts: seconds, a timedelta, or `30s`, `10m`, `2h`, `3d`.

    Headless, a sleep of two seconds or more gives the kernel back.
    """
    gate, wait = _begin_sleep(duration)
    if wait.status is WaitStatus.OPEN:
        wait = _watch(gate.session, wait).result()
    gate.passed(wait)


async def sleep_async(duration: str | float | timedelta) -> None:
    """Wait for a time that survives crashes and restarts; other tasks of the cell go on meanwhile. See `sleep`."""
    gate, wait = _begin_sleep(duration)
    if wait.status is WaitStatus.OPEN:
        wait = await _watch(gate.session, wait).result_async()
    gate.passed(wait)


def _begin_sleep(duration: str | float | timedelta) -> tuple[_Gate, Wait]:
    due_in_s = seconds(duration)
    text = str(duration) if isinstance(duration, str | timedelta) else f"{due_in_s:g} s"
    gate = _Gate(required(), WaitKind.TIMER, f"sleep {text}", f"sleep:{due_in_s}", {"due_in_s": due_in_s})
    wait = gate.open()
    if wait.status is WaitStatus.OPEN and due_in_s >= _IN_PLACE_S:
        until = display.clock(wait.due_at) if wait.due_at else text
        gate.suspend_if_headless(wait, f"sleeps until {until}")
    return gate, wait


class _Gate:
    """One wait of the cell that runs now: its key, its opening, its card."""

    def __init__(
        self, session: Session, kind: WaitKind, title: str, proposal: str, more: dict[str, Any]
    ) -> None:
        self.session, self.kind, self.title, self.more = session, kind, title, more
        steps = extension.steps()
        self.execution: Execution | None = steps.execution if steps else None
        cell = steps.cell if steps else None
        self.cell_id = (cell.id if cell else None) or "cell"
        self.proposal = proposal
        self._card_id: str | None = None

    @classmethod
    def approval(cls, value: Any, title: str, tags: Iterable[str]) -> _Gate:
        session = required()
        try:
            proposal = fingerprint(value, session.values)
        except Unfingerprintable:
            proposal = ""
        kind, shape, preview = describe(value)
        shown = value if isinstance(value, str) else preview or shape or kind
        if len(shown) > _MAX_VALUE_BYTES:
            shown = shown[:_MAX_VALUE_BYTES] + "\n… (cut)"
        more = {"preview": shown, "tags": tuple(tags), "value": _as_json(value)}
        return cls(session, WaitKind.APPROVAL, title, f"approval:{title}:{proposal}", more)

    def open(self) -> Wait:
        """Open the wait, or find the one that this gate had; what came before it is checkpointed first."""
        session = self.session
        with uninterrupted():
            key = self._key()
            question = contract.OpenWait(
                run_id=session.run_id,
                epoch=session.epoch,
                key=key,
                kind=self.kind,
                title=self.title,
                step=self.execution.name if self.execution else None,
                **self.more,
            )
            wait = session.client.call(contract.OPEN_WAIT, question)
            fault_point("wait-opened")
        return wait

    def _key(self) -> str:
        proposal = digest(self.proposal)
        if self.execution is not None:
            return self.execution.gate(proposal)
        return _counted(digest("cell", self.cell_id, proposal))

    def show(self, wait: Wait) -> None:
        """Display the card; after the decision the same display says who decided what and when."""
        self._card_id = f"nbdurable-{wait.id}"
        data = display.card(wait, self.session.home)
        self.session.shell.display_pub.publish(data, {}, transient={"display_id": self._card_id})

    def suspend_if_headless(self, wait: Wait, sentence: str) -> None:
        """End the cell with a control signal where the run is headless."""
        if self.session.headless:
            signal = Suspended(f"⏸ {self.execution.name if self.execution else 'this cell'} {sentence}")
            if self.execution is not None:
                self.execution.signal = signal
            raise signal

    def decision(self, wait: Wait, value: Any) -> Decision:
        """Show who decided, and turn the answer into a Decision."""
        answer = self.passed(wait)
        data = display.card(wait, self.session.home)
        if self._card_id is None:
            self.session.shell.display_pub.publish(data, {})
        else:
            transient = {"display_id": self._card_id}
            self.session.shell.display_pub.publish(data, {}, transient=transient, update=True)
        return Decision(
            approved=answer.approved,
            value=answer.value if answer.edited else value,
            by=answer.by,
            comment=answer.comment,
            at=datetime.fromtimestamp(answer.at).astimezone(),
        )

    def passed(self, wait: Wait) -> Any:
        """Return the answer; raises DurableError where the wait was cancelled."""
        if wait.answer is None:
            raise DurableError(
                f"`{wait.title}` was cancelled with its run", todo="`%durable new` starts another run"
            )
        return wait.answer


def _counted(key: str) -> str:
    """Number the gates of one plain cell that propose the same."""
    steps = extension.steps()
    cell = steps.cell if steps else None
    if cell is None:
        return key
    cell.gates[key] = cell.gates.get(key, 0) + 1
    return digest(key, str(cell.gates[key]))


def _as_json(value: Any) -> Any:
    """Return a value that is JSON, and small enough to be edited; else None."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if len(text) <= _MAX_VALUE_BYTES and json.loads(text) == value else None


class _watch:
    """Follows a wait in a thread until it is answered, so that the cell stays interruptible."""

    def __init__(self, session: Session, wait: Wait) -> None:
        self._session, self._wait = session, wait
        self._answered = threading.Event()
        self._left = threading.Event()
        self._error: DurableError | None = None
        threading.Thread(target=self._follow, name=f"nbdurable-wait-{wait.id}", daemon=True).start()

    def _follow(self) -> None:
        client = self._session.new_client()
        while not self._left.is_set() and self._wait.status is WaitStatus.OPEN:
            try:
                question = contract.ReadWait(wait_id=self._wait.id, hold_s=_HOLD_S)
                self._wait = client.call(contract.GET_WAIT, question)
                if self._session.trouble is not None:
                    raise self._session.trouble
            except DurableError as error:
                self._error = error
                break
        self._answered.set()

    def result(self) -> Wait:
        try:
            while not self._answered.wait(TICK_S):
                pass
        except KeyboardInterrupt as interrupt:
            raise shown_as(interrupt, f"KeyboardInterrupt: {self._still()}")  # noqa: B904  the same one
        finally:
            self._left.set()
        return self._outcome()

    async def result_async(self) -> Wait:
        try:
            while not self._answered.is_set():
                await asyncio.sleep(TICK_S)
        except asyncio.CancelledError as interrupt:
            raise shown_as(interrupt, f"CancelledError: {self._still()}")  # noqa: B904  the same one
        finally:
            self._left.set()
        return self._outcome()

    def _still(self) -> str:
        if self._wait.kind is WaitKind.TIMER:
            return "its time goes on; run the cell again to wait for its end"
        return f"approval {self._wait.id} stays open; run the cell again to wait for the answer"

    def _outcome(self) -> Wait:
        if self._error is not None:
            raise self._error
        return self._wait
