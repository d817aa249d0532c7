# ruff: noqa: E501 -- one case a line reads as a table
"""What did the cell write? Cells in which the assignment is not where one looks for it."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest

from nbdurable.checkpoint.unsaved import Unsaved
from tests.tools.cells import Cells

# id: (plain cell, step, names written, names deleted, whether random generators moved)
HARD: dict[str, tuple[str, str, str, str, bool]] = {
    "alias": ("a = [1]; b = a", "b.append(2)", "a b", "", False),
    "alias inside a container": (
        "first = {'n': 1}; items = [first]",
        "items[0]['n'] = 2",
        "first items",
        "",
        False,
    ),
    "an equal part that another variable holds": (
        "a = [1]; b = [1]; c = {'x': a}",
        "c['x'] = b",
        "a b c",
        "",
        False,
    ),
    "an equal part that is a copy": ("a = [1]; c = {'x': a}", "c['x'] = list(a)", "a c", "", False),
    "a view of another array": (
        "import numpy as np\na = np.zeros(4); b = np.zeros(4); c = [a[1:]]",
        "c[0] = b[1:]",
        "a b c",
        "",
        False,
    ),
    "another view of the same array": (
        "import numpy as np\na = np.zeros(4); c = [a[1:]]",
        "c[0] = a[:3]",
        "a c",
        "",
        False,
    ),
    "locking an array": ("import numpy as np\na = np.zeros(4)", "a.flags.writeable = False", "a", "", False),
    "in-place sort": ("n = [3, 1, 2]", "n.sort()", "n", "", False),
    "swap": ("a = [1]; b = [2]", "a, b = b, a", "a b", "", False),
    "deep mutation": (
        "data = {'x': [{'y': 1}]}",
        "for part in data['x']:\n    part['y'] += 1",
        "data part",
        "",
        False,
    ),
    "closure": (
        "def make():\n    n = [0]\n    def inc():\n        n[0] += 1\n    return inc\ninc = make()",
        "inc()",
        "inc",
        "",
        False,
    ),
    "nonlocal": (
        "def make():\n    n = 0\n    def inc():\n        nonlocal n\n        n += 1\n    def get():\n        return n\n"
        "    return inc, get\ninc, get = make()",
        "inc()",
        "inc get",
        "",
        False,
    ),
    "method": (
        "class Box:\n    def __init__(self):\n        self.items = []\n    def put(self, x):\n        self.items.append(x)\n"
        "box = Box()",
        "box.put(1)",
        "box",
        "",
        False,
    ),
    "property setter": (
        "class Box:\n    @property\n    def x(self):\n        return self._x\n    @x.setter\n    def x(self, v):\n"
        "        self._x = v\nbox = Box()",
        "box.x = 3",
        "box",
        "",
        False,
    ),
    "slots": (
        "class Point:\n    __slots__ = ('x', 'y')\np = Point(); p.x = 1; p.y = 2",
        "setattr(p, 'x', 5)",
        "p",
        "",
        False,
    ),
    "global in a function": ("x = 1\ndef f():\n    global x\n    x = 2", "f()", "x", "", False),
    "a function changes a global list": (
        "seen = []\ndef f(v):\n    seen.append(v)",
        "f(1)",
        "seen",
        "",
        False,
    ),
    "class attribute": ("class C:\n    n = 0\nc = C()", "C.n += 1", "C", "", False),
    "registry in a base class": (
        "class Base:\n    known = []\n    def __init_subclass__(cls):\n        Base.known.append(cls.__name__)",
        "class Child(Base):\n    pass",
        "Base Child",
        "",
        False,
    ),
    "method replaced": (
        "class C:\n    def f(self):\n        return 1\nc = C()",
        "C.f = lambda self: 2",
        "C",
        "",
        False,
    ),
    "default argument": ("def f(x, acc=[]):\n    acc.append(x)\n    return acc", "f(1)", "f", "", False),
    "function attribute": ("def f():\n    f.calls = getattr(f, 'calls', 0) + 1", "f()", "f", "", False),
    "bound method as a variable": ("items = []; add = items.append", "add(1)", "items add", "", False),
    "del": ("x = 1; y = 2", "del x", "", "x", False),
    "import": ("y = 1", "import json, os.path as p", "json p", "", False),
    "import from": ("y = 1", "from json import dumps as d", "d", "", False),
    "random": ("import random", "r = random.random()", "r", "", True),
    "numpy's global generator": ("import numpy", "numpy.random.rand()", "", "", True),
    "a generator object of numpy": (
        "import numpy\nrng = numpy.random.default_rng(1)",
        "x = float(rng.random())",
        "rng x",
        "",
        False,
    ),
    "generator": ("g = (i for i in [1, 1, 1])", "next(g)", "g", "", False),
    "generator behind a function": (
        "def count():\n    n = 0\n    while True:\n        n += 1\n        yield n\ng = count()\n"
        "def step():\n    return next(g)",
        "step()",
        "g",
        "",
        False,
    ),
    "iterator": ("it = iter([1, 2, 3])", "next(it)", "it", "", False),
    "numpy view": ("import numpy as np\na = np.zeros(9); v = a[2:5]", "v[0] = 9", "a v", "", False),
    "memoryview": ("b = bytearray(b'abc'); m = memoryview(b)", "m[0] = 120", "b m", "", False),
    "data frame in place": (
        "import pandas as pd\ndf = pd.DataFrame({'a': [1, 2]})",
        "df.loc[0, 'a'] = 7",
        "df",
        "",
        False,
    ),
    "reading a defaultdict": (
        "from collections import defaultdict\nd = defaultdict(list)",
        "d['new']",
        "d",
        "",
        False,
    ),
    "a dict's order": ("d = {'a': 1, 'b': 2}", "d['a'] = d.pop('a')", "d", "", False),
    "exec and globals()": ("y = 1", "exec('x = 3'); globals()['z'] = 4", "x z", "", False),
    "walrus, for, with, except, match": (
        "import io",
        "if (n := 3) > 2: pass\nfor i in range(2): pass\nwith io.StringIO() as s: pass\n"
        "match [1, 2]:\n    case [p, *q]: pass",
        "n i s p q",
        "",
        False,
    ),
    "lambda in a dict": (
        "state = {'n': 0}\nops = {'inc': lambda: state.update(n=state['n'] + 1)}",
        "ops['inc']()",
        "state",
        "",
        False,
    ),
    "type only": ("x = 1", "x = True", "x", "", False),
}


@pytest.mark.parametrize("case", HARD)
def test_finds_what_a_cell_wrote(case: str, tmp_path: Path) -> None:
    """Guarantee 2: everything that the step wrote, rebound, deleted or mutated is found."""
    plain, step, written, deleted, moved = HARD[case]
    random.seed(1)
    cells = Cells(tmp_path, plain)

    changes = cells.watch(step)

    assert set(written.split()) == changes.written
    assert set(deleted.split()) == changes.deleted
    assert moved == changes.random


@pytest.mark.parametrize("case", HARD)
def test_a_restored_step_leaves_what_running_it_left(case: str, tmp_path: Path) -> None:
    """Guarantee 6: plain cells run again and the step restored, all variables are as if it had run."""
    plain, step, *_ = HARD[case]
    random.seed(1)
    before = Cells(tmp_path, plain)
    signed = before.step(step)
    state = random.getstate()
    random.seed(2)

    after = Cells(tmp_path, plain)
    manifest = after.restore(signed)

    unsaved = {variable.name for variable in manifest.variables if variable.state == "unsaved"}
    assert unsaved <= {
        "g",
        "s",
        "Child",
    }  # generators; a closed StringIO; a class whose making runs the notebook's code
    expected = {name: digest for name, digest in before.fingerprints().items() if name not in unsaved}
    found = {name: digest for name, digest in after.fingerprints().items() if name not in unsaved}
    assert expected == found
    assert all(isinstance(after[name], Unsaved) for name in unsaved)
    assert all(type(before[name]).__name__ == type(after[name]).__name__ for name in expected)
    if manifest.random is not None:
        assert random.getstate() == state


def test_a_cell_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    """Guarantee 2: looking at values, and pickling them, is no change."""
    cells = Cells(
        tmp_path,
        "import copy, pickle, pandas as pd, numpy as np\n"
        "class P:\n    __slots__ = ('x',)\n    def __init__(self): self.x = 1\n"
        "class Q:\n    pass\n"
        "p = P(); q = Q(); df = pd.DataFrame({'a': [1, 2]}); a = np.arange(4); d = {'k': [1]}\n"
        "m = np.ma.array([1, 2], mask=[0, 1])",
    )
    changes = cells.watch(
        "copy.deepcopy((p, q, df, a, d)); Q.__annotations__; p.__reduce_ex__(4); df.describe(); df['a'].sum(); a.sum(); repr(d); m.fill_value"
    )
    assert changes.written == frozenset()
    assert not changes.random


def test_a_client_that_is_used_is_not_written(tmp_path: Path) -> None:
    """A client of a plain cell is made again there: using its connections must not replace it by a placeholder."""
    cells = Cells(tmp_path, "import httpx\nclient = httpx.Client()\nnotes = []")
    changes = cells.watch("notes.append(client.is_closed); client._state = 2; client.headers['x'] = '1'")
    assert changes.written == {"notes"}
    cells["client"].close()


def test_fingerprints_of_all_variables_are_returned(tmp_path: Path) -> None:
    """The next step compares its inputs with them."""
    cells = Cells(tmp_path, "x = 1")
    assert set(cells.watch("y = [x]").fingerprints) == {"x", "y"}


def test_looking_warns_of_nothing(tmp_path: Path) -> None:
    """A deprecated attribute of a user's object is no news of the step that looks at it."""
    cells = Cells(
        tmp_path,
        "import warnings\nclass Old:\n    def __getstate__(self):\n        warnings.warn('old', DeprecationWarning)\n        return {}",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cells.restore(cells.step("v = Old()")).fingerprints.keys() == {"v"}
