"""The words: frozen shapes of everything that crosses a boundary (API, store, pages, JSON output).

Owns the vocabulary of `design.md` §2 and nothing else: no I/O, no clock, no decisions.
Times are seconds since the epoch (UTC, float); digests are hex BLAKE3.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

JSON = Any  # any JSON value


class Shape(BaseModel):
    """Frozen base of all shapes; unknown fields are refused, so that versions cannot drift silently."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunStatus(StrEnum):
    DELAYED = "delayed"
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Tell whether nothing happens to the run any more by itself or by a driver."""
        return self in _FINAL


_FINAL = frozenset(
    {RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.TIMED_OUT, RunStatus.EXPIRED}
)


class DriverKind(StrEnum):
    INTERACTIVE = "interactive"
    HEADLESS = "headless"


class StepStatus(StrEnum):
    RUNNING = "running"
    WAITING = "waiting"  # suspended at a wait inside the cell; what came before it is checkpointed
    COMPLETED = "completed"
    FAILED = "failed"
    PENDING = "pending"  # a repair set its checkpoint aside: it runs again
    REPLAY = "replay"  # it runs in every attempt: marked so, or (`--steps all`) what it makes can't be saved


class WaitKind(StrEnum):
    APPROVAL = "approval"
    QUESTION = "question"  # a headless `input()` or `getpass()`: answered with text
    EVENT = "event"
    TIMER = "timer"
    CHILD = "child"

    @property
    def is_for_people(self) -> bool:
        """Tell whether a person answers it, and not time or another program."""
        return self in (WaitKind.APPROVAL, WaitKind.QUESTION)


class WaitStatus(StrEnum):
    OPEN = "open"
    ANSWERED = "answered"
    CANCELLED = "cancelled"


class ProcessIdentity(Shape):
    """A process, told apart from a later one with the same pid by its start time."""

    host: str
    pid: int
    started_at: float
    role: Literal["kernel", "worker", "executor"]


class Driver(Shape):
    """Who drives a run: the process whose life the lease follows, and a name for people."""

    kind: DriverKind
    process: ProcessIdentity
    label: str = ""  # e.g. "kernel 4711 on host", "worker 4712"


class ErrorInfo(Shape):
    """An exception of the user's code (or ours) as text; never pickled."""

    name: str
    message: str
    traceback: str = ""  # plain text, no ANSI


class Attempt(Shape):
    """One try at a step."""

    number: int
    status: Literal["running", "waiting", "completed", "failed", "lost"]
    epoch: int
    started_at: float
    ended_at: float | None = None
    error: ErrorInfo | None = None
    reason: str = ""  # why it was begun
    again_in_s: float | None = None  # after a failure that is tried again: how long is waited for that


class Variable(Shape):
    """What people see of a variable of a checkpoint; the value itself is in blobs."""

    name: str
    type: str
    bytes: int = 0
    state: Literal["saved", "recipe", "deleted", "unsaved"] = "saved"
    shape: str = ""  # "list[10]", "1000 × 3", "" where there is none
    preview: str = ""  # plain text, bounded
    reason: str = ""  # why it was not saved, and what to do; what makes it again


class Price(Shape):
    """What a model costs, for a million tokens."""

    input: float = Field(ge=0)
    output: float = Field(0.0, ge=0)
    cached_input: float | None = Field(None, ge=0)  # of those that the model had cached; None: as any other


class Budget(Shape):
    """What the model calls of a run may take, all of them together."""

    amount: float = Field(gt=0)
    of: Literal["money", "tokens"]


class ModelUse(Shape):
    """What one call of a model took; None where its answer does not tell."""

    model: str
    prompt: str = ""  # digest of what it was asked
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0  # of the input
    cost: float | None = None  # by the project's prices


