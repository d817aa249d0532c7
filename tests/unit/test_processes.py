"""Processes of this host: told apart by their start, ended with their children; locks between processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nbdurable import processes
from tests.tools.processes import until

SLEEPER = "import time; time.sleep(60)"
PARENT = (
    "import subprocess, sys, time\n"
    f"child = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(60)"
)


def test_a_process_knows_itself() -> None:
    me = processes.identity("kernel")
    assert processes.is_alive(me)
    assert processes.is_local(me)
    assert me == processes.identity("kernel")


def test_a_later_process_with_the_same_pid_is_another_one() -> None:
    me = processes.identity("kernel")
    assert not processes.is_alive(me.model_copy(update={"started_at": me.started_at - 10}))


def test_a_process_of_another_host_cannot_be_known_to_be_dead() -> None:
    elsewhere = processes.identity("worker").model_copy(update={"host": "elsewhere", "pid": 1 << 22})
    assert processes.is_alive(elsewhere)
    assert not processes.is_local(elsewhere)


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, what="the child ends")
    assert not processes.exists(child.pid)
    with pytest.raises(ProcessLookupError):
        processes.identity("worker", child.pid)
    child.wait()


def test_the_end_of_a_tree_leaves_nobody() -> None:
    """Guarantee 4: nothing of a lost driver works on."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        grandchild = processes.identity("kernel", int(parent.stdout.readline()))
        child = processes.identity("worker", parent.pid)
        processes.end_tree(child)
        assert not processes.is_alive(child)
        assert not processes.is_alive(grandchild)


def test_the_end_of_a_tree_spares_this_process_and_its_ancestors() -> None:
    parent = processes.identity("worker", psutil.Process().ppid())
    processes.end_tree(processes.identity("kernel"))
    assert processes.is_alive(processes.identity("kernel"))
    assert processes.is_alive(parent)


def test_a_lock_is_held_by_one_process_and_released_by_its_death(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from nbdurable import processes\n"
        f"with processes.lock(Path({str(path)!r}), timeout_s=5): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(processes.LockTimeout), processes.lock(path, timeout_s=0.05):
            pass
        holder.kill()
    with processes.lock(path, timeout_s=5):
        pass


def test_a_started_process_writes_its_log_and_not_to_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What belongs to the kernel that starts a process is not passed on."""
    monkeypatch.setenv("JPY_SESSION_NAME", "/x.ipynb")
    monkeypatch.setenv("NBDURABLE_RUN_ID", "r")
    log = tmp_path / "logs" / "x.log"
    code = "import os; print([os.environ.get(n) for n in ('JPY_SESSION_NAME', 'NBDURABLE_RUN_ID', 'EXTRA')])"
    child = processes.spawn(["-c", code], log=log, cwd=tmp_path, environment={"EXTRA": "1"})
    assert child.wait(20) == 0
    assert processes.tail(log) == ["[None, None, '1']"]
    assert processes.tail(tmp_path / "none.log") == []
