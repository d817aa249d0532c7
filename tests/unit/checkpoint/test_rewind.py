"""A namespace goes back to what it was before a cell that failed (guarantee 6: a later try begins from there)."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdurable.checkpoint.analysis import analyse, uses
from nbdurable.checkpoint.manifest import Manifest, unseal
from nbdurable.checkpoint.rewind import Rewind
from nbdurable.checkpoint.state import as_of
from tests.tools.cells import KEY, Cells

PLAIN = "import numpy as np\nconfig = {'n': 1}\ngenerator = (n for n in range(9))"
STEP = (
    "rows = [[1], [2]]\nalias = rows\nfirst = rows[0]\narray = np.arange(5)\nname = 'kept'\nother = [rows, 7]"
)


class Tried:
    """A plain cell and a step that left a checkpoint, and a way back from what comes next."""

    def __init__(self, folder: Path) -> None:
        self.cells = Cells(folder, PLAIN)
        self.manifest: Manifest = unseal(self.cells.step(STEP, "load"), KEY, of="load")

    def fail(self, source: str) -> frozenset[str]:
        """Run a cell and go back; return what could not be put back."""
        cells = self.cells
        names = analyse(ast.parse(source), source)
        mentioned = uses(names.loads, cells.namespace, cells.folder).inputs.keys() | names.loads
        rewind = Rewind(cells.namespace, cells.tracker, cells.tracker.snapshot())
        cells.run(source)
        return rewind.back(as_of([self.manifest]), cells.blobs, mentioned)


@pytest.fixture
def tried(tmp_path: Path) -> Tried:
    return Tried(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "new = 1\nname = 'other'",
        "del name, rows",
        "rows.append([3])",
        "first.append(0)",
        "rows[0] = [1]",  # equal, but `first` is another object then
        "array[0] = 9\nalias = []",
        "config = {}\nconfig['n'] = 2",
        "rows, alias, other = 1, 2, 3\nname += '!'",
        "import random\nrandom.random()\nnp.random.rand()",
    ],
)
def test_what_checkpoints_hold_is_put_back(tried: Tried, source: str) -> None:
    """Values, bindings, sharing, random state: all as before, and what was created is gone."""
    random.seed(3)
    before, dice = tried.cells.fingerprints(), random.getstate()
    assert tried.fail(source) == frozenset()
    assert tried.cells.fingerprints() == before
    assert random.getstate() == dice
    assert tried.cells["alias"] is tried.cells["rows"] is tried.cells["other"][0]
    assert tried.cells["first"] is tried.cells["rows"][0]


@pytest.mark.parametrize(
    ("source", "lost"),
    [
        ("config['n'] = 2\nrows.append(3)", {"config"}),
        ("next(generator)", {"generator"}),
    ],
)
def test_what_no_checkpoint_holds_is_named(tried: Tried, source: str, lost: set[str]) -> None:
    """Guarantee 7: never silently another value; what can be put back is."""
    assert tried.fail(source) == lost
    assert tried.cells["rows"] == [[1], [2]]


def test_a_plain_alias_of_a_checkpointed_object_is_not_torn_off(tried: Tried) -> None:
    """The object can be loaded again, but what a plain cell holds of it would be another one."""
    tried.cells.run("view = rows")
    assert "view" in tried.fail("rows.append(3)")


STATEMENTS = st.lists(
    st.sampled_from(
        ["rows.append([n])", "first.append(n)", "alias = list(rows)", "other[0] = rows[0]", "del name", "name = rows",
         "array += n", "array = array[1:]", "extra = [rows, first]", "rows, other = other, rows",
         "rows[:] = rows[::-1]", "first = first[:]"]
    ),
    max_size=5,
)  # fmt: skip


@given(STATEMENTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_try_leaves_no_trace(tmp_path: Path, statements: list[str]) -> None:
    """Guarantee 6: what a later try finds does not depend on what an earlier one did, down to sharing."""
    tried = Tried(tmp_path)
    before = tried.cells.tracker.snapshot()
    body = "\n".join(f"    {statement}" for statement in statements)
    assert tried.fail(f"n = 3\ntry:\n    pass\n{body}\nexcept Exception:\n    pass") == frozenset()
    assert tried.cells.tracker.differences(before) == frozenset()
