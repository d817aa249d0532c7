"""Processes that tests start, found by the project's folder that they were started for, and ended by pid."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from nbdurable.client import Client
from nbdurable.settings import Home

DEADLINE_S = 20.0


def until(found: Callable[[], Any], *, what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Return the first true value of `found`, asked again and again; fail the test after the deadline."""
    deadline = time.monotonic() + deadline_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.01)
    return value


def processes_of(home: Home) -> list[psutil.Process]:
    """Return the living processes of this home: coordinator, workers, executors, kernels."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            named = str(home.root) in process.cmdline()
            if process.status() != psutil.STATUS_ZOMBIE and (
                named or process.environ().get("NBDURABLE_HOME") == str(home.root)
            ):
                found.append(process)
    return found


def end_processes_of(home: Home) -> None:
    """Kill them all at once, since one that is left starts the others again; return when none is left."""

    def none_left() -> bool:
        left = processes_of(home)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        return not left

    until(none_left, what=f"the processes of {home.root} end")


class Coordinator:
    """The coordinator that a test's clients start."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.client = Client(home)

    @property
    def pid(self) -> int:
        """Return the pid of the one that listens now."""
        return int(json.loads(self.home.coordinator.read_text(encoding="utf-8"))["pid"])

    def kill(self) -> int:
        """End it by SIGKILL, as the system does when memory is short; return the pid that it had."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        self.wait_gone(pid)
        return pid

    def wait_gone(self, pid: int) -> None:
        """Wait until a process has ended."""

        def gone() -> bool:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            try:
                return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True

        until(gone, what=f"process {pid} ends")
