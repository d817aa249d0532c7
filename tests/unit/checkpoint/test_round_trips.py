# ruff: noqa: E501 -- one case a line reads as a table
"""Every type that people keep in notebooks: saved, restored by another process, equal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdurable.checkpoint.analysis import uses
from nbdurable.checkpoint.unsaved import Unsaved
from nbdurable.errors import BlobDamaged, BlobMissing, NotRestorable
from tests.tools.cells import Cells

PLAIN = "import dataclasses\nimport numpy as np"


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


def test_what_was_restored_outlives_its_store(tmp_path: Path) -> None:
    """Guarantees 7 and 10: who deletes the blobs below a running kernel takes nothing from it, and it can save again."""
    cell = (
        "array = np.arange(400_000.); view = array[5:]\nframe = pd.DataFrame({'n': array, 't': ['a text', None] * 200_000})\n"
        "talk = [{'role': 'user', 'text': str(i) * 50} for i in range(2_000)]"
    )
    before = Cells(tmp_path, "import numpy as np, pandas as pd")
    signed = before.step(cell)
    after = Cells(tmp_path)
    after.restore(signed)
    shutil.rmtree(tmp_path / "blobs")
    again = after.step("view[0] = -1.; talk.append('one more')")
    last = Cells(tmp_path)
    last.restore(again)
    exec("view[0] = -1.; talk.append('one more')", before.namespace)
    for name in ("array", "view", "talk"):
        assert list(after[name]) == list(before[name]) == list(last[name]), name
    assert after["frame"].equals(before["frame"])
    assert last["array"][5] == last["view"][0] == -1


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
        "class Meta(type):\n    def __new__(cls, *a):\n        return super().__new__(cls, *a)\n"
        "class K(metaclass=Meta): pass\nk = K(); box = {'k': k}; free = 1"
    )
    after = Cells(tmp_path)
    reasons = {variable.name: variable.reason for variable in after.restore(signed).variables}
    assert "Meta.__new__" in reasons["K"]
    assert "it needs `K`" in reasons["k"]
    assert "it needs `K`" in reasons["box"]
    assert after["free"] == 1
    assert isinstance(after["k"], Unsaved)


TEXTS = [
    "np.array([f'text {i}' for i in range(4000)], dtype=object)",
    "np.array([f'zeile ü {i} \\U0001f600' for i in range(4000)], dtype=object).reshape(2, 2000)",
    "np.array([f'{i}' for i in range(4000)], dtype=object).reshape(2000, 2, order='F')",
    "np.array([f'{i}' for i in range(4000)], dtype=object).reshape(2, 2000).T",
    "np.array([f'{i}' for i in range(4000)], dtype=object).reshape(10, 20, 20)",
    "np.array([f'{i}' if i % 3 else None if i % 2 else np.nan for i in range(4000)], dtype=object)",
    "np.array(['\\ud83d' + str(i) + '\\udc00' for i in range(4000)], dtype=object)",
    "np.array([f'{i}' if i % 3 else float(i) for i in range(4000)], dtype=object)",
    "np.array([f'{i}' if i % 3 else float('nan') for i in range(4000)], dtype=object)",
    "np.array([str(i % 7) * 3 for i in range(4000)] + [None] * 9, dtype=object)",
    "np.array([None] * 4000, dtype=object)",
    "np.array(['a b', 'c d'] * 2000, dtype=object)",
    "['a b', 'c d'] * 2000",
    "np.array(['', *map(str, range(4000))], dtype=object)",
    "[f'text {i}' for i in range(4000)]",
    "[f'text {i % 9}' for i in range(4000)]",
    "{f'text {i}': b'%d' % i for i in range(4000)}",
    "{(i if i % 2 else f'{i}'): [None, 1.5, 2**70, b'', True][i % 5] for i in range(4000)}",
]


@pytest.mark.parametrize("made", TEXTS)
def test_many_texts_come_back_as_they_were(made: str, tmp_path: Path) -> None:
    """Guarantee 7: with types, order in memory, what is missing, and room to change them."""
    before = Cells(tmp_path, "import numpy as np")
    signed = before.step(f"x = {made}; y = [x, x]")
    alone = before.step(f"z = {made}")
    after = Cells(tmp_path, "import numpy as np")
    after.restore(signed)
    after.restore(alone)
    assert after["y"][0] is after["y"][1] is after["x"]
    assert after.fingerprints() == before.fingerprints()
    x, then = after["z"], before["z"]
    assert list(map(type, _flat(x))) == list(map(type, _flat(then)))
    assert repr(_flat(x)) == repr(_flat(then))
    assert len(set(map(id, _flat(x)))) <= len(set(map(id, _flat(then))))
    if not isinstance(x, list | dict):
        assert (x.strides, x.flags.writeable, x.flags.owndata) == (then.strides, True, True)


def _flat(value: Any) -> list[Any]:
    return (
        [*value.items()]
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, list)
        else value.ravel().tolist()
    )


def test_one_changed_column_of_texts_writes_one_column(tmp_path: Path) -> None:
    """The others are not written again, wherever pandas puts it."""
    cells = Cells(tmp_path, "import pandas as pd")
    cells.step(
        "f = pd.DataFrame({c: pd.Series([f'{c} {i}' for i in range(100_000)], dtype=object) for c in 'abcdef'})"
    )
    before = set(tmp_path.rglob("*"))
    signed = cells.step("f['c'] = f['c'].str.upper().astype(object)")
    written = sum(
        path.stat().st_size for path in tmp_path.rglob("*") if path.is_file() and path not in before
    )
    assert written < 2 * 100_000 * 12
    after = Cells(tmp_path, "import pandas as pd")
    after.restore(signed)
    assert after["f"].equals(cells["f"])
