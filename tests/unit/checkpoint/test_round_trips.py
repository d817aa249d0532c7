# ruff: noqa: E501 -- one case a line reads as a table
"""Every type that people keep in notebooks: saved, restored by another process, equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nbdurable.checkpoint.analysis import uses
from nbdurable.checkpoint.fingerprint import fingerprint
from nbdurable.checkpoint.unsaved import Unsaved
from nbdurable.errors import BlobDamaged, BlobMissing, NotRestorable
from tests.tools.cells import Cells

PLAIN = """
import abc, array, collections, dataclasses, datetime, decimal, enum, fractions, functools, pathlib, random, re
import types, typing, uuid, zoneinfo
import numpy as np, pandas as pd, polars as pl, pyarrow as pa, pydantic
"""
# What `v` is; then an expression that must hold for the restored one.
TYPES: dict[str, tuple[str, str]] = {
    "None": ("v = None", "v is None"),
    "bool": ("v = True", "v is True"),
    "int": ("v = 10**50", "v == 10**50"),
    "float": ("v = -0.0", "str(v) == '-0.0'"),
    "nan": ("v = float('nan')", "v != v"),
    "str": ("v = 'ä\\ud800'", "v == 'ä\\ud800'"),
    "bytes": ("v = b'a' * 100_000", "v == b'a' * 100_000"),
    "bytearray": ("v = bytearray(b'abc')", "type(v) is bytearray and v == b'abc'"),
    "memoryview": (
        "v = memoryview(bytearray(b'abcd')).cast('H')",
        "type(v) is memoryview and v.format == 'H'",
    ),
    "array": ("v = array.array('d', [1.5])", "v == array.array('d', [1.5])"),
    "range, slice": ("v = (range(3), slice(1, 2))", "v == (range(3), slice(1, 2))"),
    "containers": (
        "v = [(1, 'a'), {'k': {1, 2}}, frozenset({'x'}), collections.OrderedDict(b=1), collections.deque([1], 3)]",
        "v[1]['k'] == {1, 2} and v[4].maxlen == 3",
    ),
    "defaultdict with a lambda": ("v = collections.defaultdict(lambda: [7])", "v['new'] == [7]"),
    "Counter": ("v = collections.Counter('abca')", "v['a'] == 2"),
    "namedtuple": ("T = collections.namedtuple('T', 'a b'); v = T(1, [2])", "type(v) is T and v.b == [2]"),
    "dict views": ("d = {'a': 1}; v = d.keys()", "(d.update(b=2), list(v))[1] == ['a', 'b']"),
    "datetime": (
        "v = datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo('Europe/Berlin'))",
        "v.tzinfo.key == 'Europe/Berlin'",
    ),
    "values": (
        "v = [decimal.Decimal('1.10'), fractions.Fraction(1, 3), uuid.UUID(int=3), pathlib.Path('/x'), re.compile('a')]",
        "str(v[0]) == '1.10' and v[4] == re.compile('a')",
    ),
    "exception": ("v = ValueError('no', 3)", "v.args == ('no', 3)"),
    "module": ("v = functools", "v is functools"),
    "builtin": ("v = [len, str.upper, [3].append]", "v[0] is len and (v[2](4), v[2].__self__)[1] == [3, 4]"),
    "typing": ("v = [list[int], int | None, typing.Optional[str]]", "v[1] == (int | None)"),
    "random.Random": (
        "v = random.Random(5); v.random()",
        "v.random() == (lambda r: (r.random(), r.random())[1])(random.Random(5))",
    ),
    "cycle": ("v = [1]; v.append(v)", "v[1] is v"),
    "cycle through an object": (
        "class N: pass\nv = N(); v.me = {v}",
        "next(iter(v.me)) is v and type(v) is N",
    ),
    "function": ("def v(x, y=[1]):\n    return x + len(y) + k\nk = 5", "v(1) == 7"),
    "function reads the live namespace": (
        "k = 1\ndef v():\n    return k",
        "(globals().update(k=9), v())[1] == 9",
    ),
    "subclass that says the same as its base": (
        "class A: n = 0\nclass v(A): n = 0",
        "'n' in vars(v) and (setattr(A, 'n', 5), v.n)[1] == 0",
    ),
    "dataclass with a factory": (
        "@dataclasses.dataclass\nclass v:\n    items: list = dataclasses.field(default_factory=list)",
        "v.__init__.__defaults__[0] is dataclasses._HAS_DEFAULT_FACTORY and v().items == []",
    ),
    "locked array": (
        "v = np.zeros(3); v.flags.writeable = False",
        "not v.flags.writeable and (setattr(v.flags, 'writeable', True), v.flags.writeable)[1]",
    ),
    "locked array of objects": (
        "v = np.array([[1], None], dtype=object); v.flags.writeable = False",
        "not v.flags.writeable and v[0] == [1]",
    ),
    "view of objects": (
        "a = np.array([[1], None], dtype=object); v = (a, a[:])",
        "v[1].flags.owndata is False and (setattr(v[1].flags, 'writeable', True), v[1][0] is v[0][0])[1]",
    ),
    "recursive function": ("def v(n):\n    return 1 if n < 2 else n * v(n - 1)", "v(4) == 24"),
    "recursive closure": (
        "def make():\n    def f(n):\n        return 1 if n < 2 else n * f(n - 1)\n    return f\nv = make()",
        "v(4) == 24",
    ),
    "closures share a cell": (
        "def make():\n    n = 0\n    def inc():\n        nonlocal n\n        n += 1\n        return n\n    def get():\n"
        "        return n\n    return inc, get\nv, get = make(); v()",
        "v() == 2 and get() == 2",
    ),
    "closures of another module share a cell": (
        "code = 'def make():\\n    def f(): return len(both), both[0] is f\\n    def g(): both.append(g); return f()\\n    both = [f, g]\\n    return f, g'\n"
        "other = types.ModuleType('other'); exec(code, vars(other)); v = other.make(); del other",
        "v[0]() == (2, True) and v[1]() == (3, True) and v[0]() == (3, True)",
    ),
    "lambda, partial, method": (
        "class C:\n    def m(self, x):\n        return self.n * x\nc = C(); c.n = 3\nv = [lambda x: x + 1, functools.partial(max, 2), c.m]",
        "v[0](1) == 2 and v[1](1) == 2 and v[2](2) == 6 and v[2].__self__ is c",
    ),
    "decorated function": (
        "def twice(f):\n    @functools.wraps(f)\n    def g(*a):\n        return 2 * f(*a)\n    return g\n@twice\ndef v(x):\n    return x",
        "v(4) == 8 and v.__wrapped__(4) == 4",
    ),
    "lru_cache": (
        "@functools.lru_cache(maxsize=7)\ndef v(x):\n    return x + 1",
        "v(1) == 2 and v.cache_parameters()['maxsize'] == 7",
    ),
    "generator function": ("def v():\n    yield 1", "list(v()) == [1]"),
    "async function": ("async def v():\n    return 1", "v.__code__.co_flags & 0x80"),
    "class": (
        "class v:\n    n = [1]\n    def m(self):\n        return self.n\n    @classmethod\n    def c(cls):\n        return cls",
        "v().m() == [1] and v.c() is v",
    ),
    "super and slots": (
        "class A:\n    __slots__ = ('x',)\n    def __init__(self):\n        self.x = 1\nclass B(A):\n    def __init__(self):\n"
        "        super().__init__()\n        self.y = 2\nv = B()",
        "v.x == 1 and v.y == 2 and isinstance(v, A) and B().y == 2",
    ),
    "frozen dataclass with slots": (
        "@dataclasses.dataclass(frozen=True, slots=True)\nclass F:\n    a: int = 1\nv = F(2)",
        "v == F(2) and dataclasses.replace(v, a=3).a == 3 and not hasattr(v, '__dict__')",
    ),
    "typing's classes": (
        "T = typing.TypeVar('T')\nclass G(typing.Generic[T]):\n    x: T\nclass N(typing.NamedTuple):\n    a: int\n    b: str = 'x'\n"
        "class D(typing.TypedDict):\n    a: int\nv = [N(3), G[int](), D(a=1)]",
        "v[0] == N(3) and v[0].b == 'x' and type(v[0]) is N and v[1].__orig_class__ == G[int]",
    ),
    "cached property": (
        "class C:\n    @functools.cached_property\n    def p(self):\n        return [3]\nv = C(); v.p",
        "v.p == [3] and C().p == [3] and v.p is v.p",
    ),
    "abstract class": (
        "class A(abc.ABC):\n    @abc.abstractmethod\n    def f(self): ...\nclass v(A):\n    def f(self):\n        return 1",
        "v().f() == 1 and A.__abstractmethods__ == {'f'}",
    ),
    "dataclass": (
        "@dataclasses.dataclass(order=True)\nclass D:\n    a: int\n    b: list = dataclasses.field(default_factory=list)\nv = D(1)",
        "v == D(1) and D(2).b == [] and dataclasses.fields(D)[0].default is dataclasses.MISSING and v < D(2)",
    ),
    "enum": (
        "class E(enum.Enum):\n    A = 1\n    B = 'x'\n    def f(self):\n        return self.value\nv = {E.A: E.B}",
        "v[E.A] is E.B and E('x') is E.B and E.A.f() == 1",
    ),
    "pydantic": (
        "class M(pydantic.BaseModel):\n    x: int = 3\n    y: list[str] = []\n    @pydantic.field_validator('x')\n    def ok(cls, v):\n"
        "        return v + 1\nv = M(x=4, y=['a'])",
        "v == M(x=4, y=['a']) and M.model_validate({'x': 1}).x == 2",
    ),
    "instance of a class that is gone": (
        "class C:\n    def m(self):\n        return 1\nv = C(); del C",
        "v.m() == 1",
    ),
    "array in memory order": (
        "v = np.asfortranarray(np.arange(6).reshape(2, 3))",
        "v.flags.f_contiguous and v[1, 2] == 5",
    ),
    "large array": ("v = np.arange(500_000.)", "v[-1] == 499_999 and v.flags.writeable"),
    "views share memory": (
        "a = np.zeros(100_000); v = a[::-2]",
        "(v.__setitem__(0, 5.), a[-1])[1] == 5 and v.shape == (50_000,)",
    ),
    "field view": (
        "a = np.zeros(3, dtype=[('x', 'i4'), ('y', 'f8')]); v = a['y']",
        "(v.__setitem__(0, 5.), a['y'][0])[1] == 5",
    ),
    "object views share memory": (
        "a = np.array([[1], [2]], dtype=object); v = a[1:]",
        "(v.__setitem__((0, 0), 5), a[1, 0])[1] == 5",
    ),
    "object array": ("v = np.array([1, 'x', None, [1]], dtype=object)", "v[3] == [1]"),
    "array dtypes": (
        "v = [np.array(['2020'], dtype='M8[D]'), np.array(['a', 'bb']), np.array([1 + 2j]), np.float32(2), np.array(3), np.zeros((0, 3))]",
        "v[0].dtype == 'M8[D]' and type(v[3]) is np.float32 and v[4].shape == () and v[5].shape == (0, 3)",
    ),
    "masked array": ("v = np.ma.array([1, 2], mask=[0, 1])", "v.sum() == 1"),
    "string array": ("v = np.array(['a', 'long' * 9], dtype=np.dtypes.StringDType())", "v[1] == 'long' * 9"),
    "numpy generator": (
        "v = np.random.default_rng(1); v.random()",
        "v.random() == (lambda g: (g.random(), g.random())[1])(np.random.default_rng(1))",
    ),
    "data frame": (
        "v = pd.DataFrame({'i': [1, 2], 's': ['a', None], 'o': pd.Series([1, 'x'], dtype=object), 'os': pd.Series(['p', 'q'], dtype=object), "
        "'c': pd.Categorical(['a', 'b'], ordered=True), 't': pd.to_datetime(['2020', '2021']).tz_localize('Europe/Berlin'), "
        "'n': pd.array([1, None], dtype='Int64'), 'p': pd.period_range('2020', periods=2, freq='M')}, index=pd.Index(['x', 'y'], name='ix'))\n"
        "v.attrs['unit'] = 'kg'; dtypes = [str(t) for t in v.dtypes]",
        "[str(t) for t in v.dtypes] == dtypes and v.attrs == {'unit': 'kg'} and v.index.name == 'ix'",
    ),
    "strings of pandas": (
        "v = [pd.Series(['a', None]), pd.Series(['a'], dtype='string'), pd.Series(['a'], dtype='string[pyarrow]'), pd.Series(['a'], dtype=object)]\n"
        "kinds = [repr(s.dtype) for s in v]",
        "[repr(s.dtype) for s in v] == kinds",
    ),
    "multi-index": (
        "v = pd.DataFrame({'a': [1, 2]}, index=pd.MultiIndex.from_tuples([('a', 1), ('b', 2)]))",
        "v.loc[('b', 2), 'a'] == 2",
    ),
    "copy on write": (
        "df = pd.DataFrame({'a': np.arange(100_000)}); v = df['a']",
        "(df.__setitem__('a', 0), int(v.iloc[-1]))[1] == 99_999",
    ),
    "list in a cell": (
        "x = [1]; df = pd.DataFrame({'o': pd.Series([x, 2], dtype=object)}); v = x",
        "df.loc[0, 'o'] is v",
    ),
    "polars": (
        "v = pl.DataFrame({'a': [1, 2], 's': ['x', None], 'c': pl.Series(['a', 'b'], dtype=pl.Categorical), "
        "'e': pl.Series(['a', 'b'], dtype=pl.Enum(['a', 'b'])), 'l': [[1], [2, 3]], 'd': [datetime.date(2020, 1, 1), None]}); schema = v.schema",
        "v.schema == schema and v['l'][1].to_list() == [2, 3]",
    ),
    "polars, large": (
        "import datetime\nv = pl.select(a=pl.int_range(70_000), n=pl.int_range(70_000).cast(pl.String), "
        "d=pl.int_range(70_000).cast(pl.Datetime('us', 'UTC')), m=pl.int_range(70_000) % 3 == 0)"
        ".with_columns(o=pl.when('m').then('a')).slice(3, 60_000)",
        "v.schema['d'] == pl.Datetime('us', 'UTC') and v['o'].null_count() == 40_000 and v['n'][-1] == '60002'",
    ),
    "polars series, large": (
        "v = pl.Series('x', range(70_000)).alias('y')",
        "v.name == 'y' and v.sum() == 2449965000",
    ),
    "polars, large, what Arrow holds otherwise": (
        "v = pl.select(a=pl.int_range(70_000), c=pl.lit('x').cast(pl.Categorical), d=pl.int_range(70_000).cast(pl.Decimal(9, 2)))",
        "v.schema['c'] == pl.Categorical and v.schema['d'] == pl.Decimal(9, 2)",
    ),
    "pandas, Arrow strings, large": (
        "v = pd.DataFrame({'s': [f'text {i}' for i in range(70_000)]}, dtype='str')[5:60_000]",
        "v.s.dtype == 'str' and v.s.iloc[0] == 'text 5' and v.index[0] == 5",
    ),
    "Arrow, large": (
        "v = pa.table({'a': list(range(70_000)), 's': ['x', None] * 35_000}).slice(5, 60_000)",
        "v.num_rows == 60_000 and v['a'][0].as_py() == 5 and v['s'].null_count == 30_000",
    ),
    "polars lazy": ("v = pl.LazyFrame({'a': [1, 2]}).filter(pl.col('a') > 1)", "v.collect().height == 1"),
    "arrow": (
        "v = pa.table({'a': [1, 2], 's': ['x', None], 'n': [[1], None]})",
        "v.column('n').to_pylist() == [[1], None]",
    ),
    "arrow slice": ("v = pa.array(range(1_000_000)).slice(10, 3)", "v.to_pylist() == [10, 11, 12]"),
    "sklearn": (
        "from sklearn.ensemble import RandomForestClassifier\nfrom sklearn.pipeline import make_pipeline\n"
        "from sklearn.preprocessing import StandardScaler\nX = np.arange(20.).reshape(10, 2); y = np.arange(10) % 2\n"
        "v = make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(X, y); p = v.predict_proba(X)",
        "(v.predict_proba(X) == p).all()",
    ),
}


@pytest.mark.parametrize("case", TYPES)
def test_a_restored_value_equals_what_was_saved(case: str, tmp_path: Path) -> None:
    """Guarantee 7: with its type, and with what it shares; guarantee 6: from a fresh namespace too."""
    make, holds = TYPES[case]
    before = Cells(tmp_path, PLAIN)
    signed = before.step(make)

    after = Cells(tmp_path, PLAIN)
    manifest = after.restore(signed)

    assert [(item.name, item.reason) for item in manifest.variables if item.state != "saved"] == []
    assert "v" in manifest.fingerprints
    for name, digest in manifest.fingerprints.items():
        assert fingerprint(after[name], after.namespace) == digest
        assert type(after[name]).__qualname__ == type(before[name]).__qualname__
    assert eval(holds, after.namespace), holds


def test_a_checkpoint_is_restored_by_another_process(tmp_path: Path) -> None:
    """Guarantee 6: nothing depends on the process that saved, such as classes that it still holds."""
    cells = Cells(tmp_path, PLAIN)
    signed = cells.step(
        "@dataclasses.dataclass\nclass D:\n    a: int\n    def twice(self):\n        return 2 * self.a * factor\n"
        "factor = 10\ndef make(n):\n    return D(n)\nd = make(3); big = np.arange(300_000.)"
    )
    (tmp_path / "signed.json").write_text(signed.model_dump_json())
    script = (
        "import sys\nfrom pathlib import Path\nfrom nbdurable.models import SignedManifest\nfrom tests.tools.cells import Cells\n"
        "folder = Path(sys.argv[1]); cells = Cells(folder)\n"
        "cells.restore(SignedManifest.model_validate_json((folder / 'signed.json').read_text()))\n"
        "d = cells['d']; big = cells['big']; big[0] = 1\n"
        "print(d, d.twice(), cells['make'](4).twice(), type(d) is cells['D'], big.sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.cwd(),
    )
    assert done.stdout.split() == ["D(a=3)", "60", "80", "True", "44999850001.0"]


def test_restored_code_has_its_source(tmp_path: Path) -> None:
    """Guarantee 1: a later step that uses a restored function or class finds it unchanged, in another process too."""
    plan = "import dataclasses"
    code = (
        "def f(x):\n    return x + 1\nclass C:\n    def m(self):\n        return f(1)\n"
        "@dataclasses.dataclass\nclass P:\n    x: int = 1\ng = lambda: P\n"
    )
    cells = Cells(tmp_path, plan)
    signed = cells.step(code)
    names = ("f", "C", "P", "g")
    recorded = {name: fact.ast for name, fact in uses(names, cells.namespace, tmp_path).helpers.items()}
    assert len(recorded) == 4
    assert not [digest for digest in recorded.values() if digest.startswith("value:")]
    (tmp_path / "signed.json").write_text(signed.model_dump_json())
    script = (
        "import json, sys, inspect\nfrom pathlib import Path\nfrom nbdurable.checkpoint.analysis import uses\n"
        "from nbdurable.models import SignedManifest\nfrom tests.tools.cells import Cells\n"
        f"folder = Path(sys.argv[1]); cells = Cells(folder, {plan!r})\n"
        "cells.restore(SignedManifest.model_validate_json((folder / 'signed.json').read_text()))\n"
        f"found = uses({names!r}, cells.namespace, folder).helpers\n"
        "assert inspect.getsource(cells['f']).startswith('def f')\n"
        "print(json.dumps({name: fact.ast for name, fact in found.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.cwd(),
    )
    assert recorded == json.loads(done.stdout)


def test_variables_keep_sharing_with_each_other(tmp_path: Path) -> None:
    """Guarantee 7: also with a variable that the step did not write."""
    before = Cells(tmp_path, "config = {'n': 1}")
    signed = before.step("jobs = [config]; alias = jobs")

    after = Cells(tmp_path, "config = {'n': 1}")
    after.restore(signed)

    after.run("config['n'] = 2")
    assert after["jobs"] == [{"n": 2}]
    assert after["alias"] is after["jobs"]


def test_unrelated_variables_are_not_saved_along(tmp_path: Path) -> None:
    """A checkpoint holds what the step wrote, not what merely stands beside it."""
    cells = Cells(
        tmp_path,
        "import numpy as np\nbig = np.zeros(9)\nclass C: pass\nc = C()\nword = 'x'\nt = (1, 2)\ndef f():\n    return big",
    )
    manifest = Cells(tmp_path).restore(cells.step("r = [word, t, len(f())]"))
    assert set(manifest.fingerprints) == {"r"}
    signed = cells.step("d = C(); handlers = {'f': f}")
    fresh = Cells(tmp_path, "class C: pass\ndef f():\n    return 'new'")
    assert set(fresh.restore(signed).fingerprints) == {"d", "handlers"}
    assert type(fresh["d"]) is fresh["C"]
    assert fresh["handlers"]["f"] is fresh["f"]


def test_a_function_does_not_drag_its_globals_along(tmp_path: Path) -> None:
    """cloudpickle would store 8 MB with a one-line function, and restore a stale value."""
    cells = Cells(tmp_path, "import numpy as np\nbig = np.zeros(1_000_000)")
    manifest = Cells(tmp_path).restore(cells.step("def f():\n    return big.sum()"))
    assert manifest.variables[0].bytes < 2000


UNSAVEABLE: dict[str, tuple[str, str, str]] = {
    "open file": ("v = open(path, 'w')", "open file", "path"),
    "binary file": ("v = open(path, 'wb')", "open file", "path"),
    "generator": ("v = (i for i in 'ab')", "generator", "list"),
    "lock": ("v = threading.Lock()", "lock", "plain cell"),
    "thread": ("v = threading.Thread()", "Thread holds ", "plain cell"),
    "socket": ("v = socket.socket()", "connection", "plain cell"),
    "database": ("v = sqlite3.connect(':memory:')", "connection", "plain cell"),
    "coroutine": ("async def co(): pass\nv = co()", "coroutine", "await"),
    "weak reference": ("class C: pass\nc = C(); v = weakref.ref(c)", "weak reference", "object itself"),
    "weak dict": (
        "class C: pass\nc = C(); v = weakref.WeakValueDictionary(c=c)",
        "weak reference",
        "object itself",
    ),
    "client": ("v = httpx.Client()", "Client holds", "plain cell"),
    "inside": (
        "class Agent: pass\nv = Agent(); v.tools = [{'client': httpx.Client()}]",
        "`v.tools[0]['client']`: Client holds",
        "plain cell",
    ),
    "a lambda with a file": ("v = (lambda f: lambda: f)(open(path, 'w'))", "open file", "path"),
    "too deep": ("v = []\nfor _ in range(5000): v = [v]", "pickle", "plain cell"),
    "reduces to something else": (
        "class Liar:\n    def __reduce__(self):\n        return (dict, ())\nv = Liar()",
        "equal",
        "plain cell",
    ),
    "refuses": (
        "class No:\n    def __reduce__(self):\n        raise RuntimeError('never')\nv = No()",
        "never",
        "plain cell",
    ),
    "figure": (
        "import matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot as plt\nv = plt.figure(); plt.close(v)",
        "matplotlib figure",
        "outputs",
    ),
    "never ends": (
        "class Endless:\n    def __reduce__(self):\n        return (Endless, (Endless(),))\nv = Endless()",
        "",
        "",
    ),
    "loses state": (
        "class Loses:\n    def __init__(self):\n        self.x = 1\n    def __getstate__(self):\n        return {'x': self.x}\n"
        "    def __setstate__(self, s):\n        pass\nv = Loses()",
        "a copy of it",
        "plain cell",
    ),
}


@pytest.mark.parametrize("case", UNSAVEABLE)
def test_what_cannot_be_saved_is_named_with_its_reason(case: str, tmp_path: Path) -> None:
    """Guarantee 7: refused by name, never silently different; other variables of the step are saved."""
    make, reason, todo = UNSAVEABLE[case]
    plain = f"import threading, socket, sqlite3, weakref, httpx\npath = {str(tmp_path / 'file')!r}"
    before = Cells(tmp_path, plain)
    signed = before.step(f"other = [1]\n{make}")

    after = Cells(tmp_path, plain)
    manifest = after.restore(signed)

    variables = {variable.name: variable for variable in manifest.variables}
    assert variables["v"].state == "unsaved"
    assert reason in variables["v"].reason
    assert todo in variables["v"].reason
    assert variables["v"].type == type(before["v"]).__qualname__
    assert after["other"] == [1]
    assert type(after["v"]) is Unsaved
    _close(before["v"])


def _close(value: object) -> None:
    for name in ("close", "tools"):
        item = getattr(value, name, None)
        if callable(item):
            item()
        elif item:
            item[0]["client"].close()
    if (closure := getattr(value, "__closure__", None)) is not None:
        closure[0].cell_contents.close()


USES = [
    "v.x", "v()", "v[0]", "v + 1", "1 + v", "len(v)", "bool(v)", "list(v)", "for _ in v: pass", "v == 1", "v < 2",
    "str(v)", "v.x = 1", "with v: pass", "x in v" if False else "1 in v", "-v", "f'{v}'", "{v: 1}", "v @ v", "del v[0]",
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_every_use_of_an_unsaved_variable_says_why(use: str, tmp_path: Path) -> None:
    """Guarantee 7: reading it after a restore raises the reason that was shown."""
    signed = Cells(tmp_path).step("v = (i for i in 'ab')")
    after = Cells(tmp_path)
    after.restore(signed)
    with pytest.raises(NotRestorable, match="generator") as error:
        after.run(use)
    assert "%durable rerun step" in error.value.todo
    assert "not saved" in repr(after["v"])


def test_a_placeholder_is_no_change_and_can_be_replaced(tmp_path: Path) -> None:
    """A later step runs beside it, and may bind the name again."""
    signed = Cells(tmp_path).step("v = (i for i in 'ab')")
    after = Cells(tmp_path)
    after.restore(signed)
    assert after.watch("x = 1").written == {"x"}
    assert after.watch("v = 2").written == {"v"}


def test_an_unsaved_variable_takes_down_only_those_that_share_with_it(tmp_path: Path) -> None:
    """Guarantee 7: sharing with something that is made anew by a plain cell would be lost silently."""
    plain = "import threading\nlog = []\nclass A: pass\na = A(); a.lock = threading.Lock(); a.log = log"
    before = Cells(tmp_path, plain)
    changes = before.watch("mine = [log]; free = [1]")
    after = Cells(tmp_path, plain)
    manifest = after.restore(before.checkpoint(changes))
    states = {variable.name: variable.state for variable in manifest.variables}
    assert states["free"] == "saved"
    assert states["mine"] == "unsaved"
    assert "`a`" in next(variable.reason for variable in manifest.variables if variable.name == "mine")
    assert type(after["a"]).__name__ == "A"  # the live one of the plain cell


def test_verifying_does_not_change_the_living_class(tmp_path: Path) -> None:
    """cloudpickle hands out the living class for a class of the same process, and sets its attributes anew."""
    cells = Cells(tmp_path)
    before = cells.watch(
        "class C:\n    items = [1]\n    def get(self):\n        return self.items\nitems = C.items; c = C()"
    )
    cells.checkpoint(before)
    assert cells["C"].items is cells["items"]
    assert type(cells["c"]) is cells["C"]


def test_a_missing_or_damaged_blob_names_variable_and_step(tmp_path: Path) -> None:
    """Guarantee 7 and 11: refused by name, and nothing of the checkpoint is bound."""
    before = Cells(tmp_path, "import numpy as np")
    signed = before.step("small = 1; big = np.arange(100_000.)", name="train")
    after = Cells(tmp_path)
    blob = max((tmp_path / "blobs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(BlobDamaged, match=r"`train` needs it for `big`"):
        after.restore(signed)
    blob.unlink()
    with pytest.raises(BlobMissing, match=r"`train` needs it for `big`"):
        after.restore(signed)
    assert "small" not in after.namespace


def test_a_class_that_the_notebook_lost_is_named(tmp_path: Path) -> None:
    """Guarantee 11."""
    signed = Cells(tmp_path, "class Tool: pass").step("t = Tool()")
    with pytest.raises(NotRestorable, match="`Tool`") as error:
        Cells(tmp_path).restore(signed)
    assert "define `Tool`" in error.value.todo


def test_a_sliced_arrow_column_does_not_drag_its_parent_along(tmp_path: Path) -> None:
    """Three rows of a million cost three rows."""
    cells = Cells(
        tmp_path, "import pyarrow as pa\nt = pa.table({'a': list(range(1_000_000)), 's': ['x'] * 1_000_000})"
    )
    manifest = Cells(tmp_path).restore(cells.step("v = t.slice(5, 3)"))
    assert manifest.variables[0].bytes < 10_000


def test_deleted_names_are_deleted_again(tmp_path: Path) -> None:
    """Guarantee 6."""
    signed = Cells(tmp_path, "x = 1; y = 2").step("del x")
    after = Cells(tmp_path, "x = 1; y = 2")
    after.restore(signed)
    assert "x" not in after.namespace
    assert after["y"] == 2


def test_what_needs_an_unsaved_class_is_unsaved_with_it(tmp_path: Path) -> None:
    """Guarantee 7: an instance would come back without its class; making that class again would run code twice."""
    before = Cells(tmp_path)
    signed = before.step(
        "class Meta(type): pass\nclass K(metaclass=Meta): pass\nk = K(); box = {'k': k}; free = 1"
    )
    after = Cells(tmp_path)
    reasons = {variable.name: variable.reason for variable in after.restore(signed).variables}
    assert "Meta.__new__" in reasons["K"]
    assert "it needs `K`" in reasons["k"]
    assert "it needs `K`" in reasons["box"]
    assert after["free"] == 1
    assert isinstance(after["k"], Unsaved)
