"""The commands: their words, options and help. What they do stands in the files beside this one.

Owns the one place that turns an error into a message and an exit status.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from nbdurable import spending
from nbdurable.cli import INTERRUPTED, parameters
from nbdurable.cli.project import approval_page, choose_home, connect, hint, with_output
from nbdurable.cli.screen import Screen, clock, warn
from nbdurable.contract import (
    ANSWER_WAIT,
    CANCEL_RUN,
    GET_RUN,
    GET_WAIT,
    HOLD_S,
    LIST_RUNS,
    LIST_WAITS,
    READ_CALLS,
    READ_EVENTS,
    READ_LOG,
    SET_BUDGET,
    SQL,
    AnswerWait,
    ByRun,
    Clean,
    ListRuns,
    ListWaits,
    Query,
    ReadCalls,
    ReadEvents,
    ReadLog,
    ReadWait,
    SetBudget,
)
from nbdurable.errors import DurableError, UsageError
from nbdurable.models import Run, RunStatus, WaitKind, WaitStatus
from nbdurable.settings import find_home

if TYPE_CHECKING:
    from nbdurable.cli.past import Change
    from nbdurable.client import Client


class _Group(TyperGroup):
    """Runs a command; an error becomes one clear message on stderr and its exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DurableError as error:
            _fail(error, f"{error.message or error}", error.todo, error.exit_status)
        except KeyboardInterrupt:
            warn("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of a pipe has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (nothing is left to be written at exit)
            raise typer.Exit(0) from None
        except OSError as error:  # a disk or a folder, which nbdurable can't mend
            named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            _fail(error, named, "make room, or change its owner or mode; `nbdurable doctor` looks further", 1)
        except Exception as error:
            if type(error).__module__.startswith(("typer.", "click.")):  # their exits, and wrong usage
                raise
            said = f"{type(error).__name__}: {error}"
            _fail(error, said, "this is a fault of nbdurable; NBDURABLE_DEBUG=1 shows where", 1)


def _fail(error: Exception, message: str, todo: str, status: int) -> NoReturn:
    if os.environ.get("NBDURABLE_DEBUG"):
        raise error
    warn(("Error: ", "red"), message)
    if todo:
        warn("  → ", todo)
    raise typer.Exit(status)


class _Run(TyperCommand):
    """Understands `-p NAME VALUE`, which Typer has no type for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, parameters.join_pairs(args))


app = typer.Typer(
    name="nbdurable",
    cls=_Group,
    help="Durable execution for Jupyter notebooks: a cell that starts with %%step runs once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; messages go to stderr.")]
RunId = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's id, or its first or last four or more digits.")
]
WaitId = Annotated[
    str, typer.Argument(metavar="WAIT", help="An approval's id, as `nbdurable waits` lists it.")
]
By = Annotated[
    str | None, typer.Option(metavar="NAME", help="Who answers or sends (default: this machine's user).")
]
Comment = Annotated[str, typer.Option(metavar="TEXT", help="What its reader should know.")]
From = Annotated[
    str | None,
    typer.Option("--from", metavar="STEP", help="From this step on (default: the first that is not done)."),
]
Edited = Annotated[
    Path | None, typer.Option(metavar="NB", help="The edited notebook (default: the run's own version).")
]
Parameter = Annotated[
    list[str] | None,
    typer.Option(
        "-p",
        "--parameter",
        metavar="NAME VALUE",
        help="A parameter; numbers, True, None and JSON are read as such.",
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=JSON", help="Give a variable this value, right before the step runs."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would happen, and why.")]


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ✓ gets a question mark, not a traceback
    app(list(words) if words is not None else None, prog_name="nbdurable")


def _version(wanted: bool) -> None:
    if wanted:
        from nbdurable import __version__

        print(f"nbdurable {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with the project's state (default: the nearest .nbdurable)."
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    choose_home(home)


# Runs ------------------------------------------------------------------------------------------------------


@app.command(
    cls=_Run, epilog='Example: nbdurable run agent.ipynb -p topic "solid state batteries" -o done.ipynb'
)
def run(
    notebook: Annotated[Path, typer.Argument(metavar="NOTEBOOK", help="The .ipynb file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Where the executed notebook goes.")
    ] = None,
    parameter: Parameter = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", metavar="FILE", help="Parameters from a YAML or JSON file.")
    ] = None,
    steps: Annotated[
        str, typer.Option(metavar="marked|all", help="Which cells are steps: those with %%step, or all.")
    ] = "marked",
    kernel: Annotated[
        str | None, typer.Option(metavar="NAME", help="Kernel to use instead of the notebook's.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("-t", "--tag", metavar="T", help="A tag; may be repeated.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(metavar="K", help="A second run with this key is the first one.")
    ] = None,
    retries: Annotated[
        int, typer.Option(metavar="N", help="Begin it again so often when it fails; its steps are kept.")
    ] = 0,
    on_exhausted: Annotated[
        str, typer.Option(metavar="fail|pause", help="What becomes of it when its retries are spent.")
    ] = "fail",
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="T", help="End it when it has been driven so long (30s, 10m, 2h); waits don't count."
        ),
    ] = None,
    delay: Annotated[str | None, typer.Option(metavar="T", help="Begin it so much later.")] = None,
    ttl: Annotated[
        str | None, typer.Option(metavar="T", help="Let it expire if no worker has begun it by then.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STEP", help="Execute nothing behind this step.")
    ] = None,
    no_questions: Annotated[
        bool, typer.Option("--no-questions", help="Let input() and getpass() fail instead of waiting.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(metavar="B", help="Pause it when its model calls have taken 2.50, or '200k tokens'."),
    ] = None,
    key_ttl: Annotated[str, typer.Option(metavar="T", help="How long the idempotency key counts.")] = "30d",
    debounce: Annotated[
        str | None, typer.Option(metavar="T", help="Begin it when nobody has asked for it so long.")
    ] = None,
    debounce_key: Annotated[
        str | None, typer.Option(metavar="K", help="Which runs are one, while they are delayed.")
    ] = None,
    debounce_mode: Annotated[
        str, typer.Option(metavar="leading|trailing", help="Whose parameters count: the first's, the last's.")
    ] = "leading",
    debounce_max: Annotated[
        str | None, typer.Option(metavar="T", help="Begin it so long after it was first asked for.")
    ] = None,
    singleton: Annotated[
        str | None,
        typer.Option(
            metavar="skip|cancel|queue",
            help="While another run of the notebook is open: take it, cancel it, wait.",
        ),
    ] = None,
    singleton_key: Annotated[
        str | None, typer.Option(metavar="K", help="What makes runs of one kind, instead of the notebook.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Queue the run and return.")] = False,
    as_json: Json = False,
) -> None:
    """Run a notebook headless and follow it.

    Exit status: 0 completed, 1 failed (or paused, timed out, expired), 2 wrong usage, 3 waiting for a person,
    4 cancelled, 5 coordinator out of reach. Ctrl-C leaves the run going.
    """
    if steps not in ("marked", "all"):
        raise UsageError(f"--steps {steps} is not known", todo="use --steps marked or --steps all")
    allowed = None if budget is None else spending.budget(budget)
    values = (parameters.read_file(file) if file else {}) | parameters.read_pairs(parameter or ())
    from nbdurable.cli.follow import heading
    from nbdurable.notebooks import conditions, create_headless

    screen = Screen(json=as_json)
    client = connect(notebook, existing=False)
    created = create_headless(
        client,
        notebook,
        parameters=values,
        output=output,
        steps_mode="all" if steps == "all" else "marked",
        kernel_name=kernel,
        tags=tuple(tag or ()),
        idempotency_key=idempotency_key,
        retries=retries,
        on_exhausted=on_exhausted,
        timeout=timeout,
        delay=delay or 0.0,
        ttl=ttl,
        questions=not no_questions,
        until=until,
        budget=allowed,
        begins=conditions(
            key_ttl=key_ttl,
            debounce=debounce,
            debounce_key=debounce_key,
            debounce_mode=debounce_mode,
            debounce_max=debounce_max,
            singleton=singleton,
            singleton_key=singleton_key,
        ),
        warn=lambda sentence: warn(("note: ", "yellow"), sentence),
    )
    screen.say(
        *heading(created),
        *(() if detach else (f"  {created.steps_total} steps",) if created.steps_total else ()),
    )
    _follow(client, created, screen, detach=detach)


def _follow(client: Client, run: Run, screen: Screen, *, detach: bool) -> None:
    """Follow a run that was just queued to its end, or say how it is followed."""
    from nbdurable.cli.follow import Story, conclude, follow

    command = hint(client.home)
    if detach:
        screen.say("follow it: ", (command(f"logs -f {run.short}"), "bold"))
        if screen.json_mode:
            screen.data(run)
        return
    try:
        ended = follow(client, run.id, screen, Story(approval_page(client.home), command))
    except KeyboardInterrupt:
        screen.say(f"run {run.short} goes on. Follow it: ", (command(f"logs -f {run.short}"), "bold"))
        screen.say("  cancel it: ", (command(f"cancel {run.short}"), "bold"))
        raise typer.Exit(INTERRUPTED) from None
    ended = with_output(client.home, ended)
    status = conclude(ended, screen, command)
    if screen.json_mode:
        screen.data(ended)
    raise typer.Exit(status)


@app.command("ls", epilog="Example: nbdurable ls --status failed --limit 5")
def list_runs(
    status: Annotated[RunStatus | None, typer.Option(help="Only runs with this status.")] = None,
    notebook: Annotated[Path | None, typer.Option(metavar="FILE", help="Only runs of this notebook.")] = None,
    tag: Annotated[
        str | None, typer.Option("-t", "--tag", metavar="T", help="Only runs with this tag.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="RUN", help="Only runs that this one started.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(metavar="RUN", help="Only runs of the tree below this one.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    as_json: Json = False,
) -> None:
    """List runs, newest first."""
    from nbdurable.cli.tables import print_runs

    wanted = ListRuns(
        status=status,
        notebook=str(notebook.expanduser().absolute()) if notebook else None,
        tag=tag,
        parent=parent,
        root=root,
        limit=limit,
    )
    runs = connect(look=True).call(LIST_RUNS, wanted).runs if find_home().root.exists() else ()
    screen = Screen(json=as_json)
    if as_json:
        screen.data(runs)
    else:
        print_runs(runs, screen)


@app.command(epilog="Example: nbdurable show 4fb29c1e")
def show(run: RunId, as_json: Json = False) -> None:
    """Show a run: steps, reasons, attempts, recorded calls, variables, waits, errors."""
    from nbdurable.cli.tables import print_run

    client = connect(look=True)
    detail = with_output(client.home, client.call(GET_RUN, ByRun(run_id=run)))
    calls = client.call(READ_CALLS, ReadCalls(run_id=detail.id)).calls
    detail = detail.model_copy(update={"calls": tuple(recorded.call for recorded in calls)})
    screen = Screen(json=as_json)
    if as_json:
        screen.data(detail)
    else:
        print_run(detail, screen, client.home)


@app.command(epilog="Example: nbdurable plan agent.ipynb")
def plan(
    target: Annotated[
        str, typer.Argument(metavar="NOTEBOOK|RUN", help="A notebook (its last run), or a run.")
    ],
    as_json: Json = False,
) -> None:
    """Say which steps would run or be restored, and why."""
    from nbdurable.cli.plans import print_plan

    print_plan(target, Screen(json=as_json))


@app.command(epilog="Example: nbdurable diff 4fb29c1e 77d0a2be:clean")
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A run, or a step of it as RUN:STEP.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another run or step.")],
    as_json: Json = False,
) -> None:
    """Compare two runs or steps: code, parameters, variables, outputs.

    Values that differ are loaded from their signed checkpoints, in this process; not from a store that is not trusted.
    """
    from nbdurable.checkpoint.compare import lines
    from nbdurable.kernel.travel import difference
    from nbdurable.security import read_key, standing

    client = connect(look=True)
    unread = "its value is not loaded: the store is not trusted" if standing(client.home) else ""
    found = difference(client, read_key(client.home), before, after, {"__name__": "__main__"}, unread=unread)
    screen = Screen(json=as_json)
    if as_json:
        screen.data(found)
    else:
        for line in lines(found):
            screen.say(line)


@app.command(epilog="Example: nbdurable logs -f 4fb29c1e")
def logs(
    run: RunId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
    events: Annotated[
        bool, typer.Option("--events", help="The run's history instead: what happened, when, and why.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --events: one JSON object per line on stdout.")
    ] = False,
) -> None:
    """Print what a headless run's process printed, or the history of any run."""
    client = connect(look=True)
    if as_json and not events:
        raise UsageError("what a process printed is text", todo="`--events --json` prints the run's history")
    if events:
        from nbdurable.cli.tables import print_history

        print_history(client, run, follow=follow, as_json=as_json)
        return
    found = client.call(GET_RUN, ByRun(run_id=run))
    offset = seq = 0
    while True:
        ended = found.status.is_final
        while (log := client.call(READ_LOG, ReadLog(run_id=found.id, offset=offset))).next_offset > offset:
            offset = log.next_offset
            sys.stdout.write(log.text)
            sys.stdout.flush()
        if ended or not follow:
            break
        answer = client.call(READ_EVENTS, ReadEvents(run_id=found.id, after=seq, hold_s=min(1.0, HOLD_S)))
        seq = answer.events[-1].seq if answer.events else seq
        found = found.model_copy(update={"status": answer.run.status})
    if not offset:
        warn(
            f"run {found.short} has printed nothing"
            if found.kind == "headless"
            else f"run {found.short} is interactive: it has no log"
        )


@app.command(epilog="Example: nbdurable resume 4fb29c1e")
def resume(
    run: RunId,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take it from the kernel that drives it; that one is told so.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(metavar="B", help="What its model calls may take in all from now on: 5, '400k tokens'."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Let a run go on headless, from its last committed step.

    One that was driven in a kernel goes on with its notebook as it is on disk now.
    """
    from nbdurable.cli.past import resume as change

    larger = None if budget is None else spending.budget(budget)
    client, screen = connect(), Screen(json=as_json)
    found = client.call(GET_RUN, ByRun(run_id=run))
    if (
        not (take_over or dry_run or as_json)
        and sys.stdin.isatty()
        and found.driver is not None
        and found.driver.kind == "interactive"
    ):
        asked = f"Run {found.short} is driven by {found.driver.label}. Take it from there?"
        take_over = typer.confirm(asked, default=False, err=True)
    planned = change(client, found.id, take_over=take_over)
    if larger is not None and not dry_run:
        client.call(SET_BUDGET, SetBudget(run_id=found.id, budget=larger))
    _carry_out(client, planned, screen, dry_run=dry_run)


@app.command(cls=_Run, epilog="Example: nbdurable fork 4fb29c1e --from draft --notebook edited.ipynb")
def fork(
    run: RunId,
    start: From = None,
    notebook: Edited = None,
    parameter: Parameter = None,
    given: Given = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Where the executed notebook goes.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Queue the run and return.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Begin a new run that shares another one's checkpoints before a step.

    What the other run has committed by now is shared, though it may still run; it is left as it is.
    """
    from nbdurable.cli.past import fork as change

    client, screen = connect(), Screen(json=as_json)
    found = change(
        client,
        run,
        start=start,
        notebook=notebook,
        parameters=parameters.read_pairs(parameter or ()),
        given=given or (),
        output=output,
        by=_user(),
    )
    if (forked := _print_change(found, screen, dry_run=dry_run)) is not None:
        _follow(client, forked, screen, detach=detach)


@app.command(epilog="Example: nbdurable repair 4fb29c1e --notebook fixed.ipynb --dry-run")
def repair(
    run: RunId,
    start: From = None,
    notebook: Edited = None,
    given: Given = None,
    mark_done: Annotated[
        list[str] | None,
        typer.Option(
            "--mark-done", metavar="STEP", help="A person did this step by hand: it counts as done."
        ),
    ] = None,
    comment: Comment = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Change the past of a run that nobody drives, and let it go on: earlier steps are kept.

    History only grows: what is set aside, the versions of the notebook and what was set by hand stay in it.
    """
    from nbdurable.cli.past import repair as change

    client, screen = connect(), Screen(json=as_json)
    found = change(
        client,
        run,
        start=start,
        notebook=notebook,
        given=given or (),
        marked=mark_done or (),
        comment=comment,
        by=_user(),
    )
    _carry_out(client, found, screen, dry_run=dry_run)


def _carry_out(client: Client, change: Change, screen: Screen, *, dry_run: bool) -> None:
    if (run := _print_change(change, screen, dry_run=dry_run)) is not None:
        screen.say("follow it: ", (hint(client.home)(f"logs -f {run.short}"), "bold"))
        if screen.json_mode:
            screen.data(run)


def _print_change(change: Change, screen: Screen, *, dry_run: bool) -> Run | None:
    """Print what would happen; then, unless it is a dry run, let it happen, and return the run."""
    from nbdurable.cli.follow import heading
    from nbdurable.cli.plans import as_json, print_steps

    screen.say(*heading(change.source), f"  {change.source.status}")
    print_steps(change.plan, screen)
    for note in change.notes:
        warn(("note: ", "yellow"), note)
    if dry_run:
        screen.say("nothing was changed")
        if screen.json_mode:
            screen.data({"run": change.source.id, "plan": [as_json(step) for step in change.plan]})
        return None
    run = change.carry_out()
    screen.say(f"run {run.short} is {run.status}: {run.reason}")
    return run


@app.command(cls=_Run, epilog="Example: nbdurable replay --status failed --since 1d --limit 20")
def replay(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN…", help="Runs, or leave them out and filter.")
    ] = None,
    parameter: Parameter = None,
    status: Annotated[RunStatus | None, typer.Option(help="Only runs with this status.")] = None,
    notebook: Annotated[Path | None, typer.Option(metavar="FILE", help="Only runs of this notebook.")] = None,
    tag: Annotated[
        str | None, typer.Option("-t", "--tag", metavar="T", help="Only runs with this tag.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only runs created no longer ago, such as 1d.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="At most so many, the newest.")] = 100,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Run again: new runs of the same versions with the same parameters, or with edited ones.

    By filter, the runs are shown first, and a person on a terminal is asked.
    """
    from nbdurable.cli.replays import replay_all
    from nbdurable.policies import seconds

    filters = (status, notebook, tag, since)
    if bool(runs) == any(one is not None for one in filters):
        raise UsageError(
            "replay needs either runs or a filter",
            todo="name RUNs, or filter by --status, --notebook, --tag, --since",
        )
    client, screen = connect(), Screen(json=as_json)
    given = parameters.read_pairs(parameter or ())
    since_s = None if since is None else seconds(since)
    failed = replay_all(
        client,
        screen,
        runs,
        (status, notebook, tag, since_s, limit),
        given,
        dry_run=dry_run,
        ask=not (yes or as_json) and not runs,
    )
    raise typer.Exit(1 if failed else 0)


@app.command(epilog="Example: nbdurable resample 4fb29c1e draft --n 5 --show text")
def resample(
    run: RunId,
    step: Annotated[str, typer.Argument(metavar="STEP", help="The step that runs several times.")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, max=100, help="How often.")] = 5,
    notebook: Edited = None,
    given: Given = None,
    show_name: Annotated[
        str | None, typer.Option("--show", metavar="NAME", help="Compare this variable, whole.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run one step several times side by side, and compare what it leaves: for prompts.

    Each is a fork of its own, which keeps the steps before and executes nothing behind. Exit status 1 if one failed.
    """
    from nbdurable.cli.past import fork as change
    from nbdurable.cli.replays import compare_samples

    client, screen = connect(), Screen(json=as_json)

    def sample() -> Change:
        return change(
            client,
            run,
            start=step,
            notebook=notebook,
            given=given or (),
            until=step,
            tags=("resample",),
            by=_user(),
        )

    first = _print_change(sample(), screen, dry_run=dry_run)
    if first is not None:
        samples = [first, *(sample().carry_out() for _ in range(n - 1))]
        raise typer.Exit(compare_samples(client, samples, step, show_name, screen))


@app.command(epilog="Example: nbdurable cancel 4fb29c1e")
def cancel(run: RunId, as_json: Json = False) -> None:
    """Cancel a run; its committed steps are kept."""
    cancelled = connect().call(CANCEL_RUN, ByRun(run_id=run))
    screen = Screen(json=as_json)
    if cancelled.status is RunStatus.CANCELLED:
        screen.say(f"run {cancelled.short} is cancelled: {cancelled.reason}")
    else:
        screen.say(f"run {cancelled.short} is being cancelled: its kernel is interrupted, then killed")
    if as_json:
        screen.data(cancelled)


# Waits -----------------------------------------------------------------------------------------------------


@app.command(epilog="Example: nbdurable waits --json")
def waits(
    everything: Annotated[bool, typer.Option("--all", help="Answered and cancelled ones as well.")] = False,
    as_json: Json = False,
) -> None:
    """List what runs wait for, oldest first."""
    from nbdurable.cli.tables import print_waits

    wanted = ListWaits(status=None if everything else WaitStatus.OPEN)
    found = connect(look=True).call(LIST_WAITS, wanted).waits if find_home().root.exists() else ()
    screen = Screen(json=as_json)
    if as_json:
        screen.data(found)
    else:
        print_waits(found, screen, hint(find_home()))


@app.command(
    epilog='Example: nbdurable approve 7K2MXD --value \'{"title": "Better"}\' --comment "shorter title"'
)
def approve(
    wait: WaitId,
    value: Annotated[
        str | None, typer.Option(metavar="JSON", help="Approve with this value instead of the proposed one.")
    ] = None,
    comment: Comment = "",
    by: By = None,
    as_json: Json = False,
) -> None:
    """Approve; the run goes on by itself.

    Where the approval has a form, the value must fit it: `nbdurable waits --json` shows its JSON schema.
    """
    edited = None if value is None else _json(value, "--value", """--value '"text"'""")
    _answer(
        wait, approved=True, edit=value is not None, value=edited, comment=comment, by=by, as_json=as_json
    )


@app.command(epilog='Example: nbdurable reject 7K2MXD --comment "the numbers are last year\'s"')
def reject(wait: WaitId, comment: Comment = "", by: By = None, as_json: Json = False) -> None:
    """Reject; the run goes on by itself and learns of it."""
    _answer(wait, approved=False, comment=comment, by=by, as_json=as_json)


@app.command(epilog="Example: nbdurable answer 7K2MXD Berlin")
def answer(
    wait: Annotated[
        str, typer.Argument(metavar="WAIT", help="A question's id, as `nbdurable waits` lists it.")
    ],
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The answer (default: it is asked for here).")
    ] = None,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Answer what `input()` or `getpass()` asks in a headless run.

    A password is better typed here than given as TEXT, which the shell's history keeps. It is never stored.
    """
    if text is None:
        found = connect().call(GET_WAIT, ReadWait(wait_id=wait))
        text = typer.prompt(found.title, hide_input=found.is_secret, prompt_suffix=" ", err=True)
    _answer(wait, approved=True, edit=True, value=text, by=by, as_json=as_json)


@app.command(epilog="""Example: nbdurable send invoice-paid '{"order": 7}' --key payment-4711""")
def send(
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event's name.")],
    payload: Annotated[
        str | None, typer.Argument(metavar="JSON", help="What it carries; - reads it from stdin.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", "--idempotency-key", metavar="K", help="Sent twice with it, it counts once."),
    ] = None,
    ttl: Annotated[
        str, typer.Option(metavar="TIME", help="How long runs that are yet to wait for it get it.")
    ] = "7d",
    by: By = None,
    as_json: Json = False,
) -> None:
    """Send an event to every run that waits for it, or will within its time to live.

    Each run takes it at most once: `durable.wait_for(EVENT, match=...)` says which of its name it takes.
    """
    text = sys.stdin.read() if payload == "-" else payload
    found = None if text is None else _json(text, "JSON", """'"text"'""")
    sent = connect(existing=False).send(event, found, idempotency_key=key, ttl=ttl, by=by or _user())
    screen = Screen(json=as_json)
    runs = ", ".join(run[-8:] for run in sent.runs)
    until = f"it is kept until {clock(sent.expires_at)}" if sent.expires_at > sent.at else "it is not kept"
    screen.say(
        f"sent {event}: " + (f"run {runs} goes on; {until}" if runs else f"no run waits for it now; {until}")
    )
    if as_json:
        screen.data(sent)


def _json(text: str, what: str, quoted: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"{what} is not JSON: {error}", todo=f"nothing was answered. Text needs its own quotes: {quoted}"
        ) from None


def _answer(
    wait_id: str,
    *,
    approved: bool,
    edit: bool = False,
    value: Any = None,
    comment: str = "",
    by: str | None,
    as_json: bool,
) -> None:
    client = connect()
    found = client.call(GET_WAIT, ReadWait(wait_id=wait_id))
    answered = client.call(
        ANSWER_WAIT,
        AnswerWait(
            wait_id=found.id,
            approved=approved,
            value=value if edit else found.value,
            edited=edit,
            by=by or _user(),
            comment=comment,
            nonce=uuid.uuid4().hex,
        ),
    )
    screen = Screen(json=as_json)
    word = "rejected" if not approved else "approved with another value" if edit else "approved"
    if answered.kind is WaitKind.QUESTION:
        word = "answered" if approved else "refused"
    screen.say(f"{word}: “{answered.title}”. Run {answered.run_id[-8:]} goes on by itself.")
    if as_json:
        screen.data(answered)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user in a container
        return "command line"


# The store -------------------------------------------------------------------------------------------------


@app.command(epilog="Example: nbdurable stats 4fb29c1e")
def stats(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run, to see its steps and variables.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what takes how much space: runs, steps, variables."""
    from nbdurable.cli.space import print_space

    print_space(connect(look=True), run, Screen(json=as_json))


@app.command(epilog="Example: nbdurable gc --keep-last 10 --keep-for 30d --keep-tagged --dry-run")
def gc(
    keep_last: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Keep the newest N runs of each notebook.")
    ] = None,
    keep_for: Annotated[
        str | None, typer.Option(metavar="TIME", help="Keep runs that ended no longer ago, such as 30d.")
    ] = None,
    keep_tagged: Annotated[bool, typer.Option("--keep-tagged", help="Keep runs that have a tag.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and why.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove checkpoints that no kept run needs; history stays.

    A run is kept by any of the --keep rules, an open one always. Without a rule every run is kept.
    """
    from nbdurable.cli.space import clean_up
    from nbdurable.policies import seconds

    rules = Clean(
        keep_last=keep_last,
        keep_for_s=None if keep_for is None else seconds(keep_for),
        keep_tagged=keep_tagged,
    )
    clean_up(connect(), rules, Screen(json=as_json), dry_run=dry_run, ask=not (yes or as_json))


@app.command(epilog='Example: nbdurable sql "select status, count(*) from runs group by status"')
def sql(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="One statement that only reads.")],
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many rows.")] = 10_000,
    as_json: Json = False,
) -> None:
    """Query the store, read only."""
    table = connect(look=True).call(SQL, Query(sql=query, limit=limit))
    screen = Screen(json=as_json)
    if as_json:
        screen.data([dict(zip(table.columns, row, strict=True)) for row in table.rows])
    else:
        from nbdurable.cli.tables import cell

        screen.table(table.columns, [[cell(value) for value in row] for row in table.rows])
    if table.truncated:
        warn(f"only the first {len(table.rows)} rows; --limit asks for more")


# Processes -------------------------------------------------------------------------------------------------


@app.command(epilog="Example: nbdurable up --port 8977")
def up(
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the pages (default: 8977, or the next free one)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the coordinator and the pages in front, until Ctrl-C."""
    from nbdurable.cli.service import run_up

    run_up(find_home(), port, Screen(json=as_json))


@app.command(epilog="Example: nbdurable down")
def down(as_json: Json = False) -> None:
    """End the coordinator, workers and pages; runs stay, and go on later."""
    from nbdurable.cli.service import run_down

    run_down(find_home(), Screen(json=as_json))


@app.command(epilog="Example: nbdurable worker")
def worker() -> None:
    """Execute queued runs in front, until there are none or Ctrl-C."""
    from nbdurable.cli.service import run_worker

    raise typer.Exit(run_worker(find_home()))


@app.command(epilog="Example: nbdurable trust ~/Downloads/study")
def trust(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH", help="A project or its .nbdurable (default: this one); with --rm also a key."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    ls: Annotated[bool, typer.Option("--ls", help="List the stores that you trust.")] = False,
    rm: Annotated[bool, typer.Option("--rm", help="Trust it no more.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a store is, and trust it once you agree.

    A store that somebody else made is only looked at before: its checkpoints and queued runs can run code.
    With --json nothing is trusted without --yes.
    """
    from nbdurable.cli import trusting

    screen = Screen(json=as_json)
    if ls:
        trusting.print_trusted(screen)
    elif rm:
        trusting.distrust(path, screen)
    else:
        trusting.trust(trusting.home_at(path), screen, yes=yes)


@app.command(epilog="Example: nbdurable doctor")
def doctor(as_json: Json = False) -> None:
    """Check what nbdurable stands on, and say what to do."""
    from nbdurable.cli.doctor import examine

    screen = Screen(json=as_json)
    checks = []
    for check in examine(find_home()):
        checks.append(check)
        screen.say(("✓", "green") if check.ok else ("✗", "red"), f" {check.name:<12}  {check.said}")
        if not check.ok and check.todo:
            screen.say(f"   → {check.todo}")
    if as_json:
        screen.data(checks)
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


@app.command(epilog="Example: nbdurable demo --yes")
def demo(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Approve the draft without asking.")] = False,
    keep: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the notebook, its output and the report are kept.")
    ] = Path("nbdurable-demo"),
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="What the agent is asked.")] = None,
    as_json: Json = False,
) -> None:
    """Watch an agent lose its worker and its kernel, and go on."""
    from nbdurable.cli.demo import run_demo

    raise typer.Exit(run_demo(keep, Screen(json=as_json), yes=yes, question=question))
