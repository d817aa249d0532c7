"""The API as data: every endpoint with the shapes of its question and its answer.

The coordinator serves this list, `client.py` calls it; neither writes a path or a field name of its own.
A question travels as JSON body (POST) or as query parameters (GET); `{name}` in a path comes from the
question's field of that name. Errors travel as `errors.DurableError.to_wire`. Every request carries the token
(`Authorization: Bearer …`) and the version (`X-NBDurable-Version`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from nbdurable.models import (
    JSON,
    Attempt,
    Budget,
    Call,
    Checkpoint,
    Driver,
    DriverKind,
    ErrorInfo,
    Event,
    HandSet,
    HookKind,
    ModelUse,
    Occasion,
    ProcessIdentity,
    Progress,
    Run,
    RunDetail,
    RunStatus,
    Sent,
    Shape,
    SignedManifest,
    Step,
    Variable,
    Wait,
    WaitDefault,
    WaitKind,
    WaitStatus,
)
from nbdurable.policies import MAX_RETRIES

Question = TypeVar("Question", bound=Shape)
Answer = TypeVar("Answer", bound=Shape)

CELL_MARK = (
    "application/vnd.nbdurable.cell+json"  # of a display by which a kernel tells its runner about cells
)

HOLD_S = 20.0  # longest time that a long poll is held
KEY_LIFE_S = 30 * 86_400.0  # how long an idempotency key returns the first run
MAX_KEY_LIFE_S = 365 * 86_400.0
MAX_CHILDREN = 1000  # that one request starts
EVENT_LIFE_S = 7 * 86_400.0  # how long a sent event is kept for runs that will wait for it
MAX_EVENT_LIFE_S = 30 * 86_400.0


@dataclass(frozen=True)
class Endpoint(Generic[Question, Answer]):
    """One call of the API."""

    method: Literal["GET", "POST"]
    path: str
    question: type[Question]
    answer: type[Answer]
    about: str


class Nothing(Shape):
    """No fields."""


class Health(Shape):
    pid: int
    version: str
    home: str
    started_at: float
    open_runs: int
    workers: int
    trouble: str = ""  # why the newest change could not be stored; empty where it could


class ByRun(Shape):
    run_id: str  # a whole id, or a unique prefix or suffix of at least four characters


class ByWait(Shape):
    wait_id: str


# Runs ------------------------------------------------------------------------------------------------------


class CreateRun(Shape):
    """Create a headless run (queued), or an interactive one (leased to `driver` at once)."""

    notebook: str
    kind: DriverKind
    snapshot: str | None = None  # digest of a blob that the client has written
    parameters: dict[str, Any] = Field(default_factory=dict)
    steps_mode: Literal["marked", "all"] = "marked"
    questions: bool = True
    output: str | None = None
    kernel_name: str | None = None
    cwd: str | None = None
    tags: tuple[str, ...] = ()
    idempotency_key: str | None = None  # a second request with it returns the first run
    key_scope: Literal["run", "global"] = "global"  # whether it counts among the parent's children only
    key_ttl_s: float = Field(KEY_LIFE_S, gt=0, le=MAX_KEY_LIFE_S)
    call: str | None = (
        None  # of a child without a key: names the call that starts it, within its parent's step
    )
    cancel_with_parent: bool = False
    debounce_s: float | None = Field(None, gt=0)  # it begins when nobody has asked for it so long
    debounce_key: str | None = None
    debounce_mode: Literal["leading", "trailing"] = "leading"  # whose parameters count
    debounce_max_s: float | None = Field(None, gt=0)  # since it was first asked for
    singleton: Literal["skip", "cancel", "queue"] | None = None
    singleton_key: str | None = None  # None: the notebook
    steps_total: int | None = None
    retries: int = Field(0, ge=0, le=MAX_RETRIES)
    on_exhausted: Literal["fail", "pause"] = "fail"
    timeout_s: float | None = Field(None, gt=0)
    delay_s: float = Field(0.0, ge=0)
    ttl_s: float | None = Field(None, gt=0)  # it expires if nobody has begun it so long after its delay
    budget: Budget | None = None
    driver: Driver | None = None
    until: str | None = None  # the last step that it executes


class StartChildren(Shape):
    """Start several headless runs in one transaction, as children of the run that the asker drives.

    A run that has a key, or whose call has started one before, is not started again: the first one is returned.
    """

    run_id: str
    epoch: int
    step: str | None = None
    children: tuple[CreateRun, ...] = Field(min_length=1, max_length=MAX_CHILDREN)


class ListRuns(Shape):
    status: RunStatus | None = None
    notebook: str | None = None
    kind: DriverKind | None = None
    tag: str | None = None
    limit: int = 50
    before: str | None = None  # run id: only older runs
    parent: str | None = None  # run id: only its children
    root: str | None = None  # run id: only what stands below it, in its tree


class Runs(Shape):
    runs: tuple[Run, ...]


class CreateRuns(Shape):
    """Create several headless runs in one transaction."""

    runs: tuple[CreateRun, ...] = Field(min_length=1, max_length=MAX_CHILDREN)


class ReadEvents(Shape):
    run_id: str
    after: int = 0  # sequence number
    hold_s: float = 0.0  # wait that long for the next one (at most HOLD_S)
    limit: int = 1000


class Events(Shape):
    events: tuple[Event, ...]
    run: Run


class ReadLog(Shape):
    run_id: str
    offset: int = 0  # bytes
    limit: int = 262_144


class Log(Shape):
    text: str
    next_offset: int


class CloseRun(Shape):
    run_id: str
    epoch: int
    reason: str


# Changing the past -----------------------------------------------------------------------------------------


class ForkRun(CreateRun):
    """Create a headless run that shares another one's checkpoints: whole, or not at all.

    `share`: the steps whose checkpoints it keeps, each committed in `source`. `forked_at`: the step from which it
    runs; None for a replay.
    """

    source: str  # names a run
    forked_at: str | None = None
    share: tuple[str, ...] = ()
    hand_set: tuple[HandSet, ...] = ()


class Version(Shape):
    """The version of its notebook that a run goes on with."""

    notebook: str
    snapshot: str  # digest of a blob that the client has written
    kernel_name: str | None = None
    steps_total: int | None = None


class Mark(Shape):
    """A step that a person did by hand: a signed checkpoint without variables, which says who did it and when."""

    step: str
    reason: str
    manifest: SignedManifest


class RepairRun(Shape):
    """Change the past of a run that nobody drives, and queue it: whole, or not at all.

    `set_aside`: steps whose checkpoints count no more; they stay in the history. `expected_epoch`: the run as it was
    when the change was planned. The same `nonce` gets the first answer.
    """

    run_id: str
    by: str
    nonce: str
    expected_epoch: int
    version: Version | None = None
    set_aside: tuple[str, ...] = ()
    hand_set: tuple[HandSet, ...] = ()
    marks: tuple[Mark, ...] = ()


class ResumeRun(Shape):
    """Queue a paused, failed or cancelled run; with `take_over` also one that a living kernel drives.

    `version`: the notebook as it is now, for a run that was last driven interactively.
    """

    run_id: str
    version: Version | None = None
    take_over: bool = False


# Driving ---------------------------------------------------------------------------------------------------


class LeaseRun(Shape):
    """Begin to drive a run interactively; LeaseHeld names the driver it has, unless `take_over`."""

    run_id: str
    driver: Driver
    take_over: bool = False
    notebook: str | None = None  # where it stands now, if it may have been renamed
    attach: bool = False  # whatever became of the run: a headless one is driven interactively from now on


class LeaseWork(Shape):
    """Ask for queued headless runs, as a worker; held until there is one or `hold_s` is over.

    `holding`: the runs that the worker executes now. A run leased to it that is not among them (the answer
    was lost) is given to it again.
    """

    driver: Driver
    slots: int
    hold_s: float = 0.0
    holding: tuple[str, ...] | None = None


class Work(Shape):
    """Runs leased to the worker. `stop`: there is nothing to do, and the worker may end."""

    runs: tuple[Run, ...]
    stop: bool = False


class Heartbeat(Shape):
    """Say that a driver lives; `processes` are those that must end with it (executor, kernel)."""

    run_id: str
    epoch: int
    processes: tuple[ProcessIdentity, ...] = ()


class Orders(Shape):
    """What the coordinator wants of a driver. A driver whose lease has passed on gets Fenced instead."""

    cancel: bool = False
    time_out: bool = False  # its run has had all the time that it was given


class EndLease(Shape):
    """Say how driving ended: the driver's one word about the run's next status.

    `suspend` with no open wait queues the run at once. `lose` may be said by the worker whose executor or
    kernel died. `leave` is the interactive kernel's goodbye.
    """

    run_id: str
    epoch: int
    how: Literal["complete", "fail", "suspend", "release", "lose", "cancel", "leave", "time_out", "pause"]
    reason: str
    error: ErrorInfo | None = None


class SetBudget(Shape):
    """Give a run that has not ended for good a budget; one that runs heeds it at its next call of a model."""

    run_id: str
    budget: Budget


class SetResult(Shape):
    run_id: str
    epoch: int
    result: JSON


class Change(Shape):
    """One change of a run's metadata: `increment` adds a number, `append` an element to a list."""

    how: Literal["set", "increment", "append", "remove"]
    name: str = Field(min_length=1, max_length=200)
    value: JSON = None


