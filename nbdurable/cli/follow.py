"""A run as it goes on: one line per finished step, and a progress bar on a terminal.

Owns `Story`, which turns successive states of a run into the lines that are new (pure), and `follow`, which
watches a run until it has ended or waits for a person. Knows nothing of how the run is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nbdurable.cli.screen import Line, Screen, clip, clock, plain, variable, warn
from nbdurable.contract import GET_RUN, HEALTH, READ_EVENTS, ByRun, Nothing, ReadEvents
from nbdurable.coordinator.fold import Kind
from nbdurable.errors import StoreFull
from nbdurable.models import Event, Run, RunDetail, RunStatus, Step, StepStatus, Wait, WaitKind, WaitStatus
from nbdurable.policies import span

if TYPE_CHECKING:
    from nbdurable.client import Client

EXIT_STATUS = {
    RunStatus.COMPLETED: 0,
    RunStatus.FAILED: 1,
    RunStatus.PAUSED: 1,
    RunStatus.WAITING: 3,
    RunStatus.CANCELLED: 4,
    RunStatus.TIMED_OUT: 1,
    RunStatus.EXPIRED: 1,
}
_TOLD = (
    Kind.RUN_LOST,
    Kind.RUN_RELEASED,
    Kind.RUN_DELAYED,
    Kind.RUN_RETRIED,
)  # what else a follower would wonder about
_NAME_WIDTH = 10
_HOLD_S = 5.0  # after so long without news, ask whether there can be any
_SHOWN_VARIABLES = 3

Address = Callable[[Wait], str | None]  # the page on which a wait can be answered, where pages are up


def step_line(step: Step, *, restored: bool) -> Line | None:
    """Return the line that a step's state deserves, None while there is nothing to say.

    A failure is told by the attempt after it, or at the run's end, below the user's own traceback.
    `restored`: whether the newest decision put its checkpoint back.
    """
    name = f" {step.name:<{_NAME_WIDTH}}  "
    if step.status not in (StepStatus.COMPLETED, StepStatus.REPLAY):
        return None
    if not (restored or step.attempts):  # shared, or marked done: told when it is restored
        return None
    if restored:
        return (("↺", "cyan"), name, "restored", (f" · {step.reason}" if step.reason else "", "dim"))
    return (("✓", "green"), name, f"{took(step):<8}", *_details(step))


def took(step: Step) -> str:
    """Return how long the newest attempt that ended took."""
    ended = [attempt for attempt in step.attempts if attempt.ended_at is not None]
    return span((ended[-1].ended_at or 0) - ended[-1].started_at) if ended else ""


def _details(step: Step) -> Iterator[tuple[str, str]]:
    notes = []
    trouble = [attempt for attempt in step.attempts[:-1] if attempt.status in ("failed", "lost")]
    if trouble:
        error = trouble[-1].error
        why = (
            f"{error.name}: {clip(error.message, 50)}" if error else f"attempt {trouble[-1].number} was lost"
        )
        again_in_s = trouble[-1].again_in_s
        waited = "" if again_in_s is None else f", waited {span(again_in_s)}"
        notes.append(f"attempt {step.attempts[-1].number} ({why}{waited})")
    saved = [variable(found) for found in step.variables if found.state == "saved"]
    notes += saved[:_SHOWN_VARIABLES]
    if len(saved) > _SHOWN_VARIABLES:
        notes.append(f"{len(saved) - _SHOWN_VARIABLES} more")
    notes += [f"{found.name} {found.reason}" for found in step.variables if found.state == "recipe"]
    if step.status is StepStatus.REPLAY:
        notes.append("runs again on resume")
    if notes:
        yield " · ".join(notes), "dim"
    for found in step.variables:
        if found.state == "unsaved":
            yield f" · {variable(found)}", "yellow"


class Story:
    """Turns successive states of a run into the lines that are new; remembers what it said."""

    def __init__(self, address: Address, command: Callable[[str], str]) -> None:
        self._address = address
        self._command = command
        self._steps: dict[str, tuple[StepStatus, int, int, int]] = {}
        self._waits: set[str] = set()
        self._seq = 0

    def lines(self, run: RunDetail, events: Sequence[Event] = ()) -> Iterator[Line]:
        """Yield what is new in a run's state and in its history."""
        for event in events:
            if event.seq > self._seq and event.kind in _TOLD:
                yield (" ", ("↻", "yellow"), f" {event.sentence}")
        self._seq = max([self._seq, *(event.seq for event in events)])
        for step in run.steps:
            state = (step.status, step.executions, step.restores, len(step.attempts))
            before = self._steps.get(step.name)
            if before == state:
                continue
            self._steps[step.name] = state
            if (line := step_line(step, restored=step.restores > (before[2] if before else 0))) is not None:
                yield (" ", *line)
        if run.status is RunStatus.WAITING:
            for wait in run.waits:
                if wait.status is WaitStatus.OPEN and wait.id not in self._waits:
                    self._waits.add(wait.id)
                    yield (" ", *(_next_try(run, wait) or self._wait(wait)))

    def _wait(self, wait: Wait) -> Line:
        name = f" {wait.step or '':<{_NAME_WIDTH}}  "
        if wait.kind is WaitKind.TIMER:
            until = f"sleeps until {clock(wait.due_at)}" if wait.due_at else "sleeps"
            return (("⏸", "cyan"), name, until, (" · goes on by itself", "dim"))
        if not wait.kind.is_for_people:
            command = self._command(f"send {wait.event}") if wait.event else ""
            return (
                ("⏸", "cyan"),
                name,
                f"waits for {clip(wait.title)}",
                *((f"  →  {command}",) if command else ()),
            )
        if wait.kind is WaitKind.QUESTION:
            return (
                ("⏸", "cyan"),
                name,
                f"asks “{clip(wait.title)}”  →  ",
                (self._command(f"answer {wait.id}"), "bold"),
            )
        page = self._address(wait)
        return (
            ("⏸", "cyan"),
            name,
            f"waits for approval “{clip(wait.title)}”  →  ",
            (self._command(f"approve {wait.id}"), "bold"),
            *((f"   or  {page}",) if page else ()),
        )


