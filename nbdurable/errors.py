"""The error tree: every error says what happened, to which object, and what to do next.

    DurableError
    ├── UsageError              a wrong word from the user (exit status 2)
    │   ├── StepUsageError      a `%%step` line, or a step cell, that can't be used
    │   ├── NotebookError       a notebook that is missing, damaged, too old, or has no such kernel
    │   └── ParameterError      an unknown parameter, or one that can't be passed
    ├── ChildFailed             a run that this one waited for did not complete
    ├── WaitTimeout             nobody answered a wait in time (a TimeoutError as well)
    ├── NotFound                no run, step or wait of that name
    ├── Conflict                the object is in a state that forbids it
    │   ├── IllegalMove         the life of a run does not allow it
    │   ├── AlreadyAnswered     the wait has its one answer
    │   ├── LeaseHeld           another driver has the run
    │   └── Fenced              this driver's lease has passed on
    ├── Untrusted               a store of somebody else's: looked at only, until `nbdurable trust`
    ├── StoreError              the store can't be opened or written
    │   ├── StoreTooNew · StoreDamaged · StoreLocked · StoreFull
    ├── CheckpointError         a checkpoint that can't be written or restored
    │   ├── BlobMissing · BlobDamaged · BadSignature · NotRestorable
    └── CoordinatorError        the coordinator is out of reach (exit status 5)
        ├── CoordinatorUnreachable · WrongVersion · Unauthorized

Control signals are no errors and derive from BaseException: `TimedOut`, and those that end a cell with one sentence
(`ControlSignal`): `Suspended`, `Paused`, `RestSkipped`. What the user's own code raises to steer its retries stands
apart, too: `Abort` and `RetryAfter`.

An error's class docstring is its title. `slug` survives HTTP: `to_wire` and `from_wire` are inverse.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar


class DurableError(Exception):
    """Something went wrong in nbdurable"""

    exit_status: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str = "", *, todo: str = "") -> None:
        self.message = message or (type(self).__doc__ or "").splitlines()[0]
        self.todo = todo
        super().__init__(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.todo))

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.todo}" if self.todo else self.message

    @classmethod
    def slug(cls) -> str:
        """Return the stable name that survives HTTP, e.g. `blob-missing`."""
        return "".join(f"-{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("-")

    def to_wire(self) -> dict[str, str]:
        """Return the JSON object that stands for this error in an HTTP answer."""
        return {"error": self.slug(), "message": self.message, "todo": self.todo}

    def _render_traceback_(self) -> list[str]:
        """Show one clean message in a notebook instead of a traceback of ours."""
        return [f"{type(self).__name__}: {self}"]


def _rebuild(kind: type[DurableError], message: str, todo: str) -> DurableError:
    return kind(message, todo=todo)


class UsageError(DurableError):
    """That can't be used so"""

    exit_status = 2
    http_status = 422


class StepUsageError(UsageError):
    """This step cell can't be used so"""


class NotebookError(UsageError):
    """This notebook can't be run"""


class ParameterError(UsageError):
    """This parameter can't be passed"""


class WaitTimeout(DurableError, TimeoutError):
    """Nobody answered this wait in time"""


class ChildFailed(DurableError):
    """A run that this one waited for did not complete

    `run_id`, `status`: which, and what became of it. `error`: its own error as text, "" where it has none.
    """

    def __init__(
        self, message: str = "", *, todo: str = "", run_id: str = "", status: str = "", error: str = ""
    ) -> None:
        super().__init__(message, todo=todo)
        self.run_id, self.status, self.error = run_id, status, error

    def __reduce__(self) -> tuple[Any, ...]:
        return (_child_failed, (self.message, self.todo, self.run_id, self.status, self.error))


def _child_failed(message: str, todo: str, run_id: str, status: str, error: str) -> ChildFailed:
    return ChildFailed(message, todo=todo, run_id=run_id, status=status, error=error)