class ChangeMetadata(Shape):
    """Change what a run's code says about it. The same `nonce` again changes nothing more."""

    run_id: str
    epoch: int
    step: str | None = None
    changes: tuple[Change, ...]
    nonce: str


class Metadata(Shape):
    values: dict[str, Any]


class AddLog(Shape):
    """Add a line to the run's own log; the same `nonce` again adds nothing."""

    run_id: str
    epoch: int
    step: str | None = None
    level: Literal["debug", "info", "warning", "error"] = "info"
    message: str
    fields: dict[str, Any] = Field(default_factory=dict)
    nonce: str


class SetProgress(Shape):
    """Say how far a step is: kept in memory only."""

    run_id: str
    epoch: int
    progress: Progress


class BeginHook(Shape):
    """Record that a hook is about to run, if it is to: its driver is about to say `how`, or begins with the steps."""

    run_id: str
    epoch: int
    kind: HookKind
    name: str
    how: Literal["start", "resume", "complete", "fail", "suspend", "pause", "lose", "cancel", "time_out"]
    reason: str = ""
    error: ErrorInfo | None = None


class HookBegun(Shape):
    """What the hook is told; None where it has run on this occasion, or the run does not end so after all."""

    occasion: Occasion | None = None


class EndHook(Shape):
    """Record how a hook ended; `key` is its occasion's."""

    run_id: str
    epoch: int
    kind: HookKind
    name: str
    key: str
    error: ErrorInfo | None = None


