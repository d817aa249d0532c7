"""The coordinator as a process: found, started once, killed, restarted under load, ended when idle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbdurable import __version__, contract, processes
from nbdurable.client import Client
from nbdurable.errors import CoordinatorUnreachable, StoreTooNew, Unauthorized, UsageError
from nbdurable.models import Driver, DriverKind, Run, RunStatus, SignedManifest, WaitKind, WaitStatus
from nbdurable.settings import Home
from tests.tools.processes import Coordinator, processes_of, until

KERNEL = Driver(kind=DriverKind.INTERACTIVE, process=processes.identity("kernel"))
NOTHING = contract.Nothing()


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDURABLE_WORKER_SLOTS", "0")


def health(client: Client) -> contract.Health:
    return client.call(contract.HEALTH, NOTHING)


def interactive(client: Client) -> Run:
    asked = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.INTERACTIVE, driver=KERNEL)
    return client.call(contract.CREATE_RUN, asked)


def commit_step(client: Client, run: Run, step: str) -> int:
    """Begin and commit a step as a kernel does."""
    begun = client.call(
        contract.BEGIN_STEP,
        contract.BeginStep(run_id=run.id, epoch=run.epoch, step=step, action="execute", reason="new"),
    )
    asked = contract.CommitStep(
        run_id=run.id,
        epoch=run.epoch,
        step=step,
        attempt=begun.attempt,
        status="completed",
        manifest=SignedManifest(text="{}", signature="0"),
    )
    return client.call(contract.COMMIT_STEP, asked).seq


def kinds(client: Client, run: Run) -> list[str]:
    events = client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id, limit=100_000)).events
    return [event.kind for event in events]


# Found and started -----------------------------------------------------------------------------------------


def test_importing_the_client_is_cheap() -> None:
    """The client is in every kernel: nothing of the coordinator or of the store comes with it."""
    heavy = "fastapi uvicorn duckdb psutil starlette asyncio pandas"
    code = f"import sys, nbdurable.client; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_two_clients_at_once_start_one_coordinator(home: Home) -> None:
    """Three processes that find no coordinator end up with the same one, and exactly one was started."""
    code = (
        "import sys; from nbdurable import contract; from nbdurable.client import Client\n"
        "sys.stdin.readline(); print(Client().call(contract.HEALTH, contract.Nothing()).pid)"
    )
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    pids = {client.communicate(timeout=60)[0] for client in clients}
    assert len(pids) == 1
    log = (home.logs / "coordinator.log").read_text()
    assert log.count("serves") == 1
    assert len(processes_of(home)) == 1


def test_what_it_leaves_is_for_this_user_alone(coordinator: Coordinator) -> None:
    """The socket, the token and the file that says where it is are closed to others."""
    found = health(coordinator.client)
    place = json.loads(coordinator.home.coordinator.read_text())
    assert place == {"pid": found.pid, "url": f"unix:{coordinator.home.socket}", "version": __version__}
    for path in (coordinator.home.coordinator, coordinator.home.token, coordinator.home.socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(coordinator.home.socket.parent.stat().st_mode) == 0o700


def test_without_start_a_missing_coordinator_is_an_error(home: Home) -> None:
    client = Client(home, start=False)
    with pytest.raises(CoordinatorUnreachable, match="is not running"):
        health(client)
    assert processes_of(home) == []


def test_a_stale_socket_and_json_do_not_hinder(coordinator: Coordinator) -> None:
    """Guarantee 11: what a killed coordinator left is cleaned away by the next one."""
    first = health(coordinator.client).pid
    coordinator.kill()
    assert coordinator.home.socket.exists()
    assert coordinator.home.coordinator.exists()
    assert health(coordinator.client).pid != first


def test_rubbish_in_the_json_does_not_hinder(home: Home) -> None:
    home.coordinator.write_text("not json")
    home.socket.write_text("a file, not a socket")
    assert health(Client(home)).home == str(home.root)


def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    """The socket then stands in the temporary folder, closed to others."""
    from tests.tools.processes import end_processes_of

    home = Home(tmp_path / ("deep" * 30) / ".nbdurable")
    assert home.root not in home.socket.parents
    try:
        with Client(home) as client:
            health(client)
            assert stat.S_IMODE(home.socket.parent.stat().st_mode) == 0o700
            client.call(contract.SHUTDOWN, NOTHING)
        until(lambda: not home.socket.exists(), what="the socket goes")
    finally:
        end_processes_of(home)
        home.socket.parent.rmdir()


def test_a_token_that_does_not_match(coordinator: Coordinator) -> None:
    health(coordinator.client)
    coordinator.home.token.write_text("0" * 64)
    with Client(coordinator.home) as client, pytest.raises(Unauthorized, match="token"):
        health(client)


def test_another_version_may_end_the_coordinator(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the error says to do works: `nbdurable down` of the new version ends the old coordinator."""
    pid = health(coordinator.client).pid
    with Client(coordinator.home) as client:
        monkeypatch.setattr("nbdurable.client.__version__", "9.9")
        client.call(contract.SHUTDOWN, NOTHING)
    coordinator.wait_gone(pid)


