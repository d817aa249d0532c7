"""Every type that people keep in notebooks: restored by another process as it was saved, or refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.fresh import Fresh
from tests.tools.types import EXACT, IMPORTS, REFUSED, table

DOCUMENT = Path(__file__).parents[2] / "nbdurable" / "checkpoint" / "TYPES.md"
HEAVY = (
    "numpy",
    "pandas",
    "polars",
    "pyarrow",
    "pydantic",
    "sklearn.pipeline",
    "matplotlib.pyplot",
    "torch",
    "httpx",
)
CASES = [(package, case) for package, cases in EXACT.items() for case in cases]


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[Fresh, Fresh]]:
    """Two worlds of different hash seeds: one saves, one restores."""
    heavy = [package for package in HEAVY if importlib.util.find_spec(package.partition(".")[0])]
    found = Fresh(1, *heavy), Fresh(2, *heavy)
    yield found
    for process in found:
        process.close()


@pytest.mark.parametrize(("package", "case"), CASES)
def test_a_restored_value_equals_what_was_saved(
    package: str, case: str, processes: tuple[Fresh, Fresh], tmp_path: Path
) -> None:
    """Guarantee 7: with its type, and with what it shares; guarantee 6: in another process, of another hash seed."""
    plain = IMPORTS[package]
    if package == "PyTorch":
        pytest.importorskip("torch")
    make, holds = EXACT[package][case]
    save, restore = processes
    made = save("saved", folder=str(tmp_path), plain=plain, make=make)
    found = restore("restored", folder=str(tmp_path), plain=plain, signed=made["signed"], holds=holds)
    assert found == {"unsaved": {}, "unequal": [], "type": made["type"], "holds": True}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_is_named_with_its_reason(
    case: str, processes: tuple[Fresh, Fresh], tmp_path: Path
) -> None:
    """Guarantee 7: refused by name, never silently different; other variables of the step are saved."""
    make, reason, todo = REFUSED[case]
    plain = f"{IMPORTS['Resources']}\npath = {str(tmp_path / 'file')!r}"
    save, restore = processes
    made = save("saved", folder=str(tmp_path), plain=plain, make=f"other = [1]\n{make}")
    found = restore("restored", folder=str(tmp_path), plain=plain, signed=made["signed"], holds="")
    assert "other" not in found["unsaved"]
    assert reason in found["unsaved"]["v"]
    assert todo in found["unsaved"]["v"]
    assert found["type"] == "Unsaved"


def test_the_table_of_types_says_what_the_tests_hold() -> None:
    """`python -m tests.tools.types` writes it."""
    assert DOCUMENT.read_text(encoding="utf-8") == table()
