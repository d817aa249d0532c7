"""`input()` and `getpass()` in a headless run: questions that somebody answers, instead of an error.

Owns their way into the kernel. In front of a person they stay as they are. A password is told to the kernel once and
kept in the coordinator's memory only: no row, event, page or log has it, and where the coordinator was restarted since,
it is asked for again. (What a step does with it is the step's: a variable that holds it is checkpointed like any other,
unless `--no-save` leaves it out.)
"""

from __future__ import annotations

from typing import Any

from nbdurable.contract import WaitSpec
from nbdurable.kernel.gates import Gate, Steps, Unopened, drive
from nbdurable.kernel.session import Session
from nbdurable.models import WaitAnswer, WaitKind


def install(session: Session) -> None:
    """Let the kernel of a headless run ask by waits: ipykernel puts these two behind `input` and `getpass`."""
    kernel = getattr(session.shell, "kernel", None)
    if kernel is not None and session.asks:
        kernel.raw_input = _input
        kernel.getpass = _getpass


def uninstall(session: Session) -> None:
    """Give the kernel its own two back."""
    kernel = getattr(session.shell, "kernel", None)
    if kernel is not None:
        for name in ("raw_input", "getpass"):
            vars(kernel).pop(name, None)


def _input(prompt: object = "", /) -> str:
    return drive(_ask(str(prompt), is_secret=False))


def _getpass(prompt: str = "Password: ", stream: Any = None, *, echo_char: str | None = None) -> str:
    return drive(_ask(str(prompt), is_secret=True))


def _ask(prompt: str, *, is_secret: bool) -> Steps[str]:
    title = prompt.strip() or ("Password" if is_secret else "Input?")
    spec = WaitSpec(kind=WaitKind.QUESTION, title=title[:2000], form={"type": "string"}, is_secret=is_secret)
    asked = Unopened(spec, f"question:{is_secret}:{prompt}", _text)
    (wait,) = yield Gate([asked])
    found: str = asked.outcome(wait)
    if not is_secret:
        print(f"{prompt}{found}")  # as a console shows it
    return found


def _text(answer: WaitAnswer) -> str:
    if not answer.approved:  # what `input` raises where there is nothing to read
        raise EOFError(f"{answer.by} refused to answer" + (f": {answer.comment}" if answer.comment else ""))
    return str(answer.value)
