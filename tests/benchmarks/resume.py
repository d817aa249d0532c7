"""How long a notebook of 200 committed steps with 1 GB of state takes to come back, once its kernel is up.

Run: `python -m tests.benchmarks.resume [--size MB] [--turns N]`. The state is a mix, and most steps read what an
earlier one left: arrays (60 % of the bytes), frames of numbers and texts (30 %), chat messages as lists of dicts
(10 %). Interactive is "run all": all cells are sent at once to a new kernel, as JupyterLab does, `%load_ext` first.
Headless is `nbdurable resume` of a run that failed in its last cell. Beside both stands the same number of cells that
do nothing, executed by the same kernel or by papermill's own engine: what Jupyter takes for itself. Processor time is
the kernel's between the same two cells, and the coordinator's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.settings import Home
from tests.benchmarks.table import Row, show
from tests.tools import notebooks
from tests.tools.kernels import Kernel

STEPS = 200
KINDS = (*["array"] * 6, *["frame"] * 2, *["chat"] * 2)  # of each ten steps
SHARES = {"array": 0.6, "frame": 0.3, "chat": 0.1}  # of the bytes
MESSAGE_BYTES = 1750
IMPORTS = "import json, os, random, time\nimport numpy as np\nimport pandas as pd"
FIRST = "began = time.time()\nrng = np.random.default_rng(0)\nwords = [f'{i:x}' for i in range(4096)]"
HELPERS = """
def messages(count, seed):
    source = random.Random(seed)
    return [{"role": "user", "content": " ".join(source.choices(words, k=400)), "tokens": i, "tools": [i, "search"]}
            for i in range(count)]

def frame(rows, seed):
    numbers = np.random.default_rng(seed).random((rows, 4))
    table = pd.DataFrame(numbers, columns=list("abcd"))
    table["text"] = [f"text of {i + seed}" for i in range(rows)]
    return table
"""


def step_bodies(size: int) -> list[str]:
    """Return the code of each step; one of a kind reads what the one before it left."""
    each = {kind: int(size * SHARES[kind] / STEPS / KINDS.count(kind) * len(KINDS)) for kind in SHARES}
    last: dict[str, str] = {}
    bodies = []
    for number in range(STEPS):
        kind, name = KINDS[number % len(KINDS)], f"v{number}"
        before = last.get(kind)
        match kind:
            case "array":
                body = f"{name} = np.random.default_rng({number}).random({each[kind] // 8})"
                body += f" + {before}[0]" if before else ""
            case "frame":
                body = f"{name} = frame({each[kind] // 60}, {number})"
                body += f"\n{name}['a'] += {before}['a'].iloc[0]" if before else ""
            case _:
                body = f"{name} = messages({each[kind] // MESSAGE_BYTES}, {number})"
                body += f"\n{name}[0]['tools'] += {before}[-1]['tools']" if before else ""
        last[kind] = name
        bodies.append(f"{body}\nprint(type({name}).__name__, len({name}))")
    return bodies


def cells(bodies: list[str], record: Path, *, ending: str = "") -> list[str]:
    """Return a notebook's cells: it notes when its first and its last cell ran, and its memory after the last."""
    rss = "int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')"
    took = "'seconds': time.time() - began, 'cpu': time.process_time() - used"
    last = f"record = {{{took}, 'rss': {rss}, 'base': base}}\n"
    last += f"with open({str(record)!r}, 'w') as f:\n    json.dump(record, f)\n{ending}"
    return [IMPORTS, f"base, used = {rss}, time.process_time()\n{FIRST}", HELPERS, *bodies, last]


def steps_of(bodies: list[str]) -> list[str]:
    return [f"%%step s{number}\n{body}" for number, body in enumerate(bodies)]


def busy_s(home: Home) -> float:
    """Return the processor time that the coordinator has used."""
    pid = json.loads(home.coordinator.read_text())["pid"]
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_all(kernel: Kernel, sources: list[str], *, at_once: bool = True) -> float:
    """Run cells; return the seconds from the first one's sending to the last one's end."""
    began = time.perf_counter()
    sent = [(f"c{i}", source) for i, source in enumerate(sources)]
    waiting = [kernel.send(source, cell_id) for cell_id, source in sent] if at_once else []
    for index, (cell_id, source) in enumerate(sent):
        reply = kernel.collect(waiting[index], 600) if at_once else kernel.run(source, cell_id, timeout=600)
        if reply.status != "ok":
            raise SystemExit(f"{source}\n{reply.error}")
    return time.perf_counter() - began


