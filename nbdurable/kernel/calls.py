"""Functions whose calls are recorded: `@durable.step`.

Owns the decorator, for functions, coroutines and generators of both kinds. Inside a `%%step` cell each call is
committed when it returns; an attempt that comes later takes its recorded result. What a call is known by and what it
leaves is `recorded.py`'s, one `Calls` for each attempt (`execution.Execution.calls`).

For others that record calls (`map`, model clients): `step(key=…)(fn)` makes a recorded function of any callable;
`recording()` returns the `Calls` of the step that runs now, None where there is none. A new attempt in place begins
with `Execution.begin`, which makes a new `Calls`; `BeginStep.fresh` forgets what earlier attempts recorded.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import AsyncIterator, Callable, Generator
from datetime import timedelta
from typing import Any, TypeVar, overload

from nbdurable.checkpoint.fingerprint import immutable, partial_fingerprint
from nbdurable.errors import UsageError
from nbdurable.kernel import display, extension
from nbdurable.kernel.recorded import Call, Calls, Function
from nbdurable.kernel.tries import Policy
from nbdurable.policies import Retry, RetryOn, check_retry_on, seconds

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Key = str | Callable[..., Any]


@overload
def step(function: Decorated, /) -> Decorated: ...
@overload
def step(
    *,
    key: Key | None = None,
    retries: int = 0,
    backoff: float = 2.0,
    min_wait: str | float | timedelta = 1.0,
    max_wait: str | float | timedelta | None = None,
    timeout: str | float | timedelta | None = None,
    retry_on: RetryOn | None = None,
) -> Callable[[Decorated], Decorated]: ...
def step(function: Any = None, /, **options: Any) -> Any:
    """Record the calls of a function, so that a call that has returned is not made again.

    Inside a `%%step` cell each call is on disk when it returns. When the cell runs again (after a failure, a crash, a
    wait, an edit), calls that are known give their recorded result and only the rest run. A call is known by its
    function, its arguments and how many equal ones came before it in the attempt; order and concurrency don't matter.
    `key`: what tells calls apart instead of their arguments, a text or a function of the arguments.

    `retries`: how often a call that raises is made again, after a wait that grows by the factor `backoff` from
    `min_wait` (1 s) to `max_wait` (60 s), or as long as the error asks; `retry_on`: classes of errors, or a function
    of one, else all but those that trying again can't help. `timeout`: of each try; what waits for a person or a time
    does not count; in threads other than the main one it holds for coroutines only.

    If the function's code, or what it uses, changed, its calls run again, and the step's line says why. For a call
    that is recorded, those inside it are not asked for. Generators run until they are exhausted, are recorded as a
    list and replayed as generators. A call that raises is not recorded. Neither is, with a notice below the cell, one
    that changes its arguments or the notebook's variables (its result alone would not bring that back), whose
    arguments can't be compared and that has no `key`, or whose result can't be saved. Outside `%%step` cells the
    function just runs. Raises UsageError for what is no function, and for two calls with one key and different
    arguments.

        @durable.step
        def ask(prompt): ...

        @durable.step(key=lambda client, query: query)
        async def search(client, query): ...
    """
    if function is None:
        _policy(**options)  # what makes no sense is said at once
        return functools.partial(_decorate, **options)
    if isinstance(function, str):
        raise UsageError(
            "`@durable.step` takes no name", todo="write `@durable.step`, or `@durable.step(key=…)`"
        )
    return _decorate(function, **options)


def again(fn: Any, options: dict[str, Any]) -> Any:
    """Decorate a function as it was decorated before: pickles call it."""
    return _decorate(fn, **options)


def _policy(
    *,
    key: Any = None,
    retries: int = 0,
    backoff: float = 2.0,
    min_wait: str | float | timedelta = 1.0,
    max_wait: str | float | timedelta | None = None,
    timeout: str | float | timedelta | None = None,
    retry_on: RetryOn | None = None,
) -> Policy:
    """Return what follows when a call fails; raises UsageError for what makes no sense."""
    if key is not None and not isinstance(key, str) and not callable(key):
        raise UsageError(
            f"`key` is a {type(key).__name__}", todo="give a text, or a function of the call's arguments"
        )
    if retry_on is not None:
        check_retry_on(retry_on)
    timeout_s = None if timeout is None else seconds(timeout)
    if timeout_s == 0:
        raise UsageError("a timeout of zero leaves no time", todo="give a time, e.g. `timeout='30s'`")
    retry = Retry.of(retries, backoff=backoff, min_wait=min_wait, max_wait=max_wait)
    return Policy(retry if retries else None, retry_on, timeout_s)


def _decorate(fn: Any, **options: Any) -> Any:
    if isinstance(fn, staticmethod | classmethod):
        return type(fn)(_decorate(fn.__func__, **options))
    if isinstance(fn, type) or not callable(fn):
        what = f"the class `{fn.__qualname__}`" if isinstance(fn, type) else f"a {type(fn).__name__}"
        raise UsageError(
            f"`durable.step` records calls of functions, not of {what}", todo="decorate a function"
        )
    function = Function(fn, options.get("key"))
    policy = _policy(**options)
    if (inspect.isasyncgenfunction(fn) or inspect.isgeneratorfunction(fn)) and policy.is_set:
        raise UsageError(
            f"`{function.name}` is a generator: what it has given can't be taken back, so that it can't be tried again",
            todo="record the function that makes the items, and give that retries or a timeout",
        )
    if inspect.isasyncgenfunction(fn):
        made: Any = _async_generator(function)
    elif inspect.isgeneratorfunction(fn):
        made = _generator(function)
    elif inspect.iscoroutinefunction(fn):
        made = _coroutine(function, policy)
    else:
        made = _plain(function, policy)
    made = functools.wraps(fn)(made)
    made.__made_by__ = (again, (fn, options))
    return made


def recording() -> Calls | None:
    """Return the calls of the step that runs now; None outside steps, and in one that keeps nothing."""
    steps = extension.steps()
    execution = steps.execution if steps is not None else None
    return None if execution is None or execution.again else execution.calls


def _open(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    calls = recording()
    if calls is None:
        _say_plain(function)
        return None
    return calls.open(function, args, kwargs)


_told: set[str] = set()


def _say_plain(function: Function) -> None:
    """Say once of a function that its calls are not recorded here."""
    steps = extension.steps()
    if function.name in _told or (steps is not None and steps.execution is not None):
        return  # in a `--replay` cell, which says so itself
    _told.add(function.name)
    if steps is None:
        warnings.warn(
            f"`{function.name}` runs without a notebook's run: its calls are not recorded", stacklevel=4
        )
    else:
        said = f"`{function.name}` is called outside a step: it runs, and nothing is recorded"
        display.say(steps.session.shell, said)


def _plain(function: Function, policy: Policy) -> Callable[..., Any]:
    fn = policy.applied(function) if policy.is_set else function.fn

    def recorded(*args: Any, **kwargs: Any) -> Any:
        call = _open(function, args, kwargs)
        if call is None:
            return fn(*args, **kwargs)
        if call.known is not None:
            return call.value()
        with call.running():
            value = fn(*args, **kwargs)
        commit(call, value)
        return value

    return recorded


def _coroutine(function: Function, policy: Policy) -> Callable[..., Any]:
    fn = policy.applied_async(function) if policy.is_set else function.fn

    async def recorded(*args: Any, **kwargs: Any) -> Any:
        call = _open(function, args, kwargs)
        if call is None:
            return await fn(*args, **kwargs)
        if call.known is not None:
            return call.value()
        with call.running():
            value = await fn(*args, **kwargs)
        await commit_async(call, value)
        return value

    return recorded


def commit(call: Call, value: Any) -> None:
    """Keep what a call left; returns when it is on disk."""
    from nbdurable.kernel.interrupts import uninterrupted

    with uninterrupted():
        ready = call.keep(value)
        if ready is not None:
            call.calls.commit(ready)


async def commit_async(call: Call, value: Any) -> None:
    """Keep what a call left, as `commit` does; other tasks go on meanwhile."""
    ready = call.keep(value)
    if ready is not None:
        await call.calls.commit_async(ready)


class _Items:
    """What a generator has given so far; a change that the one who takes them makes to one is seen."""

    def __init__(self, call: Call) -> None:
        self.values: list[Any] = []
        self._call = call
        self._digests: list[str] = []

    def take(self, item: Any) -> Any:
        self.values.append(item)
        self._digests.append(self._digest(item))
        return item

    def spoilt(self) -> str:
        """Say why the items can't be recorded; "" where they can."""
        if [self._digest(item) for item in self.values] != self._digests:
            return "an item was changed while the others were still being made; make a list of it first"
        return ""

    def _digest(self, item: Any) -> str:
        return "" if immutable(item) else partial_fingerprint(item, self._call.calls.session.values)[0]


