"""What the commands print: lines and tables for people, JSON for scripts.

Owns how lines, moments and variables look, and that JSON mode leaves stdout to JSON alone. Text of notebooks
and models reaches a terminal only through `plain`, so that it can't steer it. Knows no command.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nbdurable.models import Variable
from nbdurable.policies import size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Part = str | tuple[str, str]  # text, or text with a rich style
Line = tuple[Part, ...]

STYLES = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "timed_out": "red",
    "expired": "yellow",
    "delayed": "dim",
    "waiting": "cyan",
    "paused": "yellow",
    "running": "blue",
    "queued": "dim",
    "pending": "yellow",
    "replay": "dim",
}
LEVELS = {"debug": "dim", "info": "blue", "warning": "yellow", "error": "red"}
_KEPT = "\n\t\u200c\u200d"  # joiners carry meaning in several scripts
_WIDE = 10_000  # columns where nobody looks through a window: lines are never cut or folded


class Screen:
    """Where a command prints: people's lines on stdout, or on stderr while stdout holds JSON."""

    def __init__(self, *, json: bool = False) -> None:
        self.json_mode = json

    @cached_property
    def console(self) -> Console:
        """Return the console of people's lines."""
        return _console(stderr=self.json_mode)

    def say(self, *parts: Part) -> None:
        """Print one line for people."""
        self.console.print(_text(parts), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Part]]) -> None:
        """Print rows under a heading."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for position, name in enumerate(columns):
            table.add_column(plain(name), overflow="fold", no_wrap=position == 0)
        for row in rows:
            table.add_row(*(_text((cell,)) for cell in row))
        self.console.print(table)

    def data(self, value: Any) -> None:
        """Print a shape, a list of shapes, or any JSON value on stdout; NaN and infinities become null."""
        from pydantic_core import to_json

        text = to_json(value, indent=2, inf_nan_mode="null", fallback=str, bytes_mode="base64").decode()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def warn(*parts: Part) -> None:
    """Print one line on stderr."""
    _console(stderr=True).print(_text(parts), soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def _text(parts: Sequence[Part]) -> Text:
    from rich.text import Text

    return Text.assemble(
        *((plain(part), "") if isinstance(part, str) else (plain(part[0]), part[1]) for part in parts)
    )


def plain(text: str) -> str:
    """Return a text without control characters, tab and line feed kept."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c in _KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def clock(at: float) -> str:
    """Return a moment as local time: `12:03:10` today, with the date on other days."""
    moment, today = time.localtime(at), time.localtime()
    return time.strftime("%H:%M:%S" if moment[:3] == today[:3] else "%Y-%m-%d %H:%M:%S", moment)


def variable(found: Variable) -> str:
    """Return what a line says of a variable: `results list[10] 42 kB`."""
    if found.state != "saved":
        return f"{found.name} {'deleted' if found.state == 'deleted' else f'not saved: {found.reason}'}"
    kind = (
        found.shape
        if "[" in found.shape
        else " ".join(filter(None, (found.type.rpartition(".")[2], found.shape)))
    )
    return f"{found.name} {kind} {size(found.bytes)}"


def clip(text: str, width: int = 60) -> str:
    """Return a text on one line, cut to a width."""
    line = " ".join(plain(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"
