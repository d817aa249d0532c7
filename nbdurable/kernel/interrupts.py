"""Interrupts and errors of a cell: held back for a while, shown as one sentence, told as text.

Knows no steps and no runs.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nbdurable.kernel.limits import paused
from nbdurable.models import ErrorInfo


def describe_error(error: BaseException) -> ErrorInfo:
    """Return an exception as text."""
    text = "".join(traceback.format_exception(error))
    return ErrorInfo(name=type(error).__name__, message=str(error)[:2000], traceback=text[-20_000:])


def shown_as(error: BaseException, sentence: str) -> BaseException:
    """Show an interrupt as one sentence, instead of with a traceback through our own code."""
    error._render_traceback_ = lambda: [sentence]  # type: ignore[attr-defined]
    return error


@contextmanager
def uninterrupted(is_sent: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Hold back an interrupt while a checkpoint is committed; it is raised afterwards, unless something else is.

    A time limit stands still meanwhile: nor must it cut a conversation with the coordinator in two.

    A second one ends the saving, as long as the commit was not sent: then it must be known what became of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def hold(number: int, frame: Any) -> None:
        held.append(number)
        if len(held) > 1 and not is_sent():
            raise shown_as(KeyboardInterrupt(), "KeyboardInterrupt: interrupted twice, so nothing was kept")

    signal.signal(signal.SIGINT, hold)
    try:
        with paused():
            yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise shown_as(KeyboardInterrupt(), "KeyboardInterrupt: what the step did until then is kept")
