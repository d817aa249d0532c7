"""Generated notebooks: cells of statements that do to variables what people's cells do.

Owns the grammar. A statement only uses names of a kind that fits it, so that nearly all of them run; where one raises,
the notebook ends before its cell. Nothing depends on the order of a set, a hash seed, the clock or an address.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from textwrap import indent

SETUP = """
import collections, copy, dataclasses, enum, functools, operator, random, types
import numpy as np, pandas as pd
random.seed(1)
np.random.seed(1)
"""
NAMES = [f"{letter}{number}" for number in ("", "1", "2") for letter in "abcdefgh"]

Rule = Callable[["Writer"], str]


@dataclass(frozen=True)
class Cell:
    """Statements, and whether they are a step."""

    is_step: bool
    statements: tuple[str, ...]

    @property
    def source(self) -> str:
        return "\n".join(self.statements)


@dataclass(frozen=True)
class Program:
    """A notebook: its cells in order, and which of them are steps."""

    cells: tuple[Cell, ...]

    def __str__(self) -> str:
        titles = (
            f"# {number}: {'step' if cell.is_step else 'plain'}" for number, cell in enumerate(self.cells)
        )
        return "\n\n".join(f"{title}\n{cell.source}" for title, cell in zip(titles, self.cells, strict=True))

    def without(self, cell: int, statement: int) -> Program:
        """Return the notebook without one of its statements."""
        cells = list(self.cells)
        left = tuple(text for number, text in enumerate(cells[cell].statements) if number != statement)
        cells[cell : cell + 1] = [Cell(cells[cell].is_step, left)] if left else []
        return Program(tuple(cells))


class Missing(Exception):
    """A rule needs a name of a kind that there is none of."""


@dataclass
class Writer:
    """Writes statements; `kinds` is what each name holds by now."""

    choose: random.Random
    kinds: dict[str, str] = field(default_factory=dict)
    made: int = 0

    def one(self, *kinds: str) -> str:
        """Return a name that holds one of these kinds; the newest ones are likelier."""
        names = [name for name, kind in self.kinds.items() if kind in kinds]
        if not names:
            raise Missing
        return self.choose.choice(names)

    def new(self, kind: str) -> str:
        """Return a name to bind, of a variable that may be there already."""
        name = self.choose.choice(NAMES)
        self.kinds.pop(name, None)
        self.kinds[name] = kind
        return name

    def fresh(self, kind: str, prefix: str) -> str:
        """Return a name for a function or class; sometimes it is defined a second time."""
        again = [name for name, known in self.kinds.items() if known == kind]
        if again and self.choose.random() < 0.2:
            return self.choose.choice(again)
        self.made += 1
        name = f"{prefix}{self.made}"
        self.kinds[name] = kind
        return name

    def bind(self, kind: str, source: str) -> str:
        """Write an assignment; `source` was made before, so that a name may be bound from itself."""
        return f"{self.new(kind)} = {source}"

    def atom(self) -> str:
        return self.choose.choice(
            ["0", "1", "7", "-3", "2.5", "'x'", "'long text'", "None", "True", "b'by'", "10**30"]
        )

    def number(self) -> int:
        return self.choose.randint(0, 5)

    def any(self) -> str:
        """Return an expression: a name, an atom, or a small container of them."""
        pick = self.choose.random()
        names = [name for name, kind in self.kinds.items() if kind not in ("generator",)]
        if pick < 0.55 and names:
            return self.choose.choice(names)
        if pick < 0.75:
            return self.atom()
        if pick < 0.85:
            return f"[{self.any()}, {self.any()}]"
        if pick < 0.93:
            return f"({self.any()}, {self.atom()})"
        return f"{{'k': {self.any()}}}"


RULES: list[tuple[int, Rule]] = []


def rule(weight: int = 3) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.append((weight, function))
        return function

    return add


def simple(weight: int, *texts: Callable[[Writer], str]) -> None:
    for text in texts:
        RULES.append((weight, text))


MUTABLE = ("list", "dict", "set", "array", "object", "deque", "bytes", "counter")
ANY = (
    *MUTABLE,
    "number",
    "tuple",
    "function",
    "class",
    "closure",
    "method",
    "partial",
    "namespace",
    "frame",
    "series",
)

# Binding and aliasing
simple(
    4,
    lambda w: w.bind("list", f"[{w.any()}, {w.any()}, {w.atom()}]"),
    lambda w: w.bind("dict", f"{{'a': {w.any()}, 'b': {w.any()}}}"),
    lambda w: w.bind("number", str(w.number())),
)
simple(
    2,
    lambda w: w.bind("set", f"{{{w.number()}, {w.number()}, ({w.number()}, 2)}}"),
    lambda w: w.bind("tuple", f"({w.any()}, {w.any()})"),
    lambda w: w.bind("array", f"np.arange({w.number() + 4}) * {w.number()}"),
    lambda w: w.bind("array", "np.zeros((4, 3))"),
    lambda w: w.bind("array", f"np.array([{w.any()}, None], dtype=object)[:1].copy()"),
    lambda w: w.bind("deque", f"collections.deque([{w.any()}], maxlen=5)"),
    lambda w: w.bind("bytes", "bytearray(b'abcdefgh')"),
    lambda w: w.bind("counter", "collections.Counter('abcab')"),
    lambda w: w.bind("dict", "collections.defaultdict(list)"),
    lambda w: w.bind("dict", f"collections.OrderedDict(z={w.any()}, a={w.any()})"),
    lambda w: w.bind("namespace", f"types.SimpleNamespace(x={w.any()}, y={w.any()})"),
    lambda w: w.bind("number", "random.random()"),
    lambda w: w.bind("number", "float(np.random.rand())"),
    lambda w: w.bind("random", "random.Random(3)"),
    lambda w: w.bind("random", "np.random.default_rng(4)"),
    lambda w: w.bind("number", f"{w.one('random')}.random()"),
    lambda w: w.bind("generator", "(i for i in range(5))"),
)


@rule(6)
def alias(w: Writer) -> str:
    name = w.one(*ANY)
    return w.bind(w.kinds[name], name)


@rule(2)
def swap(w: Writer) -> str:
    one, two = w.one(*ANY), w.one(*ANY)
    w.kinds[one], w.kinds[two] = w.kinds[two], w.kinds[one]
    return f"{one}, {two} = {two}, {one}"


@rule(2)
def delete(w: Writer) -> str:
    name = w.one(*ANY, "generator")
    del w.kinds[name]
    return f"del {name}"


@rule(2)
def copies(w: Writer) -> str:
    name = w.one(*MUTABLE)
    return w.bind(w.kinds[name], f"copy.{w.choose.choice(['copy', 'deepcopy'])}({name})")


@rule(2)
def inner(w: Writer) -> str:
    return w.bind(
        "unknown",
        w.choose.choice([f"{w.one('list')}[0]", f"{w.one('dict')}.get('a')", f"{w.one('tuple')}[1]"]),
    )


# Mutating in place
simple(
    4,
    lambda w: f"{w.one('list')}.append({w.any()})",
    lambda w: f"{w.one('dict')}[{w.choose.choice(['1', repr('a'), repr('n'), '(1, 2)'])}] = {w.any()}",
    lambda w: f"{w.one('array')}[{w.choose.choice(['0', '-1', '...', '::2'])}] = {w.number()}",
)
simple(
    2,
    lambda w: f"{w.one('list')}[0] = {w.any()}",
    lambda w: f"{w.one('list')} += [{w.any()}]",
    lambda w: f"{w.one('list')}[:] = {w.one('list')}[1:]",
    lambda w: f"{w.one('list')}.reverse()",
    lambda w: f"{w.one('list')}.insert(0, {w.any()})",
    lambda w: f"{w.one('list')}.pop() if len({w.one('list')}) > 2 else None",
    lambda w: f"{w.one('dict')}.update(u={w.any()})",
    lambda w: f"{w.one('dict')}.setdefault('s', []).append({w.any()})",
    lambda w: f"{w.one('dict')}.pop('a', None)",
    lambda w: f"{w.one('set')}.add({w.number()})",
    lambda w: f"{w.one('set')} |= {{9, 10}}",
    lambda w: f"{w.one('deque')}.appendleft({w.any()})",
    lambda w: f"{w.one('counter')}.update('bc')",
    lambda w: f"{w.one('bytes')}[0:1] = b'Z'",
    lambda w: f"{w.one('array')}.sort(axis=0)",
    lambda w: f"np.add({(n := w.one('array'))}, 1, out={n}, casting='unsafe')",
    lambda w: f"{w.one('namespace')}.x = {w.any()}",
    lambda w: f"{w.one('array')}.flags.writeable = {w.choose.choice(['True', 'False'])}",
    lambda w: f"{w.one('number')} += 1",
    lambda w: f"random.shuffle({w.one('list')})",
    lambda w: "random.seed(5)",
    lambda w: f"next({w.one('generator')}, None)",
    lambda w: f"{(n := w.one('list'))}.append({n})",
    lambda w: f"{(n := w.one('dict'))}['self'] = [{n}]",
    lambda w: f"globals().update({w.choose.choice(NAMES)}=[{w.any()}])",
    lambda w: f"exec('{w.one('list')}.append(1)')",
    lambda w: f"[item.append(0) for item in {w.one('list')} if isinstance(item, list)]",
    lambda w: f"operator.setitem({w.one('dict')}, 'op', {w.any()})",
    lambda w: f"list(map({w.one('list')}.append, (1, 2)))",
)


@rule(3)
def views(w: Writer) -> str:
    array = w.one("array")
    how = w.choose.choice(["{}[1:3]", "{}.T", "{}[::-1]", "{}.reshape(-1)", "{}.view()", "{}[...]"])
    return w.bind("array", how.format(array))


@rule(1)
def memory(w: Writer) -> str:
    return w.bind("unknown", f"memoryview({w.one('bytes')})")


# Frames
simple(
    2,
    lambda w: w.bind("frame", f"pd.DataFrame({{'x': range({w.number() + 2}), 'y': 0.5, 'z': 'text'}})"),
    lambda w: f"{w.one('frame')}[{w.choose.choice(['new', 'x', 'z'])!r}] = {w.number()}",
    lambda w: f"{w.one('frame')}.loc[0, 'x'] = {w.number()}",
    lambda w: f"{w.one('frame')}.insert(0, 'first{w.number()}', {w.number()}, allow_duplicates=True)",
    lambda w: f"{w.one('frame')}.attrs['note'] = {w.atom()}",
    lambda w: w.bind("series", f"{w.one('frame')}.iloc[:, 0]"),
    lambda w: w.bind("frame", f"{w.one('frame')}[['x']]"),
    lambda w: f"{w.one('series')}.iloc[0] = {w.number()}",
    lambda w: w.bind("array", f"{w.one('frame')}.iloc[:, 0].to_numpy(copy=True)"),
    lambda w: f"{w.one('frame')}.sort_values('x', ascending=False, inplace=True)",
)


# Functions
@rule(3)
def function(w: Writer) -> str:
    body = w.choose.choice(
        [
            f"global {(g := w.choose.choice(NAMES))}\n{g} = [{w.any()}]",
            f"{w.one('list')}.append({w.number()})",
            f"return {w.any()}",
            f"memo.append({w.any()})\nreturn memo",
            "SELF.count = getattr(SELF, 'count', 0) + 1\nreturn SELF",
        ]
    )
    name = w.fresh("function", "fn")
    body = body.replace("SELF", name)
    return f"def {name}(memo=[]):\n{indent(body, '    ')}"


@rule(3)
def closure(w: Writer) -> str:
    body = w.choose.choice(
        [
            "count[0] += 1\nreturn count",
            "nonlocal total\ntotal += 1\nreturn total",
            f"count.append({w.any()})",
        ]
    )
    held = w.choose.choice([f"[{w.number()}, {w.any()}]", w.one("list")])
    return f"""def make(count, total=0):
    def go():
{indent(body, " " * 8)}
    def look():
        return count, total
    return go, look
{w.new("closure")}, {w.new("closure")} = make({held})"""


simple(
    3,
    lambda w: f"{w.one('function')}()",
    lambda w: w.bind("unknown", f"{w.one('function')}()"),
    lambda w: f"{w.one('closure')}()",
    lambda w: f"{w.one('method')}()",
)
simple(
    1,
    lambda w: w.bind("partial", f"functools.partial({w.one('list')}.append, {w.any()})"),
    lambda w: w.bind("closure", f"lambda base={w.any()}: base"),
    lambda w: w.bind("closure", f"(lambda held: lambda: held.append(1) or held)({w.one('list')})"),
    lambda w: f"{w.one('partial')}()",
    lambda w: f"{w.one('function')}.note = {w.any()}",
    lambda w: f"{w.one('function')}.__defaults__ = ({w.one('list')},)",
    lambda w: w.bind("closure", f"functools.lru_cache(maxsize=None)({w.one('function')})"),
    lambda w: w.bind("list", f"[{w.one('function')}, {w.one('closure')}]"),
    lambda w: w.bind("dict", f"{{'f': {w.one('function')}, 'g': lambda: {w.one('list')}}}"),
)


# Classes
@rule(3)
def a_class(w: Writer) -> str:
    bases = [name for name, kind in w.kinds.items() if kind == "class"]
    base = w.choose.choice(bases) if bases and w.choose.random() < 0.4 else ""
    shared = w.any()
    name = w.fresh("class", "Cls")
    base = "" if base == name else base
    return f"""class {name}{f"({base})" if base else ""}:
    shared = [{shared if shared != name else 1}]
    made = 0
    def __init__(self, value={w.number()}):
        self.value = value
        self.items = []
        type(self).made += 1
    def add(self, item={w.number()}):
        self.items.append(item)
        self.shared.append(item)
        return self
    @property
    def total(self):
        return len(self.items)
    @classmethod
    def build(cls):
        return cls({w.number()})
    @staticmethod
    def fixed():
        return {w.atom()}"""


@rule(1)
def slotted(w: Writer) -> str:
    name = w.fresh("class", "Slot")
    return f"""@dataclasses.dataclass{w.choose.choice(["", "(slots=True)"])}
