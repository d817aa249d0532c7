"""Changing the past with real kernels and headless runs: fork, repair, replay, sample, attach, hand over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.cli import past
from nbdurable.client import Client
from nbdurable.errors import LeaseHeld, NotFound, UsageError
from nbdurable.models import DriverKind, Run, RunDetail, RunStatus
from nbdurable.notebooks import create_headless
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel

DEADLINE_S = 90.0
LOAD = "%load_ext nbdurable\nimport nbdurable as durable"
CELLS = [
    ("load", LOAD),
    ("helper", "class Note:\n    def __init__(self, text):\n        self.text = text\nk = 1"),
    ("search", "%%step search\nimport random\nnotes = [Note(topic)]\nalias = notes\nluck = random.random()"),
    ("analyse", "%%step analyse\ntotal = len(notes) / (k - 1)"),
    ("end", "%%step end\ndurable.result(total=total, shared=alias is notes, topic=topic, luck=luck)"),
]
FIXED = [(name, text.replace("(k - 1)", "k")) for name, text in CELLS]
GATE = [
    ("load", LOAD),
    ("rows", "%%step rows\nrows = [1]"),
    ("gate", "%%step gate\nrows.append(2)\nprint('above')\nok = durable.approve(len(rows), title='Go on?')"),
    ("end", "%%step end\ndurable.result(rows=rows, ok=ok.approved)"),
]


def ended(client: Client, run: Run, *wanted: RunStatus) -> RunDetail:
    """Wait until a run has ended, or has one of these statuses."""
    deadline, after = time.monotonic() + DEADLINE_S, 0
    while True:
        found = client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))
        if found.status in wanted or (not wanted and found.status.is_final):
            return found
        assert time.monotonic() < deadline, f"{found.status}: {found.reason}"
        page = client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id, after=after, hold_s=2))
        after = page.events[-1].seq if page.events else after


def ran(run: RunDetail) -> dict[str, int]:
    return {step.name: step.executions for step in run.steps}


def actions(change: past.Change) -> list[tuple[str, str]]:
    return [(step.step, step.action) for step in change.plan]


def events(client: Client, run: Run) -> list[str]:
    found = client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id)).events
    return [event.kind for event in found]


def test_a_failed_run_is_forked_and_repaired(home: Home, coordinator: Any, tmp_path: Path) -> None:
    """Guarantees 1, 9, 10, 11: what was committed is not done again, each plan says so first, history only grows."""
    client = coordinator.client
    path = notebooks.write(tmp_path / "n.ipynb", CELLS, parameters="topic = 'a'")
    fixed = notebooks.write(tmp_path / "fixed.ipynb", FIXED, parameters="topic = 'a'")
    source = ended(client, create_headless(client, path, parameters={"topic": "b"}))
    assert source.status is RunStatus.FAILED

    def repair(**options: Any) -> past.Change:
        wanted = {"start": None, "notebook": None, "given": (), "marked": (), "comment": "", "by": "ann"}
        return past.repair(client, source.id, **{**wanted, **options})

    for wrong, said in (
        (lambda: past.fork(client, source.id, start="nope", by="ann"), "its steps: search, analyse, end"),
        (lambda: past.fork(client, source.id, start="end", given=["x=[1"], by="ann"), "is not JSON"),
        (lambda: past.fork(client, source.id, start=None, parameters={"q": 1}, by="ann"), "no parameter 'q'"),
        (lambda: repair(), "nothing to repair was named"),
        (lambda: repair(marked=["nope"]), "its steps: search, analyse, end"),
        (lambda: repair(marked=["search"]), "nothing to mark"),
    ):
        with pytest.raises((UsageError, NotFound)) as caught:
            wrong()
        assert said in str(caught.value)
    renamed = [(name, text.replace("step search", "step find")) for name, text in FIXED]
    other = notebooks.write(tmp_path / "other.ipynb", renamed, parameters="topic = 'a'")
    lost = past.fork(client, source.id, start="analyse", notebook=other, by="ann")
    assert actions(lost)[0] == ("find", "run")
    assert "its cell is the step `find` now" in " ".join(lost.notes)
    assert "no cell from `end` on reads `nobody`" in " ".join(
        past.fork(client, source.id, start="end", given=["nobody=1"], by="ann").notes
    )

    forking = past.fork(client, source.id, start=None, notebook=fixed, by="ann")
    assert actions(forking) == [("search", "keep"), ("analyse", "run"), ("end", "run")]
    forked = ended(client, forking.carry_out())
    assert (forked.status, forked.forked_from, forked.forked_at) == (
        RunStatus.COMPLETED,
        source.id,
        "analyse",
    )
    assert ran(forked) == {"search": 0, "analyse": 1, "end": 1}
    assert {"total": 1.0, "shared": True, "topic": "b"}.items() <= forked.result.items()

    edited = past.fork(client, forked.id, start="end", parameters={"topic": "c"}, by="ann")
    assert actions(edited)[0] == ("search", "run")

    repairing = repair(given=["total=7"], marked=["analyse"], comment="on paper")
    assert actions(repairing) == [("search", "keep"), ("analyse", "mark"), ("end", "run")]
    before = events(client, source)
    assert repairing.carry_out().status is RunStatus.QUEUED
    done = ended(client, source)
    assert done.status is RunStatus.COMPLETED
    assert ran(done) == {"search": 1, "analyse": 1, "end": 1}
    assert done.result["total"] == 7
    assert done.result["luck"] == forked.result["luck"]
    [reason] = [step.reason for step in done.steps if step.name == "analyse"]
    assert "marked done by ann" in reason
    assert reason.endswith(": on paper")
    assert events(client, source)[: len(before)] == before

    with pytest.raises(UsageError, match="is completed: say from which step"):
        repair(notebook=fixed)
    again = repair(notebook=fixed, start="analyse")
    assert actions(again) == [("search", "keep"), ("analyse", "run"), ("end", "run")]
    again.carry_out()
    redone = ended(client, source)
    assert ran(redone) == {"search": 1, "analyse": 2, "end": 2}
    assert redone.snapshot != source.snapshot
    assert redone.earlier_snapshots == (source.snapshot,)
    assert redone.result["total"] == 1.0


def test_samples_and_replays(home: Home, coordinator: Any, tmp_path: Path, capsys: Any) -> None:
    """A step runs several times and nothing behind it does; a replay has the source's version and parameters."""
    from nbdurable.cli.replays import compare_samples, replay_all
    from nbdurable.cli.screen import Screen

    client = coordinator.client
    path = notebooks.write(tmp_path / "n.ipynb", FIXED, parameters="topic = 'a'")
    source = create_headless(client, path, parameters={"topic": "b"}, until="search")
    source = ended(client, source)
    assert source.status is RunStatus.COMPLETED
    assert "stopped behind step 'search'" in source.reason
    assert ran(source) == {"search": 1}
    path.unlink()
    samples = [
        past.fork(client, source.id, start="search", until="search", by="ann").carry_out() for _ in range(2)
    ]
    assert compare_samples(client, samples, "search", "luck", Screen(json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in found] == [run.id for run in samples]
    assert len({one["value"] for one in found}) == 2
    assert (
        replay_all(client, Screen(json=True), [source.id], None, {"topic": "c"}, dry_run=False, ask=False)
        == 0
    )  # type: ignore[arg-type]
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["parameters"] == {"topic": "c"}
    assert (replayed["forked_from"], replayed["forked_at"], replayed["until"]) == (source.id, None, "search")


@pytest.fixture
def kernel(home: Home, coordinator: Any, tmp_path: Path) -> Iterator[Kernel]:
    found = Kernel(
        home.root, notebooks.write(tmp_path / "n.ipynb", CELLS, parameters="topic = 'a'"), tmp_path
    )
    yield found
    found.shutdown()


def test_a_run_comes_into_a_kernel_and_goes_back(
    kernel: Kernel, home: Home, coordinator: Any, tmp_path: Path
) -> None:
    """Guarantees 1, 4, 6, 7: exact variables with their sharing, one driver at a time, and nothing is done twice."""
    client = coordinator.client
    path, gate = tmp_path / "n.ipynb", notebooks.write(tmp_path / "gate.ipynb", GATE)
    run = ended(client, create_headless(client, path, parameters={"topic": "b"}))
    waiting = ended(client, create_headless(client, gate), RunStatus.WAITING)
    kernel.run(LOAD)
    kernel.run("%%step mine\nx = 1", "own")
    [mine] = client.call(contract.LIST_RUNS, contract.ListRuns(kind=DriverKind.INTERACTIVE)).runs

    notebooks.write(path, FIXED, parameters="topic = 'a'")
    reply = kernel.run(f"%durable attach {run.short}")
    assert "another version than the run's by now (analyse)" in reply.notes
    assert "kept: search" in reply.notes
    assert "stopped before analyse, which failed with ZeroDivisionError" in reply.notes
    assert kernel.value("(topic, [n.text for n in notes], alias is notes, k)") == "('b', ['b'], True, 1)"
    assert kernel.value("type(notes[0]) is Note") == "True"
    assert ended(client, mine, RunStatus.PAUSED).reason.startswith("its kernel went over to run")
    assert kernel.run(dict(CELLS)["search"], "search").notes.startswith("↺ search")

    assert "search   restore" in kernel.run("%durable plan").notes

    kernel.restart()  # and it is taken up with its parameters
    for cell_id, text in [("load", LOAD), ("parameters", "topic = 'a'"), *FIXED[1:4]]:
        assert kernel.run(text, cell_id).status == "ok"
    assert kernel.value("(topic, total)") == "('b', 1.0)"

    with pytest.raises(LeaseHeld, match="is driven by kernel"):
        past.resume(client, run.id, take_over=False).carry_out()
    handing = past.resume(client, run.id, take_over=True)
    assert actions(handing) == [("search", "keep"), ("analyse", "keep"), ("end", "run")]
    assert not handing.notes
    handing.carry_out()
    fenced = kernel.run("%%step late\nx = 2", "late")
    assert fenced.status == "error"
    assert (
        "is not kept" in fenced.error or "not driven from here" in fenced.error or "driven by" in fenced.error
    )
    done = ended(client, run)
    assert done.status is RunStatus.COMPLETED, done.reason
    assert ran(done) == {"search": 1, "analyse": 2, "end": 1}
    assert {"total": 1.0, "topic": "b", "shared": True}.items() <= done.result.items()
    assert done.earlier_snapshots == (run.snapshot,)
    attached = kernel.run(f"%durable attach {run.short}")
    assert attached.status == "error"
    assert "is completed" in attached.error

    brought = kernel.run(f"%durable attach {waiting.id}")
    assert "stopped at gate, which waits" in brought.notes
    assert "it stays a run of" in brought.notes
    assert kernel.value("rows") == "[1, 2]"
    answer = contract.AnswerWait(wait_id=waiting.waits[0].id, approved=True, by="ann", nonce="n")
    client.call(contract.ANSWER_WAIT, answer)
    answered = kernel.run(dict(GATE)["gate"], "gate")
    assert answered.status == "ok", answered.error
    assert kernel.value("(rows, ok.by)") == "([1, 2], 'ann')"
    assert f"nbdurable resume {waiting.short}" in kernel.run("%durable release").notes
    assert "released run" in kernel.run("%%step late\nx = 2", "late").error
    past.resume(client, waiting.id, take_over=False).carry_out()
    assert ended(client, waiting).result == {"rows": [1, 2], "ok": True}
