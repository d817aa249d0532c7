"""How long it takes until a small step is on disk: ours through the real client, DBOS on SQLite, a bare DuckDB commit.

Run: `python -m tests.benchmarks.commit [--steps N]`. Peers and ours take turns, so that a noisy machine is noisy
for all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from nbdurable import contract
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.manifest import CodeFacts, Manifest, seal
from nbdurable.checkpoint.save import save
from nbdurable.client import Client
from nbdurable.models import Driver, DriverKind, Run
from nbdurable.processes import identity
from nbdurable.security import load_key
from nbdurable.settings import Home
from tests.benchmarks.table import Row, show

TURNS = 4


def new_run(client: Client, name: str) -> Run:
    driver = Driver(kind=DriverKind.INTERACTIVE, process=identity("kernel"))
    question = contract.CreateRun(notebook=f"/bench/{name}.ipynb", kind=DriverKind.INTERACTIVE, driver=driver)
    return client.call(contract.CREATE_RUN, question)


def steps(client: Client, run: Run, count: int, start: int) -> tuple[list[float], list[float]]:
    """Commit `count` steps with a small value; return seconds per commit, and per whole step (begin, save, commit)."""
    key, blobs = load_key(client.home), LocalBlobs(client.home.blobs)
    code = CodeFacts(source="x = i", digest="d" * 32, python="3.11")
    commits, wholes = [], []
    for i in range(start, start + count):
        began = time.perf_counter()
        name = f"s{i}"
        begun = client.call(
            contract.BEGIN_STEP,
            contract.BeginStep(run_id=run.id, epoch=run.epoch, step=name, action="execute", reason="new"),
        )
        values = {"x": i}
        saved = save(values, {"x"}, blobs, fingerprints={})
        manifest = Manifest(
            run_id=run.id,
            step=name,
            created_at=time.time(),
            duration_s=0.0,
            code=code,
            variables=saved.variables,
            groups=saved.groups,
        )
        blobs.sync()
        signed = seal(manifest, key)
        sent = time.perf_counter()
        client.call(
            contract.COMMIT_STEP,
            contract.CommitStep(
                run_id=run.id,
                epoch=run.epoch,
                step=name,
                attempt=begun.attempt,
                status="completed",
                manifest=signed,
                variables=saved.variables,
            ),
        )
        done = time.perf_counter()
        commits.append(done - sent)
        wholes.append(done - began)
    return commits, wholes


def _client_process(home: Path, name: str, count: int, ready, go, results) -> None:  # type: ignore[no-untyped-def]
    client = Client(Home(home))
    run = new_run(client, name)
    steps(client, run, 20, 10_000)
    ready.release()
    go.wait()
    began = time.time()
    commits, wholes = steps(client, run, count, 0)
    results.put((began, time.time(), commits, wholes))


def ours(home: Home, clients: int, count: int) -> tuple[float, list[float], list[float]]:
    """Run `clients` processes at once; return commits per second, and seconds per commit and per step."""
    context = multiprocessing.get_context("spawn")
    ready, go, results = context.Semaphore(0), context.Event(), context.Queue()
    workers = [
        context.Process(target=_client_process, args=(home.root, f"c{i}", count, ready, go, results))
        for i in range(clients)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    go.set()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    began, ended = min(f[0] for f in found), max(f[1] for f in found)
    return (
        clients * count / (ended - began),
        [s for f in found for s in f[2]],
        [s for f in found for s in f[3]],
    )


CALLS = """
%%step calls{turn}
for i in range(20):
    small(-i)
for i in range({count}):
    began = time.perf_counter()
    small(i)
    seconds.append(time.perf_counter() - began)
"""
MAP = """
%%step map{turn}
began = time.perf_counter()
len(durable.map(small, range({items}), concurrency=64))
spent = time.perf_counter() - began
"""


def _kernel_process(home: Path, turn: int, count: int, items: int, results) -> None:  # type: ignore[no-untyped-def]
    from IPython.core.interactiveshell import InteractiveShell

    os.environ["NBDURABLE_HOME"] = str(home)
    os.chdir(home.parent)
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "nbdurable")
    setup = "import time, nbdurable as durable\nseconds = []\n@durable.step\ndef small(i):\n    return i"
    for cell in (setup, CALLS.format(turn=turn, count=count), MAP.format(turn=turn, items=items)):
        shell.run_cell(cell).raise_error()
    results.put((shell.user_ns["seconds"], items / shell.user_ns["spent"]))


def our_calls(home: Home, turn: int, count: int, items: int) -> tuple[list[float], float]:
    """Make recorded calls in a step; return seconds per call, and items per second of a `map` with 64 at once."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_kernel_process, args=(home.root, turn, count, items, results))
    process.start()
    found: tuple[list[float], float] = results.get()
    process.join()
    return found


def dbos_steps(folder: Path) -> tuple[object, object]:
    """Start DBOS on SQLite; return its workflow and DBOS itself."""
    from dbos import DBOS

    DBOS(
        config={
            "name": "bench",
            "system_database_url": f"sqlite:///{folder}/dbos.sqlite",
            "log_level": "ERROR",
            "run_admin_server": False,
        }
    )

    @DBOS.step()
    def step(i: int) -> int:
        return i

    @DBOS.workflow()
    def workflow(count: int) -> list[float]:
        seconds = []
        for i in range(count):
            began = time.perf_counter()
            step(i)
            seconds.append(time.perf_counter() - began)
        return seconds

    DBOS.launch()
    return workflow, DBOS


