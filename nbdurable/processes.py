"""Processes of this host: who one is, whether it lives, how it is started and ended; and locks between them.

Owns every use of psutil and of file locks; knows nothing of runs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from nbdurable.models import ProcessIdentity

if TYPE_CHECKING:
    import psutil

_SAME_START_S = 0.05  # a start time is exact to a clock tick (10 ms)
_MAX_LOG_BYTES = 8_000_000
_FOREIGN = (
    "JPY_",
    "NBDURABLE_RUN_ID",
)  # what belongs to the kernel that starts a process, not to the process

_children: list[subprocess.Popen[bytes]] = []  # kept, so that they are reaped


@atexit.register
def _let_go() -> None:
    """Leave the children running without Popen's warning: to outlive this process is what they are for."""
    for child in _children:
        child.returncode = child.poll() or 0


class LockTimeout(Exception):
    """Another process holds the lock"""


@cache
def _host() -> str:
    return socket.gethostname()


def _start_time(pid: int) -> float | None:
    """Return when a living process started, or None for a dead one.

    On Linux in seconds since boot, so that a clock that is set does not make a process look like another one.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        started = float(process.create_time())
    except psutil.NoSuchProcess:
        return None
    return round(started - float(psutil.boot_time()), 3) if sys.platform == "linux" else started


def identity(role: Literal["kernel", "worker", "executor"], pid: int | None = None) -> ProcessIdentity:
    """Return the identity of this process, or of `pid`.

    Raises ProcessLookupError where there is no such process.
    """
    pid = os.getpid() if pid is None else pid
    started = _start_time(pid)
    if started is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return ProcessIdentity(host=_host(), pid=pid, started_at=started, role=role)


def is_local(process: ProcessIdentity) -> bool:
    """Tell whether a process is of this host, so that it can be watched."""
    return process.host == _host()


def is_alive(process: ProcessIdentity) -> bool:
    """Tell whether a process lives; one of another host is taken to live, since nobody here can know."""
    if not is_local(process):
        return True
    started = _start_time(process.pid)
    return started is not None and abs(started - process.started_at) < _SAME_START_S


def exists(pid: int) -> bool:
    """Tell whether there is a process of that number."""
    return _start_time(pid) is not None


def was_started_with(pid: int, *words: str) -> bool:
    """Tell whether a living process has all of these words on its command line."""
    import psutil

    try:
        line = psutil.Process(pid).cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return set(words) <= set(line)


def end_tree(process: ProcessIdentity, grace_s: float = 2.0) -> None:
    """End a process of this host with its descendants: ask, and after `grace_s` seconds kill.

    Returns when all are gone. A process that is dead or of another host, and an ancestor of this one, is left
    alone.
    """
    import psutil

    if not is_local(process) or not is_alive(process):
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        _end([*_descendants(psutil.Process(process.pid)), psutil.Process(process.pid)], grace_s)


def end_marked(environment: Mapping[str, str], grace_s: float = 2.0) -> None:
    """End the processes of this host, with their descendants, that were started with these variables set.

    For what a killed process left behind, whose children nobody can find by their parent any more.
    """
    import psutil

    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # another user's, or gone meanwhile
            if environment.items() <= one.environ().items():
                found += [*_descendants(one), one]
    _end(list(dict.fromkeys(found)), grace_s)


def _descendants(process: psutil.Process) -> Iterator[psutil.Process]:
    """Yield what a process started, and what that started; but no coordinator, which serves others too."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for child in process.children():
            with contextlib.suppress(psutil.Error, OSError):
                if "nbdurable.coordinator" in child.cmdline():
                    continue
            yield from _descendants(child)
            yield child


def _end(doomed: Sequence[psutil.Process], grace_s: float) -> None:
    """Ask processes to end, and after `grace_s` seconds kill them; this one and its ancestors are spared."""
    import psutil

    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    doomed = [one for one in doomed if one.pid not in spared]
    for one in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    _, stubborn = psutil.wait_procs(doomed, timeout=grace_s)
    for one in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(stubborn, timeout=max(grace_s, 2.0))


def spawn(
    arguments: Sequence[str], *, log: Path, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start this Python with `arguments` in a session of its own, its output appended to `log`."""
    for child in _children[:]:
        if child.poll() is not None:
            _children.remove(child)
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_suffix(".1.log"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=kept | dict(environment or {}),
            start_new_session=sys.platform != "win32",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    _children.append(child)
    return child


def tail(log: Path, lines: int = 12) -> list[str]:
    """Return the last lines of a log; none where it is missing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def _try_lock(file: IO[bytes]) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def lock(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Hold the lock that `path` stands for; the system releases it when the process dies.

    Raises LockTimeout after `timeout_s` seconds.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:  # closing it unlocks
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                raise LockTimeout(f"{path} is held by another process")
            time.sleep(0.02)
        yield