def _next_try(run: RunDetail, wait: Wait) -> Line | None:
    """Return the line of a timer that stands between two tries of a step; None for any other wait."""
    tries = next((step.attempts for step in run.steps if step.name == wait.step), ())
    if wait.kind is not WaitKind.TIMER or wait.due_at is None or not tries or tries[-1].again_in_s is None:
        return None
    error = tries[-1].error
    said = f" ({clip(f'{error.name}: {error.message}')})" if error else ""
    name = f" {wait.step:<{_NAME_WIDTH}}  "
    return (("↻", "yellow"), name, f"failed{said}", (f" · tried again at {clock(wait.due_at)}", "dim"))


def heading(run: Run) -> Line:
    """Return the line that names a run."""
    return ((Path(run.notebook).name, "bold"), f"  run {run.short}")


def needs_person(run: RunDetail) -> bool:
    """Tell whether a run waits for a person, or for what somebody sends; one that only sleeps goes on by itself."""
    return run.status is RunStatus.WAITING and any(
        (wait.kind.is_for_people or wait.kind is WaitKind.EVENT) and wait.status is WaitStatus.OPEN
        for wait in run.waits
    )


def states(client: Client, run_id: str) -> Iterator[tuple[RunDetail, tuple[Event, ...]]]:
    """Yield a run with its new events whenever there are some, until it has ended or waits for a person."""
    after = 0
    trouble = ""
    while True:
        events = client.call(READ_EVENTS, ReadEvents(run_id=run_id, after=after, hold_s=_HOLD_S)).events
        run = _readable(client, run_id) if events else None
        if run is None:
            former, trouble = trouble, client.call(HEALTH, Nothing()).trouble
            if trouble not in ("", former):
                said, _, todo = trouble.partition("\n  → ")
                warn(("note: ", "yellow"), f"the run goes on by itself once this is over: {said}")
                warn("  → ", todo)
            continue
        after = events[-1].seq
        yield run, events
        if run.status.is_final or run.status is RunStatus.PAUSED or needs_person(run):
            return


