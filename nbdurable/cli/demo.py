"""`nbdurable demo`: a real agent notebook, killed twice, that ends as if nothing had happened.

Owns the story and its proofs: whatever is claimed at the end was looked up, in what the coordinator knows and
in a journal that the notebook itself writes. Knows the notebook only by its parameters.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from nbdurable import processes
from nbdurable.cli.follow import Story, conclude, needs_person, progress_bar, states
from nbdurable.cli.project import approval_page, choose_home, hint, near
from nbdurable.cli.screen import Screen, plain
from nbdurable.cli.service import end
from nbdurable.client import Client
from nbdurable.contract import ANSWER_WAIT, AnswerWait
from nbdurable.errors import CoordinatorError, UsageError
from nbdurable.models import RunDetail, RunStatus, StepStatus, Wait, WaitKind, WaitStatus
from nbdurable.settings import FOLDER, find_home

NOTEBOOK = "research_agent.ipynb"
_FIRST_KILL_AFTER = 2  # committed steps
_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)


@dataclass
class Evidence:
    """What was seen on the way, to be held against the end."""

    journal: Path
    kills: list[str] = field(default_factory=list)
    committed: dict[str, int] = field(
        default_factory=dict
    )  # step → executions when it was first seen committed
    begun_again: set[str] = field(default_factory=set)  # under way when something was killed
    _lines_at_kill: int = 0
    _committed_at_kill: int = 0

    def lines(self) -> list[str]:
        """Return the journal: `STEP TIME pid PID`, a line for each body that ran to its end."""
        try:
            return self.journal.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []

    def look(self, run: RunDetail) -> None:
        """Note which steps are committed by now."""
        for step in run.steps:
            if step.status is StepStatus.COMPLETED:
                self.committed.setdefault(step.name, step.executions)

    def target(self, run: RunDetail) -> tuple[str, int, str] | None:
        """Return what to kill now, in the middle of a step: the worker, later the recovered run's kernel."""
        under_way = next((step.name for step in run.steps if step.status is StepStatus.RUNNING), None)
        if run.status is not RunStatus.RUNNING or under_way is None or run.driver is None:
            return None
        if not self.kills and len(self.committed) >= _FIRST_KILL_AFTER:
            return "worker", run.driver.process.pid, under_way
        if len(self.kills) == 1 and len(self.committed) > self._committed_at_kill:
            new = self.lines()[self._lines_at_kill :]  # written by the kernel that recovered the run
            if new and processes.exists(pid := int(new[-1].rpartition(" ")[2])):
                return "kernel", pid, under_way
        return None

    def killed(self, what: str, step: str) -> None:
        """Note a kill."""
        self.kills.append(what)
        self.begun_again.add(step)
        self._lines_at_kill, self._committed_at_kill = len(self.lines()), len(self.committed)


def run_demo(folder: Path, screen: Screen, *, yes: bool, question: str | None) -> int:
    """Play the demo in `folder`, which keeps what it made; return the exit status."""
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        notebook = folder / NOTEBOOK
        notebook.write_bytes(_notebook())
        journal = folder / "journal.txt"
        journal.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"the demo can't write to {folder}: {error.strerror}",
            todo="name another folder: nbdurable demo --keep DIR",
        ) from None
    choose_home(folder / FOLDER)
    home = find_home()
    client = Client(home)
    try:
        return _play(client, folder, Evidence(journal), screen, yes=yes, question=question)
    except KeyboardInterrupt:
        screen.say("interrupted; what was made is in ", (near(folder), "bold"))
        return 130
    finally:
        client.close()
        with contextlib.suppress(CoordinatorError):
            end(home)


def _notebook() -> bytes:
    """Return the notebook: from the installed package, or from the checkout."""
    installed = resources.files("nbdurable.cli") / NOTEBOOK
    if installed.is_file():
        return installed.read_bytes()
    return (Path(__file__).parents[2] / "notebooks" / NOTEBOOK).read_bytes()


