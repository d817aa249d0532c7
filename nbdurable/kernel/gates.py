"""A gate: the one or more waits that a statement opens together, and how the cell waits there.

Owns keys, opening, cards, suspension and watching. Before a gate opens, what the cell did so far is checkpointed, so
that nothing above the gate's statement runs twice. Knows nothing of what an answer means (`waits.py`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nbdurable import contract
from nbdurable.checkpoint.plan import digest
from nbdurable.contract import WaitSpec
from nbdurable.errors import DurableError, Suspended, WaitTimeout
from nbdurable.kernel import display, extension
from nbdurable.kernel.execution import TICK_S, Execution
from nbdurable.kernel.interrupts import shown_as, uninterrupted
from nbdurable.kernel.limits import paused
from nbdurable.kernel.session import Session, required
from nbdurable.models import Wait, WaitAnswer, WaitKind, WaitStatus
from nbdurable.security import callback_secret, digest_of
from nbdurable.telemetry import fault_point

T = TypeVar("T")

_HOLD_S = 5.0
_SAID = 3  # waits that are named where there are many
_IN_PLACE_S = 2.0  # a shorter sleep costs less than another kernel


@dataclass(frozen=True)
class Unopened:
    """A wait that is not open yet, as `approval`, `event` and `timer` describe it: for `first_of` and `all_of`.

    `proposal` tells it from other waits of its statement. `result` turns the answer into what the notebook gets.
    `opened`: called with the wait when it is open, and again if the cell comes back while it still is.
    """

    spec: WaitSpec
    proposal: str
    result: Callable[[WaitAnswer], Any]
    opened: Callable[[Wait, str], None] | None = None

    def outcome(self, wait: Wait) -> Any:
        """Return what an answered wait gives; raises WaitTimeout where time had no default."""
        answer = wait.answer
        if answer is None:
            raise DurableError(
                f"`{wait.title}` was cancelled with its run", todo="`%durable new` starts another run"
            )
        if answer.timed_out:
            raise WaitTimeout(
                f"nobody answered `{wait.title}` until {display.clock(wait.deadline_at or answer.at)}",
                todo="catch WaitTimeout (a TimeoutError), or say what counts then: `default=`",
            )
        return self.result(answer)


class Gate:
    """The waits that the cell which runs now opens together.

    `first`: one answer is enough. `title` names the gate where it holds more than one wait.
    """

    def __init__(self, waits: Sequence[Unopened], *, first: bool = False) -> None:
        self.session: Session = required()
        self.members, self.first = waits, first
        steps = extension.steps()
        self.execution: Execution | None = steps.execution if steps else None
        cell = steps.cell if steps else None
        self._cell_id = (cell.id if cell else None) or "cell"
        self._cards: dict[str, str] = {}  # wait id → id of its display

    # What the public functions do with it

    def wait(self) -> list[Wait]:
        """Open the gate and wait there; return the waits, answered or (of `first`) cancelled."""
        waits = self._begin()
        if self._holds(waits):
            waits = _Watch(self.session, waits).result()
        return self._end(waits)

    async def wait_async(self) -> list[Wait]:
        """Open the gate and wait there; other tasks of the cell go on meanwhile. See `wait`."""
        waits = self._begin()
        if self._holds(waits):
            waits = await _Watch(self.session, waits).result_async()
        return self._end(waits)

    # Its parts

    def _begin(self) -> list[Wait]:
        """Open it; ends the cell with a control signal where the run is headless and has to wait for long."""
        waits = self._open()
        if self._holds(waits):
            for wait, member in zip(waits, self.members, strict=True):
                if wait.kind is WaitKind.APPROVAL and wait.status is WaitStatus.OPEN:
                    self._show(wait)
                if member.opened is not None and wait.status is WaitStatus.OPEN:
                    member.opened(wait, self._secret(wait.key))
            if not self._is_short(waits):
                self._suspend_if_headless(waits)
        return waits

    def _open(self) -> list[Wait]:
        """Open the waits, or find those that this gate had; what came before it is checkpointed first."""
        session = self.session
        with uninterrupted():
            key = self._key()
            keys = [key] if len(self.members) == 1 else [f"{key}/{n}" for n in range(len(self.members))]
            specs = tuple(
                member.spec.model_copy(
                    update={
                        "key": own,
                        "step": self.execution.name if self.execution else None,
                        "callback": digest_of(self._secret(own))
                        if member.spec.callback is not None
                        else None,
                    }
                )
                for own, member in zip(keys, self.members, strict=True)
            )
            question = contract.OpenGate(
                run_id=session.run_id, epoch=session.epoch, waits=specs, first=self.first
            )
            waits = list(session.client.call(contract.OPEN_GATE, question).waits)
            fault_point("wait-opened")
        return waits

    def _key(self) -> str:
        proposal = digest(*(member.proposal for member in self.members))
        if self.execution is not None:
            return self.execution.gate(proposal)
        return counted(digest("cell", self._cell_id, proposal))

    def _secret(self, key: str) -> str:
        """Return the secret of a wait's callback URL: the key's holder can make it again, nobody else."""
        return callback_secret(self.session.key, self.session.run_id, key)

    def _holds(self, waits: Sequence[Wait]) -> bool:
        """Tell whether an answer is lacking."""
        is_open = [wait.status is WaitStatus.OPEN for wait in waits]
        return all(is_open) if self.first else any(is_open)

    def _is_short(self, waits: Sequence[Wait]) -> bool:
        """Tell whether time ends it so soon that another kernel would cost more."""
        lengths = [_length_s(wait) for wait in waits if wait.status is WaitStatus.OPEN]
        return (min if self.first else max)(lengths) < _IN_PLACE_S

    def _show(self, wait: Wait) -> None:
        """Display the card; after the decision the same display says who decided what and when."""
        self._cards[wait.id] = f"nbdurable-{wait.id}"
        data = display.card(wait, self.session.home)
        self.session.shell.display_pub.publish(data, {}, transient={"display_id": self._cards[wait.id]})

    def _suspend_if_headless(self, waits: Sequence[Wait]) -> None:
        """End the cell with a control signal where the run is headless, or is only brought into this kernel."""
        if not (self.session.headless or self.session.bringing):
            return
        said = [_waits_for(wait) for wait in waits if wait.status is WaitStatus.OPEN]
        said = said if len(said) <= _SAID else [*said[:_SAID], f"{len(said) - _SAID} more"]
        between = " or " if self.first else ", and "
        name = self.execution.name if self.execution else "this cell"
        signal = Suspended(f"⏸ {name} {between.join(said)}")
        if self.execution is not None:
            self.execution.signal = signal
        raise signal

    def _end(self, waits: list[Wait]) -> list[Wait]:
        """Show who decided what."""
        for wait in waits:
            if wait.kind is not WaitKind.APPROVAL or (wait.answer is None and wait.id not in self._cards):
                continue
            data, publish = display.card(wait, self.session.home), self.session.shell.display_pub.publish
            if (card := self._cards.get(wait.id)) is None:
                publish(data, {})
            else:
                publish(data, {}, transient={"display_id": card}, update=True)
        return waits


def counted(key: str) -> str:
    """Number the gates of one plain cell that propose the same."""
    steps = extension.steps()
    cell = steps.cell if steps else None
    if cell is None:
        return key
    cell.gates[key] = cell.gates.get(key, 0) + 1
    return digest(key, str(cell.gates[key]))


def _length_s(wait: Wait) -> float:
    """Return how long time lets a wait last from its beginning."""
    return float("inf") if wait.due_at is None else wait.due_at - wait.created_at


def _waits_for(wait: Wait) -> str:
    match wait.kind:
        case WaitKind.TIMER:
            return f"sleeps until {display.clock(wait.due_at)}" if wait.due_at else "sleeps"
        case WaitKind.APPROVAL:
            return f"waits for approval {wait.title!r}  →  nbdurable approve {wait.id}"
        case WaitKind.QUESTION:
            return f"asks {wait.title!r}  →  nbdurable answer {wait.id}"
        case WaitKind.EVENT:
            return f"waits for the event {wait.event!r}  →  nbdurable send {wait.event}"
        case WaitKind.CHILD:
            return f"waits for {wait.title}"


# One generator that blocking and awaitable calls drive, so that nothing is written twice.

Steps = Generator[Gate, list[Wait], T]


def drive(steps: Steps[T]) -> T:
    """Wait at each gate that `steps` yields, and send it the answers; return its result."""
    try:
        gate = next(steps)
        while True:
            gate = steps.send(gate.wait())
    except StopIteration as end:
        result: T = end.value
        return result


async def drive_async(steps: Steps[T]) -> T:
    """Wait at each gate that `steps` yields, while other tasks of the cell go on. See `drive`."""
    try:
        gate = next(steps)
        while True:
            gate = steps.send(await gate.wait_async())
    except StopIteration as end:
        result: T = end.value
        return result


class _Watch:
    """Follows waits in a thread until none is open any more, so that the cell stays interruptible.

    Of a group all are closed by its first answer.
    """

    def __init__(self, session: Session, waits: Sequence[Wait]) -> None:
        self._session, self._waits = session, list(waits)
        self._answered = threading.Event()
        self._left = threading.Event()
        self._error: DurableError | None = None
        name = f"nbdurable-wait-{waits[0].id}"
        threading.Thread(target=self._follow, name=name, daemon=True).start()

    def _follow(self) -> None:
        client = self._session.new_client()
        try:
            for place in range(len(self._waits)):
                while not self._left.is_set() and self._waits[place].status is WaitStatus.OPEN:
                    question = contract.ReadWait(wait_id=self._waits[place].id, hold_s=_HOLD_S)
                    self._waits[place] = client.call(contract.GET_WAIT, question)
                    if self._session.trouble is not None:
                        raise self._session.trouble
        except DurableError as error:
            self._error = error
        self._answered.set()

    def result(self) -> list[Wait]:
        try:
            with paused():
                while not self._answered.wait(TICK_S):
                    pass
        except KeyboardInterrupt as interrupt:
            raise shown_as(interrupt, f"KeyboardInterrupt: {self._still()}")  # noqa: B904  the same one
        finally:
            self._left.set()
        return self._outcome()

    async def result_async(self) -> list[Wait]:
        try:
            with paused():
                while not self._answered.is_set():
                    await asyncio.sleep(TICK_S)
        except asyncio.CancelledError as interrupt:
            raise shown_as(interrupt, f"CancelledError: {self._still()}")  # noqa: B904  the same one
        finally:
            self._left.set()
        return self._outcome()

    def _still(self) -> str:
        left = [wait for wait in self._waits if wait.status is WaitStatus.OPEN] or self._waits
        asked = [wait.id for wait in left if wait.kind is WaitKind.APPROVAL]
        if asked:
            return f"approval {', '.join(asked)} stays open; run the cell again to wait for the answer"
        if all(wait.kind is WaitKind.TIMER for wait in left):
            return "its time goes on; run the cell again to wait for its end"
        return f"{left[0].title} is waited for on; run the cell again to go on with it"

    def _outcome(self) -> list[Wait]:
        if self._error is not None:
            raise self._error
        return self._waits