# Steps -----------------------------------------------------------------------------------------------------


class BeginStep(Shape):
    """Record a decision about a step, with its reason: answered when it is on disk, and carried out only then.

    `continue`: the body goes on behind a gate; `execute`: it begins anew, and waits that its last body left open are
    cancelled. `goes_on`: an attempt that failed and is to be tried again counts as an earlier try of this one, and
    its waits stay.
    """

    run_id: str
    epoch: int
    step: str
    action: Literal["execute", "continue", "restore"]
    reason: str
    cell_id: str | None = None
    fresh: bool = False  # calls that earlier attempts recorded are not used any more
    goes_on: bool = False


class Begun(Shape):
    """`failed`: the earlier tries of this attempt. `again_in_s`: nothing was begun, since the next try is due then."""

    attempt: int
    seq: int
    calls: int = 0  # recorded ones that may be used again
    failed: tuple[Attempt, ...] = ()
    again_in_s: float | None = None


class CommitStep(Shape):
    """Commit a checkpoint: answered when it is on disk.

    `status`: completed; waiting (a gate in the cell: what came before it is kept); replay (`--steps all`).
    The same manifest sent again after a lost answer gets the first answer.
    """

    run_id: str
    epoch: int
    step: str
    attempt: int
    status: Literal["completed", "waiting", "replay"]
    manifest: SignedManifest
    variables: tuple[Variable, ...] = ()
    sentence: str = ""  # e.g. "8.4 s · analysis str 3 kB"
    line: int | None = None
    calls: int = 0  # of this attempt, recorded ones
    replayed: tuple[int, ...] = ()  # numbers of the calls that it did not run


class Committed(Shape):
    seq: int


class FailStep(Shape):
    """Record that an attempt failed, and what follows: another one `again_in_s` later, or none.

    `gives_back`: a timer is opened for it, since the driver suspends the run now. `pauses`: if the run fails of this,
    it is paused instead.
    """

    run_id: str
    epoch: int
    step: str
    attempt: int
    error: ErrorInfo
    replayed: tuple[int, ...] = ()
    again_in_s: float | None = None
    gives_back: bool = False
    pauses: bool = False
    sentence: str = ""  # what follows, for people


class NewCall(Shape):
    """A call that has returned; the fields are those of `models.Call`."""

    key: str
    name: str
    given: str = ""
    type: str = ""
    bytes: int = 0
    duration_s: float
    reason: str = ""
    model: ModelUse | None = None
    manifest: SignedManifest


