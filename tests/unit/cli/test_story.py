"""What a followed run says: `Story` turns successive states into lines, each told once."""

from __future__ import annotations

from typing import Any

import pytest

from nbdurable.cli.follow import EXIT_STATUS, Story, needs_person
from nbdurable.cli.screen import Line, plain
from nbdurable.coordinator.fold import Kind
from nbdurable.models import (
    Attempt,
    DriverKind,
    ErrorInfo,
    Event,
    RunDetail,
    RunStatus,
    Step,
    StepStatus,
    Variable,
    Wait,
    WaitKind,
    WaitStatus,
)


def a_run(status: RunStatus = RunStatus.RUNNING, **fields: Any) -> RunDetail:
    return RunDetail(
        id="0199f3c2" * 4,
        notebook="/work/agent.ipynb",
        status=status,
        reason="",
        kind=DriverKind.HEADLESS,
        created_at=0,
        updated_at=0,
        **fields,
    )


def a_step(status: StepStatus = StepStatus.COMPLETED, *, name: str = "search", **fields: Any) -> Step:
    attempts = fields.pop(
        "attempts", (Attempt(number=1, status="completed", epoch=1, started_at=10.0, ended_at=12.1),)
    )
    return Step(name=name, status=status, reason="no checkpoint", executions=1, attempts=attempts, **fields)


def a_wait(kind: WaitKind, status: WaitStatus = WaitStatus.OPEN) -> Wait:
    return Wait(
        id="7K2MXD",
        run_id="0199f3c2" * 4,
        key="review",
        kind=kind,
        status=status,
        title="Publish?",
        step="review",
        created_at=0,
    )


def a_story(page: str | None = None) -> Story:
    return Story(lambda wait: page, lambda command: f"nbdurable {command}")


def told(story: Story, run: RunDetail, *events: Event) -> list[str]:
    return [_text(line) for line in story.lines(run, events)]


def _text(line: Line) -> str:
    return " ".join("".join(part if isinstance(part, str) else part[0] for part in line).split())


def test_a_finished_step_is_told_once() -> None:
    """Guarantee 9: what was done, how long it took, and what it left."""
    story = a_story()
    step = a_step(variables=(Variable(name="results", type="list", shape="list[10]", bytes=42_000),))
    assert told(story, a_run(steps=(step,))) == ["✓ search 2.1 s results list[10] 42 kB"]
    assert told(story, a_run(steps=(step,))) == []


def test_a_step_under_way_says_nothing_yet() -> None:
    """Only ends are told; the bar shows what is under way."""
    assert told(a_story(), a_run(steps=(a_step(StepStatus.RUNNING),))) == []


def test_a_restored_step_says_why() -> None:
    """Guarantee 9: the reason of the decision to restore."""
    story, before = a_story(), a_step()
    told(story, a_run(steps=(before,)))
    after = before.model_copy(update={"restores": 1, "reason": "same code and inputs"})
    assert told(story, a_run(steps=(after,))) == ["↺ search restored · same code and inputs"]


def test_a_step_that_runs_after_it_was_restored_is_no_restore() -> None:
    """The newest decision counts, not that there was ever a restore."""
    story, restored = a_story(), a_step(restores=1)
    told(story, a_run(steps=(restored,)))
    assert told(story, a_run(steps=(restored.model_copy(update={"executions": 2}),))) == ["✓ search 2.1 s"]


def test_an_attempt_after_trouble_names_the_trouble() -> None:
    """Guarantee 9: why there was a second attempt."""
    failed = Attempt(
        number=1,
        status="failed",
        epoch=1,
        started_at=0,
        ended_at=1,
        error=ErrorInfo(name="HTTPError", message="429"),
    )
    done = Attempt(number=2, status="completed", epoch=1, started_at=5, ended_at=13.4)
    assert told(a_story(), a_run(steps=(a_step(attempts=(failed, done)),))) == [
        "✓ search 8.4 s attempt 2 (HTTPError: 429)"
    ]


def test_what_was_not_saved_is_said_with_its_reason() -> None:
    """Guarantee 7: a variable that can't be saved is named at once."""
    client = Variable(name="client", type="OpenAI", state="unsaved", reason="holds a connection")
    assert told(a_story(), a_run(steps=(a_step(variables=(client,)),))) == [
        "✓ search 2.1 s · client not saved: holds a connection"
    ]