class Used(Shape):
    """What several calls of models took, those that were replaced since then as well."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0  # calls whose cost is not known


class Usage(Used):
    by_model: dict[str, Used] = Field(default_factory=dict)


class Step(Shape):
    """A `%%step` cell in a run, as `nbdurable show` prints it."""

    name: str
    status: StepStatus
    reason: str  # of the latest decision: why it ran or was restored
    executions: int = 0  # times its body was started
    restores: int = 0  # times a checkpoint was put back instead
    attempts: tuple[Attempt, ...] = ()
    variables: tuple[Variable, ...] = ()
    calls: int = 0  # recorded ones of its newest attempt
    usage: Usage = Usage()  # of all its attempts
    cell_id: str | None = None
    checkpoint_seq: int | None = None  # the event that carries its manifest
    line: int | None = None  # of a waiting step: the line of the gate
    removed: str = ""  # why its checkpoint was removed, where it was: the step can't be restored any more


class WaitDefault(Shape):
    """What time answers where nobody did until the deadline."""

    approved: bool = True
    value: JSON = None
    edited: bool = False  # whether `value` replaces the proposed one


class WaitAnswer(Shape):
    """The one answer to a wait."""

    approved: bool
    value: JSON = None  # what the gate returns: the proposed value, or the edited one; the event's payload
    edited: bool = False
    by: str  # who; `timer`, `event`, or `deadline` for what time answered
    comment: str = ""
    at: float
    timed_out: bool = False  # nobody answered until the deadline, and there was no default
    event_seq: int | None = None  # the event that answered it


class Wait(Shape):
    """Something that a run waits for; answered at most once."""

    id: str  # six Crockford base32 characters, upper case
    run_id: str
    key: str  # names the gate within the run; opening it again returns this wait
    kind: WaitKind
    status: WaitStatus = WaitStatus.OPEN
    title: str
    step: str | None = None
    value: JSON = None  # the proposed value where it is JSON, else None
    preview: str = ""  # the value as text, bounded
    form: dict[str, Any] | None = None  # JSON schema that the value of an answer must satisfy
    tags: tuple[str, ...] = ()
    due_at: float | None = None  # timers: when it is over
    event: str | None = None  # events: the name of the one that answers it
    match: dict[str, Any] = Field(default_factory=dict)  # events: paths and values that its payload must have
    group: str | None = None  # of waits of which one answer is enough: it cancels the others
    deadline_at: float | None = None  # when time answers, with `default` or without
    default: WaitDefault | None = None
    reviewers: tuple[str, ...] = ()  # names of those who may answer; empty: anybody
    remind_every_s: float | None = None
    remind_at: float | None = None  # when the next reminder is due
    reminders: int = 0  # how many there were
    callback: str | None = None  # digest of the secret with which its callback URL ends
    child: str | None = None  # children: the id of the run whose end answers it
    is_secret: bool = False  # its answer is kept in memory only, and shown nowhere
    misfit_seq: int = 0  # events: the newest one that was kept out, its payload being no answer
    created_at: float
    answer: WaitAnswer | None = None

    @property
    def next_at(self) -> float | None:
        """Return when time has something to do with it: it is over, answers it, or reminds of it."""
        moments = [at for at in (self.due_at, self.deadline_at, self.remind_at) if at is not None]
        return min(moments, default=None)


class Sent(Shape):
    """An event that somebody sent; kept for runs that will wait for it."""

    seq: int
    event: str
    at: float
    expires_at: float  # until when a wait that opens takes it
    runs: tuple[str, ...] = ()  # that have taken it so far


class Progress(Shape):
    """How far a step says that it is."""

    step: str | None = None
    done: float
    total: float | None = None
    text: str = ""


class HandSet(Shape):
    """A value that a person gave a variable, put into the namespace right before a step's cell (`--set`)."""

    step: str
    name: str
    value: JSON
    by: str
    at: float