def test_settings_that_cannot_be_used_are_told_to_the_client(home: Home) -> None:
    """Guarantee 11: why it does not start reaches whoever wanted it."""
    (home.root / "settings.toml").write_text("lease_s = 'soon'")
    with pytest.raises(UsageError, match="lease_s"):
        health(Client(home))


def test_a_store_from_a_newer_version_is_told_to_the_client(home: Home) -> None:
    client = Client(home)
    health(client)
    client.call(contract.SHUTDOWN, NOTHING)
    until(lambda: not processes_of(home), what="the coordinator ends")
    import duckdb

    with duckdb.connect(str(home.store)) as database:
        database.execute("INSERT INTO migrations SELECT version + 1, 'later', applied_at FROM migrations")
    with pytest.raises(StoreTooNew):
        health(client)


def test_one_that_dies_at_once_shows_its_log(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = home.root / "broken"
    broken.mkdir()
    (broken / "uvicorn.py").write_text("raise RuntimeError('no server today')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(CoordinatorUnreachable, match="ended at once") as told:
        health(Client(home))
    assert "no server today" in told.value.todo


def test_where_there_are_no_unix_sockets(home: Home) -> None:
    """It listens on the loopback interface with the same token; a port that became another's gets no token."""
    code = (
        "import sys; from pathlib import Path; from nbdurable.settings import Home\n"
        "from nbdurable.coordinator import daemon\n"
        "daemon.UNIX_SOCKETS = False\n"
        "daemon.serve(Home(Path(sys.argv[1])))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(home.root)], stderr=subprocess.DEVNULL) as daemon:
        until(home.coordinator.exists, what="it answers")
        place = json.loads(home.coordinator.read_text())
        assert place["url"].startswith("http://127.0.0.1:")
        with Client(home, start=False) as client:
            assert health(client).pid == daemon.pid
            home.token.write_text("0" * 64)
            client.close()
            with Client(home, start=False) as wrong, pytest.raises(Unauthorized):
                health(wrong)
            daemon.terminate()
            assert daemon.wait(20) == 0
    with socket.create_server(("127.0.0.1", int(place["url"].rpartition(":")[2]))) as other:
        home.coordinator.write_text(json.dumps(place))
        with pytest.raises(CoordinatorUnreachable), Client(home, start=False) as client:
            health(client)
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()


# Killed and restarted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["store-before-commit", "store-committed"])
def test_a_commit_whose_answer_was_lost(
    coordinator: Coordinator, point: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guarantee 3: killed before or after its transaction, the repeated commit leaves one checkpoint."""
    fuse = tmp_path / "fuse"
    client = coordinator.client
    run = interactive(client)
    before = commit_step(client, run, "before")
    client.call(contract.SHUTDOWN, NOTHING)
    until(lambda: not processes_of(coordinator.home), what="the coordinator ends")
    monkeypatch.setenv("NBDURABLE_FAULT", f"{point}:1:{fuse}")
    asked = contract.CommitStep(
        run_id=run.id,
        epoch=run.epoch,
        step="s",
        attempt=1,
        status="completed",
        manifest=SignedManifest(text="{}", signature="0"),
    )
    seq = client.call(contract.COMMIT_STEP, asked).seq
    assert fuse.exists()
    assert client.call(contract.COMMIT_STEP, asked).seq == seq > before
    assert kinds(client, run).count("step_completed") == 2
    checkpoints = client.call(contract.CHECKPOINTS, contract.ByRun(run_id=run.id)).checkpoints
    assert [(c.step, c.seq) for c in checkpoints] == [("before", before), ("s", seq)]
    assert client.call(contract.GET_RUN, contract.ByRun(run_id=run.id)).epoch == run.epoch


@pytest.mark.parametrize("point", ["store-before-commit", "store-committed"])
def test_a_run_whose_creation_was_not_answered(
    coordinator: Coordinator, point: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wish for a run that is sent again after a crash makes one run, also without a key from the user."""
    monkeypatch.setenv("NBDURABLE_FAULT", f"{point}:1:{tmp_path / 'fuse'}")
    asked = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.HEADLESS, snapshot="0" * 64)
    run = coordinator.client.call(contract.CREATE_RUN, asked)
    assert (tmp_path / "fuse").exists()
    assert coordinator.client.call(contract.LIST_RUNS, contract.ListRuns()).runs == (run,)


def test_answers_survive_a_kill(coordinator: Coordinator) -> None:
    """Guarantee 5: an answer that was acknowledged is there after SIGKILL, and wakes its run."""
    client = coordinator.client
    worker = Driver(kind=DriverKind.HEADLESS, process=processes.identity("worker"))
    asked = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.HEADLESS, snapshot="0" * 64)
    run = client.call(contract.CREATE_RUN, asked)
    (run,) = client.call(contract.LEASE_WORK, contract.LeaseWork(driver=worker, slots=1)).runs
    opening = contract.OpenWait(run_id=run.id, epoch=run.epoch, key="g", kind=WaitKind.APPROVAL, title="Go?")
    wait = client.call(contract.OPEN_WAIT, opening)
    coordinator.kill()
    ending = contract.EndLease(run_id=run.id, epoch=run.epoch, how="suspend", reason="waits for approval")
    assert client.call(contract.END_LEASE, ending).status is RunStatus.WAITING
    coordinator.kill()
    assert (
        client.call(contract.END_LEASE, ending).status is RunStatus.WAITING
    )  # its answer may have been lost
    answer = contract.AnswerWait(wait_id=wait.id, approved=True, by="Ann", nonce="n")
    answered = client.call(contract.ANSWER_WAIT, answer)
    coordinator.kill()
    assert client.call(contract.ANSWER_WAIT, answer) == answered
    found = client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))
    assert (found.status, found.waits) == (RunStatus.QUEUED, (answered,))
    assert answered.status is WaitStatus.ANSWERED


