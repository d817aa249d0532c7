# ruff: noqa: E501 -- one case a line reads as a table
"""Objects whose own code raises, lies, recurses or does not end: refused by name, in bounded time (guarantees 7, 11)."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nbdurable.checkpoint import fingerprint, objects, patience
from nbdurable.checkpoint.manifest import unseal
from nbdurable.checkpoint.unsaved import Unsaved
from tests.tools.cells import KEY, Cells

pytestmark = pytest.mark.timeout(120, method="thread")  # its other method takes the timer that is tested here
PLAIN = "import enum, functools, itertools, time, typing\nnever = 300"
# what `v` is, and what is said of it
HOSTILE: dict[str, tuple[str, str]] = {
    "raises": ("class A:\n    def __reduce__(self): raise RuntimeError('no way')", "no way"),
    "ends the kernel": ("class A:\n    def __reduce__(self): raise SystemExit(3)", "raises SystemExit"),
    "recurses": ("class A:\n    def __reduce__(self): return self.__reduce__()", "too deep a nesting"),
    "recurses in its arguments": ("class A:\n    def __reduce__(self): return A, (A(),)", "too deep"),
    "returns a number": ("class A:\n    def __reduce__(self): return 5", "returns a int"),
    "returns what has no end": (
        "class A:\n    def __reduce__(self): return itertools.count()",
        "returns a count",
    ),
    "returns too much": (
        "class A:\n    def __reduce__(self): return 1, 2, 3, 4, 5, 6, 7, 8",
        "pickle refuses",
    ),
    "returns what can't be called": (
        "class A:\n    def __reduce__(self): return len, (3,)",
        "can't be loaded",
    ),
    "returns another": ("class A:\n    def __reduce__(self): return int, ()", "does not come back equal"),
    "items without end": (
        "class A:\n    def __reduce__(self): return list, (), None, itertools.count()",
        "more than 1,000 items",
    ),
    "pairs without end": (
        "class A:\n    def __reduce__(self): return dict, (), None, None, zip(itertools.count(), itertools.count())",
        "more than 1,000 items",
    ),
    "a list without end": (
        "class A(list):\n    def __iter__(self): return itertools.count()",
        "more than 1,000 items",
    ),
    "no state": ("class A:\n    def __getstate__(self): raise RuntimeError('no state')", "no state"),
}
SLEEPS: dict[str, tuple[str, str]] = {
    "__reduce__": ("class A:\n    def __reduce__(self): time.sleep(never)", "does not end within 0.2 s"),
    "__getstate__": (
        "class A:\n    def __getstate__(self):\n        while True: pass",
        "does not end within 0.2 s",
    ),
    "__setstate__": (
        "class A:\n    def __init__(self): self.x = 1\n    def __setstate__(self, state): time.sleep(never)",
        "does not end within 0.2 s",
    ),
    "items": (
        "class A:\n    def __reduce__(self): return list, (), None, map(time.sleep, [never])",
        "does not end within 0.2 s",
    ),
}
# what runs when values are compared, printed or measured, and must not matter to a checkpoint
IRRELEVANT: dict[str, str] = {
    "raise": "class A:\n    def __eq__(self, other): raise RuntimeError\n    __hash__ = __repr__ = __len__ = __bool__ = lambda self: 1 / 0",
    "lie": "class A:\n    def __eq__(self, other): return True\n    __hash__ = __len__ = lambda self: 7\n    __repr__ = __str__ = lambda self: 5",
    "sleep": "class A:\n    def __eq__(self, other): time.sleep(never)\n    __hash__ = __repr__ = __len__ = __bool__ = lambda self: time.sleep(never)",
    "a list's length sleeps": "class A(list):\n    def __len__(self): time.sleep(never)",
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are soon reached."""
    monkeypatch.setattr(objects, "MAX_GIVEN", 1000)
    monkeypatch.setattr(patience, "LIMIT_S", 0.2)


def saved_and_restored(tmp_path: Path, step: str) -> tuple[dict[str, str], Cells]:
    """Return the reasons of what was not saved, and a new process's notebook after the restore."""
    signed = Cells(tmp_path, PLAIN).step(step)
    after = Cells(tmp_path, PLAIN)
    manifest = after.restore(signed)
    return {item.name: item.reason for item in manifest.variables if item.state != "saved"}, after


@pytest.mark.parametrize("case", HOSTILE)
def test_what_an_object_does_of_its_own_takes_only_itself_down(case: str, tmp_path: Path) -> None:
    """The reason is said, and the step's other variables are kept."""
    make, said = HOSTILE[case]
    reasons, after = saved_and_restored(tmp_path, f"{make}\nv = A()\nother = [1]")
    assert reasons.keys() == {"v"}
    assert said in reasons["v"]
    assert len(reasons["v"]) < 300
    assert after["other"] == [1]
    assert type(after["v"]) is Unsaved


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="nothing can interrupt a sleep there")
@pytest.mark.parametrize("case", SLEEPS)
def test_code_that_does_not_end_is_given_up(case: str, tmp_path: Path) -> None:
    """Bounded time: once for each class, however many objects and steps there are."""
    make, said = SLEEPS[case]
    began = time.monotonic()
    reasons, after = saved_and_restored(tmp_path, f"{make}\nv = A()\nother = [1]")
    assert time.monotonic() - began < 60
    assert said in reasons.pop("v")
    assert not reasons
    assert after["other"] == [1]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


