"""What a restore has just put there is known, until anything else may have run (guarantees 7 and 9)."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from nbdurable.checkpoint.manifest import Manifest, unseal
from nbdurable.checkpoint.restore import restore
from tests.tools.cells import KEY, Cells

CLASS = (
    "class Own:\n    def __setstate__(self, state):\n        vars(self).update(state)\n"
    "        globals()['rows'].append('set')"
)


def put_back(cells: Cells, manifest: Manifest) -> None:
    """Do as the kernel does (`kernel/step.py`)."""
    written = [*(variable.name for variable in manifest.variables), *manifest.deleted]
    plain = restore(manifest, cells.namespace, cells.blobs, ready=lambda: cells.tracker.make_room(written))
    cells.tracker.put_back(
        [name for name in written if name in cells.namespace], manifest.fingerprints, plain
    )


def manifests(cells: Cells, *sources: str) -> list[Manifest]:
    return [unseal(cells.step(source, f"s{n}"), KEY, of="it") for n, source in enumerate(sources)]


def looks(cells: Cells, name: str) -> bool:
    """Tell whether a variable is looked at: it is changed behind the tracker's back, and changed again."""
    before = cells.tracker.fingerprint(name)
    cells[name].append(None)
    after = cells.tracker.fingerprint(name)
    cells[name].pop()
    return before != after


@pytest.fixture
def resumed(tmp_path: Path) -> Cells:
    return Cells(tmp_path, "import numpy", CLASS)


def test_what_only_restores_have_put_there_is_not_looked_at(tmp_path: Path, resumed: Cells) -> None:
    """In the block the recorded fingerprint counts, also of what was replaced; behind it nothing is known."""
    ran = Cells(tmp_path, "import numpy")
    first, second, third = manifests(
        ran, "rows = [1]\narray = numpy.zeros(9)", "rows.append(2)", "other = {'a': (1, 2.5)}"
    )
    with resumed.tracker.only_restores():
        for manifest in (first, second, third):
            put_back(resumed, manifest)
        assert [looks(resumed, "rows"), resumed["rows"]] == [False, [1, 2]]
        for name in ("rows", "array", "other"):
            assert resumed.tracker.fingerprint(name) == ran.tracker.fingerprint(name)
        resumed.namespace["rows"] = [3]
        assert looks(resumed, "rows")  # it is another object
        resumed.namespace["array"] = numpy.ones(9)
        assert resumed.tracker.fingerprint("array") != ran.tracker.fingerprint("array")
    put_back(resumed, third)
    put_back(resumed, first)
    assert looks(resumed, "rows")


def test_code_of_the_notebook_that_a_restore_runs_ends_it(tmp_path: Path, resumed: Cells) -> None:
    """Loading an object of the notebook's class may change anything: what was put there before is looked at again."""
    ran = Cells(tmp_path, CLASS)
    first, second, third = manifests(ran, "rows = [1]", "own = Own()\nown.x = 1", "rows2 = [5]")
    with resumed.tracker.only_restores():
        put_back(resumed, first)
        put_back(resumed, second)
        put_back(resumed, third)
        assert resumed["rows"] == [1, "set"]
        assert looks(resumed, "rows")
        assert looks(resumed, "rows2")


def test_an_object_that_a_restore_drops_ends_it(tmp_path: Path, resumed: Cells) -> None:
    """A finalizer of what the name held may change anything."""
    ran = Cells(tmp_path)
    first, second = manifests(ran, "rows = [1]", "x = 2")
    resumed.run("class Last:\n    def __del__(self):\n        rows.append('gone')\nx = Last()")
    with resumed.tracker.only_restores():
        put_back(resumed, first)
        assert not looks(resumed, "rows")
        put_back(resumed, second)
        assert resumed["rows"] == [1, "gone"]
        assert looks(resumed, "rows")