def test_restarts_under_load_fail_nothing(coordinator: Coordinator) -> None:
    """Four kernels commit while the coordinator is killed and ended by turns: nothing fails, nothing is lost."""
    client = coordinator.client
    runs = [interactive(client) for _ in range(4)]
    done: dict[str, dict[str, int]] = {run.id: {} for run in runs}
    failures: list[BaseException] = []
    enough = threading.Event()

    def drive(run: Run) -> None:
        try:
            while not enough.is_set():
                step = f"s{len(done[run.id])}"
                done[run.id][step] = commit_step(client, run, step)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=drive, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    try:
        for turn in range(4):
            reached = {run.id: len(done[run.id]) + 5 for run in runs}
            until(
                lambda reached=reached: failures or all(len(done[i]) >= n for i, n in reached.items()),
                what="each kernel commits five more",
            )
            if turn % 2:
                pid = coordinator.pid
                os.kill(pid, signal.SIGTERM)
                coordinator.wait_gone(pid)
            else:
                coordinator.kill()
    finally:
        enough.set()
        for thread in threads:
            thread.join(60)
    assert failures == []
    for run in runs:
        found = client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))
        assert {step.name: step.checkpoint_seq for step in found.steps} == done[run.id]
        assert (found.status, found.epoch) == (RunStatus.RUNNING, run.epoch)
        assert all(step.executions == 1 for step in found.steps)


