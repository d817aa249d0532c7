"""`%durable checkout`, `%durable diff` and `durable.load` in real kernels, across runs and restarts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel

LOAD = "%load_ext nbdurable\nimport nbdurable as durable"


@pytest.fixture
def kernel(home: Home, coordinator: Any, tmp_path: Path) -> Iterator[Kernel]:
    found = Kernel(home.root, notebooks.write(tmp_path / "n.ipynb", []), tmp_path)
    assert found.run(LOAD).status == "ok"
    yield found
    found.shutdown()


def newest_run(home: Home) -> str:
    with Client(home) as client:
        return client.call(contract.LIST_RUNS, contract.ListRuns()).runs[0].id


def test_the_variables_of_any_step_of_any_run_come_into_the_live_kernel(
    kernel: Kernel, home: Home, tmp_path: Path
) -> None:
    """Guarantees 7, 9: exact values with their sharing; steps know where their inputs come from now."""
    kernel.run("n = 1")
    kernel.run("%%step load\nrows = list(range(n, n + 3))\nalias = rows\nlabel = f'run {n}'", "c1")
    kernel.run("%%step grow\nrows.append(99)\nprint('grew')\ntotal = sum(rows)", "c2")
    first = newest_run(home)
    kernel.run("%durable new")
    kernel.run("n = 10")
    kernel.run("%%step load\nrows = list(range(n, n + 3))\nalias = rows\nlabel = f'run {n}'", "c1")
    kernel.run("%%step grow\nrows.append(99)\nprint('grew')\ntotal = sum(rows)", "c2")
    second = newest_run(home)
    assert first != second

    assert kernel.value(f"durable.load({first!r}, 'load', 'rows')") == "[1, 2, 3]"
    assert kernel.value(f"durable.load({first[-8:]!r}, 'grow', 'rows')") == "[1, 2, 3, 99]"
    assert kernel.value("(rows, label)") == "([10, 11, 12, 99], 'run 10')"

    reply = kernel.run(f"%durable checkout {first[-8:]} load")
    assert f"run {first[-8:]} as of step load · alias list[3]" in reply.notes
    assert kernel.value("(rows, alias is rows, label, total)") == "([1, 2, 3], True, 'run 1', 132)"
    kernel.run(f"%durable checkout {second} grow label, total")
    assert kernel.value("(rows, label, total)") == "([1, 2, 3], 'run 10', 132)"

    kernel.run(f"%durable checkout {second} grow")
    again = kernel.run("%%step sum\nsize = len(rows)", "c3")
    assert again.status == "ok"
    kernel.run(f"%durable checkout {first} grow")
    again = kernel.run("%%step sum\nsize = len(rows)", "c3")
    assert "its input `rows` changed (step grow)" in again.notes

    told = kernel.run(f"%durable diff {first} {second}:grow").notes
    assert "variable rows changed: list list[4]" in told
    assert "[0]: 1 → 10" in told
    assert "variable total changed" in told

    program = f"import nbdurable; print(nbdurable.load({first!r}, 'grow', 'total'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "105\n", done.stderr


def test_wrong_words_are_refused_by_name_and_change_nothing(kernel: Kernel, home: Home) -> None:
    """Guarantee 11: what was meant, what there is, what to do; the namespace stays."""
    kernel.run("%%step one\nx = 1\nlines = (n for n in 'ab')", "c1")
    run = newest_run(home)
    kernel.run("x = 'mine'")
    for line, said in (
        ("checkout", "needs a run and a step"),
        (f"checkout {run} two", "has no step 'two'"),
        (f"checkout {run} one y", "no step had written a variable `y`"),
        (f"checkout {run} one x lines", "variable `lines` of step `one` was not saved"),
        ("checkout ffffffff one", "there is no run"),
        ("diff", "needs two runs or steps"),
    ):
        reply = kernel.run(f"%durable {line}")
        assert reply.status == "error"
        assert said in reply.error
    assert kernel.value("x") == "'mine'"
