"""What changed about a step's code, in words and in parts: the first difference, and where it stands now.

Owns sentences about helpers, modules, imports and what is watched; compares facts, and looks at nothing else.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nbdurable.checkpoint.manifest import CodeFacts, HelperFact, InputFact, ModuleFact
from nbdurable.checkpoint.watched import ENVIRONMENT, Watched

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_BORDERS = {tokenize.INDENT: "→", tokenize.DEDENT: "←", tokenize.NEWLINE: "↵"}
_SAID = 3  # packages whose versions are said


@dataclass(frozen=True)
class Cause:
    """What makes a step run: a sentence for people, and its parts for programs."""

    sentence: str
    kind: Literal["code", "helper", "import", "module", "watch", "input", "python"]
    name: str = ""
    cell: str = ""  # "cell 2"
    line: int | None = None  # of that cell, or of the module's file


def place(cell: str, line: int | None) -> str:
    """Write a place: " (cell 2, line 4)", as far as it is known."""
    if cell:
        return f" ({cell}, line {line})" if line else f" ({cell})"
    return f", line {line}" if line else ""


def code_cause(old: CodeFacts, new: CodeFacts) -> Cause | None:
    """Return the first difference in the code that a step stands on, None where there is none."""
    # Digests are of syntax trees, whose shape may change between Python versions; equal text is equal code.
    same_python = old.python == new.python
    if old.digest != new.digest and (same_python or old.source != new.source):
        at = first_difference(old.source, new.source)
        line = None if at is None else at + new.first_line - 1
        return Cause(f"its code changed{place('', line)}", "code", line=line)
    for name in sorted(old.helpers.keys() | new.helpers.keys()):
        was, now = old.helpers.get(name), new.helpers.get(name)
        if was is None or now is None:
            return _coming_or_going(name, was, now)
        if not same_python and was.source and was.source == now.source and was.ast != now.ast:
            continue
        if was.ast != now.ast or _other_values(was, now):
            return helper_cause(name, was, now)
    for name in sorted(old.imports.keys() & new.imports.keys()):
        if old.imports[name] != new.imports[name]:
            meant, means = (facts.imports[name].replace(":", ".") for facts in (old, new))
            said = f"`{name}` means {means}, and meant {meant}"
            return Cause(said, "import", name)
    for name in sorted(old.modules.keys() | new.modules.keys()):
        module = module_cause(name, old.modules.get(name), new.modules.get(name))
        if module is not None:
            return module
    return _watched_cause(old.watched, new.watched)


# Helpers ---------------------------------------------------------------------------------------------------


def _coming_or_going(name: str, was: HelperFact | None, now: HelperFact | None) -> Cause:
    if now is None:
        return Cause(f"helper `{name}` is gone", "helper", name)
    line = now.line or None
    return Cause(f"it now uses helper `{name}`{place(now.label, line)}", "helper", name, now.label, line)


def _other_values(was: HelperFact, now: HelperFact) -> list[str]:
    if was.state is None or now.state is None:
        return []
    names = sorted(was.state.keys() | now.state.keys())
    return [name for name in names if was.state.get(name) != now.state.get(name)]


def helper_cause(name: str, was: HelperFact, now: HelperFact) -> Cause:
    """Say what changed about a helper: "helper `clean` changed (cell 2, line 4)"; `was` and `now` differ."""
    what = f"class `{name}`" if _is_class(now.source) else f"helper `{name}`"
    if was.ast == now.ast:
        values = _other_values(was, now)
        line = now.line or None
        said = f"{values[0]} of {what} is another one{place(now.label, line)}"
        return Cause(said, "helper", name, now.label, line)
    at = first_difference(was.source, now.source)
    line = None if at is None else at + max(now.line, 1) - 1
    said = f"{_part(was.source, now.source, name) or what} changed{place(now.label, line)}"
    return Cause(said, "helper", name, now.label, line)


def first_difference(before: str, after: str) -> int | None:
    """Return the line of `after` at which its code begins to differ; None where only its layout does."""
    old, new = _tokens(before), _tokens(after)
    for (left, _), (right, line) in zip(old, new, strict=False):
        if left != right:
            return line
    if len(old) == len(new):
        return None
    return new[len(old)][1] if len(new) > len(old) else (new[-1][1] if new else 1)


def _tokens(source: str) -> list[tuple[str, int]]:
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in _LAYOUT:
                found.append((_BORDERS.get(token.type, token.string), token.start[0]))
    except (tokenize.TokenError, SyntaxError):  # cut short, or a magic: as far as it goes
        pass
    return found


def _parsed(source: str) -> Any:
    try:
        [node] = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    return node


def _is_class(source: str) -> bool:
    return isinstance(_parsed(source), ast.ClassDef)


def _same(left: Any, right: Any) -> bool:
    return [ast.dump(node) for node in left if node] == [ast.dump(node) for node in right if node]


def _part(before: str, after: str, name: str) -> str:
    """Name the part of a definition that differs; "" where that can't be told."""
    old, new = _parsed(before), _parsed(after)
    if isinstance(old, ast.ClassDef) and isinstance(new, ast.ClassDef):
        return _part_of_class(old, new, name)
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(old, functions) and isinstance(new, functions):
        return _part_of_function(old, new, f"helper `{name}`")
    return ""


