"""What can't be saved is made again: `%%step --replay` and `durable.recipe` in real kernels (guarantees 6, 7, 9)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.models import RunDetail, StepStatus
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel, Reply

LOAD = "%load_ext nbdurable\nimport nbdurable as durable"

CONNECT = "%%step connect --replay\nimport sqlite3\ndb = sqlite3.connect('base.sqlite')\nprint('connected')"
ROWS = "%%step rows\nrows = db.execute('select 40 + 2').fetchall()\nprint('asked')"


@pytest.fixture
def kernel(home: Home, coordinator: Any, tmp_path: Path) -> Iterator[Kernel]:
    """A kernel of the notebook `n.ipynb`, with the extension loaded."""
    found = Kernel(home.root, notebooks.write(tmp_path / "n.ipynb", []), tmp_path)
    assert found.run(LOAD).status == "ok"
    yield found
    found.shutdown()


def restarted(kernel: Kernel) -> Reply:
    kernel.restart()
    return kernel.run(LOAD)


def run_all(kernel: Kernel, cells: list[str]) -> list[Reply]:
    replies = [kernel.run(cell, f"c{number}") for number, cell in enumerate(cells)]
    assert [reply.error for reply in replies] == [""] * len(cells)
    return replies


def the_run(home: Home) -> RunDetail:
    client = Client(home)
    [run] = client.call(contract.LIST_RUNS, contract.ListRuns()).runs
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))


def test_a_replay_cell_runs_in_every_kernel_and_what_it_made_counts_as_the_same(
    kernel: Kernel, home: Home
) -> None:
    """Guarantees 6 and 9: a connection is made anew each time, shown anew, and what was read through it is kept."""
    cells = [CONNECT, ROWS]
    first = run_all(kernel, cells)
    assert [reply.text for reply in first] == ["connected\n", "asked\n"]
    assert "↻ connect" in first[0].notes
    for again in (run_all(kernel, cells), (restarted(kernel), run_all(kernel, cells))[1]):
        assert "it is marked --replay: it runs in every attempt" in again[0].notes
        assert again[0].text == "connected\n"
        assert "↺ rows  restored" in again[1].notes
        assert "same code and inputs" in again[1].notes
        assert kernel.value("(rows, db.execute('select 1').fetchall())") == "([(42,)], [(1,)])"
    steps = {step.name: step for step in the_run(home).steps}
    assert (steps["connect"].status, steps["connect"].executions) == (StepStatus.REPLAY, 3)
    assert steps["connect"].reason == "it is marked --replay: it runs in every attempt"
    assert steps["connect"].variables == ()
    assert (steps["rows"].executions, steps["rows"].restores) == (1, 2)


def test_an_edited_replay_cell_makes_what_depends_on_it_run_again(kernel: Kernel) -> None:
    """Guarantee 1 (edited code): another connection is another input."""
    make = "%%step connect --replay\nlimit = 1"
    read = "%%step read\nfound = limit + 1"
    run_all(kernel, [make, read])
    restarted(kernel)
    again = run_all(kernel, [make.replace("= 1", "= 2"), read])
    assert "✓ read" in again[1].notes
    assert "its input `limit`" in again[1].notes
    assert kernel.value("found") == "3"


def test_a_cell_that_is_marked_no_more_is_kept_again(kernel: Kernel, home: Home) -> None:
    """A mark holds as long as it stands there."""
    run_all(kernel, ["%%step a --replay\na = 1"])
    run_all(kernel, ["%%step a\na = 1"])
    assert the_run(home).steps[0].status is StepStatus.COMPLETED
    restarted(kernel)
    assert "↺ a" in run_all(kernel, ["%%step a\na = 1"])[0].notes
    assert "↻ a" in run_all(kernel, ["%%step a --replay\na = 1"])[0].notes


def test_a_replay_cell_can_not_wait(kernel: Kernel) -> None:
    """Guarantee 5: a question is asked once; a cell that runs each time would ask it each time."""
    reply = kernel.run("%%step ask --replay\ndurable.approve('x')")
    assert reply.status == "error"
    assert "step `ask` can't wait: it is marked --replay" in reply.error


def plan(home: Home, notebook: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "nbdurable", "plan", str(notebook), "--json"]
    environment = {**os.environ, "NBDURABLE_HOME": str(home.root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return list(json.loads(done.stdout))


def test_a_plan_says_that_a_cell_is_marked(kernel: Kernel, home: Home, tmp_path: Path) -> None:
    """Guarantee 9: in the kernel and on the command line, and what depends on it is foreseen to be restored."""
    notebook = notebooks.write(
        tmp_path / "n.ipynb",
        [(f"c{number}", cell) for number, cell in enumerate([LOAD, CONNECT, ROWS])],
    )
    run_all(kernel, [LOAD, CONNECT, ROWS])
    said = [(item["name"], item["action"], item["reason"]) for item in plan(home, notebook)]
    assert said == [
        ("connect", "replay", "it is marked --replay: it runs in every attempt"),
        ("rows", "restore", "same code and inputs"),
    ]
    assert "connect  replay    it is marked --replay" in kernel.run("%durable plan").notes
