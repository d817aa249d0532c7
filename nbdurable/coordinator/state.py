"""What the coordinator keeps in memory of an open run: its row, its lease, its steps and waits.

Owns these shapes and the clock; decides nothing, and does no I/O.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from nbdurable.coordinator.fold import Fold
from nbdurable.models import Driver, ProcessIdentity, Run, Wait


class Clock(Protocol):
    """Where the coordinator's time comes from."""

    def now(self) -> float:
        """Return seconds since the epoch: what is written."""

    def elapsed(self) -> float:
        """Return seconds that never jump: what leases are measured by."""


class SystemClock:
    """The clock of this host."""

    def now(self) -> float:
        return time.time()

    def elapsed(self) -> float:
        return time.monotonic()


class Signal:
    """Lets many wait until something changes."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None

    def next(self) -> asyncio.Event:
        """Return what the next change sets; take it before looking, so that no change is missed."""
        if self._event is None:
            self._event = asyncio.Event()
        return self._event

    def notify(self) -> None:
        """Wake all who wait."""
        if self._event is not None:
            self._event.set()
            self._event = None


@dataclass(slots=True)
class Lease:
    """The right to drive a run, as it stands in memory."""

    driver: Driver
    beat: float  # when it was last heard of, by `Clock.elapsed`
    processes: tuple[ProcessIdentity, ...] = ()
    cancel_by: float | None = None  # when a cancelled run's processes are ended, by `Clock.elapsed`
    timed_out: bool = False  # it is ended because its run has had its time


@dataclass(slots=True)
class Live:
    """A run in memory; whoever changes it holds its lock."""

    run: Run
    lease: Lease | None = None
    fold: Fold | None = None  # kept while it is driven
    waits: dict[str, Wait] | None = None  # by key, read from the store when first asked for
    nonces: set[str] | None = None  # of what its code said about it, read from history when first asked for
    changed: Signal = field(default_factory=Signal)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
