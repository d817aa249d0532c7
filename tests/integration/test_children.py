"""Notebooks that start notebooks: real kernels, a coordinator that is killed, each child started once (guarantee 6)."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest

import nbdurable as durable
from nbdurable import contract
from nbdurable.client import Client
from nbdurable.errors import ChildFailed
from nbdurable.models import RunDetail, RunStatus
from nbdurable.notebooks import create_headless
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.processes import Coordinator

DEADLINE_S = 120.0

CHILD = [
    ("setup", "%load_ext nbdurable\nimport nbdurable as durable"),
    ("work", "%%step work\nwith open('journal', 'a') as file:\n    file.write(f'{n} ')\n"
             "if n < 0 and not __import__('os').path.exists('mended'):\n    raise ValueError(f'{n} is below zero')\n"
             "durable.result(double=2 * n)"),
]  # fmt: skip
PARENT = [
    ("setup", "%load_ext nbdurable\nimport os, pydantic\nimport nbdurable as durable\n"
              "class Report(pydantic.BaseModel):\n    double: int"),
    ("start", "%%step start\nhandle = durable.trigger('child.ipynb', {'n': 1})\n"
              "again = durable.trigger('child.ipynb', {'n': 1}, idempotency_key='one')\n"
              "same = durable.trigger('child.ipynb', {'n': 1}, idempotency_key='one')\n"
              "if not os.path.exists('crashed'):\n    open('crashed', 'w').close()\n    os.kill(os.getpid(), 9)"),
    ("wait", "%%step wait\nreport = durable.trigger_and_wait('child.ipynb', {'n': 2}, returns=Report)\n"
             "first = handle.wait()"),
    ("batch", "%%step batch\nfound = durable.trigger_batch_and_wait(\n"
              "    [durable.child('child.ipynb', {'n': n}) for n in (3, -1)], on_error='collect')\n"
              "failed = found[1]\nfound = [found[0], failed.error, failed.run_id]"),
    ("refused", "%%step refused\nsaid = []\nfor ask in (lambda: durable.trigger('nowhere.ipynb'),\n"
                "            lambda: durable.trigger('journal'),\n"
                "            lambda: durable.trigger('child.ipynb', {'m': 1}),\n"
                "            lambda: durable.trigger_batch([durable.child('child.ipynb')] * 1001)):\n"
                "    try:\n        ask()\n    except durable.DurableError as error:\n"
                "        said.append(str(error).splitlines()[0])"),
    ("again", "%%step again\nmended = durable.trigger_and_wait('child.ipynb', {'n': -2})"),
    ("end", "%%step end\ndurable.result(kind=type(report).__name__, double=report.double, first=first, found=found,\n"
            "    same=again.id == same.id != handle.id, status=handle.status, said=said, mended=mended)"),
]  # fmt: skip


def show(client: Client, run_id: str) -> RunDetail:
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))


def until(client: Client, run_id: str, *statuses: RunStatus) -> RunDetail:
    deadline = time.monotonic() + DEADLINE_S
    while (run := show(client, run_id)).status not in statuses:
        assert time.monotonic() < deadline, f"{run.status}: {run.reason}"
        client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run_id, after=1 << 60, hold_s=0.2))
    return run


def test_a_headless_parent_starts_each_child_once_and_waits_without_a_kernel(
    home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    """Guarantees 5, 6, 11: over a kernel's crash, a coordinator's, a failed child, and one that is resumed."""
    client = coordinator.client
    notebooks.write(tmp_path / "child.ipynb", CHILD, parameters="n = 0")
    parent = create_headless(client, notebooks.write(tmp_path / "parent.ipynb", PARENT))
    assert until(client, parent.id, RunStatus.WAITING).driver is None
    coordinator.kill()

    failed = until(client, parent.id, RunStatus.FAILED)
    assert failed.error is not None
    assert failed.error.name == "ChildFailed"
    assert "ValueError: -2 is below zero" in failed.error.message
    runs = client.call(contract.LIST_RUNS, contract.ListRuns()).runs
    children = {run.parameters["n"]: run for run in runs if run.parent_id == parent.id}
    assert {run.trace_id for run in runs} == {parent.trace_id}
    (tmp_path / "mended").touch()
    for run in (children[-2], parent):
        client.call(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))

    done = until(client, parent.id, RunStatus.COMPLETED)
    assert done.result == {
        "kind": "Report",
        "double": 4,
        "first": {"double": 2},
        "found": [{"double": 6}, "ValueError: -1 is below zero", children[-1].id],
        "same": True,
        "status": "completed",
        "said": [
            f"there is no notebook {tmp_path / 'nowhere.ipynb'}",
            f"{tmp_path / 'journal'} is not JSON, so it is no notebook: Extra data: line 1 column 3 (char 2)",
            f"{tmp_path / 'child.ipynb'} has no parameter 'm'; those there are: n",
            "1,001 runs can't be started at once",
        ],
        "mended": {"double": -4},
    }
    journal = sorted((tmp_path / "journal").read_text().split(), key=int)
    assert journal == ["-2", "-2", "-1", "1", "1", "2", "3"]


def test_a_script_starts_a_run_and_waits_for_it(home: Home, coordinator: Coordinator, tmp_path: Path) -> None:
    """Outside of any run the same words work; what fails is an error that can be pickled."""
    path = notebooks.write(tmp_path / "child.ipynb", CHILD, parameters="n = 0")
    good = durable.trigger(path, {"n": 5})
    bad = durable.trigger(path, {"n": -5}, idempotency_key="bad")
    assert good.wait() == good.result() == {"double": 10}
    with pytest.raises(ChildFailed) as caught:
        bad.wait()
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.run_id, again.status, again.error) == (bad.id, "failed", "ValueError: -5 is below zero")
    assert str(again) == str(caught.value)
    assert show(coordinator.client, good.id).parent_id is None
