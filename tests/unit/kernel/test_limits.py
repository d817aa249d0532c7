"""Time limits on code: raised where it stands, within each other, and not while it waits."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from nbdurable.errors import TimedOut
from nbdurable.kernel.limits import Limit, paused

FOREVER = threading.Event()


def pass_time(duration_s: float) -> None:
    """Let time pass, which is what is limited here."""
    FOREVER.wait(duration_s)


def test_a_limit_is_raised_where_the_code_stands_and_leaves_the_timer_as_it_was() -> None:
    """Somebody else's alarm (here pytest's own) goes on afterwards."""
    handler, before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    limit = Limit("it", 0.05)
    limit.start()
    with pytest.raises(TimedOut, match=r"it took longer than 0\.05 s"):
        pass_time(60)
    limit.stop()
    assert limit.expired
    assert signal.getsignal(signal.SIGALRM) is handler
    assert before - 30 < signal.getitimer(signal.ITIMER_REAL)[0] <= before


def test_the_shorter_of_two_limits_is_over_first_and_the_other_one_stands() -> None:
    outer, inner = Limit("outer", 0.3), Limit("inner", 0.05)
    outer.start()
    inner.start()
    with pytest.raises(TimedOut, match="inner"):
        pass_time(60)
    inner.stop()
    assert not outer.expired
    with pytest.raises(TimedOut, match="outer"):
        pass_time(60)
    outer.stop()


def test_waiting_does_not_count() -> None:
    limit = Limit("it", 0.2)
    limit.start()
    with paused():
        pass_time(0.4)
    assert not limit.expired
    began = time.monotonic()
    with pytest.raises(TimedOut):
        pass_time(60)
    limit.stop()
    assert time.monotonic() - began > 0.1


def test_a_task_that_awaits_is_cancelled_and_the_cancelling_is_told_from_others() -> None:
    async def main() -> None:
        limit = Limit("it", 0.05)
        limit.start(awaits=True)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            limit.stop()
            behind = limit.behind(error)
        assert isinstance(behind, TimedOut)
        other = Limit("it", 60)
        other.start(awaits=True)
        other.stop()
        assert other.behind(asyncio.CancelledError()) is None

    asyncio.run(main())
