"""Previews: text about a value, made in bounded time and space."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from nbdurable.checkpoint.preview import MAX_TEXT, describe


class Huge:
    """Its `repr` would take forever, or raise."""

    def __init__(self) -> None:
        self.data = list(range(1_000_000))
        self.more = {"k": self}

    def __repr__(self) -> str:
        raise AssertionError("a preview must not run it")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ("NoneType", "", "None")),
        (3, ("int", "", "3")),
        ("a text", ("str", "", "a text")),
        ([1, "b", None], ("list", "list[3]", "[1, 'b', None]")),
        ((1,), ("tuple", "tuple[1]", "(1,)")),
        ({"a": [1, {2}]}, ("dict", "dict[1]", "{'a': [1, set({2})]}")),
        (list(range(1000)), ("list", "list[1000]", "[0, 1, 2, 3, 4, 5, …]")),
        (b"x" * 200, ("bytes", "", f"b'{'x' * 80}…'")),
        (Path("/tmp/x"), ("PosixPath", "", "PosixPath('/tmp/x')")),
        (len, ("builtin_function_or_method", "", "<builtin_function_or_method>")),
        (int, ("type", "", "<class int>")),
        (np.arange(3), ("ndarray", "3", "[0 1 2]  int64")),
        (np.float32(2), ("float32", "", "2.0")),
    ],
)
def test_small_values_are_shown(value: Any, expected: tuple[str, str, str]) -> None:
    """People recognise their variables."""
    assert describe(value) == expected


LARGE: list[tuple[Any, str, str]] = [
    (
        pd.DataFrame({"a": range(1000), "s": ["long" * 100] * 1000, "o": [[1] * 10_000] * 1000}),
        "1000 × 3",
        "longlong",
    ),
    (pd.Series(range(1000), name="n"), "1000", "4"),
    (pd.DataFrame(np.zeros((3, 500))), "3 × 500", "0.0"),
    (pd.DataFrame(), "0 × 0", "Empty"),
    (pl.DataFrame({"a": range(1000)}), "1000 × 1", "i64"),
    (pa.table({"a": range(1000)}), "1000 × 1", "int64"),
    (np.zeros((100, 200, 300)), "100 × 200 × 300", "float64"),
    (np.array([Huge()], dtype=object), "1", "Huge"),
    (Huge(), "", "Huge(data=[0, 1"),
    ([Huge()] * 10_000, "list[10000]", "Huge(data="),
    (dict.fromkeys(range(100000), Huge), "dict[100000]", "Huge"),
    ("x" * 10_000_000, "", "xxx"),
    (10**100_000, "", "bits"),
    ("\ud800" * 5000, "", "ud800"),
]


@pytest.mark.parametrize("number", range(len(LARGE)))
def test_large_values_are_bounded(number: int) -> None:
    """A checkpoint is not slower for its preview, and no code of the user runs."""
    value, shape, words = LARGE[number]
    start = time.perf_counter()
    _, found, text = describe(value)
    assert time.perf_counter() - start < 2
    assert found == shape
    assert words in text
    assert len(text) <= MAX_TEXT * 6  # escapes of what can't be printed
    text.encode()
