"""What differs between two values: frames, arrays, structures, as JSON and as lines for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy
import pandas
import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdurable.checkpoint.diff import PATHS, compare, sentences


def lines(before: Any, after: Any) -> list[str]:
    found = compare(before, after)
    json.dumps(found, allow_nan=True)
    return sentences(found)


def test_a_frames_schema_rows_and_values() -> None:
    """Issue 3, item 9: columns and types, rows by label, values with examples."""
    before = pandas.DataFrame(
        {"a": [1, 2, 3], "b": ["x", "y", None], "c": [0.5, None, 1.5]}, index=[10, 11, 12]
    )
    after = pandas.DataFrame(
        {"a": [1.0, 5.0, 4.0], "b": ["x", "z", None], "d": [1, 2, 3]}, index=[10, 11, 13]
    )
    found = compare(before, after)
    assert (found["columns_added"], found["columns_removed"]) == (["d"], ["c"])
    assert found["types"]["a"] == ["int64", "float64"]
    assert (found["rows"], found["rows_added"], found["rows_removed"]) == ([3, 3], 1, 1)
    assert {name: change["changed"] for name, change in found["columns"].items()} == {"a": 1, "b": 1}
    assert found["columns"]["b"]["examples"] == [["11", "'y'", "'z'"]]
    assert "column b: 1 values differ: [11] 'y' → 'z'" in sentences(found)


@pytest.mark.parametrize(
    "column",
    [
        pandas.Series([1.0, None, 3.0]),
        pandas.Series([1, None, 3], dtype="Int64"),
        pandas.Series(["a", None, "c"], dtype="category"),
        pandas.Series(pandas.to_datetime(["2026-01-01", None, "2026-01-03"], utc=True)),
        pandas.Series([{"a": 1}, None, [1, 2]], dtype=object),
        polars.Series("value", [1, None, 3]),
        polars.Series("value", [[1], None, [3]]),
        numpy.array([1.0, numpy.nan, 3.0]),
        numpy.array(["a", None, numpy.nan], dtype=object),
        numpy.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
    ],
    ids=str,
)
def test_equal_values_have_no_differences(column: Any) -> None:
    """Missing values are equal to each other, whatever stands for them."""
    assert lines(column, column.copy() if hasattr(column, "copy") else column.clone()) == []


def test_a_polars_frame() -> None:
    """Rows are compared by position; a type that changed does not hide an equal value."""
    before = polars.DataFrame({"n": [1, 2, None], "s": ["a", "b", "c"]})
    after = polars.DataFrame({"n": [1.0, 3.0, None, 4.0], "s": ["a", "b", "c", "d"]})
    assert lines(before, after) == [
        "column n: Int64 → Float64",
        "rows: 3 → 4 (1 new, 0 gone)",
        "column n: 1 values differ: [1] 2 → 3.0",
    ]


def test_an_arrays_statistics() -> None:
    """Issue 3, item 9: how many values changed, by how much, and what became of minimum, mean and maximum."""
    before = numpy.array([[1.0, numpy.nan], [3.0, 4.0]])
    after = numpy.array([[1.0, numpy.nan], [3.5, 7.0]])
    found = compare(before, after)
    assert (found["changed"], found["largest_change"]) == (2, 3.0)
    assert found["statistics"][1] == {"min": 1.0, "mean": 11.5 / 3, "max": 7.0, "nan": 1}
    assert sentences(found)[0] == "2 values differ, by 3 at most: [1, 0] 3.0 → 3.5; " + ("[1, 1] 4.0 → 7.0")
    assert lines(numpy.zeros(3), numpy.zeros((3, 1), dtype="float32"))[:2] == [
        "dtype: float64 → float32",
        "shape: [3] → [3, 1]",
    ]


@dataclass
class Point:
    x: int
    tags: set[str]


def test_a_structures_places() -> None:
    """Issue 3, item 9: each place that differs, by its path; lists, dicts, sets, objects, tables inside."""
    before = {"a": [1, 2], "p": Point(1, {"old"}), "t": pandas.DataFrame({"n": [1]}), "gone": 1}
    after = {"a": [1, 3, 4], "p": Point(2, {"new"}), "t": pandas.DataFrame({"n": [2]}), "b": None}
    assert lines(before, after) == [
        "len(['a']): 2 → 3",
        "['a'][1]: 2 → 3",
        "['p'].tags: 'old' → nothing",
        "['p'].tags: nothing → 'new'",
        "['p'].x: 1 → 2",
        "['t']: DataFrame → column n: 1 values differ: [0] 1 → 2",
        "['gone']: 1 → nothing",
        "['b']: nothing → None",
    ]


def test_what_is_told_is_bounded_also_for_cyclic_and_very_large_structures() -> None:
    """Guarantee 11: no value makes a comparison go on without end."""
    cyclic, other = [1], [1]
    cyclic.append(cyclic)  # type: ignore[arg-type]
    other.append(other)  # type: ignore[arg-type]
    assert lines(cyclic, other) == []
    found = compare(list(range(1000)), list(range(1, 1001)))
    assert (len(found["differences"]), found["more"]) == (PATHS, True)


def test_each_side_may_have_its_own_copy_of_a_notebooks_classes() -> None:
    """Guarantee 7: values are told apart by what they hold, not by which load made their class."""
    source = (
        "import enum, dataclasses\n"
        "class Net: pass\n"
        "@dataclasses.dataclass\nclass Row:\n    n: int\n"
        "class Slots:\n    __slots__ = ('a',)\n"
        "class Colour(enum.Enum):\n    RED = 1\n"
        "def made(n):\n    slots = Slots()\n    slots.a = n\n    net = Net()\n    net.layers = [n]\n"
        "    return [Row(n), slots, net, Colour.RED, Net, lambda: 1]\n"
    )
    sides: list[dict[str, Any]] = [{"__name__": "__main__"}, {"__name__": "__main__"}]
    for side in sides:
        exec(source, side)
    assert lines(sides[0]["made"](1), sides[1]["made"](1)) == []
    assert lines(sides[0]["made"](1), sides[1]["made"](2)) == [
        "[0].n: 1 → 2",
        "[1].a: 1 → 2",
        "[2].layers[0]: 1 → 2",
    ]
    assert lines([lambda: 1], [lambda: 2])


class Hostile:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_objects_that_refuse_to_be_compared_or_printed() -> None:
    """Guarantee 11: an object's own errors are not ours."""
    assert lines([Hostile(), 1], [Hostile(), 2]) == ["[1]: 1 → 2"]
    assert len(lines(Hostile(), 1)) == 1


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)
    )
)
def test_a_value_does_not_differ_from_its_copy(value: Any) -> None:
    """Guarantee 11: nothing is invented."""
    assert lines(value, json.loads(json.dumps(value))) == []
