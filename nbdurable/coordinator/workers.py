"""The local worker: started when runs are queued and nobody takes them, with pauses where it dies at once.

Owns which workers are known; never imports the runner, and knows nothing of runs.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable

from nbdurable import processes
from nbdurable.coordinator.state import Clock
from nbdurable.models import ProcessIdentity
from nbdurable.settings import Home

_MAX_PAUSE_S = 60.0


def start_worker(home: Home) -> subprocess.Popen[bytes]:
    """Start a worker of this project as a process of its own."""
    return processes.spawn(
        ["-m", "nbdurable.runner.worker", "--home", str(home.root)],
        log=home.logs / "worker.log",
        cwd=home.root,
        environment={"NBDURABLE_HOME": str(home.root)},
    )


class WorkerPool:
    """Keeps one local worker while there is work. `start`: how one is started; None: never."""

    def __init__(
        self, home: Home, clock: Clock, start: Callable[[Home], subprocess.Popen[bytes]] | None = start_worker
    ) -> None:
        self._home = home
        self._clock = clock
        self._start = start
        self._note = home.root / "worker.json"  # so that the next coordinator knows this one's worker
        self._known: dict[ProcessIdentity, float] = {}  # since when it has had nothing to do
        self._child: subprocess.Popen[bytes] | None = None
        self._child_polled = False
        self._failures = 0
        self._not_before = 0.0
        self.trouble: str | None = None  # what keeps workers from living, in a sentence
        with contextlib.suppress(OSError, ValueError):
            worker = ProcessIdentity.model_validate_json(self._note.read_text(encoding="utf-8"))
            self._known[worker] = clock.elapsed()

    def polled(self, worker: ProcessIdentity) -> None:
        """Note that a worker asks for work."""
        self._known.setdefault(worker, self._clock.elapsed())
        self.trouble, self._failures = None, 0
        if self._child is not None and worker.pid == self._child.pid:
            self._child_polled = True

    def worked(self, worker: ProcessIdentity) -> None:
        """Note that a driver had something to do until now; of others than workers nothing is kept."""
        if worker in self._known:
            self._known[worker] = self._clock.elapsed()

    def idle_s(self, worker: ProcessIdentity) -> float:
        """Return for how long a worker has had nothing to do."""
        return self._clock.elapsed() - self._known.get(worker, self._clock.elapsed())

    def dismissed(self, worker: ProcessIdentity) -> None:
        """Note that a worker was told to end: while it does, another may be started."""
        self._known.pop(worker, None)

    def alive(self) -> int:
        """Return how many workers live that were not told to end."""
        self._known = {worker: since for worker, since in self._known.items() if processes.is_alive(worker)}
        return len(self._known)

    def provide(self) -> None:
        """Start a worker if none lives, unless the last ones died at once a short while ago."""
        if self._child is not None and self._child.poll() is not None:
            if not self._child_polled:
                self._failed(f"the worker ended at once with status {self._child.returncode}")
            self._child = None
        if self._start is None or self.alive() or self._clock.elapsed() < self._not_before:
            return
        try:
            child = self._start(self._home)
        except OSError as error:
            self._failed(f"no worker can be started ({error})")
            return
        self._child, self._child_polled = child, False
        with contextlib.suppress(ProcessLookupError):  # dead already: seen at the next look
            worker = processes.identity("worker", child.pid)
            self._known[worker] = self._clock.elapsed()
            draft = self._note.with_suffix(".draft")
            draft.write_text(worker.model_dump_json(), encoding="utf-8")
            draft.replace(self._note)

    def _failed(self, what: str) -> None:
        self._failures += 1
        pause_s = min(_MAX_PAUSE_S, 0.5 * 2**self._failures)
        self._not_before = self._clock.elapsed() + pause_s
        log = self._home.logs / "worker.log"
        last = next((line.strip() for line in reversed(processes.tail(log)) if line.strip()), "")
        self.trouble = f"{what}, and is tried again; {log} says why" + (f": {last[:200]}" if last else "")
