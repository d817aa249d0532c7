"""Runs, a run, its history and waits as tables for people."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nbdurable import spending
from nbdurable.cli.follow import took
from nbdurable.cli.project import approval_page, hint, near
from nbdurable.cli.screen import LEVELS, STYLES, Screen, clip, clock
from nbdurable.client import Client
from nbdurable.contract import HOLD_S, READ_EVENTS, ReadEvents
from nbdurable.models import Call, Progress, Run, RunDetail, RunStatus, Variable, Wait, WaitKind, WaitStatus
from nbdurable.policies import size, span
from nbdurable.settings import Home

_CALLS = 50  # newest ones that people see


def cell(value: Any) -> str:
    """Return a JSON value as a cell of a table shows it."""
    return (
        ""
        if value is None
        else clip(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 200)
    )


def print_runs(runs: Sequence[Run], screen: Screen) -> None:
    """Print one line per run."""
    if not runs:
        screen.say("no runs")
        return
    now = time.time()
    rows = [
        (
            run.short,
            (run.status.value, STYLES[run.status]),
            near(Path(run.notebook)),
            clock(run.created_at),
            _length(run, now),
            clip(run.reason, 80) + (f" ({lineage(run)})" if run.forked_from else ""),
        )
        for run in runs
    ]
    screen.table(("RUN", "STATUS", "NOTEBOOK", "CREATED", "TOOK", "REASON"), rows)


def lineage(run: Run) -> str:
    """Say which run a fork or a replay comes from."""
    if run.forked_from is None:
        return ""
    source = run.forked_from[-8:]
    return f"fork of {source} at {run.forked_at}" if run.forked_at else f"replay of {source}"


def _length(run: Run, now: float) -> str:
    if run.started_at is None:
        return ""
    return span((run.ended_at or now) - run.started_at)


def print_run(run: RunDetail, screen: Screen, home: Home) -> None:
    """Print all that is known of a run."""
    screen.say(
        (Path(run.notebook).name, "bold"),
        f"  run {run.short}  ",
        (run.status.value, STYLES[run.status]),
        f"  {run.reason}",
    )
    facts = {
        "id": run.id,
        "notebook": near(Path(run.notebook)),
        "output": run.output and near(Path(run.output)),
        "parameters": ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in run.parameters.items()
        ),
        "tags": ", ".join(run.tags),
        "parent": run.parent_id
        and f"run {run.parent_id[-8:]}" + (f", step {run.parent_step}" if run.parent_step else ""),
        "trace": run.trace_id if run.parent_id else "",
        "lineage": lineage(run),
        "until": run.until,
        "set by hand": ", ".join(
            f"{one.name}={json.dumps(one.value, ensure_ascii=False)} before {one.step} (by {one.by})"
            for one in run.hand_set
        ),
        "created": clock(run.created_at),
        "took": _length(run, time.time()),
        "driver": run.driver and (run.driver.label or f"{run.driver.process.role} {run.driver.process.pid}"),
        "recoveries": str(run.recoveries) if run.recoveries else "",
        "retries": f"{run.failures} of {run.retries} used" if run.retries else "",
        "timeout": "" if run.timeout_s is None else f"{span(run.timeout_s)} of driving",
        "begins": "" if run.begins_at is None else clock(run.begins_at),
        "expires": "" if run.expires_at is None or run.epoch else clock(run.expires_at),
        "progress": run.progress and _progress(run.progress),
        "metadata": run.metadata and json.dumps(run.metadata, ensure_ascii=False),
        "models": spending.say(run.usage) if run.usage.calls else "",
        "budget": run.budget and spending.say_budget(run.budget),
        "result": "" if run.result is None else json.dumps(run.result, ensure_ascii=False),
    }
    for name, fact in facts.items():
        if fact:
            screen.say((f"  {name:<11}  ", "dim"), clip(fact, 400))
    if run.steps:
        screen.say()
        rows = [
            (
                step.name,
                (step.status.value, STYLES[step.status]),
                f"{step.executions}×",
                f"{step.restores}×",
                took(step),
                clip(step.reason, 120),
            )
            for step in run.steps
        ]
        screen.table(("STEP", "STATUS", "RAN", "RESTORED", "TOOK", "REASON"), rows)
    if removed := {step.removed for step in run.steps if step.removed}:
        screen.say(("note: ", "yellow"), "; ".join(sorted(removed)))
    if run.calls:
        screen.say()
        screen.table(
            ("STEP", "CALL", "GIVEN", "RESULT", "TOOK", "ATTEMPT", "REASON"),
            [_call(found) for found in run.calls[-_CALLS:]],
        )
        if (more := len(run.calls) - _CALLS) > 0:
            screen.say((f"and {more} earlier calls; --json lists them all", "dim"))
    variables = [(step.name, found) for step in run.steps for found in step.variables]
    if variables:
        screen.say()
        screen.table(
            ("STEP", "VARIABLE", "TYPE", "SIZE", "VALUE"),
            [(name, found.name, _kind(found), _amount(found), _value(found)) for name, found in variables],
        )
    trouble = [(step, attempt) for step in run.steps for attempt in step.attempts if attempt.error]
    if trouble:
        screen.say()
        for step, attempt in trouble:
            error = attempt.error
            assert error is not None
            said = clip(f"{error.name}: {error.message}", 200)
            again = "" if attempt.again_in_s is None else f" · again in {span(attempt.again_in_s)}"
            at = clock(attempt.started_at)
            screen.say(("✗", "red"), f" {step.name}, attempt {attempt.number} at {at}: {said}{again}")
    if run.children:
        screen.say()
        rows_ = [
            (
                one.id[-8:],
                (one.status.value, STYLES[one.status]),
                near(Path(one.notebook)),
                one.step or "",
                clip(one.reason, 80),
            )
            for one in run.children
        ]
        screen.table(("CHILD", "STATUS", "NOTEBOOK", "STEP", "REASON"), rows_)
    if run.waits:
        screen.say()
        _waits_table(run.waits, screen)
        _print_answers(run.waits, screen, home)
    if run.error and run.status in (RunStatus.FAILED, RunStatus.PAUSED):
        screen.say()
        screen.say(run.error.traceback.rstrip() or f"{run.error.name}: {run.error.message}")
        screen.say("  → go on from the last committed step: ", (hint(home)(f"resume {run.short}"), "bold"))


def _progress(said: Progress) -> str:
    total = "" if said.total is None else f" of {said.total:g}"
    return " ".join(filter(None, (said.step, f"{said.done:g}{total}", said.text)))


def print_history(client: Client, run: str, *, follow: bool, as_json: bool) -> None:
    """Print what happened in a run, a line per event; followed, until the run has ended."""
    screen = Screen()
    after = 0
    while True:
        question = ReadEvents(run_id=run, after=after, hold_s=HOLD_S if follow else 0.0)
        answer = client.call(READ_EVENTS, question)
        for event in answer.events:
            if as_json:
                print(event.model_dump_json(), flush=True)
            else:
                fields = event.data.get("fields") or {}
                told = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
                level = event.data.get("level", "")
                screen.say(
                    (f"{clock(event.at)}  ", "dim"),
                    (f"{level:<8}" if level else "", LEVELS.get(level, "")),
                    f"{event.step}: " if level and event.step else "",
                    event.sentence,
                    ("  " + " ".join(told) if fields else "", "dim"),
                )
        if answer.events:
            after = answer.events[-1].seq
        elif answer.run.status.is_final or not follow:
            return


def _call(found: Call) -> tuple[str, ...]:
    attempt = f"{found.attempt}, kept since" if found.replayed else str(found.attempt)
    result = spending.say_use(found.model) if found.model else f"{found.type} {size(found.bytes)}"
    return (
        found.step,
        found.name,
        found.given,
        result,
        span(found.duration_s),
        attempt,
        clip(found.reason, 80),
    )


def _kind(found: Variable) -> str:
    return " ".join(filter(None, (found.type, found.shape)))


def _amount(found: Variable) -> str:
    return size(found.bytes) if found.state == "saved" else found.state


def _value(found: Variable) -> str:
    return clip(found.reason if found.state in ("unsaved", "recipe") else found.preview, 100)


def print_waits(waits: Sequence[Wait], screen: Screen, command: Callable[[str], str]) -> None:
    """Print one line per wait, and how an approval is answered."""
    if not waits:
        screen.say("no run waits for anything")
        return
    _waits_table(waits, screen)
    for kind in (WaitKind.APPROVAL, WaitKind.QUESTION, WaitKind.EVENT):
        wait = next((w for w in waits if w.kind is kind and w.status is WaitStatus.OPEN), None)
        if wait is not None:
            words = [(command(words), "bold") for words in _ways_to_answer(wait)]
            screen.say("  → ", words[0], *(part for word in words[1:] for part in (" or ", word)))


def _ways_to_answer(wait: Wait) -> list[str]:
    """Return the commands that answer a wait."""
    if wait.kind is WaitKind.EVENT:
        return [f"send {shlex.quote(str(wait.event))}"]
    if wait.kind is WaitKind.QUESTION:
        return [f"answer {wait.id} TEXT"]
    approve = f"approve {wait.id}"
    return [f"{approve} --value JSON" if wait.form and wait.value is None else approve, f"reject {wait.id}"]


def _waits_table(waits: Sequence[Wait], screen: Screen) -> None:
    rows = [
        (
            wait.id,
            wait.kind.value,
            wait.status.value,
            wait.run_id[-8:],
            wait.step or "",
            clip(wait.title),
            clock(wait.due_at) if wait.due_at else clip(wait.preview, 80),
            _notes(wait),
        )
        for wait in waits
    ]
    screen.table(("WAIT", "KIND", "STATUS", "RUN", "STEP", "TITLE", "VALUE", "NOTES"), rows)


def _notes(wait: Wait) -> str:
    """Say who is asked, until when, what happens then, and what the answer must look like."""
    notes = []
    if wait.reviewers:
        notes.append(f"asks {', '.join(wait.reviewers)}")
    if wait.deadline_at is not None:
        default = wait.default
        then = (
            ""
            if default is None
            else ", then it is approved"
            if default.approved
            else ", then it is rejected"
        )
        notes.append(f"until {clock(wait.deadline_at)}{then if wait.kind is WaitKind.APPROVAL else ''}")
    if wait.reminders:
        notes.append(f"reminded {wait.reminders}×")
    if wait.form is not None and wait.kind is not WaitKind.QUESTION:
        fields = ", ".join(wait.form.get("properties", ())) or str(wait.form.get("type", "JSON"))
        notes.append(f"takes {fields}")
    return clip(" · ".join(notes), 100)


def _verdict(wait: Wait) -> str:
    assert wait.answer is not None
    if wait.answer.timed_out:
        return "not answered in time: ended"
    if wait.kind is WaitKind.APPROVAL:
        return "approved" if wait.answer.approved else "rejected"
    return "answered" if wait.answer.approved else "refused"


def _print_answers(waits: Sequence[Wait], screen: Screen, home: Home) -> None:
    for wait in waits:
        if wait.answer:
            said = f": {clip(wait.answer.comment, 200)}" if wait.answer.comment else ""
            screen.say(f"  {wait.id} {_verdict(wait)} by {wait.answer.by} at {clock(wait.answer.at)}{said}")
        elif wait.kind is WaitKind.QUESTION and wait.status is WaitStatus.OPEN:
            screen.say("  → ", (hint(home)(f"answer {wait.id} TEXT"), "bold"))
        elif wait.kind is WaitKind.APPROVAL and wait.status is WaitStatus.OPEN:
            page = approval_page(home)(wait)
            screen.say(
                "  → ", (hint(home)(f"approve {wait.id}"), "bold"), *((f"   or  {page}",) if page else ())
            )
