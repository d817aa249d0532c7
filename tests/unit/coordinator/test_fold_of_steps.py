"""A run's steps as the fold of its events: pure, and the same for memory and for history."""

from __future__ import annotations

from typing import Any

from nbdurable.coordinator.fold import END_OF_DRIVING, Fold, Kind, fold
from nbdurable.models import Event, StepStatus, Variable

VARIABLE = Variable(name="x", type="int", bytes=8, preview="1").model_dump(mode="json")


def event(seq: int, kind: Kind, step: str | None = None, epoch: int = 1, **data: Any) -> Event:
    return Event(
        seq=seq,
        at=float(seq),
        run_id="r",
        epoch=epoch,
        kind=kind,
        step=step,
        sentence=f"line {seq}",
        data=data,
    )


def started(seq: int, attempt: int = 1, epoch: int = 1) -> Event:
    return event(seq, Kind.STEP_STARTED, "s", epoch, attempt=attempt, reason="no checkpoint", cell_id="c1")


def committed(seq: int, status: str = "completed", attempt: int = 1, **data: Any) -> Event:
    kind = Kind(f"step_{status}")
    return event(
        seq,
        kind,
        "s",
        attempt=attempt,
        status=status,
        variables=[VARIABLE],
        signature=f"of event {seq}",
        **data,
    )


def test_a_step_that_ran_once() -> None:
    """Guarantee 9: the step tells why it ran, what it left, and which event carries its checkpoint."""
    (step,) = fold([started(1), committed(2)])
    assert (step.status, step.reason, step.cell_id) == (StepStatus.COMPLETED, "no checkpoint", "c1")
    assert (step.executions, step.restores, step.checkpoint_seq) == (1, 0, 2)
    assert step.variables == (Variable.model_validate(VARIABLE),)
    (attempt,) = step.attempts
    assert (attempt.number, attempt.status, attempt.started_at, attempt.ended_at) == (
        1,
        "completed",
        1.0,
        2.0,
    )


def test_an_attempt_is_lost_when_its_driver_goes() -> None:
    """Whatever ends driving ends the attempt that still ran, in the sentence's words."""
    for kind in END_OF_DRIVING:
        (step,) = fold([started(1), event(2, kind)])
        assert [a.status for a in step.attempts] == ["lost"]
        assert (step.status, step.reason) == (StepStatus.FAILED, "line 2")


def test_a_lost_rerun_leaves_the_older_checkpoint() -> None:
    """Guarantee 1: a step that was committed stays so when its rerun dies."""
    (step,) = fold([started(1), committed(2), started(3, 2), event(4, Kind.RUN_LOST)])
    assert [a.status for a in step.attempts] == ["completed", "lost"]
    assert (step.status, step.checkpoint_seq) == (StepStatus.COMPLETED, 2)


def test_a_restore_counts_and_keeps_the_checkpoint() -> None:
    restored = event(3, Kind.STEP_RESTORED, "s", 2, attempt=1, reason="same code and inputs", cell_id=None)
    (step,) = fold([started(1), committed(2), restored])
    assert (step.status, step.restores, step.executions) == (StepStatus.COMPLETED, 1, 1)
    assert (step.reason, step.cell_id) == ("same code and inputs", "c1")


def test_a_gate_inside_a_step() -> None:
    """What came before a gate is kept, with its line, until the rest is committed."""
    history = [started(1), committed(2, "waiting", line=3), event(3, Kind.RUN_SUSPENDED)]
    (step,) = fold(history)
    assert (step.status, step.line, [a.status for a in step.attempts]) == (StepStatus.WAITING, 3, ["waiting"])
    (step,) = fold([*history, started(4, 2, 2), committed(5, attempt=2)])
    assert (step.status, step.line) == (StepStatus.COMPLETED, None)
    assert [a.status for a in step.attempts] == ["waiting", "completed"]


def test_a_failed_attempt_keeps_its_error() -> None:
    error = {"name": "ValueError", "message": "no", "traceback": ""}
    failed = event(2, Kind.STEP_FAILED, "s", attempt=1, error=error)
    (step,) = fold([started(1), failed, started(3, 2), committed(4, attempt=2)])
    assert [(a.status, a.error.name if a.error else None) for a in step.attempts] == [
        ("failed", "ValueError"),
        ("completed", None),
    ]
    assert step.status is StepStatus.COMPLETED


def test_a_commit_whose_beginning_was_not_recorded() -> None:
    """A decision is not waited for on disk: a crash may lose it; the commit still counts as an execution."""
    (step,) = fold([committed(1)])
    assert (step.status, step.executions, [a.number for a in step.attempts]) == (StepStatus.COMPLETED, 1, [1])


def test_replayed_steps_are_told_apart() -> None:
    (step,) = fold([started(1), committed(2, "replay")])
    assert step.status is StepStatus.REPLAY


def test_one_by_one_equals_all_at_once() -> None:
    """Memory, which takes events as they happen, and history agree at every point."""
    history = [
        started(1),
        committed(2),
        started(3, 2),
        event(4, Kind.RUN_LOST),
        started(5, 3, 2),
        committed(6, attempt=3),
    ]
    kept = Fold()
    for count, one in enumerate(history, 1):
        kept.apply(one)
        assert kept.steps() == fold(history[:count])
