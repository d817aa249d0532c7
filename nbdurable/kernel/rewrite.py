"""How a `%%step` cell becomes code that IPython runs by itself.

Owns the `%%step` line (its options), the transformer of the source, and `Cell`, the syntax tree with and without
its marker. Decides nothing and touches no namespace.

A cell magic that ran its body itself would break top-level `await`, tracebacks and line numbers. Instead the first
line is replaced by a marker call, so that every line of the body keeps its number; the marker is taken out of the
syntax tree before it runs.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

from IPython.core.inputtransformer2 import cell_magic

from nbdurable.errors import StepUsageError

MARKER = "__nbdurable_step__"
HOOK = "__nbdurable__"  # the name in the namespace through which rewritten code reaches us
_MAGIC = re.compile(r"%%step(?![\w.?])")
_NAME = re.compile(r"[^\s`\"'\\/]{1,100}")
USAGE = "%%step NAME [--on-drift keep|rerun|error] [--save a,b] [--no-save c,d] [--force]"


@dataclass(frozen=True)
class StepOptions:
    """What a `%%step` line says."""

    name: str
    on_drift: str | None = None
    save: frozenset[str] = frozenset()  # save these, too, though the cell did not write them
    no_save: frozenset[str] = frozenset()  # leave these out
    force: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StepUsageError(f"`%%step`: {message}", todo=USAGE)


def _names(text: str) -> frozenset[str]:
    names = frozenset(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if not name.isidentifier():
            raise argparse.ArgumentTypeError(f"{name!r} is not a variable's name")
    return names


@cache
def _parser() -> _Parser:
    parser = _Parser(prog="%%step", add_help=False, allow_abbrev=False)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--on-drift", choices=("keep", "rerun", "error"))
    parser.add_argument("--save", type=_names, default=frozenset())
    parser.add_argument("--no-save", type=_names, default=frozenset())
    parser.add_argument("--force", action="store_true")
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
    return StepOptions(name, found.on_drift, found.save, found.no_save, found.force)


def is_step(source: str) -> bool:
    """Tell whether a cell's source starts with `%%step` (blank lines before it do not count)."""
    return bool(_MAGIC.match(source.lstrip()))


def rewrite_lines(lines: list[str]) -> list[str]:
    """Replace the `%%step` line of a cell by a marker call, as an IPython input transformer.

    Raises StepUsageError where `%%step` stands below comments, where it would be a syntax error.
    """
    first = next((i for i, line in enumerate(lines) if _MAGIC.match(line)), None)
    if first is None:
        return lines
    if any(line.strip() and not line.lstrip().startswith("#") for line in lines[:first]):
        return lines  # inside other code, perhaps in a string: not ours
    if any(line.strip() for line in lines[:first]):
        raise StepUsageError(
            f"`%%step` stands on line {first + 1}",
            todo="move it to the cell's first line; comments go below it",
        )
    body = lines[first + 1 :]
    start = next((i for i, line in enumerate(body) if line.strip()), 0)
    body = body[:start] + cell_magic(body[start:])
    return [*lines[:first], f"{MARKER}({lines[first].rstrip()!r})\n", *body]


# Without it a console would take the marker line for a complete cell and run it without its body.
rewrite_lines.has_side_effects = True  # type: ignore[attr-defined]


def take_marker(tree: ast.Module) -> str | None:
    """Take the marker out of a cell's tree, and return the `%%step` line that it stands for."""
    match tree.body:
        case [ast.Expr(ast.Call(ast.Name(id=name), [ast.Constant(value=str(line))])), *_] if name == MARKER:
            del tree.body[0]
            return line
    return None


def call(method: str, *arguments: object) -> ast.stmt:
    """Return the statement `__nbdurable__.method(arguments)`, to stand in a cell instead of its body."""
    words = ", ".join(json.dumps(argument) for argument in arguments)
    return ast.parse(f"{HOOK}.{method}({words})").body[0]


_CONFIGURING = re.compile(
    r"get_ipython\(\)\.run_line_magic\('(matplotlib|load_ext|reload_ext|config|autoreload|env|set_env|cd|pylab|gui|precision)'"
)


def is_setup(tree: ast.Module) -> bool:
    """Tell whether a cell only imports and configures: what a run with `--steps all` does again on resume.

    Imports or configuring magics, and beside them nothing but calls of, and assignments to, imported modules, and
    constants: what such a cell does is state of libraries, which no checkpoint could bring back.
    """
    imported: set[str] = set()
    configures = False
    for node in tree.body:
        match node:
            case ast.Import() | ast.ImportFrom():
                configures = True
                imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            case ast.Expr(ast.Constant()):
                pass
            case ast.Expr(ast.Call() as found) if _CONFIGURING.match(ast.unparse(found)):
                configures = True
            case (
                ast.Expr(ast.Call(func=target))
                | ast.Assign(targets=[(ast.Attribute() | ast.Subscript()) as target])
            ):
                if _root(target) not in imported:
                    return False
            case _:
                return False
    return configures


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
