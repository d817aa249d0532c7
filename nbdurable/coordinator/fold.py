"""A run's steps as the fold of its events; the kinds of events.

Pure: no clock, no I/O. Used for the runs in memory, one event at a time, and for history.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from nbdurable import spending
from nbdurable.models import (
    Attempt,
    ErrorInfo,
    Event,
    ModelUse,
    Step,
    StepStatus,
    Usage,
    Variable,
)


class Kind(StrEnum):
    """What a line of history tells, in the past tense."""

    RUN_CREATED = "run_created"
    RUN_LEASED = "run_leased"
    RUN_TAKEN_OVER = "run_taken_over"
    RUN_SUSPENDED = "run_suspended"
    RUN_WOKEN = "run_woken"
    RUN_COMPLETED = "run_completed"
    RUN_FAILED = "run_failed"
    RUN_DUE = "run_due"
    RUN_EXPIRED = "run_expired"
    RUN_RETRIED = "run_retried"
    RUN_TIMED_OUT = "run_timed_out"
    RUN_PAUSED = "run_paused"
    RUN_RELEASED = "run_released"
    RUN_LOST = "run_lost"
    RUN_LEFT = "run_left"
    RUN_POISONED = "run_poisoned"
    RUN_CANCEL_REQUESTED = "run_cancel_requested"
    RUN_CANCELLED = "run_cancelled"
    RUN_RESUMED = "run_resumed"
    RUN_CLOSED = "run_closed"
    RUN_HANDED_OVER = "run_handed_over"
    RUN_REPAIRED = "run_repaired"
    RUN_DELAYED = "run_delayed"
    BUDGET_SET = "budget_set"
    RUN_PUT_OFF = "run_put_off"
    CHILD_STARTED = "child_started"
    RESULT_SET = "result_set"
    METADATA_CHANGED = "metadata_changed"
    LOGGED = "logged"
    HOOK_BEGUN = "hook_begun"
    HOOK_RAN = "hook_ran"
    HOOK_FAILED = "hook_failed"
    STEP_STARTED = "step_started"
    STEP_RESTORED = "step_restored"
    STEP_COMPLETED = "step_completed"
    STEP_WAITING = "step_waiting"
    STEP_REPLAY = "step_replay"
    STEP_FAILED = "step_failed"
    CALL_COMPLETED = "call_completed"
    STEP_SHARED = "step_shared"  # a fork keeps the checkpoint of the run that it comes from
    STEP_MARKED = "step_marked"  # a person did it by hand
    STEP_SET_ASIDE = "step_set_aside"  # a repair lets it run again
    CHECKPOINTS_REMOVED = "checkpoints_removed"
    WAIT_OPENED = "wait_opened"
    WAIT_ANSWERED = "wait_answered"
    WAIT_CANCELLED = "wait_cancelled"
    WAIT_REMINDED = "wait_reminded"
    WAIT_MISFIT = "wait_misfit"
    EVENT_SENT = "event_sent"


END_OF_DRIVING = frozenset(
    {
        Kind.RUN_TAKEN_OVER,
        Kind.RUN_SUSPENDED,
        Kind.RUN_COMPLETED,
        Kind.RUN_FAILED,
        Kind.RUN_RETRIED,
        Kind.RUN_TIMED_OUT,
        Kind.RUN_PAUSED,
        Kind.RUN_RELEASED,
        Kind.RUN_LOST,
        Kind.RUN_LEFT,
        Kind.RUN_POISONED,
        Kind.RUN_CANCELLED,
        Kind.RUN_CLOSED,
        Kind.RUN_HANDED_OVER,
    }
)
"""After these, an attempt that still ran is lost: nobody is left who could end it."""

COMMITS = {
    "completed": (Kind.STEP_COMPLETED, StepStatus.COMPLETED),
    "waiting": (Kind.STEP_WAITING, StepStatus.WAITING),
    "replay": (Kind.STEP_REPLAY, StepStatus.REPLAY),
}
"""How a step is committed: the kind of event that carries its checkpoint, and the status that it gives it."""


@dataclass
class StepState:
    """What is known of one step while its events are read."""

    name: str
    cell_id: str | None = None
    reason: str = ""
    status: StepStatus = StepStatus.RUNNING
    executions: int = 0
    restores: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    started: dict[int, int] = field(default_factory=dict)  # attempt → seq
    committed: dict[str, int] = field(default_factory=dict)  # the manifest's signature → seq
    checkpoint: StepStatus | None = None  # the status that its latest checkpoint gives it
    checkpoint_seq: int | None = None
    variables: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)  # key → seq, of those that may be used again
    replayed: set[int] = field(default_factory=set)  # calls that the newest attempt did not run
    usage: Usage = field(default_factory=Usage)  # of all calls of models, whatever became of them
    calls_made: int | None = None  # by the attempt that committed the step
    fresh_since: int = 0  # calls up to this number are not used any more
    line: int | None = None
    removed: str = ""
    failed: list[int] = field(
        default_factory=list
    )  # attempts that the next one, or the running one, tries again
    pauses: bool = False  # it failed for good, and its run is to pause

    @property
    def running(self) -> Attempt | None:
        """Return the attempt that runs now."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.status == "running" else None

    @property
    def next_attempt(self) -> int:
        return self.attempts[-1].number + 1 if self.attempts else 1

    @property
    def tried(self) -> tuple[Attempt, ...]:
        """Return the failed attempts that the next one, or the running one, tries again."""
        return tuple(attempt for attempt in self.attempts if attempt.number in self.failed)

    def step(self) -> Step:
        """Return what people see."""
        return Step(
            name=self.name,
            status=self.status,
            reason=self.reason,
            executions=self.executions,
            restores=self.restores,
            attempts=tuple(self.attempts),
            variables=tuple(Variable.model_validate(one) for one in self.variables),
            calls=len(self.calls) if self.calls_made is None else self.calls_made,
            usage=self.usage,
            cell_id=self.cell_id,
            checkpoint_seq=self.checkpoint_seq,
            line=self.line if self.status is StepStatus.WAITING else None,
            removed=self.removed,
        )

    def end(
        self,
        number: int,
        status: Literal["waiting", "completed", "failed", "lost"],
        event: Event,
        error: ErrorInfo | None = None,
        again_in_s: float | None = None,
    ) -> None:
        """End an attempt; one whose beginning did not reach the disk begins and ends here."""
        ended = {"status": status, "ended_at": event.at, "error": error, "again_in_s": again_in_s}
        for place, attempt in enumerate(self.attempts):
            if attempt.number == number:
                self.attempts[place] = attempt.model_copy(update=ended)
                return
        self.executions += 1
        self.attempts.append(Attempt(number=number, epoch=event.epoch, started_at=event.at, **ended))