class {name}:
    value: object = 1
    items: list = dataclasses.field(default_factory=list)
    def add(self):
        self.items.append(self.value)
    @classmethod
    def build(cls):
        return cls()"""


@rule(1)
def enumeration(w: Writer) -> str:
    name = w.fresh("enum", "Color")
    return (
        f"class {name}(enum.Enum):\n    RED = 1\n    BLUE = {w.number() + 2}\n{w.new('unknown')} = {name}.RED"
    )


simple(
    4,
    lambda w: w.bind("object", f"{w.one('class')}({w.any()})"),
    lambda w: f"{w.one('object')}.add()",
    lambda w: f"{w.one('object')}.value = {w.any()}",
)
simple(
    2,
    lambda w: w.bind("object", f"{w.one('class')}.build()"),
    lambda w: f"{w.one('object')}.items = {w.one('list')}",
    lambda w: w.bind("list", f"{w.one('object')}.items"),
    lambda w: w.bind("method", f"{w.one('object')}.add"),
    lambda w: w.bind("method", f"{w.one('list')}.clear"),
    lambda w: f"{w.one('class')}.extra = {w.any()}",
    lambda w: f"{w.one('class')}.shared = [{w.any()}]",
    lambda w: f"{w.one('class')}.add = lambda self: self.items.append('patched')",
    lambda w: f"{w.one('object')}.__class__ = {w.one('class')}",
    lambda w: f"{w.one('object')}.me = {w.one('object')}",
    lambda w: w.bind("class", f"type('Made', ({w.one('class')},), {{'extra': {w.any()}}})"),
    lambda w: f"setattr({w.one('object')}, 'late', {w.any()})",
    lambda w: f"vars({w.one('object')}).update(more={w.any()})",
    lambda w: w.bind("list", f"[{w.one('class')}(i) for i in range(2)]"),
)


# Blocks
@rule(2)
def block(w: Writer) -> str:
    body = indent(statement(w), "    ")
    shape = w.choose.choice(["for i in range(2):", "if True:", "with memoryview(b''):", "try:"])
    return f"{shape}\n{body}" + ("\nfinally:\n    pass" if shape == "try:" else "")


def statement(w: Writer) -> str:
    """Write one statement."""
    weights = [weight for weight, _ in RULES]
    while True:
        [(_, chosen)] = w.choose.choices(RULES, weights)
        before = dict(w.kinds)
        try:
            return chosen(w)
        except Missing:
            w.kinds = before


def program(choose: random.Random) -> Program:
    """Write a notebook of 3 to 8 cells, of which most are steps."""
    w = Writer(choose)
    cells = []
    for _ in range(choose.randint(3, 8)):
        statements = tuple(statement(w) for _ in range(choose.randint(1, 6)))
        cells.append(Cell(choose.random() < 0.8, statements))
    return Program(tuple(cells))
