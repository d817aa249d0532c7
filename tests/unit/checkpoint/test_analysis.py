# ruff: noqa: E501 -- one case a line reads as a table
"""What a cell reads and writes, and what it stands on."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from nbdurable.checkpoint.analysis import (
    CellNames,
    Uses,
    analyse,
    helpers_in_source,
    uses,
)
from nbdurable.checkpoint.reasons import helper_cause
from nbdurable.checkpoint.sources import code_digest
from tests.tools.cells import Cells


def names(source: str) -> CellNames:
    return analyse(ast.parse(source), source)


# cell: (loads, stores, deletes)
CELLS: dict[str, tuple[str, str, str]] = {
    "x = 1": ("", "x", ""),
    "x = y": ("y", "x", ""),
    "x = 1\ny = x": ("", "x y", ""),
    "y = x\nx = 1": ("x", "x y", ""),
    "x += 1": ("x", "x", ""),
    "x: int = y": ("int y", "x", ""),
    "x: int": ("int", "", ""),
    "x.a = 1; y[0] = z": ("x y z", "", ""),
    "(a, [b, *c]), d.e = v": ("v d", "a b c", ""),
    "del x": ("x", "", "x"),
    "x = 1\ndel x": ("", "x", "x"),
    "del x\nx = 1": ("x", "x", ""),
    "del x[0]": ("x", "", ""),
    "import a.b.c, d as e": ("", "a e", ""),
    "from a import b as c, d": ("", "c d", ""),
    "for i in r:\n    s = i\nt = s": ("r s", "i s t", ""),
    "for i in r: pass\nelse: j = i": ("r i", "i j", ""),
    "while (n := f()): g(n)": ("f g", "n", ""),
    "if p: x = 1\nelse: x = 2\ny = x": ("p x", "x y", ""),
    "with o(p) as (f, g): h = f": ("o p", "f g h", ""),
    "try: x = 1\nexcept E as e: y = e\nfinally: z = 1": ("E", "x e y z", ""),
    "match s:\n    case {'k': v, **rest} if v: pass\n    case [C(a=b), *t]: pass\n    case q: pass": ("s C", "v rest b t q", ""),
    "[i * k for i in r if i in m]": ("k r m", "", ""),
    "[(w := i) for i in r]": ("r", "w", ""),
    "{a: b for a, b in c for d in a}": ("c", "", ""),
    "lambda a, b=c: a + d": ("c d", "", ""),
    "def f(a, *b, c=d, **e) -> g:\n    h = a\n    return h + i + f": ("d g i", "f", ""),
    "@dec\ndef f(): pass": ("dec", "f", ""),
    "def f():\n    global g\n    g = h": ("h", "f g", ""),
    "def f():\n    global g\n    g += 1": ("g", "f g", ""),
    "def f():\n    n = 0\n    def i():\n        nonlocal n\n        n += k\n    return i": ("k", "f", ""),
    "def f():\n    def g():\n        return x\n    x = 1": ("", "f", ""),
    "class C(B, metaclass=M):\n    x = 1\n    y = x + z\n    def m(self):\n        return x": ("B M z x", "C", ""),
    "async def f():\n    async for i in a: pass\n    async with b as c: pass": ("a b", "f", ""),
    "await f(x)": ("f x", "", ""),
    "f'{x!r:>{w}}'": ("x w", "", ""),
    "x = x if (y := 1) else y": ("x", "x y", ""),
    "get_ipython().run_cell_magic('time', '', 'a = b\\n!ls\\n%time c = d\\n')": ("get_ipython b d", "a c", ""),
    "get_ipython().run_line_magic('time', 'a = b')": ("get_ipython b", "a", ""),
    "get_ipython().run_cell_magic('bash', '', 'a = b')": ("get_ipython", "", ""),
}  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
def test_names_of_a_cell(cell: str) -> None:
    """Guarantee 2, 9: what it may read from the namespace are its inputs; what it binds must be saved."""
    loads, stores, deletes = CELLS[cell]
    found = names(cell)
    assert (set(loads.split()), set(stores.split()), set(deletes.split())) == (
        found.loads,
        found.stores,
        found.deletes,
    )


def test_imports_are_named() -> None:
    """Project modules that a cell imports are found before it has run."""
    assert names("import a.b, c as d\nfrom e.f import g").imports == {"a.b", "c", "e.f", "e.f.g"}


def test_layout_is_no_code() -> None:
    """Guarantee 1: a comment or a blank line does not make a step run again."""
    assert code_digest("x = [1,2]\nf( x )") == code_digest("# note\n\nx = [1, 2]  # why\nf(x)\n")
    sources = [
        "x = 1",
        "x = 1.0",
        "x = '1'",
        "x = True",
        "x = None",
        "x = ...",
        "x = -1",
        "y = 1",
        "x == 1",
        "f(x)",
        "f(*x)",
        "x",
        "",
    ]
    assert len({code_digest(source) for source in sources}) == len(sources)
    assert code_digest("await x\n") == code_digest("await  x")
    assert code_digest("SELECT 1 \n") == code_digest("SELECT 1")


HELPERS = """
factor = 2
table = [1]
def scale(x, by=[1]):
    return x * factor + other(x)
