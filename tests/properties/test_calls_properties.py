"""Steps that make calls in random ways, and die behind random ones, end as those that never stopped.

Each generated notebook runs whole in one process; then again, in another project, by processes that are killed each
behind a randomly chosen committed call, until one comes to the end.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.settings import Home
from tests.tools.processes import end_processes_of

RUNNER = """\
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "nbdurable")
for cell in json.load(open("cells.json")):
    shell.run_cell(cell).raise_error()
json.dump(shell.user_ns["kept"], open("kept.json", "w"))
"""
SETUP = """\
import asyncio, random, threading
import nbdurable as durable
kept = {}
def ran(name, n):
    with open("log", "a") as file:
        file.write(f"{name}({n})\\n")
@durable.step
def leaf(n):
    ran("leaf", n)
    return n * 3 + 1
@durable.step
def noisy(n):
    ran("noisy", n)
    return [n, random.random()]
@durable.step
def outer(n):
    ran("outer", n)
    return [leaf(n), leaf(n + 1), leaf(n)]
@durable.step
async def later(n):
    ran("later", n)
    await asyncio.sleep(0)
    return leaf(n) - n
@durable.step
def items(n):
    ran("items", n)
    yield from range(n % 4)
def threaded(*numbers):
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.__setitem__(n, leaf(n))) for n in numbers]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return [found[n] for n in numbers]"""
SHORT, LONG = 2, 60
STEPS = 3


def statement(choose: random.Random) -> str:
    numbers = [choose.randrange(8) for _ in range(choose.randint(1, 5))]
    one = numbers[0]
    return choose.choice(
        [
            f"found.append(leaf({one}))",
            f"found.append(noisy({one}))",
            f"found.append(outer({one}))",
            f"found.append(list(items({one})))",
            f"found += await asyncio.gather(*[later(n) for n in {numbers}])",
            f"found += durable.map(outer, {numbers}, concurrency=3)",
            f"found += await durable.map_async(later, {numbers}, concurrency=2)",
            f"found += threaded(*{numbers})",
        ]
    )


def notebook(choose: random.Random) -> list[str]:
    cells = [SETUP]
    for number in range(STEPS):
        lines = [statement(choose) for _ in range(choose.randint(1, 5))]
        cells.append("\n".join([f"%%step s{number}", "found = []", f"random.seed({number})", *lines,
                                "found.append(random.random())"]))  # fmt: skip
        cells.append(f"kept['s{number}'] = found")
    return cells


def run(folder: Path, fault: str = "") -> bool:
    """Run the notebook of a folder in a process; tell whether it came to its end."""
    env = {**os.environ, "NBDURABLE_HOME": str(folder / ".nbdurable"), "NBDURABLE_FAULT": fault}
    if not fault:
        del env["NBDURABLE_FAULT"]
    done = subprocess.run([sys.executable, "-c", RUNNER], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode in (0, -9), done.stdout + done.stderr
    return done.returncode == 0


def log(folder: Path) -> Counter[str]:
    path = folder / "log"
    lines = path.read_text().split() if path.exists() else []
    path.write_text("")
    return Counter(lines)


def committed(folder: Path) -> Counter[str]:
    with Client(Home(folder / ".nbdurable")) as client:
        [found] = client.call(contract.LIST_RUNS, contract.ListRuns()).runs
        calls = client.call(contract.READ_CALLS, contract.ReadCalls(run_id=found.id)).calls
    return Counter(f"{one.call.name}({one.call.given})" for one in calls)


@pytest.mark.timeout(3600)
def test_calls_that_were_committed_are_not_made_again(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Guarantees 1, 3 and 6, for calls: values, random state, and how often each function ran."""
    kills = 0
    for seed in range(LONG if request.config.getoption("--long") else SHORT):
        choose = random.Random(seed)
        whole, broken = tmp_path / f"whole{seed}", tmp_path / f"broken{seed}"
        cells = json.dumps(notebook(choose))
        for folder in (whole, broken):
            folder.mkdir()
            (folder / "cells.json").write_text(cells)
        assert run(whole)
        every = log(whole)
        made = committed(whole)
        known: Counter[str] = Counter()
        for turn in range(sum(made.values()) + 1):
            fuse = broken / f"fuse{turn}"
            is_done = run(broken, f"call-committed:{choose.randint(4, 24)}:{fuse}")
            for name, times in log(broken).items():
                assert times <= max(0, every[name] - known[name]), (seed, turn, name)
            if is_done:
                break
            kills += 1
            known = committed(broken)
        else:
            pytest.fail(f"seed {seed} did not come to its end")
        assert (broken / "kept.json").read_text() == (whole / "kept.json").read_text(), seed
        assert committed(broken) == made, seed
        for folder in (whole, broken):
            end_processes_of(Home(folder / ".nbdurable"))
    assert kills >= SHORT