class CommitCalls(Shape):
    """Commit calls of a running step: answered when they are on disk.

    A manifest sent again after a lost answer gets the first answer.
    """

    run_id: str
    epoch: int
    step: str
    attempt: int
    calls: tuple[NewCall, ...]


class CallsCommitted(Shape):
    seqs: tuple[int, ...]


class ReadCalls(Shape):
    """Ask for the newest recorded calls of a run, or of one of its steps, in order of commitment."""

    run_id: str
    step: str | None = None
    results: bool = False  # with the manifests
    limit: int = 1_000_000


class RecordedCall(Shape):
    call: Call
    manifest: SignedManifest | None = None


class Calls(Shape):
    """Recorded calls that may be used again: not those before a step was asked to run afresh."""

    calls: tuple[RecordedCall, ...]


class Checkpoints(Shape):
    """The latest checkpoint of each step that has one, in order of commitment."""

    checkpoints: tuple[Checkpoint, ...]


class ReadStep(Shape):
    run_id: str
    step: str


class StepDetail(Shape):
    step: Step
    checkpoint: Checkpoint | None


# Waits -----------------------------------------------------------------------------------------------------


class WaitSpec(Shape):
    """A wait before it is opened; the fields mean what they mean in `Wait`.

    A moment is given as seconds from now (`…_in_s`), or as seconds since the epoch (`…_at`).
    """

    key: str = ""
    kind: WaitKind
    title: str
    step: str | None = None
    value: JSON = None
    preview: str = ""
    form: dict[str, Any] | None = None
    tags: tuple[str, ...] = ()
    due_in_s: float | None = None  # timers
    due_at: float | None = None
    event: str | None = None
    match: dict[str, Any] = Field(default_factory=dict)
    deadline_in_s: float | None = None
    deadline_at: float | None = None
    default: WaitDefault | None = None
    reviewers: tuple[str, ...] = ()
    remind_every_s: float | None = None
    callback: str | None = None
    is_secret: bool = False
    child: str | None = None  # children: the id of a run that exists
    start: CreateRun | None = None  # children: the run that is started in the same transaction


class OpenWait(WaitSpec):
    """Open a wait, or return the one that (run, key) has already, answered or not."""

    run_id: str
    epoch: int


class OpenGate(Shape):
    """Open several waits together, or return those that (run, key) have already, answered or not.

    `first`: one answer is enough; it cancels the others in the same transaction.
    """

    run_id: str
    epoch: int
    waits: tuple[WaitSpec, ...] = Field(min_length=1)
    first: bool = False


class ReadWait(Shape):
    wait_id: str
    hold_s: float = 0.0  # wait that long for its answer


class ListWaits(Shape):
    run_id: str | None = None
    status: WaitStatus | None = WaitStatus.OPEN
    kind: WaitKind | None = None
    limit: int = 500


class Waits(Shape):
    waits: tuple[Wait, ...]


class AnswerWait(Shape):
    """Answer an approval or a question, once. AlreadyAnswered says by whom; the same `nonce` gets the first answer."""

    wait_id: str
    approved: bool
    value: JSON = None
    edited: bool = False  # whether `value` replaces the proposed one
    by: str
    comment: str = ""
    nonce: str  # chosen by the client, so that a repeated request is known


class AnswerCallback(Shape):
    """Answer the one wait whose callback URL ends with this secret, once."""

    secret: str
    approved: bool = True
    value: JSON = None
    edited: bool = False
    by: str = "callback"
    comment: str = ""


class SendEvent(Shape):
    """Send an event to every run that waits for it and whose match it fits.

    For `ttl_s` it is also kept for waits that open later: each run takes it at most once. The same
    `idempotency_key` with the same payload gets the first answer, with another one Conflict.
    """

    event: str = Field(min_length=1, max_length=200)
    payload: JSON = None
    idempotency_key: str | None = None
    ttl_s: float = Field(EVENT_LIFE_S, ge=0, le=MAX_EVENT_LIFE_S)
    by: str = ""


# Space and time travel -------------------------------------------------------------------------------------


class ReadSpace(Shape):
    run_id: str | None = None  # only this run; what is shared is shared with any run


class VariableSpace(Shape):
    """What a variable takes: `unique` bytes are used by nothing else, `inline` ones stand in the store itself."""

    name: str
    bytes: int = 0
    unique: int = 0
    shared: int = 0
    inline: int = 0


