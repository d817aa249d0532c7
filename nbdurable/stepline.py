"""The `%%step` line: where it stands in a cell, and what its words mean.

Owns the line's grammar, so that a headless run refuses before it begins what a kernel would refuse hours later.
Pure: knows no IPython, no notebook and no run.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from textwrap import dedent
from typing import NoReturn

from nbdurable.errors import StepUsageError, UsageError
from nbdurable.policies import Retry, seconds

_MAGIC = re.compile(r"%%step(?![\w.?])")
_VARIABLE = re.compile(r"env:[^\s=]+")
_NAME = re.compile(r"[^\s`\"'\\/]{1,100}")
_NO_PYTHON = re.compile(
    r"^(\s*)(?:[%!].*|[\w., ]+=\s*[%!].*|.*\?)$", re.MULTILINE
)  # magics and shell commands
_RUNS_PYTHON = re.compile(r"%%(?:time|timeit|capture|prun|debug)\b")
USAGE = (
    "%%step NAME [--on-drift keep|rerun|error] [--save a,b] [--no-save c,d] [--watch FILE|env:NAME,…] [--force] "
    "[--retries N] [--backoff F] [--min-wait T] [--max-wait T] [--retry-on ERROR,…] [--on-exhausted fail|pause] "
    "[--timeout T]"
)
USAGE_REPLAY = "%%step NAME --replay"
_OF_RETRIES = ("--backoff", "--min-wait", "--max-wait", "--retry-on", "--on-exhausted")
_NOT_WITH_REPLAY = ("--on-drift", "--save", "--no-save", "--watch", "--force")


@dataclass(frozen=True)
class StepOptions:
    """What a `%%step` line says."""

    name: str
    on_drift: str | None = None
    save: frozenset[str] = frozenset()  # save these, too, though the cell did not write them
    no_save: frozenset[str] = frozenset()  # leave these out
    force: bool = False
    watch: tuple[str, ...] = ()  # files, globs and `env:NAME` that it stands on as it does on its code
    replay: bool = False  # it runs again in every attempt, and saves no variables
    retry: Retry | None = None
    retry_on: tuple[
        str, ...
    ] = ()  # names of errors, or of one function that decides; none: whatever may pass
    timeout_s: float | None = None  # of each attempt, waits apart


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StepUsageError(f"`%%step`: {message}", todo=USAGE)


def _names(text: str) -> frozenset[str]:
    names = frozenset(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if not name.isidentifier():
            raise argparse.ArgumentTypeError(f"{name!r} is not a variable's name")
    return names


def _watched(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for declared in found:
        if declared.startswith("env:") and not _VARIABLE.fullmatch(declared):
            raise argparse.ArgumentTypeError(f"{declared[4:]!r} is not an environment variable's name")
        if declared.startswith("$"):
            raise argparse.ArgumentTypeError(f"an environment variable is written env:{declared[1:]}")
    return found


def _dotted(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in found:
        if not all(part.isidentifier() for part in name.split(".")):
            raise argparse.ArgumentTypeError(f"{name!r} is not the name of an error")
    return found


def _number(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None

    return read


@cache
def _parser() -> _Parser:
    parser = _Parser(prog="%%step", add_help=False, allow_abbrev=False)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--on-drift", choices=("keep", "rerun", "error"))
    parser.add_argument("--save", type=_names, default=frozenset())
    parser.add_argument("--no-save", type=_names, default=frozenset())
    parser.add_argument("--watch", type=_watched, action="extend", default=[])
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--retries", type=_number(int))
    parser.add_argument("--backoff", type=_number(float))
    parser.add_argument("--min-wait")
    parser.add_argument("--max-wait")
    parser.add_argument("--retry-on", type=_dotted, action="extend")
    parser.add_argument("--on-exhausted", choices=("fail", "pause"))
    parser.add_argument("--timeout")
    return parser


def parse_step_line(line: str) -> StepOptions:
    """Read a `%%step …` line; raises StepUsageError that says what is wrong and how it is written."""
    try:
        words = shlex.split(line.strip().removeprefix("%%step"))
    except ValueError as error:
        raise StepUsageError(f"`%%step`: {error}", todo=USAGE) from None
    parser = _parser()
    found, unknown = parser.parse_known_args(words)
    if unknown:
        known = ", ".join(o for action in parser._actions for o in action.option_strings)
        raise StepUsageError(f"`%%step` has no option {unknown[0]}", todo=f"its options are {known}")
    if len(found.name) != 1:
        said = "a name" if not found.name else f"one name, not {len(found.name)} ({' '.join(found.name)})"
        raise StepUsageError(f"`%%step` needs {said}", todo=USAGE)
    [name] = found.name
    if not _NAME.fullmatch(name):
        raise StepUsageError(
            f"{name!r} can't be a step's name",
            todo="use up to 100 characters without spaces, quotes and slashes",
        )
    options = StepOptions(
        name,
        found.on_drift,
        found.save,
        found.no_save,
        found.force,
        tuple(dict.fromkeys(found.watch)),
        found.replay,
        _retry(name, found),
        tuple(dict.fromkeys(found.retry_on or ())),
        _timeout_s(name, found.timeout),
    )
    if options.replay:
        given = [option for option in _NOT_WITH_REPLAY if getattr(found, option[2:].replace("-", "_"))]
        if given:
            raise StepUsageError(
                f"`%%step {name}`: {given[0]} means nothing with --replay: it runs in every attempt and saves nothing",
                todo=USAGE_REPLAY,
            )
    return options


def _retry(name: str, found: argparse.Namespace) -> Retry | None:
    """Return the policy that the line states, None where it says nothing of retries."""
    said = {option: getattr(found, option[2:].replace("-", "_")) for option in _OF_RETRIES}
    if found.retries is None:
        given = [option for option, value in said.items() if value is not None]
        if given:
            raise StepUsageError(f"`%%step {name}`: {given[0]} means nothing without --retries", todo=USAGE)
        return None
    words = {option[2:].replace("-", "_"): value for option, value in said.items() if option != "--retry-on"}
    try:
        return Retry.of(found.retries, **{word: value for word, value in words.items() if value is not None})
    except UsageError as error:
        raise StepUsageError(f"`%%step {name}`: {error.message}", todo=error.todo) from None


def _timeout_s(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        timeout_s = seconds(text)
    except UsageError as error:
        raise StepUsageError(f"`%%step {name}`: --timeout: {error.message}", todo=error.todo) from None
    if timeout_s == 0:
        raise StepUsageError(
            f"`%%step {name}`: a timeout of 0 would let nothing run",
            todo="leave --timeout out, or give it time",
        )
    return timeout_s


def is_step(source: str) -> bool:
    """Tell whether a cell's source starts with `%%step` (blank lines before it do not count)."""
    return bool(_MAGIC.match(source.lstrip()))