def dbos_threads(workflow, clients: int, count: int) -> tuple[float, list[float]]:  # type: ignore[no-untyped-def]
    found: list[list[float]] = []
    threads = [threading.Thread(target=lambda: found.append(workflow(count))) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients * count / (time.perf_counter() - began), [s for f in found for s in f]


def bare_duckdb(folder: Path, count: int) -> list[float]:
    import duckdb

    connection = duckdb.connect(str(folder / "bare.duckdb"), config={"threads": 1})
    connection.execute("CREATE TABLE IF NOT EXISTS t(i BIGINT, name VARCHAR, body VARCHAR)")
    body, seconds = "x" * 1500, []
    for i in range(count):
        began = time.perf_counter()
        connection.execute("INSERT INTO t VALUES (?, ?, ?)", [i, "s", body])
        seconds.append(time.perf_counter() - began)
    connection.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps per client and turn")
    parser.add_argument("--items", type=int, default=10_000, help="items of a map")
    wanted = parser.parse_args()
    count = wanted.steps
    folder = Path(tempfile.mkdtemp(prefix="nbdurable-bench-"))
    home = Home(folder / "home").create()
    workflow, dbos = dbos_steps(folder)
    one: list[float] = []
    one_whole: list[float] = []
    peers: list[float] = []
    bare: list[float] = []
    rates: dict[str, list[float]] = {"ours 1": [], "ours 8": [], "DBOS 1": [], "DBOS 8": []}
    eight: list[float] = []
    called: list[float] = []
    mapped: list[float] = []
    dbos_threads(workflow, 1, 50)
    for turn in range(TURNS):
        seconds, rate = our_calls(home, turn, count, wanted.items)
        called += seconds
        mapped.append(rate)
        rate, commits, wholes = ours(home, 1, count)
        rates["ours 1"].append(rate)
        one += commits
        one_whole += wholes
        rate, seconds = dbos_threads(workflow, 1, count)
        rates["DBOS 1"].append(rate)
        peers += seconds
        bare += bare_duckdb(folder, count)
        rate, commits, _ = ours(home, 8, count)
        rates["ours 8"].append(rate)
        eight += commits
        rates["DBOS 8"].append(dbos_threads(workflow, 8, count // 4)[0])
    dbos.destroy()
    Client(home, start=False).call(contract.SHUTDOWN, contract.Nothing())

    p50 = {
        name: statistics.median(v) * 1000
        for name, v in {
            "commit": one,
            "step": one_whole,
            "DBOS": peers,
            "bare": bare,
            "eight": eight,
            "call": called,
        }.items()
    }
    per_s = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        Row("bare DuckDB INSERT commit, p50", f"{p50['bare']:.2f} ms"),
        Row("DBOS step on SQLite, p50", f"{p50['DBOS']:.2f} ms"),
        Row(
            "our commit, p50, beside DBOS",
            f"{p50['commit']:.2f} ms",
            f"{p50['commit'] / p50['DBOS']:.2f} ×",
            "≤ 0.7 ×",
            p50["commit"] <= 0.7 * p50["DBOS"],
        ),
        Row(
            "our commit, p50, beside bare DuckDB",
            f"{p50['commit']:.2f} ms",
            f"{p50['commit'] / p50['bare']:.2f} ×",
            "≤ 2 ×",
            p50["commit"] <= 2 * p50["bare"],
        ),
        Row(
            "our whole step (begin, save, commit), p50",
            f"{p50['step']:.2f} ms",
            f"{p50['step'] / p50['DBOS']:.2f} × DBOS",
        ),
        Row(
            "our recorded call, small value, p50",
            f"{p50['call']:.2f} ms",
            f"{p50['call'] / p50['DBOS']:.2f} × DBOS",
            "≤ 0.7 ×",
            p50["call"] <= 0.7 * p50["DBOS"],
        ),
        Row(
            "map, 64 at once, items per second",
            f"{statistics.median(mapped):.0f} /s",
            "",
            "≥ 3000 /s",
            statistics.median(mapped) >= 3000,
        ),
        Row("8 clients: our commit, p50", f"{p50['eight']:.2f} ms"),
        Row("1 client: ours / DBOS, steps per second", f"{per_s['ours 1']:.0f} / {per_s['DBOS 1']:.0f}"),
        Row(
            "8 clients: ours, beside 1 client",
            f"{per_s['ours 8']:.0f} /s",
            f"{per_s['ours 8'] / per_s['ours 1']:.2f} ×",
            "≥ 3 ×",
            per_s["ours 8"] >= 3 * per_s["ours 1"],
        ),
        Row(
            "8 clients: ours, beside DBOS",
            f"{per_s['ours 8']:.0f} / {per_s['DBOS 8']:.0f} /s",
            f"{per_s['ours 8'] / per_s['DBOS 8']:.2f} ×",
        ),
    ]
    show("commit latency", rows, {"p50_ms": p50, "per_s": per_s, "pid": os.getpid()})


if __name__ == "__main__":
    main()
