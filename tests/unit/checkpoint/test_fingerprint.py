# ruff: noqa: E501 -- one case a line reads as a table
"""Fingerprints: equal for equal values in every process, different for every difference."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from nbdurable.checkpoint.fingerprint import (
    Unfingerprintable,
    code_bytes,
    fingerprint,
    immutable,
    partial_fingerprint,
)
from tests.tools.cells import Cells

MANY = """
import collections, dataclasses, datetime, enum, functools, re
import numpy as np, pandas as pd, polars as pl, pyarrow as pa, pydantic
from sklearn.linear_model import LogisticRegression

@dataclasses.dataclass
class D:
    a: int = 1
    b: list = dataclasses.field(default_factory=list)
    def __hash__(self):
        return hash((self.a, "x"))

class E(enum.Enum):
    A = 1
    B = "x"

class M(pydantic.BaseModel):
    x: int = 3
    tags: set[str] = {"a", "b", "c"}

def make():
    n = [0]
    def inc(k={"p", "q", "r"}):
        n[0] += 1
        return n[0] in {"a", "b", "c"} or (lambda: {1: frozenset({"x", "y", "z"})})
    return inc

class Slotted:
    __slots__ = ("p", "q")
    def __init__(self):
        self.p, self.q = {"s", "t", "u"}, self

class Dynamic(type("Base", (), {"n": 1})):
    pass

inc = make()
slotted, dynamic = Slotted(), Dynamic()
members = {D(1, ["x"]), D(2, ["y"]), D(3), (D(4), "q"), frozenset({"m", "n"}), "z", 5}
cycle = {"me": None}
cycle["me"] = [cycle, {("a", "b"), ("c", None)}]
@functools.lru_cache(maxsize=3)
def cached(x):
    return x