def interactive(folder: Path, home: Home, bodies: list[str], turns: int) -> dict[str, Any]:
    record = folder / "interactive.json"
    sources = cells(steps_of(bodies), record)
    path = notebooks.write(folder / "interactive.ipynb", sources)
    kernel = Kernel(home.root, path, folder)
    found: dict[str, Any] = {
        key: [] for key in ("resume", "rss", "empty", "load", "cpu", "empty cpu", "coordinator")
    }
    try:
        first = run_all(kernel, ["%load_ext nbdurable", *sources], at_once=False)
        found["first"] = first
        for _ in range(turns):
            kernel.kill()
            kernel.restart()
            run_all(kernel, [IMPORTS])  # what the libraries load is no cost of resuming
            found["load"].append(run_all(kernel, ["%load_ext nbdurable"]))
            before = busy_s(home)
            found["resume"].append(run_all(kernel, sources))
            found["coordinator"].append(busy_s(home) - before)
            noted = json.loads(record.read_text())
            found["cpu"].append(noted["cpu"])
            found["rss"].append(noted["rss"] - noted["base"])
            kernel.restart()
            run_all(kernel, [IMPORTS])
            found["empty"].append(
                run_all(kernel, cells([f"e{i} = {i}\nprint(e{i})" for i in range(STEPS)], record))
            )
            found["empty cpu"].append(json.loads(record.read_text())["cpu"])
    finally:
        kernel.shutdown()
    return found


def command(*words: str, env: dict[str, str], fails: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words], env=env, capture_output=True, text=True, check=False
    )
    if (done.returncode != 0) != fails:
        raise SystemExit(f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def headless(folder: Path, home: Home, bodies: list[str], turns: int) -> dict[str, Any]:
    env = {**os.environ, "NBDURABLE_HOME": str(home.root)}
    record = folder / "headless.json"
    ending = "raise RuntimeError('so that it can be resumed')"
    path = notebooks.write(folder / "headless.ipynb", cells(steps_of(bodies), record, ending=ending))
    out = folder / "out.ipynb"
    run = json.loads(command("nbdurable", "run", str(path), "-o", str(out), "--json", env=env, fails=True))
    found: dict[str, Any] = {
        "first": json.loads(record.read_text())["seconds"],
        "resume": [],
        **{key: [] for key in ("rss", "empty", "cpu", "empty cpu", "coordinator")},
    }
    plain = [f"e{i} = {i}\nprint(e{i})" for i in range(STEPS)]
    empty = notebooks.write(folder / "empty.ipynb", cells(plain, record))
    for _ in range(turns):
        before = busy_s(home)
        command("nbdurable", "resume", run["id"], "--json", env=env)
        for _ in Client(home).follow(run["id"]):
            pass  # until it has failed again
        found["coordinator"].append(busy_s(home) - before)
        noted = json.loads(record.read_text())
        found["cpu"].append(noted["cpu"])
        found["resume"].append(noted["seconds"])
        found["rss"].append(noted["rss"] - noted["base"])
        words = ("papermill", "--no-progress-bar", "--no-request-save-on-cell-execute", str(empty), str(out))
        command(*words, env=env)
        noted = json.loads(record.read_text())
        found["empty"].append(noted["seconds"])
        found["empty cpu"].append(noted["cpu"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="MB of state")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--only", choices=("interactive", "headless"))
    options = parser.parse_args()
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nbdurable-bench-") as name:
        folder = Path(name)
        os.environ["NBDURABLE_CONFIG"] = str(folder / "config")  # its stores are trusted there
        home = Home(folder / "home").create()
        bodies = step_bodies(options.size << 20)
        ways = {"interactive": interactive, "headless": headless}
        try:
            for way, measure in ways.items():
                if options.only in (None, way):
                    raw[way] = measure(folder, home, bodies, options.turns)
        finally:
            Client(home, start=False).call(contract.SHUTDOWN, contract.Nothing())
    rows = []
    for way, found in raw.items():
        whole, empty = statistics.median(found["resume"]), statistics.median(found["empty"])
        each, floor = f"{whole / STEPS * 1e3:.1f} ms a step", f"{empty / STEPS * 1e3:.1f} ms a cell"
        jupyters = "papermill's engine" if way == "headless" else "the kernel"
        rows += [
            Row(f"{way}: {STEPS} steps, {options.size} MB, first run", f"{found['first']:.1f} s"),
            Row("  resumed, first to last cell", f"{whole:.2f} s", each, "≤ 1 s", whole <= 1),
            Row(f"  of it {jupyters} for as many cells that do nothing", f"{empty:.2f} s", floor),
            Row(
                "  processor time: kernel, coordinator, kernel for cells that do nothing",
                " · ".join(
                    f"{statistics.median(found[key]):.2f}" for key in ("cpu", "coordinator", "empty cpu")
                )
                + " s",
            ),
            Row("  memory after it", f"{statistics.median(found['rss']) / 1e6:.0f} MB"),
        ]  # fmt: skip
    show("resume", rows, raw)


if __name__ == "__main__":
    main()
