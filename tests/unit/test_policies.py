"""How durations read (design §6: `500ms`, `30s`, `10m`, `2h`, `3d` or a timedelta), and what follows a failure."""

import math
import pickle
import urllib.error
from collections.abc import Callable
from datetime import timedelta
from email.message import Message
from email.utils import formatdate
from typing import Any

import httpx
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from nbdurable.errors import Abort, Fenced, RetryAfter, StepUsageError, TimedOut, UsageError
from nbdurable.policies import Retry, RetryOn, asked_s, check_retry_on, seconds, size, span


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500ms", 0.5),
        ("30s", 30),
        ("10m", 600),
        ("2h", 7200),
        ("3d", 259_200),
        ("1h 30m", 5400),
        ("1.5 h", 5400),
        (2, 2),
        (0.25, 0.25),
        (timedelta(minutes=1), 60),
    ],
)
def test_durations_read(text: object, expected: float) -> None:
    assert seconds(text) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "soon", "10", "5 m later", "-3s", -1, float("nan"), float("inf"), True, None]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    """Guarantee 11: the error shows what was said and how it is written."""
    with pytest.raises(UsageError, match="duration"):
        seconds(text)  # type: ignore[arg-type]


def test_figures_for_people() -> None:
    assert [span(s) for s in (0.24, 8.4, 720, 10_000, 500_000)] == [
        "0.2 s",
        "8.4 s",
        "12 min",
        "3 h",
        "6 days",
    ]
    assert [size(b) for b in (420, 4_200, 42_000, 1_300_000_000)] == ["420 B", "4.2 kB", "42 kB", "1.3 GB"]


# Trying again ------------------------------------------------------------------------------------------------

NOW = 1_790_000_000.0

policies = st.builds(
    lambda retries, backoff, shortest, more: Retry.of(
        retries, backoff=backoff, min_wait=shortest, max_wait=shortest + more
    ),
    st.integers(0, 1000),
    st.floats(1, 1000),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
)


@given(policies, st.integers(1, 1000), st.floats(0, 1))
def test_each_wait_stays_within_its_bounds(policy: Retry, failed: int, draw: float) -> None:
    assert policy.min_wait_s <= policy.wait_s(failed, draw) <= policy.max_wait_s


@given(policies, st.integers(1, 999), st.floats(0, 1))
def test_waits_grow_up_to_a_cap(policy: Retry, failed: int, draw: float) -> None:
    """With the same throw of the dice a later wait is no shorter."""
    assert policy.wait_s(failed, draw) <= policy.wait_s(failed + 1, draw)


def test_the_default_waits_double_from_one_second_to_a_minute_with_jitter() -> None:
    found = [(Retry().wait_s(n, 0), Retry().wait_s(n, 1)) for n in range(1, 8)]
    assert found == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (30, 60), (30, 60)]


@given(policies, st.integers(1, 1001))
def test_no_more_attempts_than_asked_for(policy: Retry, failed: int) -> None:
    again = policy.next(ValueError(), failed, draw=0.5, now=NOW).wait_s is not None
    assert again == (failed <= policy.retries)
    assert policy.next(Abort(), failed, draw=0.5, now=NOW).wait_s is None


@pytest.mark.parametrize(
    ("error", "retry_on", "again"),
    [
        (ValueError(), None, True),
        (TimedOut("it", 1), None, True),
        (ExceptionGroup("", [ValueError()]), None, True),
        (ExceptionGroup("", [ValueError(), ExceptionGroup("", [Abort()])]), None, False),
        (KeyboardInterrupt(), None, False),
        (SystemExit(1), None, False),
        (SyntaxError(), None, False),
        (StepUsageError("no"), None, False),
        (Fenced("no"), None, False),
        (ValueError(), KeyError, False),
        (KeyError(), LookupError, True),
        (TimedOut("it", 1), (KeyError, TimeoutError), True),
        (TimedOut("it", 1), KeyError, False),
        (Abort(), Exception, False),
        (KeyboardInterrupt(), BaseException, False),
        (ValueError("busy"), lambda error: "busy" in str(error), True),
        (ValueError("gone"), lambda error: "busy" in str(error), False),
        (ValueError(), lambda error: error.status, False),
    ],
)
def test_what_is_tried_again(error: BaseException, retry_on: RetryOn | None, again: bool) -> None:
    """Guarantee 9: and the reason says why, or why not."""
    found = Retry.of(3).next(error, 1, draw=0.5, now=NOW, retry_on=retry_on)
    assert (found.wait_s is not None) == again
    assert found.reason


