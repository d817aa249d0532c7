"""Time limits on code that runs in this kernel.

Owns `Limit`, and the process's interval timer while one stands. A signal interrupts Python code, and what waits in the
system; code in C that does neither is not interrupted: it raises once it returns, or (`kill`) the kernel ends itself
from a thread that needs no interpreter. Threads that the code has started are not ended. Knows no steps.
"""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from nbdurable.errors import TimedOut
from nbdurable.policies import span

_AGAIN_S = 1.0  # somebody may have swallowed it
_LONGEST_S = 100_000_000.0  # what a system's timers take
HAS_TIMER = hasattr(signal, "setitimer")  # not on Windows

_standing: list[Limit] = []  # from the outermost
_former: tuple[Any, float | None] | None = (
    None  # handler that was there before ours, and when its timer was due
)


class Limit:
    """A time limit on what runs between `start` and `stop`, in the main thread; what is `paused` does not count.

    When it is over, TimedOut is raised where the code stands now. A task (`start` is called in it) that awaits is
    cancelled instead, and `expired` tells that from somebody else's cancelling. Limits may stand within each other.
    `kill`: seconds of grace, and a file; a process whose code has not ended by then writes its stacks there and ends.
    """

    def __init__(self, what: str, timeout_s: float, *, kill: tuple[float, Path] | None = None) -> None:
        self.what, self.timeout_s = what, timeout_s
        self.expired = False
        self._kill = kill
        self._left_s = min(timeout_s, _LONGEST_S)
        self._due = 0.0
        self._began = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._others: frozenset[asyncio.Task[Any]] = frozenset()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stacks: IO[str] | None = None

    def start(self, *, awaits: bool = False) -> None:
        """Begin; `awaits`: the code is a coroutine's, in the task that runs now."""
        if awaits:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.current_task()
            self._others = frozenset(asyncio.all_tasks())
        self._began = time.monotonic()
        self.go_on()

    def stop(self) -> None:
        """End the limit; nothing is raised any more."""
        if self in _standing:
            self.rest()
        if self._stacks is not None:
            self._stacks.close()
            self._stacks = None

    def error(self) -> TimedOut:
        """Return what is raised when the time is over."""
        took_s = time.monotonic() - self._began
        late = took_s > self.timeout_s + 2 * _AGAIN_S
        note = f": {span(took_s)}, since code that runs in C is not interrupted" if late else ""
        return TimedOut(self.what, self.timeout_s, note)

    def behind(self, error: BaseException) -> TimedOut | None:
        """Return the TimedOut that stands behind the cancelling of a task; the traceback of ours ends at its code."""
        if self.expired and isinstance(error, asyncio.CancelledError):
            found = self.error().with_traceback(error.__traceback__)
            found.__suppress_context__ = True
            return found
        if isinstance(error, TimedOut):
            link = error.__traceback__
            while link is not None:
                if link.tb_next is not None and link.tb_next.tb_frame.f_code is _alarm.__code__:
                    link.tb_next = None
                link = link.tb_next
        return None

    def go_on(self, paused_s: float = 0.0) -> None:
        """Let the time run on, after a pause."""
        self._began += paused_s
        if not HAS_TIMER or threading.current_thread() is not threading.main_thread():
            return
        self._due = time.monotonic() + self._left_s
        _standing.append(self)
        if self._kill is not None:
            grace_s, path = self._kill
            if self._stacks is None:
                self._stacks = path.open("w", encoding="utf-8")
            faulthandler.dump_traceback_later(self._left_s + grace_s, exit=True, file=self._stacks)
        _set_timer()

    def rest(self) -> None:
        """Let the time stand still."""
        _standing.remove(self)
        _set_timer()
        if self._kill is not None:
            faulthandler.cancel_dump_traceback_later()
        self._left_s = max(0.001, self._due - time.monotonic())

    def strike(self) -> None:
        """Raise, or cancel the task; called by the timer's signal, again and again until the code has ended."""
        __tracebackhide__ = True
        self.expired = True
        self._due = time.monotonic() + _AGAIN_S
        if self._task is None or self._loop is None:
            raise self.error()
        try:
            running = asyncio.current_task(self._loop)
        except RuntimeError:
            running = None
        if running is self._task or (running is not None and running not in self._others):
            raise self.error()  # the code itself, or a task that it has started, holds the loop up
        self._loop.call_soon_threadsafe(self._task.cancel, str(self.error()))


@contextmanager
def paused() -> Iterator[None]:
    """Let the time of the block count for no limit: what runs in it waits."""
    standing = list(_standing)
    for one in reversed(standing):
        one.rest()
    began = time.monotonic()
    try:
        yield
    finally:
        for one in standing:
            one.go_on(time.monotonic() - began)


def _set_timer() -> None:
    """Set the timer to the limit that is over first; without any, leave things as they were found."""
    global _former
    now = time.monotonic()
    if not _standing:
        if _former is not None:
            handler, due = _former
            _former = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if due is not None:
                signal.setitimer(signal.ITIMER_REAL, max(0.001, due - now))
        return
    if _former is None:
        left_s, _ = signal.getitimer(signal.ITIMER_REAL)
        handler = signal.signal(signal.SIGALRM, _alarm)
        _former = (handler or signal.SIG_DFL, now + left_s if left_s else None)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, min(one._due for one in _standing) - now))


def _alarm(number: int, frame: FrameType | None) -> None:
    __tracebackhide__ = True
    over = next((one for one in _standing if one._due <= time.monotonic()), None)
    if over is None:
        _set_timer()
        return
    try:
        over.strike()
    finally:
        _set_timer()