def other(x):
    return x + offset
def timed(fn):
    def wrapper(*a):
        return fn(*a)
    return wrapper
@timed
def clean(x):
    return len(table)
class Base:
    limit = 3
    def go(self):
        return scale(self.limit)
class Tool(Base):
    def run(self):
        return clean(1)
tool = Tool()
tools = {"clean": clean}
double = lambda x: 2 * x
offset = 5
unused = 0
from json import dumps
from dataclasses import dataclass
@dataclass
class Point:
    x: int = 0
"""


def test_helpers_are_followed_to_what_they_read(tmp_path: Path) -> None:
    """Guarantee 1: a step runs again when anything of the notebook that it stands on changes, and only then."""
    cells = Cells(tmp_path, HELPERS)
    found = uses(["tool", "dumps", "print", "Point"], cells.namespace, tmp_path)
    assert set(found.inputs) == {"tool", "factor", "offset", "table"}
    assert set(found.helpers) == {"Tool", "Base", "scale", "other", "timed.wrapper", "clean", "Point"}
    assert found.modules == {}
    assert uses(["tools"], cells.namespace, tmp_path).inputs.keys() == {"tools", "table"}
    assert set(uses(["double"], cells.namespace, tmp_path).helpers) == {"double"}


def test_helpers_are_found_without_a_kernel(tmp_path: Path) -> None:
    """Guarantee 9: a plan can be printed before anything runs, and says what running would."""
    live = uses(["tool", "Point", "double"], Cells(tmp_path, HELPERS).namespace, tmp_path).helpers
    static = helpers_in_source([("cell 1", "x = 1"), ("cell 2", HELPERS)], live)
    assert {name: fact.ast for name, fact in live.items()} == {
        name: fact.ast for name, fact in static.items()
    }
    assert {fact.label for fact in static.values()} == {"cell 2"}
    assert static["clean"].source.startswith("@timed\ndef clean")


@pytest.mark.parametrize(
    ("old", "new", "helper", "sentence"),
    [
        ("return x + offset", "return x - offset", "other", "helper `other` changed, line 7"),
        ("limit = 3", "limit = 4", "Base", "class attribute `Base.limit` changed, line 16"),
        ("return scale(self", "return -scale(self", "Base", "method `Base.go` changed, line 18"),
        ("return fn(*a)", "return fn(*a) or 1", "timed.wrapper", "helper `timed.wrapper` changed, line 10"),
        ("by=[1]", "by=[2]", "scale", "a default of helper `scale` changed, line 4"),
        ("return len(table)", "return len(table) + 1", "clean", "helper `clean` changed, line 14"),
        ("def clean(x)", "def clean(x: int)", "clean", "the signature of helper `clean` changed, line 13"),
        (
            "(x):\n    return len",
            '(x):\n    "c"\n    return len',
            "clean",
            "the docstring of helper `clean` changed, line 14",
        ),
        ("class Tool(Base)", "class Tool(Base, dict)", "Tool", "the bases of class `Tool` changed, line 19"),
        (
            "    def run(self)",
            "    @property\n    def run(self)",
            "Tool",
            "a decorator of method `Tool.run` changed, line 20",
        ),
        ("def run(", "def walk(", "Tool", "method `Tool.walk` changed, line 20"),
    ],
)
def test_a_changed_helper_is_named(old: str, new: str, helper: str, sentence: str, tmp_path: Path) -> None:
    """Guarantee 9: which helper, which part of it, and where."""
    before = uses(["tool"], Cells(tmp_path, HELPERS).namespace, tmp_path).helpers
    after = uses(["tool"], Cells(tmp_path, HELPERS.replace(old, new)).namespace, tmp_path).helpers
    changed = {
        name
        for name in before
        if (before[name].ast, before[name].state) != (after[name].ast, after[name].state)
    }
    assert changed == {helper}
    assert helper_cause(helper, before[helper], after[helper]).sentence == sentence


def test_a_helper_whose_closure_holds_another_value_is_named(tmp_path: Path) -> None:
    """Guarantee 9."""
    source = "def make(n):\n    def f():\n        return n\n    return f\nf = make({})"
    before = uses(["f"], Cells(tmp_path, source.format(1)).namespace, tmp_path).helpers["make.f"]
    after = uses(["f"], Cells(tmp_path, source.format(2)).namespace, tmp_path).helpers["make.f"]
    assert before.ast == after.ast
    assert helper_cause("make.f", before, after).sentence.startswith(
        "closure variable `n` of helper `make.f` is another one"
    )


def test_explains_the_line(tmp_path: Path) -> None:
    """Guarantee 9: as the design shows it."""
    sources = [
        "def clean(x):\n    # drop\n    y = x\n    return y",
        "def clean(x):\n    # keep\n    y = x\n    return y or 1",
    ]
    facts = [helpers_in_source([("", source)], ["clean"])["clean"] for source in sources]
    assert helper_cause("clean", *facts).sentence == "helper `clean` changed, line 4"


def test_modules_of_the_project_count_by_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 1: an edited project module is edited code; installed packages are not looked into."""
    project = tmp_path / "project"
    (project / "pkg_of_project").mkdir(parents=True)
    (project / "pkg_of_project" / "__init__.py").write_text("")
    (project / "pkg_of_project" / "deep.py").write_text("def g():\n    return 1\n")
    (project / "tools_of_project.py").write_text(
        "import json\nfrom pkg_of_project.deep import g\ndef f():\n    return g()\nclass K: pass\n"
    )
    installed = project / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "package_of_others.py").write_text("def h(): pass\n")
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.syspath_prepend(str(installed))
    before = set(sys.modules)
    try:
        cells = Cells(
            project,
            "import tools_of_project, package_of_others, json\nfrom tools_of_project import f, K\nk = K()",
        )

        def found(*wanted: str) -> Uses:
            return uses(wanted, cells.namespace, project)

        for name in ("tools_of_project", "f", "K", "k"):
            assert set(found(name).modules) == {
                "tools_of_project",
                "pkg_of_project",
                "pkg_of_project.deep",
            }, name
        assert found("package_of_others", "json").modules == {}
        assert set(found("k").inputs) == {"k"}
        assert found("f", "K").inputs == {}
        first = found("f").modules
        (project / "pkg_of_project" / "deep.py").write_text("def g():\n    return 2\n")
        assert {name for name, digest in found("f").modules.items() if digest != first[name]} == {
            "pkg_of_project.deep"
        }
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