class Fold:
    """The steps of a run, in order of their first mention; `apply` takes its events one by one."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._steps: dict[str, StepState] = {}
        self.usage = Usage()
        self.has_children = False
        for event in events:
            self.apply(event)

    def get(self, name: str) -> StepState | None:
        """Return a step, or None where the run has none of that name."""
        return self._steps.get(name)

    def steps(self) -> tuple[Step, ...]:
        """Return all steps."""
        return tuple(state.step() for state in self._steps.values())

    @property
    def pauses(self) -> bool:
        """Tell whether a step has failed for good, and asked for a pause then."""
        return any(state.pauses for state in self._steps.values())

    def apply(self, event: Event) -> None:
        """Take the next event of the run."""
        if event.kind in END_OF_DRIVING:
            self._lose(event)
        elif event.kind == Kind.CHILD_STARTED:
            self.has_children = True
        elif event.kind == Kind.CHECKPOINTS_REMOVED:
            self._remove(event)
        elif event.step is not None and event.kind in _STEP_EVENTS:
            state = self._steps.setdefault(event.step, StepState(event.step))
            _STEP_EVENTS[Kind(event.kind)](state, event)
            if use := event.data.get("model"):
                self.usage = spending.add(self.usage, ModelUse.model_validate(use))

    def _remove(self, event: Event) -> None:
        gone = set(event.data["seqs"])
        for state in self._steps.values():
            state.calls = {key: seq for key, seq in state.calls.items() if seq not in gone}
            if state.checkpoint_seq in gone:
                state.removed = event.sentence

    def _lose(self, event: Event) -> None:
        for state in self._steps.values():
            if (attempt := state.running) is not None:
                state.end(attempt.number, "lost", event)
                state.status = state.checkpoint or StepStatus.FAILED
                state.reason = event.sentence


def _started(state: StepState, event: Event) -> None:
    number = int(event.data["attempt"])
    state.attempts.append(
        Attempt(
            number=number,
            status="running",
            epoch=event.epoch,
            started_at=event.at,
            reason=str(event.data["reason"]),
        ),
    )
    if not event.data.get("goes_on"):
        state.failed.clear()
    state.pauses = False
    state.started[number] = event.seq
    state.executions += 1
    state.status = StepStatus.RUNNING
    state.replayed, state.calls_made = set(), None
    if event.data.get("fresh"):
        state.calls, state.fresh_since = {}, event.seq
    _decided(state, event)


def _restored(state: StepState, event: Event) -> None:
    state.restores += 1
    state.status = state.checkpoint or state.status
    _decided(state, event)


def _decided(state: StepState, event: Event) -> None:
    state.reason = str(event.data["reason"])
    state.cell_id = event.data.get("cell_id") or state.cell_id


def _committed(state: StepState, event: Event) -> None:
    number, status = int(event.data["attempt"]), event.data["status"]
    state.end(number, "waiting" if status == "waiting" else "completed", event)
    if status != "waiting":
        state.failed.clear()
    state.committed[event.data["signature"]] = event.seq
    state.status = state.checkpoint = COMMITS[status][1]
    state.checkpoint_seq = event.seq
    state.removed = ""
    state.variables = event.data["variables"]
    state.calls_made = int(event.data.get("calls", 0))
    state.replayed = set(event.data.get("replayed", ()))
    state.line = event.data.get("line")


def _kept(state: StepState, event: Event) -> None:
    """Take a checkpoint that no body of this run made."""
    _decided(state, event)
    state.status = state.checkpoint = StepStatus.COMPLETED
    state.checkpoint_seq = event.seq
    state.removed = ""
    state.variables = event.data["variables"]
    state.calls_made = int(event.data.get("calls", 0))


def _set_aside(state: StepState, event: Event) -> None:
    _decided(state, event)
    state.status = StepStatus.PENDING
    state.checkpoint = state.checkpoint_seq = None
    state.removed = ""
    state.variables = []
    state.calls, state.calls_made, state.fresh_since = {}, None, event.seq


def _failed(state: StepState, event: Event) -> None:
    number, again_in_s = int(event.data["attempt"]), event.data.get("again_in_s")
    state.end(number, "failed", event, ErrorInfo.model_validate(event.data["error"]), again_in_s)
    state.status = StepStatus.FAILED
    state.replayed = set(event.data.get("replayed", ()))
    state.pauses = bool(event.data.get("pauses"))
    if again_in_s is None:
        state.failed.clear()
    elif number not in state.failed:
        state.failed.append(number)


def _called(state: StepState, event: Event) -> None:
    state.committed[event.data["signature"]] = event.seq
    state.calls[event.data["key"]] = event.seq
    if use := event.data.get("model"):
        state.usage = spending.add(state.usage, ModelUse.model_validate(use))


_STEP_EVENTS = {
    Kind.STEP_STARTED: _started,
    Kind.STEP_RESTORED: _restored,
    **{kind: _committed for kind, _ in COMMITS.values()},
    Kind.STEP_FAILED: _failed,
    Kind.CALL_COMPLETED: _called,
    Kind.STEP_SHARED: _kept,
    Kind.STEP_MARKED: _kept,
    Kind.STEP_SET_ASIDE: _set_aside,
}


def fold(events: Iterable[Event]) -> tuple[Step, ...]:
    """Return the steps of a run as its whole history tells them."""
    return Fold(events).steps()
