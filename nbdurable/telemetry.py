"""Fault points: named places, one after each thing made durable, at which a test can crash the process.

Owns the list of their names; knows nothing of what they protect. Without `NBDURABLE_FAULT` a point costs one
dictionary look-up.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

FAULT_POINTS: dict[str, str] = {
    "blob-written": "a blob stands under its name, nothing refers to it yet",
    "checkpoint-saved": "all blobs of a checkpoint are on disk, the manifest is not committed",
    "attempt-failed": "an attempt's failure, and what follows it, is recorded; its kernel has done nothing about it",
    "commit-sent": "the kernel sent a commit and has not read the answer",
    "commit-acknowledged": "the kernel knows that its step is committed",
    "call-committed": "the kernel knows that calls of its step are committed, the step goes on",
    "restore-done": "the kernel put a checkpoint back",
    "event-sent": "a sent event is on disk, no run was given it",
    "wait-answered": "an answer is on disk, with what it cancels and wakes, and nobody was told",
    "children-started": "the kernel knows that runs it started are on disk, its step goes on",
    "wait-opened": "the kernel opened a wait and has not suspended",
    "hook-begun": "that a hook begins is on disk, it has not run",
    "hook-ran": "a hook has run, that it ended is not recorded",
    "store-before-commit": "the writer holds a group, the journal does not",
    "store-committed": "the group is on disk in the journal, nobody was told",
    "store-applied": "the database has on disk what the journal still holds",
    "run-leased": "a worker was given a run, and has not started it",
    "executor-started": "the worker started the run's process",
    "kernel-started": "the run's process started its kernel",
    "output-written": "the output notebook is written, the run's end is not reported",
    "end-reported": "the run's end is reported, its process still lives",
    "past-changed": "a fork, a repair or a hand-over is on disk, nobody was told",
    "suspend-reported": "the run waits, its kernel still lives",
}

_armed = os.environ.get("NBDURABLE_FAULT")
_hits = 0


def fault_point(name: str, of: str = "") -> None:
    """Crash here (SIGKILL) if a test asked for it; `of` is the step that passes.

    `NBDURABLE_FAULT=name:hit:fuse`: at the hit-th passage (from 1) in a process, once: the file `fuse` is created
    before the crash, and where it exists nothing happens. `name:each:folder`: once for each step, whose name is
    that of its fuse in the folder. Raises KeyError for a name not in FAULT_POINTS.
    """
    if _armed is None:
        return
    FAULT_POINTS[name]
    wanted, hit, fuse = _armed.split(":", 2)
    if wanted != name:
        return
    global _hits
    _hits += 1
    if hit != "each" and _hits != int(hit):
        return
    try:
        (Path(fuse) / of if hit == "each" else Path(fuse)).open("x").close()
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