def _part_of_function(old: Any, new: Any, what: str) -> str:
    if not _same(old.decorator_list, new.decorator_list):
        return f"a decorator of {what}"
    if not _same(old.args.defaults + old.args.kw_defaults, new.args.defaults + new.args.kw_defaults):
        return f"a default of {what}"
    if not _same([old.args, old.returns], [new.args, new.returns]):
        return f"the signature of {what}"
    if ast.get_docstring(old, clean=False) != ast.get_docstring(new, clean=False):
        return f"the docstring of {what}"
    return what


def _part_of_class(old: ast.ClassDef, new: ast.ClassDef, name: str) -> str:
    what = f"class `{name}`"
    if not _same(old.decorator_list, new.decorator_list):
        return f"a decorator of {what}"
    if not _same(old.bases + old.keywords, new.bases + new.keywords):
        return f"the bases of {what}"
    before, after = dict(_members(old)), dict(_members(new))
    for member in {**after, **before}:
        left, right = before.get(member), after.get(member)
        if left is not None and right is not None and ast.dump(left) == ast.dump(right):
            continue
        inner = f"{name}.{member}"
        if isinstance(left, ast.ClassDef) and isinstance(right, ast.ClassDef):
            return _part_of_class(left, right, inner)
        if isinstance(right or left, ast.FunctionDef | ast.AsyncFunctionDef):
            both = type(left) is type(right)
            return _part_of_function(left, right, f"method `{inner}`") if both else f"method `{inner}`"
        return f"class attribute `{inner}`"
    return what


def _members(node: ast.ClassDef) -> Iterator[tuple[str, ast.stmt]]:
    for child in node.body:
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield child.name, child
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name, child


# Modules ---------------------------------------------------------------------------------------------------


def module_cause(name: str, was: ModuleFact | None, now: ModuleFact | None) -> Cause | None:
    """Say what changed about a module of the project: "module `helpers.py` changed, line 12"; None: nothing."""
    if was is None or now is None:
        said = f"module `{name}` is gone" if now is None else f"it now uses module `{now.file}`"
        return Cause(said, "module", name)
    if was.digest == now.digest:
        return None
    line = _line_of_module(was.outline.split(), now.outline.split())
    return Cause(f"module `{now.file}` changed{place('', line)}", "module", name, line=line)


def _line_of_module(old: list[str], new: list[str]) -> int | None:
    pairs = [[entry.partition(":")[::2] for entry in side] for side in (old, new)]
    for (_, left), (line, right) in zip(*pairs, strict=False):
        if left != right:
            return int(line)
    if len(old) == len(new) or not new:
        return None
    return int(pairs[1][min(len(old), len(new) - 1)][0])


# What is watched -------------------------------------------------------------------------------------------


def _watched_cause(old: Watched, new: Watched) -> Cause | None:
    for declared, now in sorted(new.items()):
        if (was := old.get(declared)) is None:
            return Cause(f"it now watches {declared}", "watch", declared)
        names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        if names:
            is_variable = declared.startswith(ENVIRONMENT)
            words = ("was set", "was unset") if is_variable else ("was added", "was removed")
            word = words[0] if names[0] not in was else words[1] if names[0] not in now else "changed"
            what = names[0].removeprefix(ENVIRONMENT) if is_variable else names[0]
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            kind = "environment variable" if is_variable else "file"
            return Cause(f"watched {kind} {what} {word}{more}", "watch", names[0])
    return None


# Inputs ----------------------------------------------------------------------------------------------------


def input_cause(name: str, old: InputFact, new: InputFact) -> Cause:
    """Say that an input is another one since the source that made it changed."""
    line = new.line or None
    who = f"`{name}`, which helper `{new.via}` reads," if new.via else f"its input `{name}`"
    if new.label == old.label and not new.cell:
        said = f"{who} changed ({new.label})"
    elif new.cell and not old.label.startswith("step "):
        said = f"{who} changed{place(new.cell, line)}"
    else:
        said = f"{who} now comes from {new.label}{place(new.cell, line)}"
    return Cause(said, "input", name, new.cell, line)


# Versions --------------------------------------------------------------------------------------------------


def versions_differ(code: CodeFacts, python: str, installed: Callable[[str], str | None]) -> str:
    """Say with what a checkpoint was made that is another version here: "made with pandas 2.2, this is 3.0"; or ""."""
    pairs: Mapping[str, tuple[str, str | None]] = {
        **({"Python": (code.python, python)} if code.python else {}),
        **{name: (version, installed(name)) for name, version in sorted(code.packages.items())},
    }
    told = [
        f"{name} {was}, {f'this is {now}' if now else 'which is not installed here'}"
        for name, (was, now) in pairs.items()
        if was != now
    ]
    more = [f"{len(told) - _SAID} more"] if len(told) > _SAID else []
    return f"made with {'; '.join([*told[:_SAID], *more])}" if told else ""