# Ended -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["shutdown", "SIGTERM", "SIGINT"])
def test_a_clean_end(coordinator: Coordinator, how: str) -> None:
    """It answers who waits, keeps runs as they are, leaves a backup, and says nothing of trouble."""
    client, home = coordinator.client, coordinator.home
    run = interactive(client)
    pid = coordinator.pid
    held: list[Any] = []
    asked = contract.ReadEvents(run_id=run.id, after=10**9, hold_s=20.0)
    with Client(home) as other:
        waiting = threading.Thread(target=lambda: held.append(other.call(contract.READ_EVENTS, asked)))
        waiting.start()
        until(lambda: len(psutil.Process(pid).net_connections("unix")) >= 3, what="the question is held")
        if how == "shutdown":
            client.call(contract.SHUTDOWN, NOTHING)
        else:
            os.kill(pid, getattr(signal, how))
        coordinator.wait_gone(pid)
        log = (home.logs / "coordinator.log").read_text()
        assert "Traceback" not in log
        assert [path.name for path in home.backups.iterdir()]
        waiting.join(30)
    assert [page.run.status for page in held] == [RunStatus.RUNNING]
    with Client(home) as another:
        assert another.call(contract.GET_RUN, contract.ByRun(run_id=run.id)).epoch == run.epoch


def test_it_ends_when_idle(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driven run, an open timer or a client keeps it; with nothing left it ends, and says so."""
    monkeypatch.setenv("NBDURABLE_IDLE_EXIT_S", "0.6")
    client = coordinator.client
    run = interactive(client)
    pid = coordinator.pid
    client.close()
    child = psutil.Process(pid)
    with pytest.raises(psutil.TimeoutExpired):
        child.wait(1.5)  # the run is driven
    ending = contract.EndLease(run_id=run.id, epoch=run.epoch, how="leave", reason="kernel ended")
    assert client.call(contract.END_LEASE, ending).status is RunStatus.PAUSED
    with pytest.raises(psutil.TimeoutExpired):
        child.wait(1.5)  # this client is there
    client.close()
    coordinator.wait_gone(pid)
    assert "nothing to do" in (coordinator.home.logs / "coordinator.log").read_text()
    assert not coordinator.home.coordinator.exists()
    assert not coordinator.home.socket.exists()


def test_it_tells_again_where_it_is(coordinator: Coordinator) -> None:
    """A `coordinator.json` that was removed comes back, since nobody else could own the store meanwhile."""
    pid = health(coordinator.client).pid
    coordinator.home.coordinator.unlink()
    until(coordinator.home.coordinator.exists, what="the file is back")
    with Client(coordinator.home, start=False) as another:
        assert health(another).pid == pid


def test_it_ends_when_the_project_is_removed(coordinator: Coordinator) -> None:
    """Removing the folder is how to get rid of everything: nothing comes back."""
    pid = health(coordinator.client).pid
    shutil.rmtree(coordinator.home.root)
    coordinator.wait_gone(pid)
    assert not coordinator.home.root.exists()


def test_in_front_it_stays(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDURABLE_IDLE_EXIT_S", "0.1")
    arguments = [sys.executable, "-m", "nbdurable.coordinator", "--home", str(home.root), "--stay"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as front:
        until(home.coordinator.exists, what="it answers")
        with pytest.raises(subprocess.TimeoutExpired):
            front.wait(1.5)
        with Client(home, start=False) as client:
            assert health(client).pid == front.pid
        front.send_signal(signal.SIGINT)
        assert front.wait(20) == 0


def test_a_second_one_is_refused_the_store(coordinator: Coordinator) -> None:
    """One process owns the store: another coordinator of the same project gives up and says whose it is."""
    pid = health(coordinator.client).pid
    from nbdurable.errors import StoreLocked
    from nbdurable.store.duckdb_store import DuckDBStore

    with pytest.raises(StoreLocked, match=str(pid)):
        DuckDBStore.open(coordinator.home)
    assert health(coordinator.client).pid == pid


def test_forks_do_not_share_connections(coordinator: Coordinator) -> None:
    """A kernel that forks (multiprocessing) keeps its answers apart from its children's."""
    pid = health(coordinator.client).pid
    code = (
        "import os; from nbdurable import contract; from nbdurable.client import Client\n"
        "client = Client(start=False)\n"
        "ask = lambda: client.call(contract.HEALTH, contract.Nothing()).pid\n"
        "ask(); child = os.fork()\n"
        f"right = all(ask() == {pid} for _ in range(100))\n"
        "if child == 0: os._exit(0 if right else 1)\n"
        "assert right and os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