@pytest.mark.parametrize("case", IRRELEVANT)
def test_comparing_printing_and_measuring_do_not_matter(case: str, tmp_path: Path) -> None:
    """None of it is asked for, or it is given up: the object comes back."""
    began = time.monotonic()
    reasons, after = saved_and_restored(tmp_path, f"{IRRELEVANT[case]}\nv = A()\nother = [v]")
    assert time.monotonic() - began < 60
    assert not reasons
    assert type(after["v"]) is after["A"]
    assert after["other"][0] is after["v"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such timer")
def test_a_timer_of_the_notebook_is_left_alone(tmp_path: Path) -> None:
    """Who uses the timer of the system keeps it; the limit waits for another time."""
    rung = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rung.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        Cells(tmp_path, PLAIN).step("v = [1]")
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        signal.raise_signal(signal.SIGALRM)
        assert rung.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_path_without_end_is_told_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that fills a page says nothing."""
    monkeypatch.setattr(fingerprint, "MAX_DEPTH", 500)
    reasons, after = saved_and_restored(
        tmp_path, "class A:\n    def __reduce__(self): return A, (), {'n': A()}\nv = A()\nother = [1]"
    )
    assert "too deep a nesting" in reasons["v"]
    assert "[…]" in reasons["v"]
    assert len(reasons["v"]) < 200
    assert after["other"] == [1]


# step, and what must hold afterwards, in the notebook that was restored
EXACT: dict[str, tuple[str, str]] = {
    "a hundred closures, one in the other": (
        "def nest(n):\n    if not n: return lambda: 0\n    inner = nest(n - 1)\n    return lambda: inner() + n\nv = nest(100)",
        "v() == 5050",
    ),
    "a NewType of the notebook": (
        "v = typing.NewType('v', int); w = typing.NewType('other', v); both = [v]",
        "both[0] is v and w.__supertype__ is v and v(3) == 3 and repr(v) == '__main__.v'",
    ),
    "an object that is pickled by its name": (
        "class Missing:\n    def __reduce__(self): return 'v'\nv = Missing(); v.n = [3]; held = {'k': v}",
        "held['k'] is v and v.n == [3] and type(v) is Missing",
    ),
    "second names of an enum": (
        "class C(enum.Enum):\n    RED = 1\n    ALSO = 1\n    BLUE = 2\nv = C.ALSO",
        "v is C.RED is C.ALSO and list(C.__members__) == ['RED', 'ALSO', 'BLUE'] and list(C) == [C.RED, C.BLUE]",
    ),
    "a flag that names a combination": (
        "class C(enum.Flag):\n    A = 1\n    B = 2\n    AB = 3\nv = C.A",
        "v | C.B is C.AB and C.AB.name == 'AB'",
    ),
    "attributes of a caching function": (
        "@functools.lru_cache(3)\ndef v(x): return x\nv.seen = [1]; seen = v.seen",
        "v.seen is seen and v(2) == 2 and v.cache_parameters()['maxsize'] == 3",
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_odd_but_ordinary_code_comes_back(case: str, tmp_path: Path) -> None:
    """Values, types, sharing and later behaviour, in a new process's notebook."""
    make, holds = EXACT[case]
    reasons, after = saved_and_restored(tmp_path, make)
    assert not reasons
    assert eval(holds, after.namespace)


def test_a_changed_attribute_of_a_caching_function_is_a_write(tmp_path: Path) -> None:
    """Guarantee 2."""
    cells = Cells(tmp_path, "import functools\n@functools.cache\ndef f(x): return x\nf.seen = []")
    assert cells.watch("f.seen.append(1)").written == {"f"}
    assert cells.watch("f(1)").written == frozenset()


def test_large_values_that_a_thread_writes_to_are_refused(tmp_path: Path) -> None:
    """Guarantee 7: what is too large to be loaded back and compared is not kept torn; what shares with it neither."""
    cells = Cells(tmp_path, "import threading\nimport numpy as np")
    cells.run("going = threading.Event()\nbegun = threading.Event()")
    signed = cells.step(
        "calm = np.arange(12_000_000)\nbusy = np.zeros(12_000_000)\nview = busy[::2]\n"
        "def work():\n    while not going.is_set():\n        busy[:] += 1\n        begun.set()\n"
        "thread = threading.Thread(target=work, daemon=True); thread.start()\nbegun.wait(20)"
    )
    cells["going"].set()
    cells["thread"].join(20)
    states = {v.name: (v.state, v.reason) for v in unseal(signed, KEY, of="step").variables}
    assert states["calm"] == ("saved", "")
    for name in ("busy", "view"):
        assert states[name][0] == "unsaved"
        assert "another thread changed it while it was saved" in states[name][1]


def test_variables_that_a_thread_changes_are_kept_or_refused(tmp_path: Path) -> None:
    """Nothing is torn: each part of a value is one that it had at some moment, or the variable is refused by name."""
    cells = Cells(tmp_path, "import threading\nimport numpy as np")
    cells.run("items, table, array, going = [], {}, np.zeros(5000), [True]\nbegun = threading.Event()")
    cells.run(
        "def work():\n    n = 0\n    while going:\n        items.append([n]); table[n] = [n]; table.pop(n - 20, None)\n"
        "        array[:] = n\n        n += 1\n        begun.set()\n        if len(items) > 2000: items.clear()\n"
        "thread = threading.Thread(target=work, daemon=True); thread.start()\nbegun.wait(20)"
    )
    values: dict[str, Any] = cells.namespace
    try:
        signed = cells.step("a, b, c, other = items, table, array, ['kept']")
    finally:
        values["going"].clear()
        values["thread"].join(20)
    after = Cells(tmp_path)
    manifest = after.restore(signed)
    assert after["other"] == ["kept"]
    reasons = {item.name: item.reason for item in manifest.variables if item.state == "unsaved"}
    assert all(reasons.values())
    if "a" not in reasons:
        assert all(type(item) is list and len(item) == 1 for item in after["a"])
    if "b" not in reasons:
        assert all(value == [key] for key, value in after["b"].items())
