# ruff: noqa: E501 -- a case a line reads as a table
"""A change of meaning runs a step and is named; anything else restores it: in two real kernels (guarantees 1 and 9).

The second kernel has another hash seed, another working directory, and every cell further down.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel

LOAD = "%load_ext nbdurable"


class Case(NamedTuple):
    """Cells before a step, and the step's body; an edit, and the reason it gives, "" where the step is restored."""

    cells: list[str]
    body: str
    old: str
    new: str
    reason: str


def case(source: str, edit: str, reason: str) -> Case:
    """Read a case: cells apart by `---`, the last one is the step's body; the edit as `old → new`."""
    *cells, body = [cell.strip("\n") for cell in source.split("---\n")]
    old, _, new = edit.partition(" → ")
    assert old in source
    return Case(cells, body, old, new, reason)


FACTOR = "factor = 2\n---\ndef scale(x):\n    # twice\n    return x * factor\n---\ny = scale(1)"
TOOL = (
    "class Base:\n    limit = 3\n    def go(self):\n        return self.limit\n---\n"
    "class Tool(Base):\n    def run(self, by=1):\n        return self.go() + by\n---\ntool = Tool()\n---\ny = tool.run()"
)
CASES: dict[str, Case] = {
    "constant of the step": case("y = 1", "1 → 2", "its code changed, line 4"),
    "constant that it reads": case("LIMIT = 5\n---\ny = LIMIT", "5 → 6", "its input `LIMIT` changed (cell n, line 3)"),
    "constant that a helper reads": case(FACTOR, "factor = 2 → factor = 3", "`factor`, which helper `scale` reads, changed (cell n, line 3)"),
    "body of a helper": case(FACTOR, "return x → return -x", "helper `scale` changed (cell n, line 5)"),
    "default": case("def f(a=1):\n    return a\n---\ny = f()", "a=1 → a=2", "a default of helper `f` changed (cell n, line 3)"),
    "default from a variable": case("n = 1\n---\ndef f(a=n):\n    return a\n---\ny = f()", "n = 1 → n = 2", "default `a` of helper `f` is another one (cell n, line 3)"),
    "keyword default": case("def f(*, a=1):\n    return a\n---\ny = f()", "a=1 → a=2", "a default of helper `f` changed (cell n, line 3)"),
    "decorator": case(
        "import functools\ndef twice(f):\n    return lambda: 2 * f()\ndef once(f):\n    return f\n---\n"
        "@twice\ndef f():\n    return 1\n---\ny = f()", "@twice → @once", "helper `f` changed (cell n, line 3)"),
    "body of a decorator": case(
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def w():\n        return 2 * f()\n    return w\n---\n"
        "@twice\ndef f():\n    return 1\n---\ny = f()", "2 * f → 3 * f", "helper `twice.w` changed (cell n, line 7)"),
    "argument of a decorator": case(
        "import functools\ndef times(n):\n    def d(f):\n        @functools.wraps(f)\n        def w():\n"
        "            return n * f()\n        return w\n    return d\n---\n"
        "@times(2)\ndef f():\n    return 1\n---\ny = f()", "times(2) → times(3)", "a decorator of helper `f` changed (cell n, line 3)"),
    "decorated function under a decorator": case(
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def w():\n        return 2 * f()\n    return w\n---\n"
        "@twice\ndef f():\n    return 1\n---\ny = f()", "return 1 → return 7", "helper `f` changed (cell n, line 5)"),
    "cached function": case(
        "from functools import lru_cache\n@lru_cache\ndef f():\n    return 1\n---\ny = f()", "return 1 → return 7", "helper `f` changed (cell n, line 6)"),
    "method": case(TOOL, "+ by → - by", "method `Tool.run` changed (cell n, line 5)"),
    "method of a base class": case(TOOL, "return self.limit → return -self.limit", "method `Base.go` changed (cell n, line 6)"),
    "class attribute": case(TOOL, "limit = 3 → limit = 4", "class attribute `Base.limit` changed (cell n, line 4)"),
    "default of a method": case(TOOL, "by=1 → by=2", "a default of method `Tool.run` changed (cell n, line 4)"),
    "bases of a class": case(TOOL, "class Tool(Base) → class Tool(Base, dict)", "the bases of class `Tool` changed (cell n, line 3)"),
    "class attribute from a variable": case(
        "n = 3\n---\nclass K:\n    limit = n\n---\ny = K.limit", "n = 3 → n = 4", "attribute `limit` of class `K` is another one (cell n, line 3)"),
    "class used in a helper": case(
        "class K:\n    def m(self):\n        return 1\n---\ndef make():\n    return K()\n---\ny = make().m()",
        "return 1 → return 2", "method `K.m` changed (cell n, line 5)"),
    "property": case(
        "class K:\n    @property\n    def p(self):\n        return 1\n---\ny = K().p", "return 1 → return 2", "method `K.p` changed (cell n, line 6)"),
    "static method": case(
        "class K:\n    @staticmethod\n    def p():\n        return 1\n---\ny = K.p()", "return 1 → return 2", "method `K.p` changed (cell n, line 6)"),
    "class method": case(
        "class K:\n    @classmethod\n    def p(cls):\n        return 1\n---\ny = K.p()", "return 1 → return 2", "method `K.p` changed (cell n, line 6)"),
    "helper that a method calls": case(
        "def h():\n    return 1\n---\nclass K:\n    def m(self):\n        return h()\n---\nk = K()\n---\ny = k.m()",
        "return 1 → return 2", "helper `h` changed (cell n, line 4)"),
    "constant that a method reads": case(
        "c = 1\n---\nclass K:\n    def m(self):\n        return c\n---\nk = K()\n---\ny = k.m()", "c = 1 → c = 2", "`c`, which helper `K` reads, changed (cell n, line 3)"),
    "metaclass": case(
        "class M(type):\n    def go(cls):\n        return 1\n---\nclass K(metaclass=M):\n    pass\n---\ny = K.go()",
        "return 1 → return 2", "method `M.go` changed (cell n, line 5)"),
    "dataclass default": case(
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\n---\ny = P().x", "int = 1 → int = 2", "class attribute `P.x` changed (cell n, line 6)"),
    "dataclass default factory": case(
        "from dataclasses import dataclass, field\ndef make():\n    return [1]\n@dataclass\nclass P:\n"
        "    x: list = field(default_factory=make)\n---\ny = P().x", "return [1] → return [2]", "helper `make` changed (cell n, line 5)"),
    "dataclass default from a variable": case(
        "n = 1\n---\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = n\n---\ny = P().x",
        "n = 1 → n = 2", "attribute `x` of class `P` is another one (cell n, line 4)"),
    "enum": case("from enum import Enum\nclass E(Enum):\n    A = 1\n---\ny = E.A.value", "A = 1 → A = 2", "class attribute `E.A` changed (cell n, line 5)"),
    "member of an enum that is an input": case(
        "from enum import Enum\nclass E(Enum):\n    A = 1\n---\ne = E.A\n---\ny = e.value", "A = 1 → A = 2", "class attribute `E.A` changed (cell n, line 5)"),
    "named tuple": case(
        "from typing import NamedTuple\nclass T(NamedTuple):\n    a: int = 1\n---\ny = T().a", "int = 1 → int = 2", "class attribute `T.a` changed (cell n, line 5)"),
    "closure": case(
        "def make(n):\n    def f():\n        return n\n    return f\n---\nf = make(1)\n---\ny = f()", "make(1) → make(2)", "closure variable `n` of helper `make.f` is another one (cell n, line 4)"),
    "body of a closure": case(
        "def make(n):\n    def f():\n        return n\n    return f\n---\nf = make(1)\n---\ny = f()",
        "return n\n → return -n\n", "helper `make.f` changed (cell n, line 5)"),
    "function in a closure": case(
        "def h():\n    return 1\ndef make(g):\n    def f():\n        return g()\n    return f\n---\nf = make(h)\n---\ny = f()",
        "return 1 → return 2", "helper `h` changed (cell n, line 4)"),
    "partial": case(
        "from functools import partial\ndef g(a):\n    return a + 1\n---\nf = partial(g, 1)\n---\ny = f()",
        "a + 1 → a + 2", "helper `g` changed (cell n, line 5)"),
    "argument of a partial": case(
        "from functools import partial\ndef g(a):\n    return a\n---\nf = partial(g, 1)\n---\ny = f()",
        "partial(g, 1) → partial(g, 2)", "its input `f` changed (cell n, line 3)"),
    "dispatch dict": case(
        "def on_x():\n    return 1\n---\nHANDLERS = {'x': on_x}\n---\ny = HANDLERS['x']()", "return 1 → return 2", "helper `on_x` changed (cell n, line 4)"),
    "deep dispatch dict": case(
        "def on_x():\n    return 1\n---\nHANDLERS = {'a': {'b': [({'x': on_x},)]}}\n---\ny = HANDLERS['a']['b'][0][0]['x']()",
        "return 1 → return 2", "helper `on_x` changed (cell n, line 4)"),
    "wide dispatch dict": case(
        "def on_x():\n    return 1\n---\nHANDLERS = {i: None for i in range(500)} | {'x': on_x}\n---\ny = HANDLERS['x']()",
        "return 1 → return 2", "helper `on_x` changed (cell n, line 4)"),
    "lambda": case("f = lambda: 1\n---\ny = f()", "lambda: 1 → lambda: 2", "helper `f` changed (cell n, line 3)"),
    "lambda in a dict": case("fs = {'a': lambda: 1}\n---\ny = fs['a']()", "lambda: 1 → lambda: 2", "helper `fs` changed"),
    "second lambda of a line": case(
        "f, g = lambda: 1, lambda: 2\n---\ny = g()", "lambda: 2 → lambda: 3", "helper `g` changed"),
    "function in an attribute of an instance": case(
        "def on_x():\n    return 1\n---\nclass K:\n    pass\n---\nk = K()\nk.handler = on_x\n---\ny = k.handler()",
        "return 1 → return 2", "helper `on_x` changed (cell n, line 4)"),
    "method through an alias": case(
        "class K:\n    def m(self):\n        return 1\n---\ngo = K().m\n---\ny = go()", "return 1 → return 2", "method `K.m` changed (cell n, line 5)"),
    "monkeypatched method": case(
        "class P:\n    def go(self):\n        return 1\n---\ndef other(self):\n    return 2\nP.go = other\n---\ny = P().go()",
        "return 2 → return 3", "helper `other` changed (cell n, line 4)"),
    "monkeypatched lambda": case(
        "class K:\n    def m(self):\n        return 1\n---\nK.m = lambda self: 2\n---\ny = K().m()",
        "lambda self: 2 → lambda self: 3", "helper `<lambda>` changed"),
    "method that a monkeypatch replaces": case(
        "class K:\n    def m(self):\n        return 1\n    def n(self):\n        return 1\n---\nk = K()\nK.m = K.n\n---\ny = k.m()",
        "K.m = K.n → pass", "method `m` of class `K` is another one (cell n, line 3)"),
    "class attribute that is set later": case(
        "class K:\n    a = 1\n---\nK.a = 2\n---\ny = K.a", "K.a = 2 → K.a = 3", "attribute `a` of class `K` is another one (cell n, line 3)"),
    "attribute of a function": case(
        "def f():\n    return f.n\nf.n = 1\n---\ny = f()", "f.n = 1 → f.n = 2", "attribute `n` of helper `f` is another one (cell n, line 3)"),
    "inheritance of a library's class": case(
        "class K(dict):\n    def m(self):\n        return 1\n---\nk = K()\n---\ny = k.m()", "return 1 → return 2", "method `K.m` changed (cell n, line 5)"),
    "callable instance": case(
        "class K:\n    def __call__(self):\n        return 1\n---\nk = K()\n---\ny = k()", "return 1 → return 2", "method `K.__call__` changed (cell n, line 5)"),
    "special method": case(
        "class K:\n    def __add__(self, other):\n        return 1\n---\nk = K()\n---\ny = k + 1", "return 1 → return 2", "method `K.__add__` changed (cell n, line 5)"),
    "property made by a call": case(
        "def get(self):\n    return 1\nclass K:\n    p = property(get)\n---\ny = K().p", "return 1 → return 2", "helper `get` changed (cell n, line 4)"),
    "descriptor": case(
        "class D:\n    def __get__(self, o, t=None):\n        return 1\nclass K:\n    d = D()\n---\ny = K().d",
        "return 1 → return 2", "method `D.__get__` changed (cell n, line 5)"),
    "helper of a helper": case(
        "def a():\n    return 1\n---\ndef b():\n    return a()\n---\ndef c():\n    return b()\n---\ny = c()",
        "return 1 → return 2", "helper `a` changed (cell n, line 4)"),
    "async helper": case(
        "async def f():\n    return 1\n---\ny = await f()", "return 1 → return 2", "helper `f` changed (cell n, line 4)"),
    "generator helper": case("def f():\n    yield 1\n---\ny = list(f())", "yield 1 → yield 2", "helper `f` changed (cell n, line 4)"),
    "docstring, which tools and prompts are made of": case(
        'def f():\n    "one"\n    return f.__doc__\n---\ny = f()', "one → two", "the docstring of helper `f` changed (cell n, line 4)"),
    "annotation": case("def f(a: int):\n    return a\n---\ny = f(1)", "a: int → a: str", "the signature of helper `f` changed (cell n, line 3)"),
    "function by name in a string of globals": case(
        "def f():\n    return 1\n---\ny = globals()['f']()", "globals()['f']() → globals()['f']() + 1", "its code changed, line 4"),
    "import of another thing": case("from math import floor as f\n---\ny = f(1.5)", "floor as f → ceil as f", "`f` means math.ceil, and meant math.floor"),
    "import of another thing in a helper": case(
        "from math import floor as f\n---\ndef g():\n    return f(1.5)\n---\ny = g()", "floor as f → ceil as f", "`f` means math.ceil, and meant math.floor"),
    "module under another name": case("import math as m\n---\ny = m.pi", "import math as m → import cmath as m", "`m` means cmath, and meant math"),
    "variable that a plain cell changes in place": case(
        "rows = [1]\n---\nrows.append(2)\n---\ny = len(rows)", "append(2) → append(3)", "its input `rows` changed (cell n, line 3)"),
    "attribute that a plain cell sets": case(
        "class K:\n    pass\n---\nk = K()\n---\nk.n = 1\n---\ny = k.n", "k.n = 1 → k.n = 2", "its input `k` changed (cell n, line 3)"),
    "argument of a decorator of a method": case(
        "import functools\ndef times(n):\n    def d(f):\n        @functools.wraps(f)\n        def w(self):\n"
        "            return n * f(self)\n        return w\n    return d\n---\n"
        "class K:\n    @times(2)\n    def m(self):\n        return 1\n---\ny = K().m()", "times(2) → times(3)",
        "a decorator of method `K.m` changed (cell n, line 4)"),
    "body of a decorator of a method": case(
        "import functools\ndef times(n):\n    def d(f):\n        @functools.wraps(f)\n        def w(self):\n"
        "            return n * f(self)\n        return w\n    return d\n---\n"
        "class K:\n    @times(2)\n    def m(self):\n        return 1\n---\ny = K().m()", "return n * f → return n + f",
        "helper `times.d.w` changed (cell n, line 8)"),
    "function that a package's object holds": case(
        "from sklearn.preprocessing import FunctionTransformer\nfrom sklearn.pipeline import Pipeline\n"
        "def double(x):\n    return 2 * x\npipe = Pipeline([('double', FunctionTransformer(double))])\n---\n"
        "y = pipe.fit_transform([[1]])", "return 2 → return 3", "helper `double` changed (cell n, line 6)"),
    "comment": case(FACTOR, "# twice → # two times", ""),
    "comment above": case(FACTOR, "def scale → # a helper\n\n\ndef scale", ""),
    "whitespace": case(FACTOR, "x * factor → (x  *  factor)", ""),
    "quotes": case("s = 'a'\n---\ny = s", "'a' → \"a\"", ""),
    "layout of a class": case(TOOL, "    limit = 3\n → \n\n    # limit\n    limit = 3  # three\n\n\n", ""),
    "layout of a dispatch dict": case(
        "def on_x():\n    return 1\n---\nHANDLERS = {'x': on_x}\n---\ny = HANDLERS['x']()", "{'x': on_x} → {\n  'x': on_x,\n}", ""),
    "a helper that it does not use": case(
        "def f():\n    return 1\ndef g():\n    return 2\n---\ny = f()", "return 2 → return 3", ""),
    "a set, whose order follows the hash seed": case(
        "s = {'a', 'b', 'c', 'd'}\n---\ny = sorted(s)", "'a', 'b' → 'b', 'a'", ""),
}  # fmt: skip


class Pair:
    """A notebook in two kernels, one after the other."""

    def __init__(self, home: Home, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.path = notebooks.write(folder / "n.ipynb", [])

    def kernel(self, seed: int, cwd: Path | None = None) -> Kernel:
        kernel = Kernel(self.home.root, self.path, cwd or self.folder, env={"PYTHONHASHSEED": str(seed)})
        assert kernel.run(LOAD).status == "ok"
        return kernel


@pytest.fixture(scope="module")
def reasons(started_home: Callable[[], Home], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the second kernel said of each case's step."""
    folder = tmp_path_factory.mktemp("meaning")
    pair = Pair(started_home(), folder)
    first = pair.kernel(1)
    steps = {name: f"step{number}" for number, name in enumerate(CASES)}
    try:
        for name, found in CASES.items():
            for cell in found.cells:
                assert first.run(cell).status == "ok", name
            reply = first.run(f"%%step {steps[name]}\n{found.body}", steps[name])
            assert reply.status == "ok", (name, reply.error)
            first.run("%reset -f")
    finally:
        first.shutdown()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    second = pair.kernel(2, elsewhere)
    said = {}
    try:
        for name, found in CASES.items():
            edited = [f"# moved\n\n{cell}".replace(found.old, found.new) for cell in found.cells]
            body = found.body.replace(found.old, found.new)
            for cell in edited:
                assert second.run(cell).status == "ok", name
            said[name] = second.run(f"%%step {steps[name]}\n# moved\n\n{body}", steps[name]).notes
            second.run("%reset -f")
    finally:
        second.shutdown()
    return said


@pytest.mark.parametrize("name", CASES)
def test_what_changes_the_meaning_runs_the_step(name: str, reasons: dict[str, str]) -> None:
    """Guarantees 1, 9."""
    said, reason = reasons[name], CASES[name].reason
    if not reason:
        assert said.startswith("↺"), said
    else:
        assert said.startswith(("✓", "✗")), said
        assert f"({reason})" in re.sub(r"cell \d+", "cell n", said)
