"""The process of one headless run: `python -m nbdurable.runner.executor --home H --run ID --epoch N`.

Owns the run's lease while it lives, one kernel, and the word that ends the lease. When it ends, however it
ends, its kernel is gone. Knows no other run; how cells are executed is `execution`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from nbdurable.client import Client
from nbdurable.contract import END_LEASE, FAIL_STEP, GET_RUN, HEARTBEAT, ByRun, EndLease, FailStep, Heartbeat
from nbdurable.errors import DurableError, Fenced, NotebookError
from nbdurable.models import ErrorInfo, Run, RunDetail, RunStatus, Step, StepStatus
from nbdurable.notebooks import output_path, read_snapshot, step_cells
from nbdurable.policies import span
from nbdurable.processes import identity
from nbdurable.runner.hooks import Hooks
from nbdurable.runner.kernels import Kernel
from nbdurable.settings import Home, Settings
from nbdurable.telemetry import fault_point

if TYPE_CHECKING:
    from nbdurable.runner.execution import Outcome

PATIENCE_S = 300.0  # a run does not fail because the coordinator is away
HEARTBEAT_S = 2.0
_START_S = 180  # a kernel that is not ready by then never will be
_TICK_S = 0.25
_RELEASE_GRACE_S = 4.0  # the worker that stops waits about twice as long
_LAST_WORD_S = 5.0  # what is left to say when nobody may listen any more


class Wish(IntEnum):
    """Why a run should stop before its notebook ends; a stronger wish replaces a weaker one."""

    RELEASE = 1  # the worker stops: somebody else goes on with the run
    TIME_OUT = 2  # the run has had its time
    CANCEL = 3
    ORPHANED = 4  # the worker died
    FENCED = 5  # somebody else drives the run


class Stop:
    """The wish to stop, if there is one. `asked` is set with any, `disowned` where the run is lost."""

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.asked = threading.Event()
        self.disowned = threading.Event()

    def ask(self, wish: Wish) -> None:
        """Ask for a stop; from any thread or signal handler."""
        if self.wish is None or wish > self.wish:
            self.wish = wish
        self.asked.set()
        if self.wish >= Wish.ORPHANED:
            self.disowned.set()


class Executor:
    """Executes a run that is leased already. `worker`: the pid of the process that started this one."""

    def __init__(
        self, home: Home, run_id: str, epoch: int, *, worker: int | None = None, log: TextIO
    ) -> None:
        self.home = home
        self.run_id = run_id
        self.epoch = epoch
        self.client = Client(home, timeout_s=PATIENCE_S)
        self.settings = Settings.load(home)
        self.stop = Stop()
        self._worker = os.getppid() if worker is None else worker
        self._log = log
        self._timeout_s = 0.0
        self._over = threading.Event()
        self._telling = threading.Event()  # hooks are told how the notebook ended: they have their own limit
        self._beat_now = threading.Event()

    def execute(self) -> int:
        """Execute the run and end its lease; return the exit status: 0 if the lease is ended, or was lost."""
        run = self.client.call(GET_RUN, ByRun(run_id=self.run_id))
        if run.epoch != self.epoch or run.status is not RunStatus.RUNNING:
            self._say(
                f"run {run.short} is {run.status}, epoch {run.epoch}: nothing to do for epoch {self.epoch}"
            )
            return 0
        self._say(f"── run {run.short}, epoch {self.epoch}, process {os.getpid()} ──")
        self._timeout_s = run.timeout_s or 0.0
        try:
            kernel = self._kernel(run)
        except Exception as error:
            end = _failure(run, self.epoch, error)
            self._hooks(None).tell_end(end.how, end.reason, end.error)
            return self._report(end)
        threads = [threading.Thread(target=self._watch, args=(kernel,), daemon=True)]
        threads.append(threading.Thread(target=self._keep_lease, args=(kernel,), daemon=True))
        for thread in threads:
            thread.start()
        try:
            hooks = self._hooks(kernel)
            end = self._end_of(self._execute(run, kernel, hooks), kernel)
            if not self.stop.disowned.is_set():
                self._telling.set()
                hooks.tell_end(end.how, end.reason, end.error)
            if end.how in ("lose", "release", "cancel", "time_out") or (
                end.how == "fail" and run.retries
            ):  # somebody else may go on at once
                kernel.end(graceful=end.how != "lose")
            status = self._report(end)
            if end.how == "suspend":
                fault_point("suspend-reported")
            elif end.how == "complete":
                fault_point("end-reported")
            return status
        finally:
            self._over.set()
            self._beat_now.set()
            kernel.end(graceful=not self.stop.disowned.is_set())
            for path in self.home.last_words(self.run_id, self.epoch):
                path.unlink(missing_ok=True)

    def _kernel(self, run: Run) -> Kernel:
        cwd = Path(run.cwd) if run.cwd is not None else Path(run.notebook).parent
        if not cwd.is_dir():
            raise NotebookError(f"the working directory {cwd} is gone", todo="create it, and resume the run")
        environment = {
            "NBDURABLE_HOME": str(self.home.root),
            "NBDURABLE_RUN_ID": run.id,
            "NBDURABLE_EPOCH": str(self.epoch),
            "JPY_SESSION_NAME": run.notebook,
        }
        if not run.questions:  # else the project's setting counts
            environment["NBDURABLE_QUESTIONS"] = "false"
        return Kernel(
            run.kernel_name or "python3",
            cwd=cwd,
            environment=environment,
            label=run.short,
            on_start=self._kernel_started,
        )

    def _hooks(self, kernel: Kernel | None) -> Hooks:
        return Hooks(
            self.client,
            self.home,
            self.settings,
            kernel,
            run_id=self.run_id,
            epoch=self.epoch,
            log=self._log,
        )

    def _kernel_started(self) -> None:
        fault_point("kernel-started")
        self._beat_now.set()

    # Execution ----------------------------------------------------------------------------------------------

    def _execute(self, run: RunDetail, kernel: Kernel, hooks: Hooks) -> EndLease:
        """Execute the notebook, and return what is to be said of it."""
        try:
            kernel.start()  # it needs as long as these imports do
        except Exception as error:
            return _failure(run, self.epoch, error)
        import nbformat
        import papermill
        from papermill.exceptions import PapermillExecutionError

        from nbdurable.runner.execution import Assignment, KernelNotReady

        try:
            nb = nbformat.from_dict(read_snapshot(self.home, run))
            output = output_path(self.home, run)
            if run.output is None:
                output.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            assignment = Assignment(
                run=run,
                kernel=kernel,
                output=output,
                log=self._log,
                steps=self._steps,
                stop=self.stop.asked,
                disowned=self.stop.disowned,
                hooks=hooks,
                begins="resume" if any(step.attempts for step in run.steps) else "start",
            )
            with contextlib.suppress(PapermillExecutionError):  # a cell raised: the outcome tells more
                papermill.execute_notebook(
                    nb,
                    None,
                    engine_name="nbdurable",
                    request_save_on_cell_execute=False,
                    kernel_name=kernel.manager.kernel_name,
                    progress_bar=False,
                    start_timeout=_START_S,
                    assignment=assignment,
                )
            fault_point("output-written")
            assert assignment.outcome is not None
            return self._verdict(run, nb, assignment.outcome)
        except KernelNotReady as error:
            return self._word("lose", str(error))
        except Exception as error:
            if isinstance(error, DurableError) or kernel.exit_status is None:
                return _failure(run, self.epoch, error)
            return self._last_word() or self._word("lose", _death(kernel.exit_status))

    def _last_word(self) -> EndLease | None:
        """Return what follows if the kernel ended itself, since a step's code took too long and was not to be stopped.

        The attempt is recorded as the kernel would have recorded it. None where it did not.
        """
        words, stacks = self.home.last_words(self.run_id, self.epoch)
        try:
            told = stacks.read_text(encoding="utf-8", errors="replace")
            question = FailStep.model_validate_json(words.read_bytes())
        except (OSError, ValueError):
            return None
        if not told.strip():
            return None
        error = question.error.model_copy(update={"traceback": told})
        self.client.call(FAIL_STEP, question.model_copy(update={"error": error}))
        sentence = f"step {question.step!r} raised {error.name}: {error.message}"
        if question.again_in_s is not None:
            return self._word("suspend", sentence)
        return self._word("fail", sentence, error)

    def _steps(self) -> Sequence[Step]:
        """Return the run's steps as the coordinator knows them; none where nobody should ask any more."""
        if self.stop.disowned.is_set():
            return ()
        return self.client.call(GET_RUN, ByRun(run_id=self.run_id)).steps

    def _verdict(self, run: Run, nb: Any, outcome: Outcome) -> EndLease:
        """Return what an outcome means for the run. It is complete when every step of its notebook is (`--until`)."""
        if outcome.how in ("suspend", "pause"):
            return self._word(outcome.how, outcome.sentence)
        if outcome.how == "stop":
            return self._word("release", outcome.sentence)
        if outcome.how == "fail":
            return self._word("fail", outcome.sentence, outcome.error)
        if outcome.how == "skip":
            return self._word("complete", outcome.sentence)
        from nbdurable.runner.execution import is_last

        steps = self._steps()
        done = {step.name for step in steps if step.status in (StepStatus.COMPLETED, StepStatus.REPLAY)}
        last = next((number for number, cell in enumerate(nb.cells, 1) if is_last(cell, run)), None)
        cells = {cell.id for cell in nb.cells[:last]}
        known = [step.name for step in steps if step.cell_id in cells]
        marked = [name for name, cell in step_cells(nb, Path("the notebook")).items() if cell in cells]
        wanted = dict.fromkeys([*marked, *known])
        if missing := [name for name in wanted if name not in done]:
            names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            sentence = f"{outcome.sentence}, but {len(missing)} of {len(wanted)} steps are not done: {names}"
            return self._word("fail", sentence, ErrorInfo(name="Incomplete", message=sentence))
        return self._word("complete", f"{outcome.sentence}; {len(done)} steps are kept")

    def _word(self, how: Any, reason: str, error: ErrorInfo | None = None) -> EndLease:
        return EndLease(run_id=self.run_id, epoch=self.epoch, how=how, reason=reason, error=error)

    # The lease ----------------------------------------------------------------------------------------------

    def _end_of(self, word: EndLease, kernel: Kernel) -> EndLease:
        """Return the word that ends the lease, once it is known who wished what meanwhile."""
        match self.stop.wish:
            case Wish.CANCEL if word.how != "complete":
                return self._word("cancel", "cancelled")
            case Wish.TIME_OUT if word.how != "complete":
                return self._word("time_out", f"it was driven for the {span(self._timeout_s)} that it may be")
            case Wish.RELEASE if word.how not in ("complete", "suspend", "pause"):
                return self._word("release", "its worker stopped; another one goes on with it")
            case Wish.ORPHANED if word.how not in ("complete", "suspend", "pause"):
                return self._word("lose", "its worker died")
        return word

    def _report(self, word: EndLease) -> int:
        """End the lease; return the exit status."""
        self._say(f"── {word.how}: {word.reason}")
        if self.stop.wish is Wish.FENCED:
            return 0
        patience_s = _LAST_WORD_S if self.stop.wish is Wish.ORPHANED else PATIENCE_S
        try:
            if word.how == "lose":  # the coordinator ends what it knows of: let that not be this process
                beat = Heartbeat(run_id=self.run_id, epoch=self.epoch)
                self._over.set()
                self.client.call(HEARTBEAT, beat, timeout_s=patience_s)
            self.client.call(END_LEASE, word, timeout_s=patience_s)
        except Fenced as error:
            self._say(f"── {error.message}")
        except DurableError as error:
            self._say(f"── {error}")
            return 1
        return 0

    def _keep_lease(self, kernel: Kernel) -> None:
        """Keep the lease, and hear what the coordinator wants."""
        me = identity("executor")
        while not self._over.is_set():
            ours = (me,) if kernel.process is None else (me, kernel.process)
            beat = Heartbeat(run_id=self.run_id, epoch=self.epoch, processes=ours)
            try:
                orders = self.client.call(HEARTBEAT, beat)
            except Fenced:
                self.stop.ask(Wish.FENCED)
                return
            except DurableError as error:
                self._say(f"no heartbeat: {error.message}")
            else:
                if orders.time_out:
                    self.stop.ask(Wish.TIME_OUT)
                if orders.cancel:
                    self.stop.ask(Wish.CANCEL)
            self._beat_now.wait(HEARTBEAT_S)
            self._beat_now.clear()

    def _watch(self, kernel: Kernel) -> None:
        """Notice that the worker died, and carry wishes out: interrupt, interrupt again, kill."""
        asked_at: float | None = None
        interrupts = 0
        while not self._over.wait(_TICK_S):
            if os.getppid() != self._worker:
                self.stop.ask(Wish.ORPHANED)
            if self.stop.wish is None or (self._telling.is_set() and not self.stop.disowned.is_set()):
                continue
            asked_at = asked_at or time.monotonic()
            waited_s = time.monotonic() - asked_at
            asked = self.stop.wish in (Wish.CANCEL, Wish.TIME_OUT)
            grace_s = self.settings.cancel_grace_s if asked else _RELEASE_GRACE_S
            if self.stop.disowned.is_set():
                kernel.kill()
                if waited_s > 2 * _LAST_WORD_S:  # stuck in a call: there is nothing left to do for us
                    os._exit(1)
            elif waited_s >= grace_s:
                kernel.kill()
            elif waited_s >= interrupts * grace_s / 2:  # one may be lost between two cells
                interrupts += 1
                kernel.interrupt()

    def _say(self, sentence: str) -> None:
        with contextlib.suppress(OSError):
            self._log.write(f"{time.strftime('%H:%M:%S')} {sentence}\n")
            self._log.flush()