class NotFound(DurableError):
    """No such object"""

    exit_status = 2
    http_status = 404


class Conflict(DurableError):
    """The object is in a state that forbids it"""

    http_status = 409


class IllegalMove(Conflict):
    """The life of a run does not allow it"""


class AlreadyAnswered(Conflict):
    """This wait has been answered already"""


class LeaseHeld(Conflict):
    """Another driver has this run"""


class Fenced(Conflict):
    """This driver's lease has passed on"""


class Untrusted(DurableError):
    """This store is not trusted"""

    http_status = 403


class StoreError(DurableError):
    """The store can't be used"""


class StoreTooNew(StoreError):
    """The store was written by a newer nbdurable"""


class StoreDamaged(StoreError):
    """The store is damaged"""


class StoreLocked(StoreError):
    """Another process owns the store"""


class StoreFull(StoreError):
    """There is no space left to commit"""

    http_status = 507


class CheckpointError(DurableError):
    """This checkpoint can't be used"""


class BlobMissing(CheckpointError):
    """A blob of this checkpoint is missing"""

    http_status = 404


class BlobDamaged(CheckpointError):
    """A blob of this checkpoint is not what was written"""


class BadSignature(CheckpointError):
    """The signature of this checkpoint does not match this project's key"""


class NotRestorable(CheckpointError):
    """A value of this checkpoint can't be restored"""

    http_status = 409


class CoordinatorError(DurableError):
    """The coordinator is out of reach"""

    exit_status = 5


class CoordinatorUnreachable(CoordinatorError):
    """The coordinator does not answer"""


class WrongVersion(CoordinatorError):
    """The coordinator is of another version"""

    http_status = 426


class Unauthorized(CoordinatorError):
    """The coordinator does not accept this token"""

    http_status = 401


class ControlSignal(BaseException):
    """Ends a cell without being an error; shown as its one sentence.

    Derives from BaseException so that `except Exception` in a cell does not swallow it.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence

    def _render_traceback_(self) -> list[str]:
        return [self.sentence]


class Suspended(ControlSignal):
    """Control signal: the run waits, and the headless kernel is given back."""


class Paused(ControlSignal):
    """Control signal: the run is not to go on before somebody says so."""


class RestSkipped(ControlSignal):
    """Control signal: the notebook ends here, early and clean."""


class TimedOut(BaseException):
    """Control signal: code has had all the time that it was given. `retry_on=TimeoutError` means it, too.

    Derives from BaseException so that a loop with `except Exception`, which is what hangs, does not swallow it.
    """

    def __init__(self, what: str = "", timeout_s: float = 0.0, note: str = "") -> None:
        super().__init__(what, timeout_s, note)
        self.what, self.timeout_s, self.note = what, timeout_s, note

    def __str__(self) -> str:
        return f"{self.what} took longer than {self.timeout_s:g} s{self.note}"


class Abort(Exception):
    """Raised by the user's code: trying again would not help, whatever the retries say."""


class RetryAfter(Exception):
    """Raised by the user's code: try again after a time (`30s`, `10m`, a timedelta, seconds).

    Raises UsageError for what is no duration.
    """

    def __init__(self, after: str | float | timedelta, message: str = "") -> None:
        from nbdurable.policies import seconds  # which knows our errors

        super().__init__(after, message)
        self.after_s = seconds(after)
        self.message = message

    def __str__(self) -> str:
        return self.message or f"again after {self.after_s:g} s"


def _tree(kind: type[DurableError]) -> dict[str, type[DurableError]]:
    found = {kind.slug(): kind}
    for child in kind.__subclasses__():
        found |= _tree(child)
    return found


def from_wire(body: dict[str, Any]) -> DurableError:
    """Rebuild the error that an HTTP answer stands for; an unknown slug becomes DurableError."""
    kind = _tree(DurableError).get(str(body.get("error", "")), DurableError)
    return kind(str(body.get("message", "")), todo=str(body.get("todo", "")))
