"""The worker: `python -m nbdurable.runner.worker --home H` leases queued runs and starts a process for each.

Owns the slots, the executors' processes and what is said when one dies without a word. Executes nothing
itself, so that nothing that a notebook does can take the other runs down.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from nbdurable.client import Client
from nbdurable.contract import END_LEASE, GET_RUN, HEALTH, LEASE_WORK, ByRun, EndLease, LeaseWork, Nothing
from nbdurable.errors import CoordinatorUnreachable, DurableError, Fenced, NotFound
from nbdurable.models import Driver, DriverKind, Run, RunStatus
from nbdurable.processes import end_marked, exists, identity
from nbdurable.security import load_key
from nbdurable.settings import Home, Settings
from nbdurable.telemetry import fault_point

PATIENCE_S = 300.0
_HOLD_S = 3.0  # a long poll is the longest thing that a stop waits for, executors apart
_TICK_S = 0.1
_STOP_S = 9.0  # executors that have not stopped by then are killed
_BREATH_S = 0.5


class Worker:
    """Executes runs of a project, up to `worker_slots` at once, until it is told to stop or not needed."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.settings = Settings.load(home)
        self.client = Client(home, timeout_s=PATIENCE_S)
        process = identity("worker")
        label = f"worker {process.pid} on {process.host}"
        self.driver = Driver(kind=DriverKind.HEADLESS, process=process, label=label)
        self._leased: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._held: dict[tuple[str, int], Run] = {}  # leased, and their executors not yet buried
        self._executors: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    def stop(self, *_: object) -> None:
        """Lease nothing more, and let the executors give their runs back; also from a signal handler."""
        self._stopping.set()

    def work(self) -> int:
        """Lease and execute runs; return the exit status.

        Executors are started from here, the main thread: on Linux they are told when the thread that started
        them is gone.
        """
        leasing = threading.Thread(target=self._lease, name="lease", daemon=True)
        leasing.start()
        asked_at: float | None = None
        while leasing.is_alive() or self._held:
            with contextlib.suppress(queue.Empty):
                self._start(self._leased.get(timeout=_TICK_S))
            if not self._stopping.is_set():
                continue
            if asked_at is None:
                asked_at = time.monotonic()
                self._signal("terminate")
            elif time.monotonic() - asked_at > _STOP_S:
                self._signal("kill")
                if time.monotonic() - asked_at > _STOP_S + _TICK_S * 20:
                    return 1
        return 0

    # Leasing ------------------------------------------------------------------------------------------------

    def _lease(self) -> None:
        """Ask for as many runs as there are free slots, again and again."""
        asking = Client(self.home, start=False)
        trouble = ""
        while not self._stopping.is_set():
            with self._changed:
                slots = self.settings.worker_slots - len(self._held)
                if slots <= 0:
                    self._changed.wait(_BREATH_S)
                    continue
                holding = tuple(run_id for run_id, _ in self._held)
            question = LeaseWork(driver=self.driver, slots=slots, hold_s=_HOLD_S, holding=holding)
            try:
                work = asking.call(LEASE_WORK, question)
            except CoordinatorUnreachable as error:
                if not self._revive(error):
                    return
                continue
            except DurableError as error:
                if str(error) != trouble:  # it may last for hours
                    trouble = str(error)
                    _say(trouble)
                self._stopping.wait(_BREATH_S)
                continue
            trouble = ""
            with self._changed:
                self._held |= {(run.id, run.epoch): run for run in work.runs}
            for run in work.runs:
                self._leased.put(run)
            if work.stop:
                _say("nothing to do: this worker ends")
                return

    def _revive(self, error: CoordinatorUnreachable) -> bool:
        """Start the coordinator if it died, or runs need it; tell whether to go on.

        One that ended cleanly took its file with it, and starts a worker itself when it needs one again.
        """
        pid = self._coordinator()
        if not self._held and pid is None:
            _say(f"{error.message}: this worker ends")
            return False
        if not self._held and pid is not None and exists(pid):  # it is about to end, or to answer
            self._stopping.wait(_TICK_S)
            return True
        try:
            self.client.call(HEALTH, Nothing(), timeout_s=_HOLD_S)
        except DurableError as trouble:
            _say(str(trouble))
            self._stopping.wait(_BREATH_S)
        return True

    def _coordinator(self) -> int | None:
        """Return the pid of the coordinator that did not end cleanly, dead or alive."""
        try:
            return int(json.loads(self.home.coordinator.read_text(encoding="utf-8"))["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # Executors ----------------------------------------------------------------------------------------------

    def _start(self, run: Run) -> None:
        """Start the executor of a run; one that was leased too late is given back."""
        key = (run.id, run.epoch)
        if self._stopping.is_set():
            self._end(run, "release", "its worker stopped before it began")
            return
        fault_point("run-leased")
        _say(f"run {run.short}, epoch {run.epoch}: {run.notebook}")
        command = [sys.executable, "-P", "-m", "nbdurable.runner.executor"]
        command += ["--home", str(self.home.root), "--run", run.id, "--epoch", str(run.epoch)]
        command += ["--worker", str(self.driver.process.pid)]
        try:
            self.home.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.home.run_log(run.id).open("ab") as log:
                executor = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.home.root,
                    start_new_session=sys.platform
                    != "win32",  # Ctrl-C at the worker's terminal is not for it
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
        except OSError as error:
            self._end(run, "lose", f"its process could not be started: {error}")
            return
        fault_point("executor-started")
        self._executors[key] = executor
        threading.Thread(target=self._attend, args=(run, executor), daemon=True).start()

    def _attend(self, run: Run, executor: subprocess.Popen[bytes]) -> None:
        """Wait for an executor's end, and say that the run lost its driver if it ended without a word."""
        status = executor.wait()
        if status == 0:
            # It said how it ended. To ask again could start a coordinator that somebody has just ended.
            self._forget(run)
            return
        try:
            now = self.client.call(GET_RUN, ByRun(run_id=run.id))
            if now.status is RunStatus.RUNNING and now.epoch == run.epoch:
                end_marked({"NBDURABLE_RUN_ID": run.id, "NBDURABLE_EPOCH": str(run.epoch)}, grace_s=0.0)
                how = "release" if self._stopping.is_set() else "lose"  # told to end before it could listen
                self._end(run, how, f"its process {_death(status)}")
        except DurableError as error:
            _say(f"run {run.short}: {error}")
        finally:
            self._forget(run)

    def _end(self, run: Run, how: str, reason: str) -> None:
        """End the lease of a run that has no executor (any more)."""
        _say(f"run {run.short}: {reason}")
        word = EndLease.model_validate({"run_id": run.id, "epoch": run.epoch, "how": how, "reason": reason})
        try:
            self.client.call(END_LEASE, word)
        except (Fenced, NotFound):
            pass
        except DurableError as error:
            _say(f"run {run.short}: {error}")
        self._forget(run)

    def _forget(self, run: Run) -> None:
        with self._changed:
            self._held.pop((run.id, run.epoch), None)
            self._executors.pop((run.id, run.epoch), None)
            self._changed.notify_all()

    def _signal(self, how: str) -> None:
        for executor in list(self._executors.values()):
            with contextlib.suppress(OSError):
                getattr(executor, how)()


def _death(status: int) -> str:
    if status >= 0:
        return f"ended with status {status} and said nothing"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), sentence, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Lease and execute headless runs until there is nothing to do (or Ctrl-C, SIGTERM)."""
    parser = argparse.ArgumentParser(prog="python -m nbdurable.runner.worker", description=main.__doc__)
    parser.add_argument("--home", type=Path, required=True, help="the project's .nbdurable folder")
    home = Home(parser.parse_args(arguments).home.resolve())
    load_key(home)  # refuses a store that is not trusted
    worker = Worker(home)
    signal.signal(signal.SIGTERM, worker.stop)
    signal.signal(signal.SIGINT, worker.stop)
    return worker.work()


if __name__ == "__main__":
    sys.exit(main())