def _failure(run: Run, epoch: int, error: Exception) -> EndLease:
    """Return the word for a run that can't be executed: an error of ours is shown without its traceback."""
    known = isinstance(error, DurableError)
    trace = "" if known else "".join(traceback.format_exception(error))
    info = ErrorInfo(name=type(error).__name__, message=str(error), traceback=trace)
    reason = str(error).splitlines()[0] if known else f"{type(error).__name__}: {error}"
    return EndLease(run_id=run.id, epoch=epoch, how="fail", reason=reason, error=info)


def _death(status: int) -> str:
    """Say how a kernel died."""
    if status >= 0:
        return f"its kernel ended by itself with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory, if nobody killed it by hand)" if name == "SIGKILL" else ""
    return f"its kernel was killed by {name}{hint}"


def _end_with_worker() -> None:
    """Ask the system for a SIGTERM when the worker dies (Linux); elsewhere `_watch` notices."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGTERM), 0, 0, 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute one leased run."""
    parser = argparse.ArgumentParser(prog="python -m nbdurable.runner.executor", description=main.__doc__)
    parser.add_argument("--home", type=Path, required=True, help="the project's .nbdurable folder")
    parser.add_argument("--run", required=True, help="the run's id")
    parser.add_argument("--epoch", type=int, required=True, help="the lease's fencing number")
    parser.add_argument("--worker", type=int, help="pid of the worker that started this process")
    given = parser.parse_args(arguments)
    # jsonschema would compile a grammar of URIs for nbformat, half of the time that a run takes to begin
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    log = open(sys.stdout.fileno(), "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    executor = Executor(Home(given.home.resolve()), given.run, given.epoch, worker=given.worker, log=log)

    def asked(*_: object) -> None:
        orphaned = given.worker is not None and os.getppid() != given.worker
        executor.stop.ask(Wish.ORPHANED if orphaned else Wish.RELEASE)

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)
    _end_with_worker()
    try:
        return executor.execute()
    except DurableError as error:
        print(error, file=log, flush=True)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