def find_step_line(lines: Sequence[str]) -> int | None:
    """Return the index of a cell's `%%step` line, None where it has none.

    One in a string, or in the text of another magic, is none. Raises StepUsageError where comments or code stand
    above it.
    """
    first = next((i for i, line in enumerate(lines) if _MAGIC.match(line)), None)
    if first is None:
        return None
    above = [line for line in lines[:first] if line.strip()]
    if not above:
        return first
    if above[0].startswith("%%") and not _RUNS_PYTHON.match(above[0]):
        return None
    if not _ends_a_statement(above):
        return None
    raise StepUsageError(
        f"`%%step` stands on line {first + 1}",
        todo="move it to the cell's first line; comments, other magics and code go below it",
    )


def _ends_a_statement(lines: Sequence[str]) -> bool:
    """Tell whether lines of a cell are whole, so that the next one begins a statement of its own."""
    text = "\n".join(line.rstrip("\n") for line in lines)
    try:
        ast.parse(_NO_PYTHON.sub(r"\1pass", text))
    except (SyntaxError, ValueError):
        return False
    return True


def read_step(source: str) -> StepOptions | None:
    """Return what a cell's `%%step` line says, None where it has none; raises StepUsageError for one that can't run."""
    lines = dedent(source).splitlines()
    place = find_step_line(lines)
    if place is None:
        return None
    options = parse_step_line(lines[place])
    if not any(line.strip() and not line.lstrip().startswith("#") for line in lines[place + 1 :]):
        raise StepUsageError(f"step `{options.name}` has no code", todo="write it below the `%%step` line")
    return options
