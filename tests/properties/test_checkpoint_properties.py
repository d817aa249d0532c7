"""Properties of fingerprints and round trips, over generated values with sharing between their parts."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdurable.checkpoint.fingerprint import fingerprint
from tests.tools.cells import Cells

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters(codec=None, exclude_categories=[]), max_size=8),
    st.binary(max_size=8),
    st.dates(),
    st.decimals(allow_nan=False),
)
HASHABLE = st.recursive(
    ATOMS, lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)), max_leaves=4
)
ARRAYS = st.builds(
    lambda items, kind: np.array(items, dtype=kind),
    st.lists(st.integers(0, 100), max_size=5),
    st.sampled_from(["i4", "f8", "u1", "U3", "O", "M8[s]"]),
)


class Item:
    """An object with attributes."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(HASHABLE, inner, max_size=3),
        st.sets(HASHABLE, max_size=4),
        st.builds(Item, st.dictionaries(st.sampled_from("abc"), inner)),
        inner.map(lambda part: [part, part]),  # shared
        inner.map(lambda part: {"first": part, "second": [part, [part]]}),
        st.lists(inner, max_size=2).map(lambda part: (part.append(part), part)[1]),  # a cycle
    )


VALUES = st.recursive(st.one_of(ATOMS, ARRAYS, st.builds(bytearray)), _containers, max_leaves=12)


def _same_shape(left: Any, right: Any, seen: set[int]) -> bool:
    """Compare types all through, and contents, without fingerprints."""
    if type(left) is not type(right):
        return False
    if id(left) in seen:
        return True
    seen.add(id(left))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(
            _same_shape(a, b, seen) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, dict):
        pairs = zip(left.items(), right.items(), strict=True)
        return len(left) == len(right) and all(_same_shape(list(a), list(b), seen) for a, b in pairs)
    if isinstance(left, Item):
        return _same_shape(vars(left), vars(right), seen)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tolist() == right.tolist()
    if isinstance(left, set | frozenset):
        return sorted(map(fingerprint, left)) == sorted(map(fingerprint, right))
    return repr(left) == repr(right)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_a_copy_has_the_same_fingerprint(value: Any) -> None:
    """Guarantee 7: a fingerprint is of the value, not of the objects that hold it."""
    assert fingerprint(value) == fingerprint(copy.deepcopy(value))


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_looking_changes_nothing(value: Any) -> None:
    """A fingerprint can be taken at any time, any number of times."""
    first = fingerprint(value)
    assert fingerprint(value) == first
    assert fingerprint([value]) != first


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES)
def test_values_with_one_fingerprint_are_the_same(left: Any, right: Any) -> None:
    """Guarantee 7: different values, types or orders differ."""
    if fingerprint(left) == fingerprint(right):
        assert _same_shape(left, right, set())
    else:
        assert left is not right


@settings(max_examples=100, deadline=None)
@given(VALUES, VALUES)
def test_what_is_saved_comes_back(one: Any, two: Any) -> None:
    """Guarantee 7: value, type, and sharing within and between variables."""
    with tempfile.TemporaryDirectory() as folder:
        before = Cells(Path(folder))
        before.namespace.update(one=one, two=two, both=[one, two])
        changes = before.watch("pair = (one, two); last = both; one = one; two = two")
        written = before.checkpoint(changes)
        # everything that shares a mutable object with `pair` came along
        after = Cells(Path(folder))
        manifest = after.restore(written)
        assert [variable.reason for variable in manifest.variables if variable.state != "saved"] == []
        for name, digest in manifest.fingerprints.items():
            assert (
                fingerprint(after[name], after.namespace)
                == digest
                == fingerprint(before[name], before.namespace)
            )
            assert _same_shape(before[name], after[name], set())
        assert (after["last"][0] is after["pair"][0]) == (
            before["last"][0] is before["pair"][0]
        ) or not isinstance(one, list | dict | set | Item | np.ndarray | bytearray)
