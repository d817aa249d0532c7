# ruff: noqa: E501 -- one case a line reads as a table
"""Every type that people keep in notebooks: how a value is made, and what must hold for the restored one.

The table of types (`nbdurable/checkpoint/TYPES.md`) is made of these: `python -m tests.tools.types`.
"""

from __future__ import annotations

# package → what a plain cell imports
IMPORTS: dict[str, str] = {
    "Python": "import array, collections, copyreg, datetime, decimal, fractions, functools, io, pathlib, random, re, threading, types, typing, uuid, weakref, zoneinfo",
    "Functions and classes": "import abc, collections, dataclasses, enum, functools, types, typing, pydantic",
    "A reduction of one's own": (
        "import copyreg, sqlite3, threading\nclass Held:\n    def __init__(self, url):\n        self.url, self.lock = url, threading.Lock()\n"
        "copyreg.pickle(Held, lambda held: (Held, (held.url,)))\n"
        "copyreg.pickle(sqlite3.Connection, lambda held: (sqlite3.connect, (':memory:',)))"
    ),
    "NumPy": "import numpy as np",
    "pandas": "import numpy as np, pandas as pd, pyarrow as pa",
    "polars": "import polars as pl, datetime",
    "Arrow": "import pyarrow as pa",
    "scikit-learn": "import numpy as np\nfrom sklearn.pipeline import make_pipeline",
    "SciPy": "import numpy as np, scipy.sparse as sp",
    "networkx": "import networkx as nx",
    "Matplotlib": "import io, numpy as np, matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot as plt",
    "Pillow": "import PIL.Image",
    "PyTorch": "import torch",
    "Resources": "import asyncio, duckdb, functools, itertools, polars as pl, logging, queue, requests, socket, sqlite3, subprocess, threading, weakref, httpx, concurrent.futures, contextvars, multiprocessing",
}
# package → case → what `v` is; an expression that must hold for the restored one
EXACT: dict[str, dict[str, tuple[str, str]]] = {
    "Python": {
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
        "namedtuple": (
            "T = collections.namedtuple('T', 'a b'); v = T(1, [2])",
            "type(v) is T and v.b == [2]",
        ),
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
        "builtin": (
            "v = [len, str.upper, [3].append]",
            "v[0] is len and (v[2](4), v[2].__self__)[1] == [3, 4]",
        ),
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
        "signed zero, infinity": (
            "v = [-0.0, float('inf'), complex(-0.0, 1)]",
            "str(v) == '[-0.0, inf, (-0+1j)]'",
        ),
        "Ellipsis, NotImplemented": ("v = [..., NotImplemented]", "v[0] is ... and v[1] is NotImplemented"),
        "exception with its cause": (
            "class MyError(Exception):\n    def __init__(self, code):\n        super().__init__('failed')\n        self.code = code\n"
            "    def __reduce__(self):\n        return MyError, (self.code,), self.__dict__\n"
            "v = MyError(7); v.add_note('a note')",
            "type(v) is MyError and v.code == 7 and v.__notes__ == ['a note'] and v.args == ('failed',)",
        ),
        "exception group": (
            "v = ExceptionGroup('many', [ValueError(1), KeyError('k')])",
            "v.exceptions[1].args == ('k',)",
        ),
        "ChainMap, UserDict": (
            "d = {'a': 1}; v = [collections.ChainMap(d, {}), collections.UserDict(b=2), collections.UserList([d])]",
            "v[0].maps[0] is d and v[1]['b'] == 2 and v[2].data[0] is d",
        ),
        "SimpleNamespace": ("v = types.SimpleNamespace(a=[1])", "v.a == [1]"),
        "mappingproxy": (
            "d = {'a': 1}; v = types.MappingProxyType(d)",
            "(d.update(b=2), dict(v))[1] == {'a': 1, 'b': 2}",
        ),
        "ipaddress, string.Template": (
            "import ipaddress, string\nv = [ipaddress.ip_network('10.0.0.0/8'), string.Template('$x')]",
            "v[0].num_addresses == 2**24 and v[1].substitute(x=1) == '1'",
        ),
        "iterator over a list": ("v = iter([1, 2, 3]); next(v)", "list(v) == [2, 3]"),
        "iterator over a range": ("v = iter(range(3)); next(v)", "list(v) == [1, 2]"),
        "BytesIO, StringIO": (
            "v = [io.BytesIO(b'abc'), io.StringIO('text')]; v[0].read(1); v[1].seek(2)",
            "v[0].read() == b'bc' and v[1].read() == 'xt' and v[0].getvalue() == b'abc'",
        ),
        "logger": ("import logging\nv = logging.getLogger('mine')", "v is logging.getLogger('mine')"),
        "heap of objects that refer to each other": (
            "class N:\n    def __init__(self, up=None):\n        self.up, self.below = up, []\n        if up: up.below.append(self)\n"
            "v = N(); N(v); N(v.below[0])",
            "v.below[0].up is v and v.below[0].below[0].up.up is v",
        ),
        "set that holds its owner": (
            "class N:\n    def __init__(self):\n        self.all = {self}\nv = N()",
            "next(iter(v.all)) is v",
        ),
        "map, zip, enumerate, count": (
            "import itertools\nv = [map(str, [1, 2]), zip('ab', [1, 2]), enumerate('xy'), itertools.count(5)]; next(v[0]), next(v[3])",
            "list(v[0]) == ['2'] and list(v[1])[1] == ('b', 2) and list(v[2])[1] == (1, 'y') and next(v[3]) == 6",
        ),
    },
    "Functions and classes": {
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
        "property, classmethod, staticmethod": (
            "v = [property(lambda self: 1), classmethod(lambda cls: 2), staticmethod(lambda: 3)]",
            "v[0].fget(0) == 1 and v[1].__func__(0) == 2 and v[2]() == 3",
        ),
        "class made by type()": (
            "v = type('Made', (dict,), {'n': 1, 'f': lambda self: self.n})",
            "v().f() == 1 and issubclass(v, dict)",
        ),
        "class inside a function": (
            "def make():\n    class Inner:\n        def f(self):\n            return [type(self)]\n    return Inner()\nv = make()",
            "v.f()[0] is type(v)",
        ),
        "metaclass": (
            "class Meta(type):\n    def tell(cls):\n        return cls.__name__\nclass v(metaclass=Meta): pass",
            "v.tell() == 'v' and type(v) is Meta",
        ),
        "descriptor": (
            "class Positive:\n    def __set_name__(self, owner, name):\n        self.name = '_' + name\n    def __get__(self, obj, kind):\n        return getattr(obj, self.name)\n"
            "    def __set__(self, obj, value):\n        setattr(obj, self.name, abs(value))\nclass C:\n    x = Positive()\nv = C(); v.x = -3",
            "v.x == 3 and (setattr(v, 'x', -5), v.x)[1] == 5",
        ),
        "functions with attributes and annotations": (
            "def v(x: int = 3, *, y: 'str' = 'b') -> float:\n    'Tell.'\n    return x\nv.calls = [1]",
            "v.__annotations__['x'] is int and v.__doc__ == 'Tell.' and v.calls == [1] and v.__kwdefaults__ == {'y': 'b'}",
        ),
        "flags": (
            "class F(enum.Flag):\n    A = enum.auto()\n    B = enum.auto()\nv = F.A | F.B",
            "v == F.A | F.B and F.A in v",
        ),
        "string enum": ("class S(enum.StrEnum):\n    A = 'a'\nv = [S.A]", "v[0] is S.A and v[0] == 'a'"),
        "pydantic, nested and private": (
            "class Inner(pydantic.BaseModel):\n    x: int\nclass Outer(pydantic.BaseModel):\n    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)\n"
            "    inner: Inner\n    _seen: list = pydantic.PrivateAttr(default_factory=list)\nv = Outer(inner=Inner(x=1)); v._seen.append(2)",
            "type(v.inner) is Inner and v._seen == [2] and Outer.model_validate({'inner': {'x': 3}}).inner.x == 3",
        ),
        "async generator function": ("async def v():\n    yield 1", "v.__code__.co_flags & 0x200"),
        "attrs of functions in a dispatch dict": (
            "def one(): return 1\nv = {'one': one, 'two': lambda: 2}",
            "v['one'] is one and v['two']() == 2",
        ),
        "operator's helpers": (
            "import operator\nv = [operator.itemgetter(1), operator.attrgetter('a.b'), operator.methodcaller('upper')]",
            "v[0]('ab') == 'b' and v[2]('a') == 'A'",
        ),
    },
    "A reduction of one's own": {
        "copyreg.pickle in a plain cell": ("v = Held('x')", "v.url == 'x' and not v.lock.locked()"),
        "__reduce__": (
            "class Client:\n    def __init__(self, url):\n        self.url, self.lock = url, threading.Lock()\n"
            "    def __reduce__(self):\n        return Client, (self.url,)\nv = [Client('x')]",
            "v[0].url == 'x' and not v[0].lock.locked()",
        ),
        "__getstate__": (
            "class Client:\n    def __init__(self):\n        self.url, self.lock = 'x', threading.Lock()\n"
            "    def __getstate__(self):\n        return {'url': self.url}\n"
            "    def __setstate__(self, state):\n        self.__init__()\n        self.url = state['url']\nv = Client()",
            "v.url == 'x' and not v.lock.locked()",
        ),
        "copyreg.pickle of what else is refused": (
            "v = sqlite3.connect(':memory:')",
            "v.execute('select 1').fetchone() == (1,)",
        ),
    },
    "NumPy": {
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
        "string array": (
            "v = np.array(['a', 'long' * 9], dtype=np.dtypes.StringDType())",
            "v[1] == 'long' * 9",
        ),
        "numpy generator": (
            "v = np.random.default_rng(1); v.random()",
            "v.random() == (lambda g: (g.random(), g.random())[1])(np.random.default_rng(1))",
        ),
        "structured array": (
            "v = np.zeros(3, dtype=[('x', 'i4'), ('in', [('y', 'f8', (2,))])]); v['in']['y'] = 3",
            "v.dtype.names == ('x', 'in') and v['in']['y'][2, 1] == 3",
        ),
        "record array": (
            "v = np.rec.array([(1, 'a')], dtype=[('n', 'i4'), ('s', 'U1')])",
            "v.n[0] == 1 and type(v) is np.rec.recarray",
        ),
        "memory map": (
            "import tempfile\nfile = tempfile.mktemp(); v = np.memmap(file, mode='w+', dtype='f8', shape=(4,)); v[:] = 2",
            "v.tolist() == [2.0] * 4",
        ),
        "matrix": ("v = np.matrix([[1, 2]])", "type(v) is np.matrix and (v * v.T)[0, 0] == 5"),
        "zero-dimensional, empty": (
            "v = [np.array(3.5), np.empty((0, 2), 'i2')]",
            "v[0].ndim == 0 and v[1].dtype == 'i2'",
        ),
        "byte order": ("v = np.arange(3, dtype='>i4')", "v.dtype == '>i4' and v[2] == 2"),
        "subclass of ndarray": (
            "class Unit(np.ndarray):\n    def __array_finalize__(self, obj):\n        self.unit = getattr(obj, 'unit', None)\n"
            "    def __reduce__(self):\n        make, args, state = super().__reduce__()\n        return make, args, (state, self.unit)\n"
            "    def __setstate__(self, state):\n        super().__setstate__(state[0])\n        self.unit = state[1]\n"
            "v = np.arange(3).view(Unit); v.unit = 'kg'",
            "type(v) is Unit and v.unit == 'kg' and v[2] == 2",
        ),
        "broadcast array": (
            "v = np.broadcast_to(np.arange(3), (2, 3))",
            "v.shape == (2, 3) and v[1].tolist() == [0, 1, 2]",
        ),
        "RandomState": (
            "v = np.random.RandomState(3); v.rand()",
            "v.rand() == (lambda g: (g.rand(), g.rand())[1])(np.random.RandomState(3))",
        ),
        "vectorize, poly1d, dtype": (
            "v = [np.poly1d([1, 2]), np.dtype('f4'), np.add]",
            "v[0](1) == 3 and v[2] is np.add",
        ),
    },
    "pandas": {
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
        "pandas, Arrow strings, large": (
            "v = pd.DataFrame({'s': [f'text {i}' for i in range(70_000)]}, dtype='str')[5:60_000]",
            "v.s.dtype == 'str' and v.s.iloc[0] == 'text 5' and v.index[0] == 5",
        ),
        "every kind of index": (
            "v = [pd.RangeIndex(2, 9, 3), pd.Index([1, 2], dtype='uint8'), pd.DatetimeIndex(['2020'], tz='UTC', name='t'), pd.date_range('2020', periods=2, freq='D'), "
            "pd.TimedeltaIndex(['1D']), pd.period_range('2020', periods=2, freq='Q'), pd.IntervalIndex.from_breaks([0, 1, 2]), pd.CategoricalIndex(['a', 'b'], ordered=True), "
            "pd.MultiIndex.from_product([['a', 'b'], [1, 2]], names=['l', 'n'])]",
            "v[3].freqstr == 'D' and v[6].closed == 'right' and v[8].names == ['l', 'n'] and v[0].step == 3 and v[2].name == 't'",
        ),
        "extension types": (
            "v = pd.DataFrame({'b': pd.array([True, None], dtype='boolean'), 'f': pd.array([1.5, None], dtype='Float32'), 's': pd.arrays.SparseArray([0, 1]), "
            "'i': pd.arrays.IntervalArray.from_breaks([0, 1, 2]), 'a': pd.array([[1], None], dtype=pd.ArrowDtype(pa.list_(pa.int64())))}); kinds = list(map(str, v.dtypes))",
            "list(map(str, v.dtypes)) == kinds and v['a'][0] == [1] and v['b'].isna()[1]",
        ),
        "scalars": (
            "v = [pd.Timestamp('2020', tz='UTC'), pd.NaT, pd.NA, pd.Timedelta('1D'), pd.Period('2020'), pd.Interval(0, 1)]",
            "v[1] is pd.NaT and v[2] is pd.NA and v[5].right == 1",
        ),
        "groupby": (
            "df = pd.DataFrame({'k': list('aab'), 'x': [1, 2, 3]}); v = df.groupby('k')",
            "v['x'].sum().tolist() == [3, 3]",
        ),
        "duplicate columns, attrs, flags": (
            "v = pd.DataFrame([[1, 2]], columns=['a', 'a']); v.attrs = {'deep': [1]}",
            "list(v.columns) == ['a', 'a'] and v.attrs == {'deep': [1]} and v.iloc[0, 1] == 2",
        ),
        "object column of objects": (
            "x = {'n': 1}; v = pd.DataFrame({'o': [x, [1], None, 'text']}, dtype=object)",
            "v['o'].dtype == object and v.loc[0, 'o'] is x and v['o'][1] == [1]",
        ),
        "subclass of DataFrame": (
            "class Frame(pd.DataFrame):\n    _metadata = ['unit']\n    @property\n    def _constructor(self):\n        return Frame\nv = Frame({'a': [1]}); v.unit = 'kg'",
            "type(v) is Frame and v.unit == 'kg'",
        ),
    },
    "polars": {
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
        "polars lazy": ("v = pl.LazyFrame({'a': [1, 2]}).filter(pl.col('a') > 1)", "v.collect().height == 1"),
        "nested, decimal, int128, time": (
            "import datetime, decimal\nv = pl.DataFrame({'s': [{'a': 1, 'b': 'x'}], 'l': [[1, 2]], 'f': pl.Series([[1, 2]], dtype=pl.Array(pl.Int8, 2)), 'd': [decimal.Decimal('1.50')], "
            "'i': pl.Series([2**100], dtype=pl.Int128), 't': [datetime.time(1, 2)], 'z': [datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)]}); schema = v.schema",
            "v.schema == schema and v['i'][0] == 2**100 and v['s'][0] == {'a': 1, 'b': 'x'}",
        ),
        "expressions": ("v = (pl.col('a') * 2).alias('b')", "pl.select(a=3).select(v)['b'][0] == 6"),
        "sorted, large": (
            "v = pl.select(a=pl.int_range(70_000)).with_columns(pl.col('a').set_sorted())",
            "v['a'].flags['SORTED_ASC']",
        ),
        "int128, large": (
            "v = pl.select(a=pl.int_range(70_000).cast(pl.Int128))",
            "v.schema['a'] == pl.Int128 and v['a'][-1] == 69_999",
        ),
    },
    "Arrow": {
        "Arrow, large": (
            "v = pa.table({'a': list(range(70_000)), 's': ['x', None] * 35_000}).slice(5, 60_000)",
            "v.num_rows == 60_000 and v['a'][0].as_py() == 5 and v['s'].null_count == 30_000",
        ),
        "arrow": (
            "v = pa.table({'a': [1, 2], 's': ['x', None], 'n': [[1], None]})",
            "v.column('n').to_pylist() == [[1], None]",
        ),
        "arrow slice": ("v = pa.array(range(1_000_000)).slice(10, 3)", "v.to_pylist() == [10, 11, 12]"),
        "all shapes": (
            "t = pa.table({'a': [1, 2]}, metadata={'k': 'v'}); v = [t, t.to_batches()[0], t['a'], pa.array(['x', 'y', 'x']).dictionary_encode(), pa.scalar(3), t.schema, pa.array([{'q': [1]}])]",
            "v[0].schema.metadata == {b'k': b'v'} and v[3].dictionary.to_pylist() == ['x', 'y'] and v[6][0].as_py() == {'q': [1]}",
        ),
    },
    "scikit-learn": {
        "sklearn": (
            "from sklearn.ensemble import RandomForestClassifier\nfrom sklearn.pipeline import make_pipeline\n"
            "from sklearn.preprocessing import StandardScaler\nX = np.arange(20.).reshape(10, 2); y = np.arange(10) % 2\n"
            "v = make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(X, y); p = v.predict_proba(X)",
            "(v.predict_proba(X) == p).all()",
        ),
        "fitted search with own transformer": (
            "from sklearn.base import BaseEstimator, TransformerMixin\nfrom sklearn.linear_model import LogisticRegression\nfrom sklearn.model_selection import GridSearchCV\n"
            "class Scale(TransformerMixin, BaseEstimator):\n    def __init__(self, by=1.0):\n        self.by = by\n    def fit(self, X, y=None):\n        return self\n    def transform(self, X):\n        return X * self.by\n"
            "X = np.arange(40.).reshape(20, 2); y = np.arange(20) % 2\nv = GridSearchCV(make_pipeline(Scale(), LogisticRegression()), {'scale__by': [0.1, 1]}, cv=2).fit(X, y); p = v.predict_proba(X)",
            "(v.predict_proba(X) == p).all() and type(v.best_estimator_[0]) is Scale",
        ),
        "KMeans, PCA, text": (
            "from sklearn.cluster import KMeans\nfrom sklearn.decomposition import PCA\nfrom sklearn.feature_extraction.text import TfidfVectorizer\n"
            "X = np.arange(40.).reshape(20, 2)\nv = [KMeans(2, n_init=1, random_state=0).fit(X), PCA(1).fit(X), TfidfVectorizer().fit(['a bc', 'bc de'])]; p = v[2].transform(['bc']).toarray()",
            "(v[2].transform(['bc']).toarray() == p).all() and v[0].predict(X).shape == (20,)",
        ),
    },
    "SciPy": {
        "sparse matrices of every format": (
            "m = sp.random(20, 20, 0.2, random_state=0); v = {f: m.asformat(f) for f in ('csr', 'csc', 'coo', 'lil', 'dok', 'dia', 'bsr')}; total = m.sum()",
            "all(abs(x.sum() - total) < 1e-9 and x.format == f for f, x in v.items())",
        ),
        "sparse arrays share their data": (
            "d = np.ones(3); v = sp.csr_array((d, (range(3), range(3))), shape=(3, 3)); v.data = d",
            "(d.__setitem__(0, 5.), v.data[0])[1] == 5",
        ),
        "distributions": ("import scipy.stats\nv = scipy.stats.norm(1, 2)", "v.mean() == 1"),
        "interpolators": (
            "import scipy.interpolate\nv = scipy.interpolate.CubicSpline([0, 1, 2], [0, 1, 4])",
            "abs(float(v(1)) - 1) < 1e-9",
        ),
    },
    "networkx": {
        "graph": (
            "v = nx.DiGraph(name='g'); v.add_edge('a', 'b', weight=[1]); v.nodes['a']['x'] = 3; nodes = v.nodes",
            "v['a']['b']['weight'] == [1] and v.nodes['a']['x'] == 3 and v.graph['name'] == 'g'",
        ),
    },
    "Matplotlib": {
        "figure and axes": (
            "fig, ax = plt.subplots(); x = np.arange(3.); ax.plot(x, label='l'); ax.set_title('T'); ax.legend(); plt.close(fig); v = fig",
            "v.axes[0] is ax and ax.get_title() == 'T' and ax.lines[0].get_ydata()[2] == 2 and v.savefig(io.BytesIO()) is None and not plt.get_fignums()",
        ),
        "figure that was drawn, with images, bars, dates and a color bar": (
            "fig, (a, b, c) = plt.subplots(1, 3, layout='constrained'); im = a.imshow(np.ones((3, 3))); fig.colorbar(im); b.bar(['x', 'y'], [1, 2]); b.twinx().plot([2, 1]); "
            "c.plot(np.array(['2020-01-01', '2020-02-01'], dtype='M8[D]'), [1, 2]); c.annotate('here', (0, 1)); fig.savefig(io.BytesIO()); plt.close(fig); v = [fig]",
            "len(v[0].axes) == 5 and (a.plot([1]), v[0].savefig(io.BytesIO()))[1] is None",
        ),
        "color map, norm": (
            "v = [plt.get_cmap('viridis'), matplotlib.colors.LogNorm(1, 10)]",
            "v[0](0.5)[3] == 1.0 and v[1](10) == 1.0",
        ),
    },
    "Pillow": {
        "image": (
            "v = PIL.Image.new('RGB', (300, 200), (1, 2, 3)); v.putpixel((5, 5), (9, 9, 9))",
            "v.getpixel((5, 5)) == (9, 9, 9) and v.size == (300, 200) and v.mode == 'RGB'",
        ),
        "palette image": (
            "v = PIL.Image.new('P', (4, 4)); v.putpalette([1, 2, 3] * 256)",
            "v.mode == 'P' and v.getpalette()[:3] == [1, 2, 3]",
        ),
    },
    "PyTorch": {
        "tensor": (
            "v = torch.arange(6.).reshape(2, 3); v.requires_grad_()",
            "v[1, 2].item() == 5 and v.requires_grad",
        ),
        "tensors share storage": (
            "t = torch.zeros(100_000); v = t[::2]",
            "(v.__setitem__(0, 5.), t[0].item())[1] == 5 and v.shape == (50_000,)",
        ),
        "module": (
            "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.l = torch.nn.Linear(3, 2)\n    def forward(self, x):\n        return self.l(x)\n"
            "v = Net(); x = torch.ones(3); p = v(x).detach()",
            "bool((v(x) == p).all()) and type(v) is Net",
        ),
        "module and its optimizer": (
            "v = torch.nn.Linear(3, 2); opt = torch.optim.Adam(v.parameters()); v(torch.ones(3)).sum().backward(); opt.step()",
            "opt.param_groups[0]['params'][0] is v.weight and (v(torch.ones(3)).sum().backward(), opt.step())[1] is None",
        ),
        "gradient": (
            "v = torch.ones(3, requires_grad=True); (v * 2).sum().backward()",
            "v.grad.tolist() == [2.0] * 3",
        ),
        "bfloat16, sparse, bool": (
            "v = [torch.ones(3, dtype=torch.bfloat16), torch.eye(3).to_sparse(), torch.tensor([True])]",
            "v[0].dtype == torch.bfloat16 and v[1].is_sparse",
        ),
        "the default generator": (
            "torch.manual_seed(5); torch.rand(1); v = torch.get_rng_state()",
            "bool((torch.get_rng_state() == v).all())",
        ),
        "generator": (
            "v = torch.Generator().manual_seed(3); torch.rand(1, generator=v); s = v.get_state()",
            "bool((v.get_state() == s).all())",
        ),
    },
}
# case → what `v` is; a part of the reason; a part of what to do instead
REFUSED: dict[str, tuple[str, str, str]] = {
    "open file": ("v = open(path, 'w')", "open file", "path"),
    "binary file": ("v = open(path, 'wb')", "open file", "path"),
    "generator": ("v = (i for i in 'ab')", "generator", "list"),
    "lock": ("v = threading.Lock()", "lock", "plain cell"),
    "thread": ("v = threading.Thread()", "Thread holds ", "plain cell"),
    "socket": ("v = socket.socket()", "connection", "plain cell"),
    "database": ("v = sqlite3.connect(':memory:')", "connection", "plain cell"),
    "coroutine": ("async def co(): pass\nv = co()", "coroutine", "await"),
    "figure that pyplot holds": (
        "import matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot as plt\nv = plt.figure()",
        "pyplot still holds open",
        "plt.close",
    ),
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
    "itertools": ("v = itertools.cycle([1])", "an iterator", "list"),
    "cursor": ("v = sqlite3.connect(':memory:').cursor()", "connection", "plain cell"),
    "DuckDB connection": ("v = duckdb.connect()", "connection", "plain cell"),
    "DuckDB relation": ("v = duckdb.sql('select 1 as a')", "connection", "plain cell"),
    "requests session": (
        "v = requests.Session(); v.hooks['response'].append(socket.socket())",
        "connection",
        "plain cell",
    ),
    "thread pool": ("v = concurrent.futures.ThreadPoolExecutor(1)", "ThreadPoolExecutor holds", "plain cell"),
    "future": ("v = concurrent.futures.Future()", "Future holds", "plain cell"),
    "queue": ("v = queue.Queue()", "Queue holds", "plain cell"),
    "event": ("v = threading.Event()", "Event holds", "plain cell"),
    "process": ("v = subprocess.Popen(['true']); v.wait()", "Popen holds", "plain cell"),
    "context variable": ("v = contextvars.ContextVar('v')", "ContextVar", "plain cell"),
    "event loop": ("v = asyncio.new_event_loop(); v.close()", "event loop", "plain cell"),
    "traceback": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    v = e.__traceback__",
        "traceback",
        "text",
    ),
    "function of singledispatch": (
        "v = functools.singledispatch(lambda x: 1)",
        "weak reference",
        "plain cell",
    ),
    "polars column of objects": ("v = pl.Series('o', [{1}], dtype=pl.Object)", "Object", "plain cell"),
    "class whose metaclass has code that runs": (
        "class Meta(type):\n    def __init__(cls, *a):\n        cls.made = 1\nclass v(metaclass=Meta): pass",
        "Meta.__init__",
        "plain cell",
    ),
    "task": ("loop = asyncio.new_event_loop(); v = loop.create_future(); loop.close()", "task", "await"),
    "weak reference to what is gone": (
        "v = weakref.ref(type('C', (), {})())",
        "weak reference",
        "object itself",
    ),
}


def table() -> str:
    """Return the table of types, as Markdown."""
    lines = [
        "# What a checkpoint can hold",
        "",
        "Made from the tests (`tests/contract/test_types.py`): each line is saved by one process and restored by another.",
        "Exact: equal in value and type, shared with other variables as before, and it behaves as before. By recipe: what",
        "can't be saved is made again (`durable.recipe`, `%%step --replay`, a plain cell). Refused: named with the reason.",
        "",
        "| of | what | restored |",
        "|---|---|---|",
    ]
    lines += [f"| {package} | {case} | exact |" for package, cases in EXACT.items() for case in cases]
    lines += [
        f"| | {case} | refused: {reason or 'named'}; {todo} |" for case, (_, reason, todo) in REFUSED.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