def _readable(client: Client, run_id: str) -> RunDetail | None:
    """Return a run, None while the store has no space: whoever follows goes on following, as the run does."""
    with suppress(StoreFull):
        return client.call(GET_RUN, ByRun(run_id=run_id))
    return None


def follow(client: Client, run_id: str, screen: Screen, story: Story) -> RunDetail:
    """Print what a run does until it has ended or waits for a person; return its state then."""
    with progress_bar(screen) as update:
        for run, events in states(client, run_id):
            for line in story.lines(run, events):
                screen.say(*line)
            update(run)
    return run


@contextmanager
def progress_bar(screen: Screen) -> Iterator[Callable[[RunDetail], None]]:
    """Show a progress bar of steps below the lines, where somebody looks; it is gone in the end."""
    if not screen.console.is_terminal:
        yield lambda run: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(20),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=screen.console, transient=True) as progress:
        task = progress.add_task("", visible=False, now="")

        def update(run: RunDetail) -> None:
            done = sum(step.status in (StepStatus.COMPLETED, StepStatus.REPLAY) for step in run.steps)
            active = next(
                (step.name for step in reversed(run.steps) if step.status is StepStatus.RUNNING), run.status
            )
            progress.update(
                task,
                description=f"{plain(Path(run.notebook).name)}  run {run.short}",
                completed=done,
                total=max(run.steps_total or 0, len(run.steps)),
                now=plain(active),
                visible=True,
            )

        yield update


def conclude(run: RunDetail, screen: Screen, command: Callable[[str], str]) -> int:
    """Print how a run stands now and what can be done next; return the exit status."""
    if run.status is RunStatus.COMPLETED:
        screen.say(
            ("✓", "green"),
            f" run {run.short} completed",
            *((f" in {span(run.ended_at - run.started_at)}",) if run.ended_at and run.started_at else ()),
            *((f" → {run.output}",) if run.output else ()),
        )
    elif run.status is RunStatus.WAITING:
        screen.say(f"run {run.short} is waiting (exit status 3). It goes on by itself when somebody answers.")
    elif run.status is RunStatus.CANCELLED:
        screen.say(
            ("✗", "yellow"),
            f" run {run.short} was cancelled; {_kept(run)}. Go on: ",
            (command(f"resume {run.short}"), "bold"),
        )
    else:
        if run.error and run.error.traceback:
            screen.say(run.error.traceback.rstrip())
        said = f"{run.error.name}: {run.error.message}" if run.error else run.reason
        failed = next(
            (step.name for step in run.steps if step.status is StepStatus.FAILED), f"run {run.short}"
        )
        screen.say(("✗", "red"), f" {failed}  {clip(said, 300)}")
        resume = command(f"resume {run.short}")
        screen.say(
            f"run {run.short} {plain_status(run.status)}; {_kept(run)}. Go on with this notebook as it was: ",
            (resume, "bold"),
        )
        screen.say(
            "with a cell that is fixed: ",
            (command(f"repair {run.short} --notebook NB"), "bold"),
            ", or in a notebook ",
            (f"%durable attach {run.short}", "bold"),
        )
    return EXIT_STATUS[run.status]


def plain_status(status: RunStatus) -> str:
    """Return a status as people write it."""
    return status.value.replace("_", " ")


def _kept(run: RunDetail) -> str:
    kept = [step.name for step in run.steps if step.status is StepStatus.COMPLETED]
    if not kept:
        return "no step was committed"
    total = max(run.steps_total or 0, len(run.steps))
    return f"{len(kept)} of {total} steps are kept ({clip(', '.join(kept))})"
