"""What code says about its run, and where it ends it early: headless and in front of a person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.models import Driver, DriverKind, RunDetail, RunStatus
from nbdurable.notebooks import create_headless
from nbdurable.processes import identity
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel

LOAD = "%load_ext nbdurable\nimport nbdurable as durable"
SAYS = """%%step count
run = durable.current_run()
for page in range(3):
    run.metadata.increment("pages")
    run.metadata.append("titles", f"page {page}")
    run.progress(page + 1, 3, "pages")
run.metadata.set("topic", "old")
run.metadata.set("topic", "batteries")
run.metadata.set("gone", 1)
run.metadata.remove("gone")
run.log("counted", level="warning", pages=3)
seen = run.metadata.values()"""
ENDS = """%%step look
news = []
try:
    if not news:
        durable.skip_rest("no news today")
except:
    pass
unreached = True"""


@pytest.fixture
def client(home: Home, coordinator: Any) -> Iterator[Client]:
    with Client(home) as found:
        yield found


def ended(client: Client, run_id: str) -> RunDetail:
    """Wait for the end of a run."""
    for _ in client.follow(run_id):
        pass
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))


@pytest.mark.parametrize("crash", ["", "commit-acknowledged"])
def test_a_headless_run_says_and_ends_early(
    crash: str, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 6: a run that skips its rest is completed with the reason, also if it dies right behind the step."""
    if crash:
        monkeypatch.setenv("NBDURABLE_FAULT", f"{crash}:2:{tmp_path / 'fuse'}")
    path = notebooks.write(tmp_path / "n.ipynb", [LOAD, SAYS, ENDS, "%%step never\nraise SystemError"])
    output = tmp_path / "out.ipynb"
    run = ended(client, create_headless(client, path, output=output).id)
    assert (run.status, run.recoveries) == (RunStatus.COMPLETED, 1 if crash else 0)
    assert (tmp_path / "fuse").exists() == bool(crash)
    assert run.reason == "step 'look' ⏭ skips the rest: no news today"
    assert [(step.name, step.status.value, step.executions) for step in run.steps] == [
        ("count", "completed", 1),
        ("look", "completed", 1),
    ]
    expected = {"pages": 3, "titles": ["page 0", "page 1", "page 2"], "topic": "batteries"}
    assert run.metadata == expected
    assert run.progress is not None
    assert (run.progress.step, run.progress.done, run.progress.total) == ("count", 3, 3)
    shown = notebooks.outputs(output)
    assert shown["cell-2"] == [
        {"output_type": "stream", "name": "stdout", "text": "⏭ skips the rest: no news today\n"}
    ]
    assert shown["cell-3"] == []


def test_a_person_is_stopped_at_the_same_place(home: Home, client: Client, tmp_path: Path) -> None:
    """A kept step that skips the rest does so again when it is restored; what it says may be refused by name."""
    kernel = Kernel(home.root, notebooks.write(tmp_path / "n.ipynb", []), tmp_path)
    try:
        kernel.run(LOAD)
        first = kernel.run(ENDS, "c1")
        assert (first.status, first.content["ename"]) == ("error", "RestSkipped")
        assert "✓ look" in first.notes
        kernel.restart()
        kernel.run(LOAD)
        again = kernel.run(ENDS, "c1")
        assert "↺ look" in again.notes
        assert (again.status, again.content["evalue"]) == ("error", "⏭ skips the rest: no news today")
        refused = kernel.run("durable.current_run().metadata.set('x', {1, 2})")
        assert "the metadata 'x' is not JSON" in refused.error
        refused = kernel.run("durable.current_run().metadata.increment('x', 'y')")
        assert "can't be incremented by 'y'" in refused.error
    finally:
        kernel.shutdown()


def test_a_repeated_saying_counts_once(home: Home, client: Client, tmp_path: Path) -> None:
    """A question that is sent again, to another coordinator at that, changes nothing more."""
    driver = Driver(kind=DriverKind.INTERACTIVE, process=identity("kernel"))
    wanted = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.INTERACTIVE, driver=driver)
    run = client.call(contract.CREATE_RUN, wanted)
    change = contract.ChangeMetadata(
        run_id=run.id,
        epoch=run.epoch,
        changes=(contract.Change(how="increment", name="n", value=1),),
        nonce="once",
    )
    line = contract.AddLog(run_id=run.id, epoch=run.epoch, message="said", nonce="line")
    for _ in range(2):
        client.call(contract.ADD_LOG, line)
        assert client.call(contract.CHANGE_METADATA, change).values == {"n": 1}
    client.call(contract.SHUTDOWN, contract.Nothing())
    assert client.call(contract.CHANGE_METADATA, change).values == {"n": 1}
    client.call(contract.ADD_LOG, line)
    events = client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id)).events
    assert [event.kind for event in events if event.kind in ("logged", "metadata_changed")] == [
        "logged",
        "metadata_changed",
    ]
