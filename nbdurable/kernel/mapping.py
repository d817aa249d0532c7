"""Durable fan-out: `durable.map`, each item a recorded call.

Owns who takes which item when, what a failure does, and the progress bar; what makes an item's call durable is
`calls.py`'s. Plain functions run in threads, coroutines as tasks.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

from nbdurable.checkpoint.objects import decorated
from nbdurable.errors import UsageError
from nbdurable.kernel import display, extension
from nbdurable.kernel.calls import Key, step
from nbdurable.kernel.execution import TICK_S
from nbdurable.kernel.recorded import brief

OnError = Literal["stop", "collect"] | int
CONCURRENCY = 8
_MAX_CONCURRENCY = 1000
_SHOW_EVERY_S = 0.1
_nothing = object()


@dataclass(frozen=True)
class Failed:
    """Stands in the results of `map` for an item whose call raised: which item, and what."""

    index: int
    item: str  # as text, bounded
    error: str  # "ValueError: no such page"

    def __str__(self) -> str:
        return f"item {self.index} ({self.item}) failed with {self.error}"


def map(
    fn: Callable[..., Any],
    items: Iterable[Any],
    *,
    key: Key | None = None,
    concurrency: int = CONCURRENCY,
    desc: str = "",
    ordered: bool = True,
    on_error: OnError = "stop",
) -> list[Any]:
    """Call a function for each item, several at a time, and return the results; finished items stay finished.

    In a `%%step` cell each item's call is recorded as with `@durable.step`: after a failure, a crash or a restart only
    the items that are missing run. `fn` runs in `concurrency` threads; a coroutine function needs `map_async`. `key`:
    what tells the items apart, where they can't be compared. `ordered`: the results stand in the order of the items,
    else in that of completion. `desc` stands beside the progress bar.

    `on_error`: "stop" takes no further item once one has failed, lets those in flight finish, and raises; "collect"
    goes on, and a `durable.Failed` stands for the result of each item that failed; a number tolerates that many
    failures, as "collect" does, and stops at the next one. Raises UsageError for arguments that make no sense.

        pages = durable.map(fetch, urls, concurrency=16, desc="pages", on_error="collect")
    """
    job = _Job(fn, items, key, concurrency, desc, ordered, on_error)
    if job.is_async:
        raise UsageError(
            f"`{job.name}` is a coroutine function: a plain `map` can't run it",
            todo="write `await durable.map_async(…)`",
        )
    done = threading.Event()
    job.start_threads(done.set)
    try:
        while not done.wait(TICK_S if job.is_quiet else _SHOW_EVERY_S):
            job.show()
    except BaseException:
        job.stopped = True
        raise
    return job.outcome()


async def map_async(
    fn: Callable[..., Any],
    items: Iterable[Any],
    *,
    key: Key | None = None,
    concurrency: int = CONCURRENCY,
    desc: str = "",
    ordered: bool = True,
    on_error: OnError = "stop",
) -> list[Any]:
    """Call a function or coroutine function for each item; other tasks of the cell go on meanwhile. See `map`."""
    job = _Job(fn, items, key, concurrency, desc, ordered, on_error)
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []
    if job.is_async:
        tasks = [asyncio.create_task(job.work_async()) for _ in range(concurrency)]
        ending = asyncio.gather(*tasks)
        ending.add_done_callback(lambda _: done.set())
    else:
        job.start_threads(lambda: loop.call_soon_threadsafe(done.set))
    try:
        while not done.is_set():
            try:
                await asyncio.wait_for(done.wait(), _SHOW_EVERY_S)
            except TimeoutError:
                job.show()
    except BaseException:
        job.stopped = True
        for task in tasks:
            task.cancel()
        raise
    return job.outcome()


class _Job:
    """One call of `map`: its items, who takes the next one, what came of them. Thread-safe."""

    def __init__(
        self,
        fn: Callable[..., Any],
        items: Iterable[Any],
        key: Key | None,
        concurrency: int,
        desc: str,
        ordered: bool,
        on_error: OnError,
    ) -> None:
        self.concurrency, self.desc, self.ordered = concurrency, desc, ordered
        self.tolerated = _tolerated(on_error)
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 1 <= concurrency <= 1000:
            raise UsageError(
                f"the concurrency {concurrency!r} makes no sense",
                todo=f"give a number from 1 to {_MAX_CONCURRENCY}",
            )
        if not callable(fn):
            raise UsageError(
                f"`map` calls a function, not a {type(fn).__name__}", todo="durable.map(fn, items)"
            )
        try:
            self.items = iter(items)
        except TypeError:
            raise UsageError(
                f"the items are a {type(items).__name__}, which can't be gone through", todo="give a list"
            ) from None
        self.total = len(items) if isinstance(items, Sized) else None
        self.call, self.name, self.is_async = _recorded(fn, key)
        self.results: list[Any] = []
        self.failures: list[Failed] = []
        self.error: BaseException | None = None
        self.stopped = False
        self._taken = 0
        self._finished = 0
        self._guard = threading.Lock()
        self._bar = _Bar(desc or self.name)

    @property
    def is_quiet(self) -> bool:
        return not self._bar.is_live

    def _next(self) -> tuple[int, Any] | None:
        """Take the next item; None where there is none, or no more is to be taken."""
        with self._guard:
            if self.stopped:
                return None
            try:
                item = next(self.items, _nothing)
            except BaseException as error:
                self._stop(error)
                return None
            if item is _nothing:
                return None
            index, self._taken = self._taken, self._taken + 1
            if self.ordered:
                self.results.append(None)
            return index, item

    def _stop(self, error: BaseException) -> None:
        self.stopped = True
        self.error = self.error or error

    def _succeeded(self, index: int, value: Any) -> None:
        with self._guard:
            self._finished += 1
            if self.ordered:
                self.results[index] = value
            else:
                self.results.append(value)

    def _failed(self, index: int, item: Any, error: BaseException) -> None:
        failed = Failed(index, brief(item), f"{type(error).__name__}: {str(error)[:500]}")
        if not isinstance(error, Exception):
            with self._guard:
                self._stop(error)
            return
        with self._guard:
            self.failures.append(failed)
            if self.tolerated is not None and len(self.failures) > self.tolerated:
                error.add_note(
                    f"durable.map: {failed}; {self._finished} items are finished, and are not run again"
                )
                self._stop(error)
                return
        self._succeeded(index, failed)

    # At work -------------------------------------------------------------------------------------------------

    def start_threads(self, ended: Callable[[], object]) -> None:
        """Let threads work, each in a copy of this context; `ended` is called by the last one."""
        count = self.concurrency if self.total is None else max(1, min(self.concurrency, self.total))
        left = [count]

        def work() -> None:
            try:
                self.work()
            finally:
                with self._guard:
                    left[0] -= 1
                    last = not left[0]
                if last:
                    ended()

        for number in range(count):
            target = contextvars.copy_context().run
            threading.Thread(target=target, args=(work,), name=f"nbdurable-map-{number}", daemon=True).start()

    def work(self) -> None:
        """Take items until there are no more."""
        while (taken := self._next()) is not None:
            index, item = taken
            try:
                value = self.call(item)
            except BaseException as error:
                self._failed(index, item, error)
            else:
                self._succeeded(index, value)

    async def work_async(self) -> None:
        """Take items until there are no more."""
        while (taken := self._next()) is not None:
            index, item = taken
            try:
                value = await self.call(item)
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                self._failed(index, item, error)
            else:
                self._succeeded(index, value)

    def show(self) -> None:
        """Show how far it has come."""
        self._bar.show(self._finished, len(self.failures), self.total)

    def outcome(self) -> list[Any]:
        """Show that it has ended, and return the results; raises what stopped it."""
        self._bar.end(self._finished, len(self.failures), self.total)
        if self.error is not None:
            raise self.error
        return self.results


class _Bar:
    """The progress bar: a display of a notebook, a line of a terminal.

    What it shows at the end does not depend on how long it took and on what was known before: it is the one thing
    that is recorded with the step.
    """

    def __init__(self, desc: str) -> None:
        steps = extension.steps()
        self._desc = desc
        self._shell = steps.session.shell if steps is not None else None
        self._in_kernel = self._shell is not None and hasattr(self._shell, "kernel")
        terminal = sys.__stderr__
        self._terminal = (
            terminal if terminal is not None and not self._in_kernel and terminal.isatty() else None
        )
        self._id: str | None = None
        self._shown_at = 0.0

    @property
    def is_live(self) -> bool:
        return self._in_kernel or self._terminal is not None

    def show(self, done: int, failed: int, total: int | None) -> None:
        if not self.is_live or time.monotonic() - self._shown_at < _SHOW_EVERY_S:
            return
        self._shown_at = time.monotonic()
        self._put(display.progress(self._desc, done, failed, total))

    def end(self, done: int, failed: int, total: int | None) -> None:
        data = display.progress(self._desc, done, failed, total, ended=True)
        if self._terminal is not None:
            self._terminal.write("\r\x1b[K")
        if self._shell is not None:
            self._publish(data)

    def _put(self, data: dict[str, Any]) -> None:
        if self._terminal is not None:
            self._terminal.write(f"\r\x1b[K{data['text/plain']}")
            self._terminal.flush()
        else:
            self._publish(data)

    def _publish(self, data: dict[str, Any]) -> None:
        update = self._id is not None
        self._id = self._id or f"nbdurable-map-{id(self)}-{time.monotonic_ns()}"
        transient = {"display_id": self._id}
        assert self._shell is not None
        self._shell.display_pub.publish(
            data, {"nbdurable": {"progress": True}}, transient=transient, update=update
        )


def _tolerated(on_error: OnError) -> int | None:
    """Return how many failures are tolerated; None: any number."""
    if on_error == "stop":
        return 0
    if on_error == "collect":
        return None
    if isinstance(on_error, int) and not isinstance(on_error, bool) and on_error >= 0:
        return on_error
    raise UsageError(
        f"`on_error` is {on_error!r}", todo='give "stop", "collect", or how many failures are tolerated'
    )


def _recorded(fn: Callable[..., Any], key: Key | None) -> tuple[Callable[..., Any], str, bool]:
    """Return what calls a function for an item and records that, its name, and whether it is a coroutine function."""
    inner = fn.__func__ if isinstance(fn, MethodType) else fn
    name = str(getattr(inner, "__qualname__", type(inner).__qualname__))
    is_async = inspect.iscoroutinefunction(inner)
    if decorated(inner) is not None:
        if key is not None:
            raise UsageError(
                f"`{name}` records its calls already, by its own rule",
                todo="give `key` to its `@durable.step`",
            )
        return fn, name, is_async
    if isinstance(fn, MethodType):  # what it is bound to is an argument like others
        owner, of = fn.__self__, step(key=_of_item(key))(inner)
        return (lambda item: of(owner, item)), name, is_async
    return step(key=key)(fn), name, is_async


def _of_item(key: Key | None) -> Key | None:
    """Return the key of a method's call, whose user thinks of the item alone."""
    return (lambda owner, item: key(item)) if callable(key) else key