def http_error(**headers: str) -> Exception:
    request = httpx.Request("GET", "http://x")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = httpx.Response(429, headers=named, request=request)
    return httpx.HTTPStatusError("busy", request=request, response=answer)


def caused_by(error: Exception) -> Exception:
    try:
        raise ValueError("wrapped") from error
    except ValueError as found:
        return found


def of_urllib() -> Exception:
    headers = Message()
    headers["Retry-After"] = "7"
    return urllib.error.HTTPError("http://x", 503, "busy", headers, None)


def of_requests() -> Exception:
    answer = requests.Response()
    answer.status_code, answer.headers["Retry-After"] = 429, "7"
    try:
        answer.raise_for_status()
    except requests.HTTPError as found:
        return found
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError(), None),
        (RetryAfter("2m"), 120.0),
        (RetryAfter(timedelta(seconds=3), "busy"), 3.0),
        (http_error(), None),
        (http_error(Retry_After="7"), 7.0),
        (http_error(Retry_After="7", Retry_After_Ms="1500"), 1.5),
        (http_error(Retry_After=formatdate(NOW + 30, usegmt=True)), 30.0),
        (http_error(Retry_After=formatdate(NOW - 30, usegmt=True)), 0.0),
        (http_error(Retry_After="99999999"), 86_400.0),
        (http_error(Retry_After="-5"), 0.0),
        (http_error(Retry_After="nan"), None),
        (http_error(Retry_After="soon"), None),
        (caused_by(http_error(Retry_After="7")), 7.0),
        (ExceptionGroup("", [ValueError(), RetryAfter(2), http_error(Retry_After="7")]), 7.0),
        (of_urllib(), 7.0),
        (of_requests(), 7.0),
    ],
)
def test_what_an_error_asks_for(error: BaseException, expected: float | None) -> None:
    """The wait that a server or the user's code asks for outweighs the backoff."""
    assert asked_s(error, NOW) == expected
    found = Retry.of(1).next(error, 1, draw=0.5, now=NOW)
    assert found.wait_s == (1.5 if expected is None else expected)


@pytest.mark.parametrize("error", [RetryAfter("2m", "busy"), Abort("no"), TimedOut("it", 1.5)])
def test_what_steers_retries_can_be_pickled(error: BaseException) -> None:
    """It may come out of another process."""
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Retry.of(-1), "retries can't be -1"),
        (lambda: Retry.of(1001), "retries can't be 1001"),
        (lambda: Retry.of(True), "retries can't be True"),
        (lambda: Retry.of(1, backoff=0.5), "backoff"),
        (lambda: Retry.of(1, backoff=math.nan), "backoff"),
        (lambda: Retry.of(1, min_wait="5 minutes"), "no duration"),
        (lambda: Retry.of(1, min_wait="2m", max_wait="1m"), "shorter than the shortest"),
        (lambda: Retry.of(1, on_exhausted="explode"), "on_exhausted"),
        (lambda: RetryAfter("soon"), "no duration"),
        (lambda: check_retry_on(3), "retry_on"),
        (lambda: check_retry_on((KeyError, "busy")), "retry_on"),
    ],
)
def test_a_policy_that_is_nonsense_is_refused(make: Callable[[], Any], said: str) -> None:
    """Guarantee 11: at the earliest moment, and by name."""
    with pytest.raises(UsageError, match=said):
        make()
