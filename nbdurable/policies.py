"""Rules about time and about trying again that people type, pure.

Owns how durations read, how they and ages are written for people, and what follows when something failed: `Retry`.
No clock and no randomness: both are handed in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from nbdurable.errors import Abort, Conflict, RetryAfter, TimedOut, UsageError, WaitTimeout
from nbdurable.models import Shape

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*")


def seconds(duration: str | float | timedelta) -> float:
    """Return a duration in seconds: a number of seconds, a timedelta, or text such as `500ms`, `30s`, `1h 30m`, `3d`.

    Raises UsageError for anything else, and for durations below zero.
    """
    if isinstance(duration, timedelta):
        total = duration.total_seconds()
    elif isinstance(duration, int | float) and not isinstance(duration, bool):
        total = float(duration)
    else:
        text = str(duration)
        parts = list(_DURATION.finditer(text))
        if not parts or "".join(part.group() for part in parts) != text:
            raise UsageError(
                f"{duration!r} is no duration", todo="write it as 500ms, 30s, 10m, 2h, 3d or 1h 30m"
            )
        total = sum(float(part[1]) * _UNITS_S[part[2]] for part in parts)
    if not 0 <= total < float("inf"):
        raise UsageError(f"a duration can't be {duration!r}", todo="it must be finite and not below zero")
    return total


def span(seconds_: float) -> str:
    """Write a duration for people: `0.2 s`, `8.4 s`, `12 min`, `3 h`, `5 days`."""
    if seconds_ < 60:
        return f"{seconds_:.1f} s"
    for unit, size, limit in (("min", 60, 3600), ("h", 3600, 172_800)):
        if seconds_ < limit:
            return f"{seconds_ / size:.0f} {unit}"
    return f"{seconds_ / 86400:.0f} days"


def size(bytes_: int) -> str:
    """Write a number of bytes for people, in powers of 1000: `420 B`, `42 kB`, `1.3 GB`."""
    if bytes_ < 1000:
        return f"{bytes_} B"
    value = float(bytes_)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


# Trying again ------------------------------------------------------------------------------------------------

MAX_RETRIES = 1000
MAX_WAIT_S = 60.0
_MAX_ASKED_S = 86_400.0  # a server that asks for more than a day is not believed
_CAUSES = 5  # links of a chain of errors in which a server's answer is looked for

# Wrong words, what forbids itself, and a wait that is over: the next try would find the same.
_USELESS = (SyntaxError, UsageError, Conflict, WaitTimeout)

RetryOn = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], object]


@dataclass(frozen=True)
class Next:
    """What follows when an attempt failed: another one after `wait_s`, or none (None). `reason`: why."""

    wait_s: float | None
    reason: str


class Retry(Shape):
    """How often something that failed is tried again, how long is waited before, and what follows at last.

    `retries`: further attempts after the first. `on_exhausted`: what becomes of a headless run when they are spent.
    """

    retries: int = 0
    backoff: float = 2.0
    min_wait_s: float = 1.0
    max_wait_s: float = MAX_WAIT_S
    on_exhausted: Literal["fail", "pause"] = "fail"

    @classmethod
    def of(
        cls,
        retries: int = 0,
        *,
        backoff: float = 2.0,
        min_wait: str | float | timedelta = 1.0,
        max_wait: str | float | timedelta | None = None,
        on_exhausted: str = "fail",
    ) -> Retry:
        """Return a policy from what people write; raises UsageError, naming it, for what makes no sense.

        `max_wait` is a minute where nothing is said, or `min_wait` where that is longer.
        """
        if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= MAX_RETRIES:
            raise UsageError(
                f"retries can't be {retries!r}", todo=f"give a whole number from 0 to {MAX_RETRIES}"
            )
        if isinstance(backoff, bool) or not isinstance(backoff, int | float) or not 1 <= backoff <= 1000:
            raise UsageError(
                f"backoff can't be {backoff!r}",
                todo="give the factor of each wait to the one before: 1 to 1000",
            )
        shortest = seconds(min_wait)
        longest = max(MAX_WAIT_S, shortest) if max_wait is None else seconds(max_wait)
        if longest < shortest:
            raise UsageError(
                f"the longest wait ({longest:g} s) is shorter than the shortest ({shortest:g} s)",
                todo="raise max_wait or lower min_wait",
            )
        if on_exhausted not in ("fail", "pause"):
            raise UsageError(f"on_exhausted can't be {on_exhausted!r}", todo="say fail or pause")
        return cls(
            retries=retries,
            backoff=backoff,
            min_wait_s=shortest,
            max_wait_s=longest,
            on_exhausted="pause" if on_exhausted == "pause" else "fail",
        )

    @property
    def attempts(self) -> int:
        return self.retries + 1

    def wait_s(self, failed: int, draw: float) -> float:
        """Return how long to wait after the `failed`-th failure (from 1).

        Between the shortest and the longest wait, doubling with `backoff` 2: 1 to 2 s, 2 to 4 s, … 30 to 60 s. `draw`,
        from 0 to 1, chooses within, so that many that failed together do not come back together.
        """
        try:
            grown = self.min_wait_s * self.backoff ** (failed - 1)
        except OverflowError:
            grown = math.inf if self.min_wait_s else 0.0
        top = min(self.max_wait_s, 2 * grown)
        bottom = max(self.min_wait_s, top / 2)
        return bottom + draw * (top - bottom)

    def next(
        self,
        error: BaseException,
        failed: int,
        *,
        draw: float,
        now: float,
        retry_on: RetryOn | None = None,
    ) -> Next:
        """Say what follows the `failed`-th failure (from 1). What the error itself asks for outweighs the backoff.

        `retry_on`: classes of errors, or a function of one; None: any but those which trying again can't help.
        """
        if refused := _why_not(error, retry_on):
            return Next(None, refused)
        if failed > self.retries:
            said = f"its {self.attempts} attempts are spent" if self.retries else "it is not retried"
            return Next(None, said)
        asked = asked_s(error, now)
        wait = self.wait_s(failed, draw) if asked is None else asked
        who = "" if asked is None else ", as the error asks"
        return Next(wait, f"again in {span(wait)}{who}")


def _why_not(error: BaseException, retry_on: RetryOn | None) -> str:
    """Say why an error is never retried under a policy; "" where it is."""
    if any(isinstance(one, Abort) for one in _parts(error)):
        return "Abort: never retried"
    name = type(error).__name__
    if not isinstance(error, Exception | TimedOut):
        return f"{name} is never retried"
    if retry_on is None:
        useless = isinstance(error, _USELESS)
        return f"{name}: trying again can't help" if useless else ""
    if isinstance(retry_on, type | tuple):
        kinds = retry_on if isinstance(retry_on, tuple) else (retry_on,)
        if isinstance(error, kinds) or (isinstance(error, TimedOut) and issubclass(TimeoutError, kinds)):
            return ""
        return f"{name} is not among what is retried"
    try:
        return "" if retry_on(error) else f"{name}: `retry_on` said no"
    except Exception as trouble:
        return f"`retry_on` raised {type(trouble).__name__}: {trouble}"


def is_useless(name: str) -> bool:
    """Tell whether trying again can't help against an error, of which only the name is known."""
    return name in _named(Abort, KeyboardInterrupt, *_USELESS)