class Run(Shape):
    """One execution of a notebook: the row that lists show."""

    id: str  # UUIDv7, 32 hex digits
    notebook: str  # absolute path of the .ipynb, or of the console session
    status: RunStatus
    reason: str  # one plain sentence: why it has this status
    kind: DriverKind
    snapshot: str | None = None  # digest of the notebook version it started with (headless)
    parameters: dict[str, Any] = Field(default_factory=dict)
    steps_mode: Literal["marked", "all"] = "marked"
    questions: bool = True  # whether `input()` and `getpass()` wait for an answer (headless)
    output: str | None = None  # path of the output notebook (headless)
    kernel_name: str | None = None
    cwd: str | None = None
    tags: tuple[str, ...] = ()
    idempotency_key: str | None = None
    epoch: int = 0
    recoveries: int = 0
    driver: Driver | None = None
    cancel_requested: bool = False
    result: JSON = None
    metadata: dict[str, Any] = Field(default_factory=dict)  # what its code says about it, while it runs
    progress: Progress | None = None  # kept in memory: what was said last
    error: ErrorInfo | None = None
    steps_total: int | None = None  # step cells in the snapshot, where known
    retries: int = 0  # how often it is begun again after it has failed
    on_exhausted: Literal["fail", "pause"] = "fail"
    failures: int = 0  # how often it has failed
    timeout_s: float | None = None  # that it may be driven headless, all of its drivers together
    active_s: float = 0.0  # that its former headless drivers took
    driven_since: float | None = None
    begins_at: float | None = None  # it is delayed until then
    expires_at: float | None = None  # if nobody has begun it by then
    forked_from: str | None = None  # id of the run that it was forked from, or is a replay of
    forked_at: str | None = (
        None  # the step from which the fork runs; None: it is a replay, and shares nothing
    )
    until: str | None = None  # the last step that it executes
    hand_set: tuple[HandSet, ...] = ()
    earlier_snapshots: tuple[
        str, ...
    ] = ()  # digests of the versions that it had before repairs and hand-overs
    budget: Budget | None = None
    parent_id: str | None = None  # the run that started it
    parent_step: str | None = None
    root_id: str | None = None  # the run on top of its tree; None: itself
    trace_id: str = ""  # W3C: 32 hex digits, those of the root
    depth: int = 0  # how many runs stand above it
    debounce_key: str | None = None  # what asks for a run with it while it is delayed puts its beginning off
    debounce_until: float | None = None  # but not beyond this
    singleton: Literal["skip", "cancel", "queue"] | None = (
        None  # what happens while another one of its kind is open
    )
    singleton_key: str | None = None
    cancel_with_parent: bool = False  # whether it is cancelled when its parent ends without having completed
    is_tied: bool = True  # whether it is cancelled with its parent: until somebody resumes it by hand
    key_expires_at: float | None = (
        None  # until when its idempotency key returns it; None: 30 days after its creation
    )
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    updated_at: float

    @property
    def short(self) -> str:
        """Return the eight random digits that people type."""
        return self.id[-8:]


class Call(Shape):
    """A recorded call inside a step, as people see it; its result is in blobs."""

    step: str
    key: str  # names the call within its step
    name: str  # of the function
    given: str = ""  # the key that the user gave, or the arguments, as text, bounded
    type: str = ""  # of the result
    bytes: int = 0
    duration_s: float
    attempt: int  # at the step, in which it ran
    replayed: bool = False  # the newest attempt took its result, and did not run it
    reason: str = ""  # why it ran, though an earlier attempt had recorded it
    model: ModelUse | None = None  # of a call of a model
    at: float
    seq: int


class ChildRun(Shape):
    """A run that another one started, as that one shows it."""

    id: str
    notebook: str
    status: RunStatus
    reason: str
    step: str | None = None  # that started it


class RunDetail(Run):
    """A run with its steps and waits: the shape of `show RUN --json`."""

    steps: tuple[Step, ...] = ()
    waits: tuple[Wait, ...] = ()
    children: tuple[ChildRun, ...] = ()
    calls: tuple[Call, ...] = ()  # recorded ones, where they were asked for
    usage: Usage = Usage()


HookKind = Literal["start", "success", "failure", "wait", "resume", "cancel"]


class Occasion(Shape):
    """What a hook is told: what happens to the run, which is as it will be once this is over.

    `key` is the same however often the occasion is told. `waits`: titles. `url`: of the run's page, while pages are up.
    """

    kind: HookKind
    key: str
    id: str
    notebook: str
    parameters: JSON
    tags: tuple[str, ...] = ()
    status: RunStatus
    reason: str
    error: ErrorInfo | None = None
    result: JSON = None
    waits: tuple[str, ...] = ()
    url: str | None = None


class Event(Shape):
    """One line of a run's append-only history."""

    seq: int
    at: float
    run_id: str
    epoch: int
    kind: str
    step: str | None = None
    sentence: str
    data: dict[str, Any] = Field(default_factory=dict)


class SignedManifest(Shape):
    """A checkpoint's manifest as the kernel signed it: JSON text, never interpreted before `security.verify`."""

    text: str
    signature: str


class Checkpoint(Shape):
    """What the coordinator knows of a step's committed state."""

    run_id: str
    step: str
    status: StepStatus
    seq: int
    at: float
    manifest: SignedManifest