strings = {"a", "b", "c", "d", "e"}
enums = {E.A: 1, E.B: {E.A, E.B}}
model = M(x=4)
frame = pd.DataFrame({"a": [1, 2], "s": ["x", None], "c": pd.Categorical(["b", "a"])})
lazy = pl.LazyFrame({"a": [1]}).filter(pl.col("a") > 0)
table = pa.table({"a": [1], "d": pa.array(["x"]).dictionary_encode()})
fitted = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
generator = np.random.default_rng(3)
pattern = re.compile("a+")
when = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
counted = collections.Counter("abca")
"""


def _elsewhere(folder: Path, hash_seed: str, lines_above: int) -> dict[str, str]:
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.tools.cells import Cells\n"
        "source = (Path(sys.argv[1]) / 'many.py').read_text()\n"
        "print(json.dumps(Cells(Path(sys.argv[1]), '\\n' * int(sys.argv[2]) + source).fingerprints()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(lines_above)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    found: dict[str, str] = __import__("json").loads(done.stdout)
    return found


def test_processes_hash_seeds_and_moved_lines_agree(tmp_path: Path) -> None:
    """Guarantee 6: a resumed run compares fingerprints that another process made."""
    (tmp_path / "many.py").write_text(MANY)
    here = Cells(tmp_path, MANY).fingerprints()
    assert len(here) > 25
    assert not [name for name, digest in here.items() if ":" in digest]
    assert here == _elsewhere(tmp_path, "1", 0)
    assert here == _elsewhere(tmp_path, "2", 7)


class _Plain:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def _shared() -> list[Any]:
    part = [1]
    return [part, part]


FRAME = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
DIFFERENT: list[Any] = [
    None, False, True, 0, 1, 0.0, -0.0, 1.0, float("nan"), float("inf"), 1j, "", "1", "a", b"1", bytearray(b"1"),
    memoryview(b"1"), [], (), {}, set(), frozenset(), [1], [1.0], [True], [None], (1,), [[1]], [(1,)], {1: 1}, {1}, frozenset({1}),
    {"a": 1, "b": 2}, {"b": 2, "a": 1}, [[1], [1]], _shared(), ["ab", "c"], ["a", "bc"], [1, [2]], [[1], 2],
    int, float, len, np, _Plain(), _Plain(a=1), _Plain(b=1), _Plain(a=1.0), range(3), slice(3), ...,
    np.int64(1), np.int32(1), np.float64(1), np.array(1), np.array([1]), np.array([[1]]), np.array([1.0]), np.array([1], dtype="u1"),
    np.array([1], dtype=object), np.array(["a"]), np.array([], dtype="f4"), np.zeros((0, 2)), np.zeros((2, 0)),
    FRAME, FRAME.rename(columns={"a": "c"}), FRAME.iloc[::-1], FRAME.astype({"a": "f8"}), FRAME.astype({"b": object}), FRAME["a"],
    FRAME["a"].rename("z"), FRAME.set_index("b"), FRAME.index, pd.Index([0, 1]), FRAME.assign(a=[1, 3]), pd.Timestamp("2020"), pd.NaT, pd.NA,
    pl.DataFrame({"a": [1]}), pl.DataFrame({"b": [1]}), pl.DataFrame({"a": [2]}), pl.Series("a", [1]), pl.Series("a", [1], dtype=pl.Int8),
    pa.table({"a": [1]}), pa.table({"a": [1.0]}), pa.array([1]), pa.array([1, None]), pa.chunked_array([[1]]), pa.int8(), pa.scalar(1),
    pl.DataFrame({"c": pl.Series(["a"], dtype=pl.Categorical)}), pl.DataFrame({"c": pl.Series(["b"], dtype=pl.Categorical)}),
]  # fmt: skip


def test_different_values_differ() -> None:
    """Guarantee 7: type, order, sharing, names and dtypes are part of a value."""
    seen: dict[str, Any] = {}
    for value in DIFFERENT:
        digest = fingerprint(value)
        assert digest not in seen, (value, seen[digest])
        seen[digest] = value


def test_equal_values_are_equal() -> None:
    """A copy, another memory layout or another chunk border is the same value."""
    for value in DIFFERENT:
        if type(value) not in (memoryview, type(np)):
            assert fingerprint(value) == fingerprint(copy.deepcopy(value)), value
    grid = np.arange(6).reshape(2, 3)
    assert (
        fingerprint(grid)
        == fingerprint(np.asfortranarray(grid))
        == fingerprint(np.arange(12).reshape(2, 6)[:, ::2] // 2)
    )
    assert fingerprint(pa.chunked_array([[1], [2]])) == fingerprint(pa.chunked_array([[1, 2]]))
    assert fingerprint(pa.array([0, 1, 2, 3])[1:3]) == fingerprint(pa.array([1, 2]))
    assert fingerprint([(1, 2), (1, 2)]) == fingerprint([(1, int("2"))] * 2)


CODE = [
    "def f(x):\n    return x + 1",
    "def f(x):\n    return x + 2",
    "def f(x):\n    return x - 1",
    "def f(y):\n    return y + 1",
    "def f(x=1):\n    return x + 1",
    "def f(x=2):\n    return x + 1",
    "def f(x, *, k=2):\n    return x + 1",
    "def f(x):\n    return x + g",
    "def f(x):\n    return x + h",
    "def f(x):\n    return [x + 1 for x in x]",
    "def f(x):\n    return {'a', 'b'}",
    "def f(x):\n    return {'a', 'c'}",
    "def f(x):\n    return x + 1\nf.unit = 1",
    "def make(n):\n    def f(x):\n        return x + n\n    return f\nf = make(1)",
    "def make(n):\n    def f(x):\n        return x + n\n    return f\nf = make(2)",
    "async def f(x):\n    return x + 1",
    "def f(x):\n    yield x + 1",
    "class f:\n    n = 1",
    "class f:\n    n = 2",
    "class f(dict):\n    n = 1",
    "class f:\n    def n(self): return 1",
    "class f:\n    def n(self): return 2",
    "class f:\n    @property\n    def n(self): return 1",
    "class f:\n    @staticmethod\n    def n(self): return 1",
    "import pydantic\nclass f(pydantic.BaseModel):\n    n: int = 1",
    "import pydantic\nclass f(pydantic.BaseModel):\n    n: int = 2",
    "import enum\nclass f(enum.Enum):\n    A = 1",
    "import enum\nclass f(enum.Enum):\n    A = 2",
    "import enum\nclass f(enum.Enum):\n    B = 1",
]


def test_code_counts_without_the_lines_on_which_it_stands(tmp_path: Path) -> None:
    """A function moved to another line is the same; any other change makes another one."""
    digests = [Cells(tmp_path, source).fingerprints()["f"] for source in CODE]
    assert len(set(digests)) == len(CODE)
    moved = [Cells(tmp_path, f"# above\n\n{source}  # beside").fingerprints()["f"] for source in CODE]
    assert digests == moved


def test_what_a_value_merely_refers_to_counts_by_name(tmp_path: Path) -> None:
    """An edited helper changes itself, not every variable that holds it or an instance of it."""
    first = Cells(tmp_path, "class C:\n    n = 1\ndef f():\n    return 1\nv = [C(), f]").fingerprints()
    other = Cells(tmp_path, "class C:\n    n = 2\ndef f():\n    return 2\nv = [C(), f]").fingerprints()
    assert first["v"] == other["v"]
    assert first["C"] != other["C"]
    assert first["f"] != other["f"]


def test_looking_leaves_no_trace() -> None:
    """Pickling an instance writes `__slotnames__` into its class; a fingerprint must not."""

    class Fresh:
        pass

    fingerprint([Fresh()])
    assert "__slotnames__" not in vars(Fresh)
    masked = np.ma.array([1.0])
    fingerprint(masked)
    assert masked._fill_value is None


class _Raises:
    def __reduce__(self) -> Any:
        raise OSError("no way")


class _Endless:
    def __reduce__(self) -> Any:
        return (_Endless, (_Endless(),))


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        ([1, {"k": (x for x in "ab")}], "[1]['k']", "generator"),
        (_Plain(a=[_Raises()]), ".a[0]", "no way"),
        ({1, frozenset({_Raises()})}, "", "no way"),
        (_Endless(), "", "nest"),
    ],
)
def test_what_cannot_be_fingerprinted_is_named(value: Any, path: str, reason: str) -> None:
    """Guarantee 11: where it is, and why; a pathological `__reduce__` ends."""
    with pytest.raises(Unfingerprintable) as error:
        fingerprint(value)
    assert error.value.path.startswith(path)
    assert reason in error.value.reason


def test_deep_nesting_is_no_trouble() -> None:
    """Python's own stack does not bound what can be compared."""
    deep: list[Any] = []
    for _ in range(8000):
        deep = [deep]
    assert fingerprint(deep) != fingerprint(deep[0])


