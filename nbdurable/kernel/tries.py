"""The tries of one call: made again after a failure, each within its time.

Owns how a function that is called gets a `policies.Retry` and a `limits.Limit`; knows nothing of what is recorded.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from nbdurable.errors import TimedOut
from nbdurable.kernel.limits import Limit, paused
from nbdurable.kernel.recorded import Function, note_tries
from nbdurable.policies import Retry, RetryOn

_dice = random.Random()  # the notebook's own generator is not ours to move


@dataclass(frozen=True)
class Policy:
    """What follows when a call fails, and how long a try may take."""

    retry: Retry | None
    retry_on: RetryOn | None
    timeout_s: float | None

    @property
    def is_set(self) -> bool:
        return self.retry is not None or self.timeout_s is not None

    def _wait_s(self, error: BaseException, failed: int) -> float | None:
        """Return how long to wait before the next try; None: there is none."""
        if self.retry is None:
            return None
        following = self.retry.next(
            error, failed, draw=_dice.random(), now=time.time(), retry_on=self.retry_on
        )
        if following.wait_s is not None:
            note_tries(failed + 1, error)
        return following.wait_s

    def applied(self, function: Function) -> Callable[..., Any]:
        """Return a function that is tried again, and ended when its time is over."""
        fn, what = function.fn, f"call `{function.name}`"

        def tried(*args: Any, **kwargs: Any) -> Any:
            failed = 0
            while True:
                with ExitStack() as ending:
                    if self.timeout_s is not None:
                        limit = Limit(what, self.timeout_s)
                        ending.callback(limit.stop)
                        limit.start()
                    try:
                        return fn(*args, **kwargs)
                    except BaseException as error:
                        failed += 1
                        if (wait_s := self._wait_s(error, failed)) is None:
                            raise
                with paused():
                    time.sleep(wait_s)

        return tried

    def applied_async(self, function: Function) -> Callable[..., Awaitable[Any]]:
        """Return a coroutine function that is tried again, and ended when its time is over."""
        fn, what = function.fn, f"call `{function.name}`"

        async def timed(*args: Any, **kwargs: Any) -> Any:
            try:
                async with asyncio.timeout(self.timeout_s) as limit:
                    return await fn(*args, **kwargs)
            except TimeoutError as error:
                if not limit.expired() or self.timeout_s is None:
                    raise
                raise TimedOut(what, self.timeout_s).with_traceback(error.__traceback__) from None

        async def tried(*args: Any, **kwargs: Any) -> Any:
            failed = 0
            while True:
                try:
                    return await timed(*args, **kwargs)
                except BaseException as error:
                    failed += 1
                    if (wait_s := self._wait_s(error, failed)) is None:
                        raise
                await asyncio.sleep(wait_s)

        return tried
