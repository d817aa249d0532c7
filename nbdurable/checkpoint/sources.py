"""Digests of source code: of what it says, whatever its layout and comments.

Owns what counts in a syntax tree. The same for every Python version as far as their trees agree. Knows no cells, no
modules and no running code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from blake3 import blake3

_STATEMENTS = 2000  # that an outline holds at most
_SUITES = ("body", "orelse", "finalbody", "handlers", "cases")


def _canonical(node: Any) -> str:
    """Write a syntax tree without positions, leaving out what is empty (as later Pythons do)."""
    if isinstance(node, ast.AST):
        fields = ",".join(
            f"{name}={_canonical(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != [] and name not in ("type_comment", "kind", "type_ignores")
        )
        # a constant None is a field that is None
        return f"{type(node).__name__}({fields})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def code_digest(source: str) -> str:
    """Return the digest of a cell's or a module's code without positions, comments and whitespace.

    Text that is not Python (of another kernel's language) counts line by line.
    """
    try:
        text = _canonical(ast.parse(source))
    except (SyntaxError, ValueError):
        text = "\n".join(line.rstrip() for line in source.strip().splitlines())
    return blake3(text.encode("utf-8", "surrogatepass")).hexdigest(16)


def node_digest(node: ast.AST) -> str:
    """Return the digest of a part of a syntax tree, as `code_digest` of a whole one."""
    return blake3(_canonical(node).encode("utf-8", "surrogatepass")).hexdigest(16)


def outline(text: str) -> str:
    """Return `line:digest` of each statement, in order: enough to find the first one that differs from another's."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    found: list[str] = []
    for node in _statements(tree):
        if len(found) == _STATEMENTS:
            break
        own = [f"{name}={_canonical(value)}" for name, value in ast.iter_fields(node) if name not in _SUITES]
        told = f"{type(node).__name__}({','.join(own)})"
        found.append(f"{node.lineno}:{blake3(told.encode('utf-8', 'surrogatepass')).hexdigest(2)}")
    return " ".join(found)


def _statements(node: Any) -> Iterator[Any]:
    for suite in _SUITES:
        for child in getattr(node, suite, None) or ():
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield child
            if isinstance(child, ast.AST):
                yield from _statements(child)


def parameters_source(values: Mapping[str, Any]) -> str:
    """Return the cell that gives a run its parameters, as papermill writes it."""
    return "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