def _generator(function: Function) -> Callable[..., Any]:
    fn = function.fn

    def recorded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        call = _open(function, args, kwargs)
        if call is None:
            return (yield from fn(*args, **kwargs))
        if call.known is not None:
            values, result = call.value()
            yield from values
            return result
        items, why = _Items(call), ""
        with call.running():
            source = fn(*args, **kwargs)
        sent: Any = None
        try:
            while True:
                try:
                    with call.running(ends=StopIteration):
                        item = source.send(sent) if sent is not None else next(source)
                except StopIteration as stop:
                    result = stop.value
                    break
                sent = yield items.take(item)
                why = why if sent is None else "values were sent into it"
        except GeneratorExit:
            source.close()
            call.end(recorded=False)
            raise
        why = why or items.spoilt()
        if why:
            call.refuse(why)
        else:
            commit(call, (items.values, result))
        return result

    return recorded


def _async_generator(function: Function) -> Callable[..., Any]:
    fn = function.fn

    async def recorded(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        call = _open(function, args, kwargs)
        if call is None:
            async for item in fn(*args, **kwargs):
                yield item
            return
        if call.known is not None:
            for item in call.value()[0]:
                yield item
            return
        items = _Items(call)
        with call.running():
            source = fn(*args, **kwargs)
        try:
            while True:
                try:
                    with call.running(ends=StopAsyncIteration):
                        item = await anext(source)
                except StopAsyncIteration:
                    break
                yield items.take(item)
        except GeneratorExit:
            await source.aclose()
            call.end(recorded=False)
            raise
        if why := items.spoilt():
            call.refuse(why)
        else:
            await commit_async(call, (items.values, None))

    return recorded