class StepSpace(VariableSpace):
    """What a step's checkpoints take: variables, outputs, random state."""

    checkpoints: int = 0
    variables: tuple[VariableSpace, ...] = ()


class RunSpace(Shape):
    id: str
    notebook: str
    status: RunStatus
    created_at: float
    tags: tuple[str, ...] = ()
    bytes: int = 0
    unique: int = 0
    shared: int = 0
    inline: int = 0
    steps: tuple[StepSpace, ...] = ()


class Space(Shape):
    """What the project's state takes on disk, in bytes; the runs that take most stand first."""

    blobs: int  # files
    blob_bytes: int
    store_bytes: int
    unused_bytes: int  # of blobs that no checkpoint and no run needs
    runs: tuple[RunSpace, ...]


class Clean(Shape):
    """Ask for a clean-up. Without a rule every run is kept, and only what no run needs goes.

    A run is kept by any of the rules; an open one always. `only`: the runs whose removal was shown to somebody.
    """

    keep_last: int | None = Field(None, ge=0)  # so many newest runs of each notebook
    keep_for_s: float | None = Field(None, ge=0)  # runs that ended no longer ago
    keep_tagged: bool = False
    dry_run: bool = True
    only: tuple[str, ...] | None = None


class Fate(Shape):
    """One thing that a clean-up looked at, what becomes of it, and why."""

    kind: Literal["run", "earlier checkpoints", "blobs"]
    id: str = ""  # the run's
    notebook: str = ""
    action: Literal["keep", "remove"]
    reason: str
    count: int  # checkpoints, or files
    bytes: int  # that go, or would go; of kept ones: that they take


class Cleaned(Shape):
    dry_run: bool
    fates: tuple[Fate, ...]
    files: int  # removed, or to be removed
    bytes: int


class ReadState(Shape):
    """Ask for the variables of a run as they were when a step was committed; None: as its last step left them."""

    run_id: str
    step: str | None = None


class State(Shape):
    """The checkpoints that such a state consists of, in order of commitment: a later one overwrites."""

    run: Run
    checkpoints: tuple[Checkpoint, ...]


# Store -----------------------------------------------------------------------------------------------------


class Query(Shape):
    sql: str
    limit: int = 10_000


class Table(Shape):
    columns: tuple[str, ...]
    rows: tuple[tuple[JSON, ...], ...]
    truncated: bool = False