def _play(
    client: Client, folder: Path, evidence: Evidence, screen: Screen, *, yes: bool, question: str | None
) -> int:
    from nbdurable.notebooks import create_headless

    command = hint(client.home)
    report, output = folder / "report.md", folder / "research_agent.out.ipynb"
    report.unlink(missing_ok=True)
    screen.say("A research agent answers a question from the documentation of the packages installed here.")
    screen.say(
        "Its worker and its kernel are killed (SIGKILL) in the middle. Steps that were done stay done."
    )
    screen.say()
    parameters = {"report_path": str(report), "journal": str(evidence.journal)}
    created = create_headless(
        client,
        folder / NOTEBOOK,
        parameters=parameters | ({"question": question} if question else {}),
        output=output,
        tags=("demo",),
    )
    screen.say((NOTEBOOK, "bold"), f"  run {created.short}  {created.steps_total} steps")
    story = Story(approval_page(client.home), command)

    run = _watch(client, created.id, evidence, story, screen)
    if needs_person(run):
        wait = next(w for w in run.waits if w.kind is WaitKind.APPROVAL and w.status is WaitStatus.OPEN)
        approved = _ask(wait, screen, yes=yes)
        if approved is None:
            screen.say("No terminal to ask on. The run waits; answer it, and it goes on by itself:")
            screen.say("  → ", (command(f"approve {wait.id}"), "bold"))
            if screen.json_mode:
                screen.data(run)
            return 3
        by = "demo --yes" if yes else "demo"
        client.call(
            ANSWER_WAIT,
            AnswerWait(wait_id=wait.id, approved=approved, value=wait.value, by=by, nonce=uuid.uuid4().hex),
        )
        run = _watch(client, created.id, evidence, story, screen)
    if run.status is not RunStatus.COMPLETED:
        status = conclude(run, screen, command)
        if screen.json_mode:
            screen.data(run)
        return status
    return _prove(run, evidence, report, output, screen, command)


def _watch(client: Client, run_id: str, evidence: Evidence, story: Story, screen: Screen) -> RunDetail:
    """Follow the run and kill in the middle of it, until it has ended or waits for a person."""
    with progress_bar(screen) as update:
        for run, events in states(client, run_id):
            for line in story.lines(run, events):
                screen.say(*line)
            update(run)
            evidence.look(run)
            if (target := evidence.target(run)) is not None:
                what, pid, step = target
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, _SIGKILL)
                    evidence.killed(what, step)
                    screen.say(
                        " ",
                        ("✗", "red"),
                        (f" kill -9 {pid}: the {what}, in the middle of `{step}`", "bold red"),
                    )
    return run


def _ask(wait: Wait, screen: Screen, *, yes: bool) -> bool | None:
    """Show the draft and ask; None where nobody can be asked."""
    import typer

    screen.say()
    draft = wait.value if isinstance(wait.value, str) else wait.preview
    for line in draft.splitlines():
        screen.say(("  │ ", "dim"), line)
    screen.say()
    if yes:
        screen.say(f"{wait.title} yes (--yes)")
        return True
    if not sys.stdin.isatty():
        return None
    return typer.confirm(plain(wait.title), err=screen.json_mode)


def _prove(
    run: RunDetail,
    evidence: Evidence,
    report: Path,
    output: Path,
    screen: Screen,
    command: Callable[[str], str],
) -> int:
    """Hold the end against what was seen on the way, print what was found, return 0 if all of it holds."""
    ran = Counter(line.split(" ", 1)[0] for line in evidence.lines())
    twice = {name for name, times in ran.items() if times != 1 and name not in evidence.begun_again}
    for step in run.steps:
        completed = sum(attempt.status == "completed" for attempt in step.attempts)
        if completed != 1 or step.executions != evidence.committed.get(step.name):
            twice.add(step.name)
    restored = [step.name for step in run.steps if step.restores]
    published = bool(run.result and run.result["approved"])
    findings = [
        (
            "the worker was killed, then the kernel of the recovered run",
            evidence.kills == ["worker", "kernel"],
        ),
        (f"the run recovered by itself, {run.recoveries} times", run.recoveries == len(evidence.kills)),
        (f"restored instead of run again: {', '.join(restored) or 'nothing'}", bool(restored)),
        (f"none of the {len(evidence.committed)} committed steps ran twice", not twice),
        ("the report was published" if published else "nothing was published", report.exists() == published),
        ("the output notebook is written", output.exists()),
    ]
    screen.say()
    for said, holds in findings:
        screen.say(*((("✓", "green"), " ") if holds else (("✗", "red"), " does not hold: ")), said)
    if twice:
        screen.say(f"    ran twice: {', '.join(sorted(twice))}")
    if again := sorted(evidence.begun_again):
        screen.say((f"    not committed when the kill came, so begun again: {', '.join(again)}", "dim"))
    screen.say()
    if published:
        screen.say("report           ", (near(report), "bold"))
    screen.say("output notebook  ", (near(output), "bold"))
    screen.say("journal          ", near(evidence.journal))
    screen.say("look at the run  ", command(f"show {run.short}"))
    if screen.json_mode:
        screen.data(
            {
                "ok": all(holds for _, holds in findings),
                "findings": [{"said": said, "holds": holds} for said, holds in findings],
                "report": str(report) if published else None,
                "output": str(output),
                "journal": str(evidence.journal),
                "run": run,
            }
        )
    return 0 if all(holds for _, holds in findings) else 1
