"""The variables of a run as of a step: a fold of checkpoints, and some or all of them brought back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.manifest import Manifest, unseal
from nbdurable.checkpoint.state import State, as_of, checkout, value_of
from nbdurable.errors import BlobMissing, NotFound, NotRestorable
from tests.tools.cells import KEY, Cells

LARGE = 200_000


class Run:
    """Cells that ran as steps, and their manifests in order of commitment."""

    def __init__(self, folder: Path, *plain: str) -> None:
        self.cells = Cells(folder, *plain)
        self.blobs = LocalBlobs(self.cells.blobs.root)
        self.manifests: list[Manifest] = []

    def step(self, name: str, source: str) -> None:
        self.manifests.append(unseal(self.cells.step(source, name), KEY, of=name))

    def state(self, until: int | None = None) -> State:
        return as_of(self.manifests[:until])


def fresh(*sources: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for source in sources:
        exec(source, namespace)
    return namespace


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.step("load", "rows = [1, 2, 3]\nalias = rows\nname = 'first'\ntrash = 0")
    run.step("clean", "rows.append(4)\nname = 'second'\ndel trash\nlines = (line for line in rows)")
    run.step("end", "total = sum(rows)\nname = 'third'")
    return run


def test_a_later_step_overwrites_and_takes_away(run: Run) -> None:
    """Issue 3, item 9: the state as of a step is the fold of the checkpoints up to it, in order of commitment."""
    names = {"rows", "alias", "name"}
    assert set(run.state(1).variables) == names | {"trash"}
    assert set(run.state(2).variables) == names | {"lines"}
    assert run.state(2).deleted == {"trash"}
    assert {name: held.manifest.step for name, held in run.state().variables.items()} == {
        "rows": "clean",
        "alias": "clean",
        "lines": "clean",
        "name": "end",
        "total": "end",
    }
    assert as_of([]).variables == {}


@pytest.mark.parametrize(("until", "rows", "name"), [(1, 3, "first"), (2, 4, "second"), (3, 4, "third")])
def test_a_checkout_brings_the_variables_as_they_were(run: Run, until: int, rows: int, name: str) -> None:
    """Guarantee 7: values, sharing between them, and what was deleted then is deleted."""
    namespace = fresh("rows = alias = None\nother = 'mine'\ntrash = 'old'")
    checkout(run.state(until), namespace, run.blobs)
    assert (len(namespace["rows"]), namespace["name"]) == (rows, name)
    assert namespace["alias"] is namespace["rows"]
    assert namespace.get("trash") == (0 if until == 1 else None)
    assert namespace["other"] == "mine"
    if until > 1:
        with pytest.raises(NotRestorable, match="lines"):
            next(namespace["lines"])


def test_a_checkout_of_some_names_touches_nothing_else(run: Run) -> None:
    """Guarantee 7: only what was asked for is bound; an unknown or unsaved name is refused, and nothing is bound."""
    namespace = fresh("name = 'mine'\ntrash = 'mine'")
    assert set(checkout(run.state(2), namespace, run.blobs, ["alias"])) == {"alias"}
    assert (namespace["alias"], namespace["name"], namespace["trash"]) == ([1, 2, 3, 4], "mine", "mine")
    assert "rows" not in namespace
    for names, error in ((["name", "nothing"], NotFound), (["name", "lines"], NotRestorable)):
        with pytest.raises(error):
            checkout(run.state(2), namespace, run.blobs, names)
        assert namespace["name"] == "mine"


def test_a_checkout_binds_all_or_nothing(tmp_path: Path) -> None:
    """Guarantee 7: a blob that is missing in a later checkpoint leaves the kernel as it was."""
    run = Run(tmp_path)
    run.step("one", "a = 1")
    run.step("two", f"b = b'x' * {LARGE}\nc = 3")
    for file in run.blobs.files():
        os.unlink(file.path)
    namespace = fresh("a = c = 'mine'")
    before = dict(namespace)
    with pytest.raises(BlobMissing, match="step `two` needs it for `b`"):
        checkout(run.state(), namespace, run.blobs)
    assert namespace == before


def test_the_random_state_of_that_moment_comes_back(tmp_path: Path) -> None:
    """Guarantee 6: what is drawn after a checkout is what was drawn after the step."""
    run = Run(tmp_path, "import random\nrandom.seed(5)")
    run.step("draw", "x = random.random()")
    run.step("again", "y = random.random()")
    namespace = fresh("import random\nrandom.seed(77)")
    checkout(run.state(1), namespace, run.blobs)
    assert namespace["random"].random() == run.cells["y"]


def test_one_value_is_loaded_without_binding_anything(run: Run) -> None:
    """Issue 3, item 9: `durable.load`."""
    namespace = fresh("name = 'mine'")
    before = dict(namespace)
    assert value_of(run.state(1), "name", namespace, run.blobs) == "first"
    assert value_of(run.state(3), "name", namespace, run.blobs) == "third"
    assert namespace == before
    with pytest.raises(NotFound, match="no step had written a variable `total` by then"):
        value_of(run.state(2), "total", namespace, run.blobs)
    with pytest.raises(NotRestorable, match="`lines` of step `clean` was not saved"):
        value_of(run.state(2), "lines", namespace, run.blobs)


def test_a_value_finds_its_class_in_the_notebook_or_in_the_run(tmp_path: Path) -> None:
    """Guarantee 7: an instance whose class another step defined comes back with that class, or is refused."""
    run = Run(tmp_path)
    run.step("define", "class Net:\n    def area(self):\n        return self.side ** 2")
    run.step("make", "net = Net()\nnet.side = 3")
    assert value_of(run.state(), "net", fresh(), run.blobs).area() == 9
    live = fresh("class Net:\n    def area(self):\n        return 'of the notebook'")
    assert value_of(run.state(), "net", live, run.blobs).area() == "of the notebook"
    with pytest.raises(NotRestorable, match=r"`net` of step `make`.*`Net`"):
        value_of(as_of(run.manifests[1:]), "net", fresh(), run.blobs)