def test_the_rest_of_a_partly_closed_value_still_counts(tmp_path: Path) -> None:
    """A change beside something that can't be looked into is found."""
    agent = _Plain(client=_Raises(), notes=[])
    first, problems, _ = partial_fingerprint(agent)
    agent.notes.append(1)
    assert partial_fingerprint(agent)[0] != first
    assert [problem.path for problem in problems] == [".client"]


@pytest.mark.parametrize(
    ("value", "expected"), [(1, True), ("a", True), ((1, ("a",)), True), ((1, []), False), ([], False)]
)
def test_only_what_cannot_change_is_remembered(value: Any, expected: bool) -> None:
    """A remembered fingerprint must stay true."""
    assert immutable(value) is expected


@pytest.mark.parametrize(
    "make",
    [
        "pa.array([f'text {i}' for i in range(100)])",
        "pa.array([f'text {i}' for i in range(100)], pa.large_string())",
        "pa.array([f'a long text {i}' for i in range(100)], pa.string_view())",
        "pa.array([i % 3 == 0 for i in range(100)])",
        "pa.array([None if i % 7 == 0 else i for i in range(100)], pa.int16())",
        "pa.array([[i] * (i % 3) for i in range(100)])",
        "pa.array([{'a': str(i)} for i in range(100)])",
        "pa.array([str(i % 4) for i in range(100)]).dictionary_encode()",
    ],
)
@pytest.mark.parametrize("part", [(0, 97), (5, 95), (3, 40), (16, 0)])
def test_arrow_counts_by_its_values(make: str, part: tuple[int, int]) -> None:
    """Guarantee 7: a slice is what its values are, whatever stands beside them in memory."""
    import pyarrow as pa

    whole = eval(make, {"pa": pa})
    sliced = whole.slice(*part)
    assert fingerprint(sliced) == fingerprint(pa.concat_arrays([sliced, sliced.slice(0, 0)]))
    chunked = pa.chunked_array([sliced.slice(0, 2), sliced.slice(2)], whole.type)
    assert fingerprint(chunked) == fingerprint(pa.chunked_array([sliced]))
    assert fingerprint(sliced) != fingerprint(whole)
    if not isinstance(whole, pa.DictionaryArray):
        assert fingerprint(sliced) == fingerprint(pa.array(sliced.to_pylist(), whole.type))


