"""Patience: how long the own code of objects may run while their values are looked at and saved.

Owns the limit, and that it is kept. Knows nothing of values: any code that isn't ours, such as an object's
`__reduce__`, runs inside `others_code`. Only in the main thread of a system with interval timers is it ended;
elsewhere, and where the notebook uses that timer itself, it may take its time.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

LIMIT_S = 15.0
_TICKS = 10  # in a limit: a machine that slept meanwhile counts as one


class GaveUp(Exception):
    """The own code of an object did not end in time, or tried to end the kernel."""


class _OthersCode:
    """Where objects' own code runs; `began` counts how often it did."""

    def __init__(self) -> None:
        self.inside, self.began = 0, 0
        self.seen, self.ticks = 0, 0

    def __enter__(self) -> None:
        self.inside += 1
        self.began += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside -= 1
        if isinstance(error, SystemExit | GeneratorExit):
            raise GaveUp(f"its own code raises {type(error).__name__}") from error

    def tick(self, number: int, frame: FrameType | None) -> None:
        """Give up a piece of code that has run since too many ticks."""
        same = self.inside and self.began == self.seen
        self.seen, self.ticks = self.began, self.ticks + 1 if same else 0
        if self.ticks >= _TICKS:
            self.ticks = 0
            raise GaveUp(f"its own code does not end within {LIMIT_S:g} s")


others_code = _OthersCode()


@contextmanager
def patient() -> Iterator[None]:
    """Keep the limit meanwhile."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
        or signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0)
        or signal.getsignal(signal.SIGALRM) is None  # set by C code: it could not be put back
    ):
        yield
        return
    before = signal.signal(signal.SIGALRM, others_code.tick)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S / _TICKS, LIMIT_S / _TICKS)
    others_code.inside = 0
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
