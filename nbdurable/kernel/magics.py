"""`%durable`: what a person asks about the run, and tells it, from within the notebook."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

from nbdurable import contract
from nbdurable.checkpoint.compare import lines
from nbdurable.errors import DurableError, LeaseHeld, UsageError
from nbdurable.kernel import display, travel
from nbdurable.kernel.attach import attach
from nbdurable.kernel.foresight import foresee, read_cells, with_parameters
from nbdurable.kernel.session import Session
from nbdurable.kernel.step import FRESH
from nbdurable.kernel.whereabouts import notebook_path
from nbdurable.models import DriverKind, RunDetail, StepStatus, Wait, WaitKind, WaitStatus
from nbdurable.policies import span

HELP = """\
%durable status         this run's steps: what was kept, how often each ran
%durable plan           what would happen to each step now, and why
%durable rerun NAME     let the step run when its cell is executed next
%durable new            end this run and begin a new one: nothing is kept from this one
%durable takeover       drive the run from this kernel, though another one does
%durable attach RUN     bring a failed, waiting, paused or cancelled run into this kernel, with its exact variables
%durable release        give the run back: `nbdurable resume RUN` lets it go on headless
%durable checkout RUN STEP [NAMES]   bring the variables as of a step of any run into this kernel
%durable diff RUN [RUN]  what differs between two runs or steps (RUN:STEP); the second one: this run
%durable runs           the notebook's runs
%durable help           this

%%step NAME [options]   a cell that runs once; `%%step?` tells the options, `--replay` among them
@durable.step           records the calls of a function inside a step: a call that has returned is not made again
durable.map(fn, items)  calls it for each item, several at a time; finished items stay finished
durable.recipe("client", make_client)   makes what can't be saved, and makes it again where the step is restored"""

_MARKS = {
    StepStatus.RUNNING: "…",
    StepStatus.WAITING: "⏸",
    StepStatus.COMPLETED: "✓",
    StepStatus.FAILED: "✗",
    StepStatus.PENDING: "…",
    StepStatus.REPLAY: "↻",
}