def _tree(count: int = 3) -> list[Any]:
    return [{"i": i, "t": ["x", [i]], "p": (i, "y")} for i in range(count)]


def _with_shared(value: list[Any], *, apart: bool) -> list[Any]:
    inner = copy.deepcopy(value[1]["t"]) if apart else value[1]["t"]
    return [value, {1, 2}, inner]  # the set makes the whole no tree, so the parts are looked at one by one


# id: two values that look alike; the fast way through plain trees must tell them apart
TREES: dict[str, tuple[Any, Any]] = {
    "a member shared within": ([(x := [1]), x, [2, [3]]], [[1], [1], [2, [3]]]),
    "shared at different depths": ([(y := {"a": [1]}), [y]], [{"a": [1]}, [{"a": [1]}]]),
    "shared from outside": (_with_shared(_tree(), apart=False), _with_shared(_tree(), apart=True)),
    "another member shared": ([(t := _tree()), {1}, t[0]], [(u := _tree()), {1}, u[2]]),
    "bool and int": ([[1], [True]], [[1], [1]]),
    "int and float": ([[1], {"a": 1}], [[1], {"a": 1.0}]),
    "zeros": ([[0.0]], [[-0.0]]),
    "bytes and text": ([["a"]], [[b"a"]]),
    "list and tuple": ([[1], (2,)], [[1], [2]]),
    "order of a dict": ([{"a": [1], "b": [2]}], [{"b": [2], "a": [1]}]),
    "key and value": ([{"a": [], "b": "c"}], [{"b": [], "a": "c"}]),
    "borders of lists": ([[1, [2]], [3]], [[1], [[2], 3]]),
    "behind the first batch": ([[i] for i in range(9000)], [[i if i != 8999 else 0] for i in range(9000)]),
    "an object among atoms": ([1, {3}, None], [1, None, {3}]),
    "an ellipsis among atoms": ([1, ..., {3}], [1, None, {3}]),
    "bytes and bytearray": ([[b"a"]], [[bytearray(b"a")]]),
    "list and subclass": ([[1]], [type("L", (list,), {})([1])]),
}


@pytest.mark.parametrize("case", TREES)
def test_the_fast_way_tells_trees_apart(case: str) -> None:
    """Guarantee 7: values, types, order and sharing count, however they are walked."""
    one, other = TREES[case]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))
    assert fingerprint(other) == fingerprint(copy.deepcopy(other))


def test_a_tree_that_leads_back_to_itself_ends_soon() -> None:
    """Bad input: each level would be twice as wide as the one before."""
    value: list[Any] = []
    value += [value, value]
    twin: list[Any] = []
    twin += [twin, twin]
    assert fingerprint(value) == fingerprint(twin)
    ladder: list[Any] = [1]
    for _ in range(200):
        ladder = [ladder, ladder]
    assert fingerprint(ladder) == fingerprint(copy.deepcopy(ladder))


def test_a_dict_of_an_object_counts_by_its_order_of_insertion() -> None:
    """The position of what is shared must not depend on how Python lays out the attributes of a class."""

    class Holder:
        def __init__(self) -> None:
            self.first, self.second = [1], [2]

    late = Holder.__new__(Holder)
    late.second, late.first = [2], [1]
    plain = {"second": (second := [2]), "first": [1]}
    assert fingerprint([vars(late), {1}, late.second]) == fingerprint([plain, {1}, second])


def test_where_a_functions_lines_break_does_not_count() -> None:
    """Guarantee 1: Python compiles in an instruction that does nothing where `return` stands above its constant."""

    def code(source: str) -> bytes:
        space: dict[str, Any] = {}
        exec(source, space)
        return code_bytes(space["f"].__code__)

    source = (
        "def f(a):\n    try:\n        for i in a:\n            if i:\n                return {}\n"
        "    except ValueError:\n        return {}\n"
    )
    one = code(source.format("'x'", "'y'"))
    assert code(source.format("(\n'x'\n)", "\\\n 'y'")) == one
    assert code(source.format("'y'", "'x'")) != one
    assert code(source.format("'x'", "'y'").replace("if i:", "if not i:")) != one
    assert code(source.format("'x'", "'y'").replace("ValueError", "KeyError")) != one
