"""Random SIGKILLs over kernel, worker and coordinator: guarantees 1, 3 and 6 hold for every run.

A notebook of 30 steps, each with a side effect (a line in a file), runs while processes die at random moments.
Short by default; `pytest --long tests/faults/test_random_kills.py` kills 200 times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.models import Event, Run, RunStatus
from nbdurable.notebooks import create_headless
from nbdurable.settings import Home
from tests.tools import notebooks

STEPS = 30
KILLS_PER_RUN = 8  # below the recoveries after which a run counts as poison
DEADLINE_S = 180.0


def write_notebook(folder: Path) -> tuple[Path, Path]:
    journal = folder / "journal.txt"
    cells = [f"%load_ext nbdurable\nimport os, time\ndef effect(i):\n    with open({str(journal)!r}, 'a') as f:\n"
             "        f.write(f'{i}\\n')\ntotal = 0\nseen = []"]  # fmt: skip
    for i in range(STEPS):
        body = f"%%step step{i}\neffect({i})\ntime.sleep(0.1)\n"
        cells.append(
            body + f"value{i} = {i} * {i}\nhistory = [*(history if {i} else []), {i}]\nprint('did {i}')"
        )
    cells.append(
        "import nbdurable\nnbdurable.result(total=sum(globals()[f'value{i}'] for i in range(30)), history=history)"
    )
    return notebooks.write(folder / "effects.ipynb", cells), journal


class Victims:
    """Finds and kills one of the processes that work on a run."""

    def __init__(self, home: Home, seed: int) -> None:
        self.home, self.random, self.killed = home, random.Random(seed), Counter[str]()

    def kill_one(self, run: Run) -> None:
        kind = self.random.choice(["kernel", "worker", "coordinator"])
        pid = self._pid(kind, run)
        if pid is None:
            return
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.killed[kind] += 1

    def _pid(self, kind: str, run: Run) -> int | None:
        if kind == "coordinator":
            try:
                return coordinator_pid(self.home)
            except (OSError, ValueError):
                return None
        if run.driver is None:
            return None
        worker = run.driver.process.pid
        if kind == "worker":
            return worker
        try:
            family = psutil.Process(worker).children(recursive=True)
            return next((p.pid for p in family if "ipykernel_launcher" in " ".join(p.cmdline())), None)
        except psutil.Error:
            return None


def coordinator_pid(home: Home) -> int:
    return int(json.loads(home.coordinator.read_text())["pid"])


def all_events(client: Client, run_id: str) -> list[Event]:
    events: list[Event] = []
    while True:
        after = events[-1].seq if events else 0
        page = client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run_id, after=after)).events
        if not page:
            return events
        events += page


def check(client: Client, run_id: str, journal: Path, seen: dict[str, int]) -> None:
    """Hold the guarantees against a run's history, its side effects, and what was seen acknowledged."""
    detail = client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))
    assert detail.status is RunStatus.COMPLETED, detail.reason
    assert detail.result == {"total": sum(i * i for i in range(STEPS)), "history": list(range(STEPS))}
    committed: dict[str, int] = {}
    begun: Counter[str] = Counter()
    for event in all_events(client, run_id):
        if event.kind == "step_started":
            assert event.step not in committed, f"{event.step} was committed and began again (guarantee 1)"
            begun[event.step or ""] += 1
        elif event.kind == "step_completed":
            assert event.step not in committed, f"{event.step} was committed twice"
            committed[event.step or ""] = event.seq
    assert set(committed) == {f"step{i}" for i in range(STEPS)}
    for step, seq in seen.items():
        assert committed[step] == seq, f"the acknowledged checkpoint of {step} was lost (guarantee 3)"
    effects = Counter(int(line) for line in journal.read_text().split())
    for i in range(STEPS):
        assert 1 <= effects[i] <= begun[f"step{i}"], f"step{i} had its effect {effects[i]} times"


def one_run(home: Home, folder: Path, seed: int, kills: int) -> Counter[str]:
    folder.mkdir()
    notebook, journal = write_notebook(folder)
    client = Client(home, timeout_s=60)
    run = create_headless(client, notebook, output=folder / "out.ipynb")
    victims = Victims(home, seed)
    seen: dict[str, int] = {}
    deadline = time.monotonic() + DEADLINE_S
    next_kill = time.monotonic() + victims.random.uniform(1.0, 2.5)
    while True:
        assert time.monotonic() < deadline, f"run {run.id} did not end: {run.status} {run.reason}"
        detail = client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))
        for step in detail.steps:
            if step.status == "completed" and step.checkpoint_seq is not None:
                assert seen.setdefault(step.name, step.checkpoint_seq) == step.checkpoint_seq
        if detail.status.is_final:
            break
        if sum(victims.killed.values()) < kills and time.monotonic() >= next_kill:
            victims.kill_one(detail)
            next_kill = time.monotonic() + victims.random.uniform(0.2, 2.5)
        wait = contract.ReadEvents(run_id=run.id, after=1 << 60, hold_s=0.1)
        client.call(contract.READ_EVENTS, wait)
    check(client, run.id, journal, seen)
    return victims.killed


def test_random_kills(
    home: Home, coordinator: object, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Guarantees 1, 3, 6: all runs complete, no committed step runs twice, no acknowledged one is lost."""
    wanted = 200 if request.config.getoption("--long") else 10
    seed = int(os.environ.get("NBDURABLE_SEED", random.SystemRandom().randrange(1 << 30)))
    killed: Counter[str] = Counter()
    turn = 0
    while sum(killed.values()) < wanted:
        left = wanted - sum(killed.values())
        print(f"seed {seed + turn}, killed so far {dict(killed)}", flush=True)
        killed += one_run(home, tmp_path / f"run{turn}", seed + turn, min(left, KILLS_PER_RUN))
        turn += 1