def _named(*kinds: type) -> set[str]:
    found = {kind.__name__ for kind in kinds}
    for kind in kinds:
        found |= _named(*kind.__subclasses__())
    return found


def check_retry_on(retry_on: object) -> None:
    """Raise UsageError for what is neither classes of errors nor a function."""
    kinds = retry_on if isinstance(retry_on, tuple) else (retry_on,)
    classes = all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)
    if classes or (callable(retry_on) and not isinstance(retry_on, type)):
        return
    raise UsageError(
        f"retry_on can't be {retry_on!r}",
        todo="give classes of errors, or a function of the error that says whether",
    )


def _parts(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those in it where it is a group."""
    yield error
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _parts(one)


def asked_s(error: BaseException, now: float) -> float | None:
    """Return after how many seconds an error asks to try again, None where it does not say.

    RetryAfter does, and the answer of a server (`Retry-After`, in seconds or as a date) that httpx, requests, openai,
    anthropic and urllib hang on their errors, also where another error was raised from theirs.
    """
    asked = [found for one in _parts(error) if (found := _asked_by(one, now)) is not None]
    return max(asked, default=None)


def _asked_by(error: BaseException, now: float) -> float | None:
    link: BaseException | None = error
    for _ in range(_CAUSES):
        if link is None:
            break
        if isinstance(link, RetryAfter):
            return link.after_s
        headers = getattr(getattr(link, "response", None), "headers", None) or getattr(link, "headers", None)
        if headers is not None and (found := _read_headers(headers, now)) is not None:
            return found
        link = link.__cause__
    return None


def _read_headers(headers: Any, now: float) -> float | None:
    try:
        said = {str(name).lower(): str(value).strip() for name, value in headers.items()}
    except Exception:  # it only looked like an answer's headers
        return None
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = said.get(name, "")
        try:
            asked = float(text) * unit
        except ValueError:
            try:
                date = parsedate_to_datetime(text)
            except ValueError:
                continue
            asked = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
        if not math.isnan(asked):
            return min(max(0.0, asked), _MAX_ASKED_S)
    return None
