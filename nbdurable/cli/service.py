"""The processes of a project: `up`, `down`, `worker`, and whether a coordinator runs.

Owns their order at start and end; knows them by their command lines and by the files in which they say where
they are, and imports none of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdurable import processes
from nbdurable.cli.project import pages
from nbdurable.cli.screen import Screen
from nbdurable.client import START_S, Client
from nbdurable.contract import HEALTH, LIST_RUNS, SHUTDOWN, Health, ListRuns, Nothing
from nbdurable.errors import Conflict, CoordinatorError, CoordinatorUnreachable, Unauthorized, WrongVersion
from nbdurable.models import DriverKind, ProcessIdentity, RunStatus
from nbdurable.security import load_token
from nbdurable.settings import Home, Settings

_RELEASE_S = 15.0  # a worker that was asked to end interrupts its kernels first
_LOOK_S = 0.25  # between two looks at the processes


def health(home: Home) -> Health | None:
    """Return what a running coordinator says of itself, None where none runs; it is not started.

    Raises WrongVersion or Unauthorized where one runs that does not want to talk.
    """
    try:
        with Client(home, start=False, timeout_s=2.0) as client:
            return client.call(HEALTH, Nothing())
    except CoordinatorUnreachable:
        return None


@dataclass(frozen=True)
class Ended:
    """A coordinator that was ended; `open_runs` is None where it did not say."""

    pid: int
    open_runs: int | None


def stop(home: Home) -> Ended | None:
    """End the coordinator, if one runs, and wait until its process is gone; workers and runs stay."""
    try:
        found = health(home)
        if found is None:
            return None
        ended = Ended(found.pid, found.open_runs)
    except (WrongVersion, Unauthorized):
        ended = Ended(int(json.loads(home.coordinator.read_text(encoding="utf-8"))["pid"]), None)
    try:
        with Client(home, start=False, timeout_s=START_S) as client:
            client.call(SHUTDOWN, Nothing())
    except CoordinatorUnreachable:
        pass  # it was faster
    except Unauthorized:  # its token was replaced; it is this user's all the same
        os.kill(ended.pid, signal.SIGTERM)
    deadline = time.monotonic() + START_S
    while processes.exists(ended.pid):
        if time.monotonic() > deadline:
            raise CoordinatorError(
                f"the coordinator {ended.pid} was asked to end and still runs after {START_S:.0f} s",
                todo=f"its log is {home.logs / 'coordinator.log'}",
            )
        time.sleep(0.02)
    return ended


def end(home: Home) -> Ended | None:
    """End the coordinator and the workers of this host.

    Workers come first: they give their runs back, and would start the coordinator again.
    """
    if not home.coordinator.exists():
        return None
    with processes.lock(home.start_lock, timeout_s=START_S):
        with contextlib.suppress(CoordinatorError):
            for worker in _busy_workers(home):
                _ask_to_end(worker)
        ended = stop(home)
        with contextlib.suppress(
            OSError, ValueError
        ):  # the coordinator notes the worker that it started last
            note = (home.root / "worker.json").read_text(encoding="utf-8")
            processes.end_tree(ProcessIdentity.model_validate_json(note))
    return ended


def _busy_workers(home: Home) -> list[ProcessIdentity]:
    wanted = ListRuns(status=RunStatus.RUNNING, kind=DriverKind.HEADLESS, limit=1000)
    with Client(home, start=False, timeout_s=2.0) as client:
        runs = client.call(LIST_RUNS, wanted).runs
    return [run.driver.process for run in runs if run.driver is not None]


def _ask_to_end(worker: ProcessIdentity) -> None:
    """Ask a worker of this host to give its runs back and end; kill it if it does not."""
    if not processes.is_local(worker) or not processes.is_alive(worker):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGTERM)
    deadline = time.monotonic() + _RELEASE_S
    while processes.is_alive(worker):
        if time.monotonic() > deadline:
            processes.end_tree(worker)
            return
        time.sleep(0.02)


def run_down(home: Home, screen: Screen) -> None:
    """End the workers, the coordinator and the pages, and say what was left open."""
    ended = end(home)
    page = _pages_process(home)
    if page is not None:
        processes.end_tree(page)
        home.dashboard.unlink(missing_ok=True)
    if screen.json_mode:
        screen.data({"stopped": ended is not None, "open_runs": ended.open_runs if ended else None})
    if ended is None:
        screen.say(f"no coordinator runs for {home.root}")
    else:
        screen.say(f"the coordinator {ended.pid} has ended{_left(ended.open_runs)}")


def _left(open_runs: int | None) -> str:
    if not open_runs:
        return ""
    runs, go = ("run is", "it goes") if open_runs == 1 else ("runs are", "they go")
    return (
        f"; {open_runs} {runs} open, and {go} on when a command, a kernel or `nbdurable up` starts it again"
    )


def _pages_process(home: Home) -> ProcessIdentity | None:
    """Return the process that serves the pages, None where they are not up."""
    if pages(home) is None:
        return None
    pid = json.loads(home.dashboard.read_text(encoding="utf-8"))["pid"]
    if not processes.was_started_with(pid, "nbdurable.dashboard", str(home.root)):
        return None  # a copied or stale file may name any process
    with contextlib.suppress(ProcessLookupError):
        return processes.identity("executor", pid)
    return None


def run_up(home: Home, port: int | None, screen: Screen) -> None:
    """Run coordinator and pages until Ctrl-C, SIGTERM or `nbdurable down`, then end both.

    A coordinator that dies is started again; its clients wait for it.
    """
    if (address := pages(home)) is not None:
        raise Conflict(f"it is up already: {address}", todo="`nbdurable down` ends it")
    settings = Settings.load(home)
    home.create()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        coordinator = _start_coordinator(home, screen)
        with _dashboard(home, settings.dashboard_port if port is None else port) as dashboard:
            address = f"{pages(home)}/ui?token={load_token(home)}"
            screen.say(("✓", "green"), f" coordinator {coordinator.pid} of {home.root}")
            screen.say(("✓", "green"), " pages  ", (address, "bold"))
            screen.say("Ctrl-C ends both; runs stay, and go on later.")
            if screen.json_mode:
                screen.data({"url": address, "pid": coordinator.pid, "home": str(home.root)})
            while status := _watch(home, coordinator, dashboard):
                screen.say(("↻", "yellow"), f" the coordinator {coordinator.pid} ended, status {status}")
                coordinator = _start_coordinator(home, screen)
                screen.say(("✓", "green"), f" coordinator {coordinator.pid} of {home.root}")
    except KeyboardInterrupt:
        screen.say("ended")
    finally:
        with contextlib.suppress(CoordinatorError):
            end(home)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _start_coordinator(home: Home, screen: Screen) -> subprocess.Popen[bytes]:
    """Start a coordinator that does not end when idle, in place of one that runs in the background."""
    with processes.lock(home.start_lock, timeout_s=START_S):  # so that no client starts one in between
        if (before := stop(home)) is not None:
            screen.say(f"taking over from the coordinator {before.pid}, which ran in the background")
        log = home.logs / "coordinator.log"
        child = processes.spawn(
            ["-m", "nbdurable.coordinator", "--home", str(home.root), "--stay"], log=log, cwd=home.root
        )
        deadline = time.monotonic() + START_S
        while (found := health(home)) is None or found.pid != child.pid:
            if child.poll() is not None or time.monotonic() > deadline:
                raise CoordinatorUnreachable("the coordinator did not start", todo=_ends(log))
            time.sleep(0.02)
        return child


@contextlib.contextmanager
def _dashboard(home: Home, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the pages."""
    log = home.logs / "dashboard.log"
    words = ["-m", "nbdurable.dashboard", "--home", str(home.root), "--port", str(port), "--with-parent"]
    child = processes.spawn(words, log=log, cwd=home.root)
    try:
        deadline = time.monotonic() + 2 * START_S
        while pages(home) is None:
            if child.poll() is not None or time.monotonic() > deadline:
                raise Conflict("the pages did not start", todo=_ends(log))
            time.sleep(0.05)
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _watch(home: Home, coordinator: subprocess.Popen[bytes], dashboard: subprocess.Popen[bytes]) -> int:
    """Return the coordinator's exit status when it has ended: 0 where it was asked to.

    Raises Conflict where the pages ended first.
    """
    while (status := coordinator.poll()) is None:
        if dashboard.poll() is not None:
            raise Conflict("the pages ended", todo=_ends(home.logs / "dashboard.log"))
        time.sleep(_LOOK_S)
    return status


def _ends(log: Path) -> str:
    lines = "".join(f"\n    {line}" for line in processes.tail(log))
    return f"the log {log} ends:{lines}" if lines else f"its log is {log}"


def run_worker(home: Home) -> int:
    """Run a worker in this process until there is nothing to do, or Ctrl-C; return its exit status."""
    from nbdurable.runner import worker

    return worker.main(["--home", str(home.root)])