def test_a_failure_is_told_by_what_comes_after_it() -> None:
    """Design §5a: the user's traceback comes first, so a failed step's line waits for the run's end."""
    assert told(a_story(), a_run(steps=(a_step(StepStatus.FAILED),))) == []


def test_a_recovery_is_told() -> None:
    """Guarantee 6 is no secret: the loss of a driver is told, once, in the coordinator's words."""
    story = a_story()
    lost = Event(seq=7, at=0, run_id="0199f3c2" * 4, epoch=1, kind=Kind.RUN_LOST, sentence="worker 4711 died")
    assert told(story, a_run(), lost) == ["↻ worker 4711 died"]
    assert told(story, a_run(), lost) == []


def test_an_approval_names_the_command_and_the_page_that_answer() -> None:
    """Guarantee 5: whoever reads the line can answer."""
    run = a_run(RunStatus.WAITING, waits=(a_wait(WaitKind.APPROVAL),))
    line = "⏸ review waits for approval “Publish?” → nbdurable approve 7K2MXD or http://127.0.0.1:8977/ui/approvals/7K2MXD"
    assert told(a_story("http://127.0.0.1:8977/ui/approvals/7K2MXD"), run) == [line]


@pytest.mark.parametrize(
    ("kind", "status", "needed"),
    [
        (WaitKind.APPROVAL, WaitStatus.OPEN, True),
        (WaitKind.APPROVAL, WaitStatus.ANSWERED, False),
        (WaitKind.QUESTION, WaitStatus.OPEN, True),
        (WaitKind.EVENT, WaitStatus.OPEN, True),
        (WaitKind.TIMER, WaitStatus.OPEN, False),
    ],
)
def test_only_what_somebody_must_answer_ends_a_follow(
    kind: WaitKind, status: WaitStatus, needed: bool
) -> None:
    """A run that sleeps goes on by itself; one that waits for a person or an event ends the command with status 3."""
    assert needs_person(a_run(RunStatus.WAITING, waits=(a_wait(kind, status),))) is needed


def test_a_wait_between_two_tries_is_told_with_what_failed() -> None:
    """Guarantee 9: and the step's own line tells how long the wait was."""
    failed = Attempt(
        number=1,
        status="failed",
        epoch=1,
        started_at=1.0,
        ended_at=2.0,
        error=ErrorInfo(name="RateLimitError", message="429"),
        again_in_s=4.0,
    )
    timer = a_wait(WaitKind.TIMER).model_copy(update={"due_at": 6.0})
    story = a_story()
    step = a_step(StepStatus.FAILED, name="review", attempts=(failed,))
    (line,) = told(story, a_run(RunStatus.WAITING, steps=(step,), waits=(timer,)))
    assert line.startswith("↻ review failed (RateLimitError: 429) · tried again at ")
    done = Attempt(number=2, status="completed", epoch=2, started_at=6.0, ended_at=6.5)
    step = a_step(name="review", attempts=(failed, done))
    assert told(story, a_run(steps=(step,))) == [
        "✓ review 0.5 s attempt 2 (RateLimitError: 429, waited 4.0 s)"
    ]


def test_each_status_that_ends_a_follow_has_its_exit_status() -> None:
    """Design §6: 0 completed, 1 failed (or paused, timed out, expired), 3 waiting, 4 cancelled."""
    wanted = {
        RunStatus.COMPLETED: 0,
        RunStatus.FAILED: 1,
        RunStatus.PAUSED: 1,
        RunStatus.WAITING: 3,
        RunStatus.CANCELLED: 4,
        RunStatus.TIMED_OUT: 1,
        RunStatus.EXPIRED: 1,
    }
    assert wanted == EXIT_STATUS


def test_text_of_a_notebook_can_not_steer_the_terminal() -> None:
    """Escapes, carriage returns and bidirectional controls of a title or a value are dropped."""
    assert plain("a\x1b[2Jb\rc\u202ed\te\nf") == "a[2Jbcd\te\nf"
