"""50 trivial steps headless, each checkpointed, beside plain papermill on the same cells.

Run: `python -m tests.benchmarks.headless [--turns N]`. Both are whole processes from start to end, the coordinator
being up: ours as `nbdurable run`, papermill as its own command. The time between the first and the last cell is
measured inside the notebook.
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

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.settings import Home
from tests.benchmarks.table import Row, show
from tests.tools import notebooks

STEPS = 50


def cells(*, marked: bool, stamps: Path) -> list[str]:
    first = f"import json, time\n_stamps = {str(stamps)!r}\n_began = time.time()"
    last = "with open(_stamps, 'w') as f:\n    json.dump([_began, time.time()], f)"
    body = [(f"%%step s{i}\n" if marked else "") + f"x{i} = {i}\nprint(x{i})" for i in range(STEPS)]
    return [("%load_ext nbdurable\n" if marked else "") + first, *body, last]


def timed(command: list[str], env: dict[str, str], stamps: Path) -> tuple[float, float]:
    """Run a command; return seconds of the whole process, and from first to last cell."""
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    whole = time.perf_counter() - began
    if done.returncode != 0:
        raise SystemExit(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    first, last = json.loads(stamps.read_text())
    return whole, last - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    turns = parser.parse_args().turns
    folder = Path(tempfile.mkdtemp(prefix="nbdurable-bench-"))
    home = Home(folder / "home").create()
    env = {**os.environ, "NBDURABLE_HOME": str(home.root)}
    stamps = folder / "stamps.json"
    ours = notebooks.write(folder / "ours.ipynb", cells(marked=True, stamps=stamps))
    plain = notebooks.write(folder / "plain.ipynb", cells(marked=False, stamps=stamps))
    our_command = [
        sys.executable,
        "-m",
        "nbdurable",
        "run",
        str(ours),
        "-o",
        str(folder / "out.ipynb"),
        "--json",
    ]
    papermill = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        str(plain),
        str(folder / "plain-out.ipynb"),
    ]
    timed(our_command, env, stamps)  # starts coordinator and worker
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "papermill": []}
    for _ in range(turns):
        found["ours"].append(timed(our_command, env, stamps))
        found["papermill"].append(timed(papermill, env, stamps))
    Client(home, start=False).call(contract.SHUTDOWN, contract.Nothing())

    whole = {name: statistics.median(t[0] for t in times) for name, times in found.items()}
    inside = {name: statistics.median(t[1] for t in times) for name, times in found.items()}
    rows = [
        Row(
            "papermill, first to last cell",
            f"{inside['papermill']:.2f} s",
            f"{inside['papermill'] / STEPS * 1e3:.1f} ms a cell",
        ),
        Row(
            "ours, first to last cell",
            f"{inside['ours']:.2f} s",
            f"{inside['ours'] / inside['papermill']:.2f} ×",
            "< 1 ×",
            inside["ours"] < inside["papermill"],
        ),
        Row("papermill, whole process", f"{whole['papermill']:.2f} s"),
        Row(
            "ours, whole `nbdurable run`",
            f"{whole['ours']:.2f} s",
            f"{whole['ours'] / whole['papermill']:.2f} ×",
            "< 1 ×",
            whole["ours"] < whole["papermill"],
        ),
    ]
    show("headless 50 steps", rows, {"whole_s": found})


if __name__ == "__main__":
    main()
