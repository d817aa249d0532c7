"""The legal moves of a run: (status, happening) → status and effects.

Pure: no clock, no I/O, no randomness. Everything that changes a run's status asks `move`; the README's state
diagram is generated from `MOVES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nbdurable.errors import IllegalMove
from nbdurable.models import DriverKind, Run, RunStatus, WaitAnswer

MAX_RECOVERIES = 10


class Happening(StrEnum):
    """What can befall a run."""

    DUE = "due"  # its delay is over
    EXPIRE = "expire"  # nobody began it in time
    LEASE = "lease"  # a worker, or a kernel that a person uses, begins to drive it
    TAKE_OVER = "take over"  # a person lets another kernel drive it
    SUSPEND = "suspend"  # its headless driver reached a wait and gave its kernel back
    WAKE = "wake"  # every wait it had open is answered
    COMPLETE = "complete"
    FAIL = "fail"
    RETRY = "retry"  # it failed, and is begun again later
    PAUSE = "pause"  # attempts are spent, and the policy says pause
    TIME_OUT = "time out"  # it was driven for as long as it may be
    RELEASE = "release"  # its worker stops cleanly and gives it back
    LOSE = "lose"  # its headless driver died
    LEAVE = "leave"  # its interactive kernel ended or died
    POISON = "poison"  # its driver died once too often
    REQUEST_CANCEL = "request cancel"  # somebody cancels it while a worker drives it
    CANCEL = "cancel"
    RESUME = "resume"  # somebody lets it go on headless
    ATTACH = "attach"  # a person brings it, with its variables, into a kernel
    HAND_OVER = "hand over"  # somebody lets workers go on with what a living kernel drives
    REPAIR = "repair"  # somebody changes its past, and lets it go on headless
    CLOSE = "close"  # `%durable new` begins another one


class Effect(StrEnum):
    """What a move brings with it."""

    NEW_EPOCH = "new epoch"
    DROP_DRIVER = "drop driver"
    COUNT_RECOVERY = "count recovery"
    RESET_RECOVERIES = "reset recoveries"
    CANCEL_WAITS = "cancel waits"
    FLAG_CANCEL = "flag cancel"
    END = "end"


@dataclass(frozen=True)
class Move:
    """Where a run goes, and what that brings with it."""

    to: RunStatus
    effects: frozenset[Effect] = frozenset()


def _to(status: RunStatus, *effects: Effect) -> Move:
    return Move(status, frozenset(effects))


_S, _H, _E = RunStatus, Happening, Effect

MOVES: dict[tuple[RunStatus, Happening], Move] = {
    (_S.DELAYED, _H.DUE): _to(_S.QUEUED),
    (_S.DELAYED, _H.RESUME): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.DELAYED, _H.EXPIRE): _to(_S.EXPIRED, _E.CANCEL_WAITS, _E.END),
    (_S.DELAYED, _H.CANCEL): _to(_S.CANCELLED, _E.CANCEL_WAITS, _E.END),
    (_S.QUEUED, _H.EXPIRE): _to(_S.EXPIRED, _E.CANCEL_WAITS, _E.END),
    (_S.QUEUED, _H.LEASE): _to(_S.RUNNING, _E.NEW_EPOCH),
    (_S.QUEUED, _H.CANCEL): _to(_S.CANCELLED, _E.CANCEL_WAITS, _E.END),
    (_S.RUNNING, _H.TAKE_OVER): _to(_S.RUNNING, _E.NEW_EPOCH),
    (_S.RUNNING, _H.SUSPEND): _to(_S.WAITING, _E.DROP_DRIVER),
    (_S.RUNNING, _H.COMPLETE): _to(_S.COMPLETED, _E.DROP_DRIVER, _E.CANCEL_WAITS, _E.END),
    (_S.RUNNING, _H.FAIL): _to(_S.FAILED, _E.DROP_DRIVER, _E.END),
    (_S.RUNNING, _H.RETRY): _to(_S.DELAYED, _E.DROP_DRIVER),
    (_S.RUNNING, _H.TIME_OUT): _to(_S.TIMED_OUT, _E.DROP_DRIVER, _E.CANCEL_WAITS, _E.END),
    (_S.RUNNING, _H.PAUSE): _to(_S.PAUSED, _E.DROP_DRIVER),
    (_S.RUNNING, _H.RELEASE): _to(_S.QUEUED, _E.DROP_DRIVER),
    (_S.RUNNING, _H.LOSE): _to(_S.QUEUED, _E.DROP_DRIVER, _E.COUNT_RECOVERY),
    (_S.RUNNING, _H.LEAVE): _to(_S.PAUSED, _E.DROP_DRIVER),
    (_S.RUNNING, _H.POISON): _to(_S.FAILED, _E.DROP_DRIVER, _E.COUNT_RECOVERY, _E.END),
    (_S.RUNNING, _H.REQUEST_CANCEL): _to(_S.RUNNING, _E.FLAG_CANCEL),
    (_S.RUNNING, _H.CANCEL): _to(_S.CANCELLED, _E.DROP_DRIVER, _E.CANCEL_WAITS, _E.END),
    (_S.RUNNING, _H.CLOSE): _to(_S.COMPLETED, _E.DROP_DRIVER, _E.CANCEL_WAITS, _E.END),
    (_S.WAITING, _H.WAKE): _to(_S.QUEUED),
    (_S.WAITING, _H.CANCEL): _to(_S.CANCELLED, _E.CANCEL_WAITS, _E.END),
    (_S.PAUSED, _H.LEASE): _to(_S.RUNNING, _E.NEW_EPOCH),
    (_S.PAUSED, _H.RESUME): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.PAUSED, _H.CANCEL): _to(_S.CANCELLED, _E.CANCEL_WAITS, _E.END),
    (_S.PAUSED, _H.CLOSE): _to(_S.COMPLETED, _E.CANCEL_WAITS, _E.END),
    (_S.FAILED, _H.RESUME): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.CANCELLED, _H.RESUME): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.TIMED_OUT, _H.RESUME): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.EXPIRED, _H.RESUME): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.RUNNING, _H.HAND_OVER): _to(_S.QUEUED, _E.DROP_DRIVER, _E.RESET_RECOVERIES),
    (_S.QUEUED, _H.ATTACH): _to(_S.RUNNING, _E.NEW_EPOCH, _E.RESET_RECOVERIES),
    (_S.WAITING, _H.ATTACH): _to(_S.RUNNING, _E.NEW_EPOCH, _E.RESET_RECOVERIES),
    (_S.PAUSED, _H.ATTACH): _to(_S.RUNNING, _E.NEW_EPOCH, _E.RESET_RECOVERIES),
    (_S.FAILED, _H.ATTACH): _to(_S.RUNNING, _E.NEW_EPOCH, _E.RESET_RECOVERIES),
    (_S.CANCELLED, _H.ATTACH): _to(_S.RUNNING, _E.NEW_EPOCH, _E.RESET_RECOVERIES),
    (_S.TIMED_OUT, _H.ATTACH): _to(_S.RUNNING, _E.NEW_EPOCH, _E.RESET_RECOVERIES),
    (_S.DELAYED, _H.ATTACH): _to(_S.RUNNING, _E.NEW_EPOCH, _E.RESET_RECOVERIES),
    (_S.QUEUED, _H.REPAIR): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.WAITING, _H.REPAIR): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.PAUSED, _H.REPAIR): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.COMPLETED, _H.REPAIR): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.FAILED, _H.REPAIR): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.CANCELLED, _H.REPAIR): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.TIMED_OUT, _H.REPAIR): _to(_S.QUEUED, _E.RESET_RECOVERIES),
    (_S.DELAYED, _H.REPAIR): _to(_S.QUEUED, _E.RESET_RECOVERIES),
}

_TODO = {
    Happening.RESUME: "only a run that is delayed, paused or ended can be resumed; `nbdurable show RUN` says more",
    Happening.CANCEL: "a run that has ended can't be cancelled",
    Happening.LEASE: "`nbdurable resume RUN` lets it go on; `%durable new` starts another run",
    Happening.ATTACH: "`%durable checkout RUN STEP` brings its variables; `nbdurable fork RUN --from STEP` begins anew",
    Happening.REPAIR: "stop it first: `nbdurable cancel RUN` keeps its committed steps; then it can be repaired",
}


def move(status: RunStatus, happening: Happening, *, run: str = "the run") -> Move:
    """Return the move that `happening` makes from `status`.

    Raises IllegalMove, naming the run, where the table has none.
    """
    found = MOVES.get((status, happening))
    if found is None:
        raise IllegalMove(f"{run} is {status}: it can't {happening}", todo=_TODO.get(happening, ""))
    return found


def loss(kind: DriverKind, recoveries: int) -> Happening:
    """Say what the death of its driver means for a run that was recovered `recoveries` times before."""
    if kind is DriverKind.INTERACTIVE:
        return Happening.LEAVE
    return Happening.POISON if recoveries >= MAX_RECOVERIES else Happening.LOSE


def cancellation(status: RunStatus, kind: DriverKind) -> Happening:
    """Say what a wish to cancel means: a worker is asked to stop, everything else stops at once."""
    if status is RunStatus.RUNNING and kind is DriverKind.HEADLESS:
        return Happening.REQUEST_CANCEL
    return Happening.CANCEL


def outcome(child: Run, at: float) -> WaitAnswer:
    """Return what the end of a run answers to those who wait for it."""
    if child.status is RunStatus.COMPLETED:
        return WaitAnswer(approved=True, value=child.result, by="child", at=at)
    value = {
        "run_id": child.id,
        "status": child.status.value,
        "reason": child.reason,
        "epoch": child.epoch,
        "error": child.error and {"name": child.error.name, "message": child.error.message},
    }
    return WaitAnswer(approved=False, value=value, by="child", at=at)


def falls(child: Run, parent: Run) -> bool:
    """Tell whether a child is to be cancelled because of what became of its parent."""
    if not child.is_tied or child.cancel_requested or child.status.is_final:
        return False
    if parent.status is RunStatus.CANCELLED or parent.cancel_requested:
        return True
    return child.cancel_with_parent and parent.status.is_final and parent.status is not RunStatus.COMPLETED


def mermaid() -> str:
    """Return the state diagram of `MOVES` in Mermaid's notation, as the README shows it."""
    edges: dict[tuple[RunStatus, RunStatus], list[str]] = {}
    for (status, happening), found in MOVES.items():
        edges.setdefault((status, found.to), []).append(happening.value)
    lines = [
        "stateDiagram-v2",
        f"    [*] --> {RunStatus.DELAYED}: headless, later",
        f"    [*] --> {RunStatus.QUEUED}: headless",
        f"    [*] --> {RunStatus.RUNNING}: interactive",
    ]
    lines += [f"    {a} --> {b}: {', '.join(labels)}" for (a, b), labels in edges.items()]
    lines += [f"    {status} --> [*]" for status in RunStatus if status.is_final]
    return "\n".join(lines)
