"""How a `%%step` cell becomes code that IPython runs by itself.

Owns the transformer of the source, and the marker in its syntax tree. Decides nothing and touches no namespace; the
`%%step` line itself is read by `nbdurable/stepline.py`.

A cell magic that ran its body itself would break top-level `await`, tracebacks and line numbers. Instead the first
line is replaced by a marker call, so that every line of the body keeps its number; the marker is taken out of the
syntax tree before it runs.
"""

from __future__ import annotations

import ast
import json
import linecache
import re
from collections.abc import Collection, Mapping
from typing import Any

from IPython.core.inputtransformer2 import cell_magic

from nbdurable.stepline import StepOptions, find_step_line

MARKER = "__nbdurable_step__"
HOOK = "__nbdurable__"  # the name in the namespace through which rewritten code reaches us


def rewrite_lines(lines: list[str]) -> list[str]:
    """Replace the `%%step` line of a cell by a marker call, as an IPython input transformer.

    Raises StepUsageError where `%%step` stands below other lines.
    """
    first = find_step_line(lines)
    if first is None:
        return lines
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


def unmark(line: str) -> None:
    """Let tracebacks show a cell's `%%step` line instead of the marker: as a comment, since they parse it."""
    for entry in linecache.cache.values():
        if len(entry) > 2:  # else not read yet, so no cell
            shown = entry[2]
            for index, text in enumerate(shown):
                if text.startswith(MARKER):
                    shown[index] = f"# {line}\n"
                if text.strip():
                    break


def call(method: str, *arguments: object) -> ast.stmt:
    """Return the statement `__nbdurable__.method(arguments)`, to stand in a cell instead of its body."""
    words = ", ".join(json.dumps(argument) for argument in arguments)
    return ast.parse(f"{HOOK}.{method}({words})").body[0]


_CONFIGURING = re.compile(
    r"get_ipython\(\)\.run_line_magic\('(matplotlib|load_ext|reload_ext|config|autoreload|env|set_env|cd|pylab|gui|precision)'"
)


_LOOP = f"""
while {HOOK}.trying.unfinished:
    with {HOOK}.trying:
        pass
"""


def in_attempts(pieces: list[tuple[int, list[ast.stmt]]], interactivity: str) -> list[ast.stmt]:
    """Return a step's statements so that they can be tried again: in a loop, and a block that asks us after each try.

    `pieces`: the statements, cut where a later try may begin, each with the number that its first one has in the cell.
    The value of the last expression is displayed below the loop, as IPython would have displayed it; line numbers and
    top-level `await` stay. `interactivity`: IPython's `ast_node_interactivity`.
    """
    every = [node for _, piece in pieces for node in piece]
    if any(isinstance(part, ast.Break | ast.Continue) for node in every for part in ast.walk(node)):
        try:
            compile(ast.Module(every, type_ignores=[]), "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError:  # what a loop can hold and a cell can't: the user is to see IPython's own words
            return every
    futures = [node for node in every if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    awaits = any(_awaits(node) for node in every)
    loop = _parsed(_LOOP.replace("with", "async with") if awaits else _LOOP)
    below: list[ast.stmt] = []
    body: list[ast.stmt] = []
    for start, piece in pieces:
        kept: list[ast.stmt] = []
        for node in piece:
            if isinstance(node, ast.Expr) and interactivity == "all":
                kept.append(_handing(node, "show"))
            elif isinstance(node, ast.Expr) and node is every[-1] and interactivity != "none":
                kept.append(_handing(node, "keep"))
                below.append(ast.copy_location(_parsed(f"{HOOK}.trying.last()"), node))
            elif node not in futures:
                kept.append(node)
        if len(pieces) == 1:
            body = kept
        elif kept:
            due = _parsed(f"if {HOOK}.trying.due({start}):\n    pass")
            due.body = kept
            body.append(due)
    loop.body[0].body[:] = body
    return [*futures, loop, *below]


def _parsed(text: str) -> Any:
    """Return a statement of ours; in tracebacks it stands on the cell's `%%step` line."""
    tree = compile(text.strip(), "<nbdurable>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for part in ast.walk(tree):
        if isinstance(part, ast.stmt | ast.expr | ast.excepthandler):
            part.lineno = part.end_lineno = 1
            part.col_offset = part.end_col_offset = 0
    return tree.body[0]


def _handing(node: ast.Expr, method: str) -> ast.stmt:
    """Return the statement that hands an expression's value to us."""
    handing = _parsed(f"{HOOK}.trying.{method}(None)")
    handing.value.args = [node.value]
    found: ast.stmt = ast.copy_location(handing, node)
    return found


def _awaits(node: ast.AST) -> bool:
    """Tell whether a statement awaits in the cell itself, not in a function that it defines."""
    if isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith) or getattr(node, "is_async", False):
        return True
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return False
    return any(_awaits(child) for child in ast.iter_child_nodes(node))


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


def why_again(options: StepOptions, tree: ast.Module, *, marked: bool, every_cell: bool) -> str | None:
    """Say why a step runs in every attempt and keeps nothing, None for one that is kept."""
    if options.replay:
        return "it is marked --replay: it runs in every attempt"
    if every_cell and not marked and is_setup(tree):
        return "it only imports and configures: it runs in every attempt"
    return None


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


_VERBS = ("approve", "sleep", "sleep_until", "wait_for", "first_of", "all_of")
GATE_CALL = re.compile(rf"\b({'|'.join(_VERBS)})(_async)?\s*\(")
QUESTION_CALL = re.compile(r"\b(input|getpass)\s*\(")
_GATES = {*_VERBS, *(f"{verb}_async" for verb in _VERBS)}


def may_wait(
    node: ast.stmt, values: Mapping[str, Any], helpers: Collection[str], *, asks: bool = False
) -> bool:
    """Tell whether a statement may reach a gate: it calls one, or it mentions one of `helpers`, which do.

    `values`: the namespace, which tells `durable.sleep` from `time.sleep`. A magic's text counts as it reads. `asks`:
    whether `input()` and `getpass()` are gates.
    """
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name) if name in helpers:
                return True
            case ast.Call() if asks and QUESTION_CALL.search(f"{ast.unparse(part.func)}("):
                return True
            case ast.Call(func=ast.Name(id=name)) if name in _GATES:
                if getattr(values.get(name), "__module__", "nbdurable").startswith("nbdurable"):
                    return True
            case ast.Call(func=ast.Attribute(attr=name, value=owner)) if name in _GATES:
                module = values.get(_root(owner) or "")
                if module is None or getattr(module, "__name__", "") == "nbdurable":
                    return True
            case ast.Constant(value=str(text)) if GATE_CALL.search(text) and "run_cell_magic" in ast.unparse(
                node
            ):
                return True
    return False