HEALTH = Endpoint("GET", "/v1/health", Nothing, Health, "Say that the coordinator is there, and which one.")
SHUTDOWN = Endpoint("POST", "/v1/shutdown", Nothing, Nothing, "End the coordinator cleanly; runs stay.")
CREATE_RUN = Endpoint("POST", "/v1/runs", CreateRun, Run, "Create a run.")
CREATE_RUNS = Endpoint("POST", "/v1/runs/batch", CreateRuns, Runs, "Create several runs together.")
START_CHILDREN = Endpoint(
    "POST", "/v1/runs/{run_id}/children", StartChildren, Runs, "Start runs as children of a run."
)
LIST_RUNS = Endpoint("GET", "/v1/runs", ListRuns, Runs, "List runs, newest first.")
GET_RUN = Endpoint("GET", "/v1/runs/{run_id}", ByRun, RunDetail, "Show a run with its steps and waits.")
READ_EVENTS = Endpoint(
    "GET", "/v1/runs/{run_id}/events", ReadEvents, Events, "Read a run's history, or follow it."
)
READ_LOG = Endpoint("GET", "/v1/runs/{run_id}/log", ReadLog, Log, "Read what a headless run printed.")
CANCEL_RUN = Endpoint("POST", "/v1/runs/{run_id}/cancel", ByRun, Run, "Cancel a run.")
RESUME_RUN = Endpoint(
    "POST", "/v1/runs/{run_id}/resume", ResumeRun, Run, "Queue a run that was delayed, paused or has ended."
)
FORK_RUN = Endpoint("POST", "/v1/forks", ForkRun, Run, "Create a run that shares another one's checkpoints.")
REPAIR_RUN = Endpoint(
    "POST", "/v1/runs/{run_id}/repair", RepairRun, Run, "Change a run's past, and queue it."
)
SET_BUDGET = Endpoint("POST", "/v1/runs/{run_id}/budget", SetBudget, Run, "Give a run a budget.")
CLOSE_RUN = Endpoint("POST", "/v1/runs/{run_id}/close", CloseRun, Run, "End an interactive run.")
LEASE_RUN = Endpoint("POST", "/v1/runs/{run_id}/lease", LeaseRun, Run, "Begin to drive a run interactively.")
LEASE_WORK = Endpoint("POST", "/v1/work", LeaseWork, Work, "Lease queued runs.")
HEARTBEAT = Endpoint("POST", "/v1/runs/{run_id}/heartbeat", Heartbeat, Orders, "Keep a lease.")
END_LEASE = Endpoint("POST", "/v1/runs/{run_id}/end", EndLease, Run, "End a lease.")
SET_RESULT = Endpoint("POST", "/v1/runs/{run_id}/result", SetResult, Nothing, "Record the run's result.")
CHANGE_METADATA = Endpoint(
    "POST", "/v1/runs/{run_id}/metadata", ChangeMetadata, Metadata, "Change the run's metadata."
)
ADD_LOG = Endpoint("POST", "/v1/runs/{run_id}/logged", AddLog, Nothing, "Add a line to the run's own log.")
SET_PROGRESS = Endpoint("POST", "/v1/runs/{run_id}/progress", SetProgress, Nothing, "Say how far a step is.")
BEGIN_HOOK = Endpoint(
    "POST", "/v1/runs/{run_id}/hooks/begin", BeginHook, HookBegun, "Record that a hook is about to run."
)
END_HOOK = Endpoint("POST", "/v1/runs/{run_id}/hooks/end", EndHook, Nothing, "Record how a hook ended.")
BEGIN_STEP = Endpoint("POST", "/v1/runs/{run_id}/begin", BeginStep, Begun, "Record a decision about a step.")
COMMIT_STEP = Endpoint("POST", "/v1/runs/{run_id}/commit", CommitStep, Committed, "Commit a checkpoint.")
FAIL_STEP = Endpoint("POST", "/v1/runs/{run_id}/fail", FailStep, Nothing, "Record that an attempt failed.")
COMMIT_CALLS = Endpoint(
    "POST", "/v1/runs/{run_id}/calls", CommitCalls, CallsCommitted, "Commit calls of a running step."
)
READ_CALLS = Endpoint("GET", "/v1/runs/{run_id}/calls", ReadCalls, Calls, "Read a run's recorded calls.")
CHECKPOINTS = Endpoint(
    "GET", "/v1/runs/{run_id}/checkpoints", ByRun, Checkpoints, "Read a run's checkpoints."
)
GET_STEP = Endpoint("GET", "/v1/runs/{run_id}/step", ReadStep, StepDetail, "Show a step with its manifest.")
OPEN_WAIT = Endpoint("POST", "/v1/runs/{run_id}/waits", OpenWait, Wait, "Open a wait.")
LIST_WAITS = Endpoint("GET", "/v1/waits", ListWaits, Waits, "List waits, oldest first.")
GET_WAIT = Endpoint("GET", "/v1/waits/{wait_id}", ReadWait, Wait, "Show a wait, or wait for its answer.")
OPEN_GATE = Endpoint("POST", "/v1/runs/{run_id}/gates", OpenGate, Waits, "Open several waits together.")
ANSWER_WAIT = Endpoint("POST", "/v1/waits/{wait_id}/answer", AnswerWait, Wait, "Approve or reject.")
ANSWER_CALLBACK = Endpoint(
    "POST", "/v1/callbacks/{secret}", AnswerCallback, Nothing, "Answer a wait by its callback's secret."
)
SEND_EVENT = Endpoint("POST", "/v1/events", SendEvent, Sent, "Send an event to the runs that wait for it.")
SPACE = Endpoint("GET", "/v1/space", ReadSpace, Space, "Say what takes how much space.")
CLEAN = Endpoint("POST", "/v1/clean", Clean, Cleaned, "Remove what no kept run needs, or say what would go.")
STATE = Endpoint("GET", "/v1/runs/{run_id}/state", ReadState, State, "Read a run's state as of a step.")
SQL = Endpoint("POST", "/v1/sql", Query, Table, "Query the store, read only.")

ENDPOINTS: tuple[Endpoint[Any, Any], ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Endpoint)
)

LOOKING: frozenset[Endpoint[Any, Any]] = frozenset(
    one for one in ENDPOINTS if one.method == "GET" or one in (SQL, SHUTDOWN)
)
"""What changes nothing of runs, waits and checkpoints: all that an untrusted store answers."""