@magics_class
class DurableMagics(Magics):  # type: ignore[misc]
    """`%durable` and its words."""

    def __init__(self, shell: Any, session: Session) -> None:
        super().__init__(shell)
        self._session = session

    @line_magic  # type: ignore[untyped-decorator]
    def durable(self, line: str) -> None:
        """Ask about this notebook's run, or tell it something: `%durable help` lists what."""
        word, *rest = line.split() or ["help"]
        words: dict[str, Callable[[list[str]], str]] = {
            "status": self._status,
            "plan": self._plan,
            "rerun": self._rerun,
            "new": self._new,
            "takeover": self._takeover,
            "attach": self._attach,
            "release": self._release,
            "checkout": self._checkout,
            "diff": self._diff,
            "runs": self._runs,
            "help": lambda _: HELP,
        }
        if word not in words:
            raise UsageError(f"`%durable` has no word {word!r}", todo=f"its words are {', '.join(words)}")
        display.say(self.shell, words[word](rest))

    @cell_magic  # type: ignore[untyped-decorator]
    def step(self, line: str, cell: str) -> None:
        """Run this cell once: what it writes and displays is kept, and restored when it is run again.

            %%step NAME [--on-drift keep|rerun|error] [--save a,b] [--no-save c,d] [--watch FILE|env:NAME,…] [--force]
                        [--retries N] [--backoff F] [--min-wait T] [--max-wait T] [--retry-on ERROR,…]
                        [--on-exhausted fail|pause] [--timeout T]
            %%step NAME --replay

        NAME is unique in the notebook. `--on-drift`: what happens where only the value of an input differs.
        `--save`, `--no-save`: variables to keep, or not, whatever the cell does. `--force`: run it anyway.
        `--watch data.csv,parts/*.parquet,env:MODE`: files, from the notebook's folder, and environment variables that
        it stands on as it does on its code: it runs again where one of them changed.
        `--retries 3`: where it fails, it is tried again, from the state before it, after 1 to 2 s, 2 to 4 s, … up to a
        minute (`--min-wait`, `--max-wait`, `--backoff`); `--retry-on`: only for these errors, or where this function of
        the error says so. `raise durable.Abort(…)` ends the tries, `durable.RetryAfter("30s")` sets the wait. With
        `--on-exhausted pause` a headless run is paused in the end. `--timeout 10m`: of each try, waits apart.
        `--replay`: the cell makes what can't be saved (a client, a connection): it runs again in every attempt, saves
        nothing, and what later steps made from it is kept. `durable.recipe` does so for a single variable.
        `%durable help` lists what can be asked about steps.
        """
        # Loaded, the extension rewrites the cell before IPython looks for a magic; this is for `%%step?` and <Tab>.
        raise UsageError("nbdurable is not loaded any more", todo="`%load_ext nbdurable`")

    def _detail(self) -> RunDetail | None:
        session = self._session
        if session.run is None:
            return None
        return session.client.call(contract.GET_RUN, contract.ByRun(run_id=session.run.id))

    def _status(self, _: list[str]) -> str:
        detail = self._detail()
        if detail is None:
            trouble = self._session.trouble
            return "no run yet: the first step cell begins one" if trouble is None else str(trouble)
        lines = [f"run {detail.short}, {detail.status}: {detail.reason}"]
        width = max((len(step.name) for step in detail.steps), default=0)
        for step in detail.steps:
            counts = f"ran {step.executions}×, restored {step.restores}×"
            why = "" if step.reason == FRESH and step.status is StepStatus.COMPLETED else f"  {step.reason}"
            lines.append(f" {_MARKS[step.status]} {step.name:<{width}}  {step.status:<9}  {counts}{why}")
        lines += [f" ⏸ {_awaited(wait)}" for wait in detail.waits if wait.status is WaitStatus.OPEN]
        return "\n".join(lines)

    def _plan(self, _: list[str]) -> str:
        session = self._session
        cells = read_cells(session.notebook) or read_cells(notebook_path(session.values))  # renamed meanwhile
        known = {}
        for step in session.checkpoints:
            manifest = session.manifest(step)
            if manifest is not None:
                known[step] = manifest
        if not cells:
            if not known:
                return "no step is kept yet"
            return "\n".join(
                f" {step}  kept {span(time.time() - m.created_at)} ago" for step, m in known.items()
            )
        planned = foresee(
            with_parameters(cells, session.run.parameters if session.run else {}),
            known,
            session.project,
            session.watcher,
            every_cell=session.every_cell,
            hand_set=session.run.hand_set if session.run else (),
        )
        if not planned:
            return f"{session.notebook.name} has no step cells (as it was last saved)"
        width = max(len(item.step) for item in planned)
        return "\n".join(
            f" {item.step:<{width}}  {'run' if item.step in session.to_rerun else item.action:<8}  "
            f"{'asked for by %durable rerun' if item.step in session.to_rerun else item.reason}"
            for item in planned
        )

    def _rerun(self, names: list[str]) -> str:
        if not names:
            raise UsageError("`%durable rerun` needs a step's name", todo="`%durable status` lists them")
        known = self._session.checkpoints
        for name in names:
            if name not in known:
                raise UsageError(
                    f"no step `{name}` is kept in this run",
                    todo=f"kept are {', '.join(known)}"
                    if known
                    else "nothing is kept yet: just run the cell",
                )
        self._session.to_rerun |= set(names)
        return "\n".join(f"{name} will run when its cell is executed next" for name in names)

    def _new(self, _: list[str]) -> str:
        old = self._detail()
        run = self._session.start_new()
        if old is None:
            return f"run {run.short} begins"
        now = self._session.client.call(contract.GET_RUN, contract.ByRun(run_id=old.id))
        what = (
            "is closed, its history stays"
            if now.status.is_final
            else f"goes on without this kernel: {now.reason}"
        )
        return f"run {run.short} begins; run {old.short} {what}"

    def _takeover(self, _: list[str]) -> str:
        session = self._session
        run = session.open_run()
        if run is None:
            return "this notebook has no open run"
        session.take_up(run, take_over=True)
        return f"this kernel now drives run {run.short}: {_steps(len(session.checkpoints))} kept"

    def _attach(self, words: list[str]) -> str:
        take_over = "--take-over" in words
        named = [word for word in words if word != "--take-over"]
        if len(named) != 1:
            raise UsageError(
                "`%durable attach` needs a run",
                todo="`%durable attach RUN`; `nbdurable ls` lists the runs of the project",
            )
        return attach(self._session, self.shell, named[0], take_over=take_over)

    def _release(self, _: list[str]) -> str:
        run = self._session.release()
        return f"run {run.short} is paused: save the notebook, then `nbdurable resume {run.short}` goes on headless"

    def _checkout(self, words: list[str]) -> str:
        if len(words) < 2:
            raise UsageError(
                "`%durable checkout` needs a run and a step",
                todo="`%durable checkout RUN STEP` brings all variables, `… NAME NAME` only some; "
                "`%durable runs` lists the runs",
            )
        run, step, *names = words
        names = [name for word in names for name in word.split(",") if name]
        found, bound = travel.checkout(self._session, run, step, names or None)
        here = display.summary(held.variable for held in bound.values()) or "no variables"
        lines = [f"⇤ run {found.short} as of step {step} · {here}"]
        return "\n  ".join([*lines, *display.notices(held.variable for held in bound.values())])

    def _diff(self, words: list[str]) -> str:
        session = self._session
        if len(words) == 1 and session.run is not None:
            words = [*words, session.run.id]
        if len(words) != 2:
            raise UsageError(
                "`%durable diff` needs two runs or steps, or one to compare this run with",
                todo="write each as RUN or RUN:STEP; `%durable runs` lists the runs",
            )
        before, after = words
        found = travel.difference(session.client, session.key, before, after, session.values)
        return "\n".join(lines(found))

    def _runs(self, _: list[str]) -> str:
        session = self._session
        question = contract.ListRuns(notebook=str(session.notebook), limit=20)
        runs = session.client.call(contract.LIST_RUNS, question).runs
        if not runs:
            return "this notebook has no runs yet"
        now = time.time()
        return "\n".join(
            f" {run.short}  {run.status:<9}  {span(now - run.created_at)} ago  "
            f"{'interactive' if run.kind is DriverKind.INTERACTIVE else 'headless'}  {run.reason}"
            for run in runs
        )


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _awaited(wait: Wait) -> str:
    if wait.kind.is_for_people:
        word = "approve" if wait.kind is WaitKind.APPROVAL else "answer"
        return f"{wait.title}  →  nbdurable {word} {wait.id}"
    return f"{wait.title}, until {display.clock(wait.due_at)}" if wait.due_at else wait.title


def greet(session: Session) -> str:
    """Take up the notebook's open run, and say so in one line."""
    name = session.notebook.name
    run = session.open_run()
    if run is None:
        return f"{name}: no open run; the first step cell begins one.  %durable help"
    try:
        session.take_up(run)
    except LeaseHeld as error:
        return f"{name}: {error.message}.\n  → {error.todo}"
    except DurableError as error:
        return str(error)
    kept = len(session.checkpoints)
    steps = [cell for cell in read_cells(session.notebook) if cell.options is not None]
    of = f"{kept} of {_steps(len(steps))}" if steps else _steps(kept)
    newest = max((c.at for c in session.checkpoints.values()), default=None)
    age = f", {span(max(0.0, time.time() - newest))} old" if newest is not None else ""
    why = run.reason.partition(";")[0]  # what to do about it has just been done
    if run.notebook != str(session.notebook):
        name += f" (was {Path(run.notebook).name})"
    return f"{name}, run {run.short}: {of} kept{age} ({why}).  %durable plan · %durable new"
