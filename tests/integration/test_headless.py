"""Headless runs end to end: coordinator, worker, executor, papermill and kernel are real processes."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.models import RunDetail, RunStatus, Step, StepStatus
from nbdurable.notebooks import create_headless, output_path
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.processes import Coordinator, processes_of, until

DEADLINE_S = 60.0
LOAD = "%load_ext nbdurable\nimport nbdurable as durable"


def _get(client: Client, run_id: str) -> RunDetail:
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))


def _wait(client: Client, run_id: str, *wanted: RunStatus) -> RunDetail:
    """Wait until a run has one of these statuses; the test fails with its log where it ends otherwise."""
    after, deadline = 0, time.monotonic() + DEADLINE_S
    while (run := _get(client, run_id)).status not in wanted:
        log = client.home.run_log(run_id)
        said = log.read_text() if log.exists() else "(no log)"
        assert not run.status.is_final, f"{run.status}: {run.reason}\n{said}"
        assert time.monotonic() < deadline, f"{run.status}: {run.reason}\n{said}"
        question = contract.ReadEvents(run_id=run_id, after=after, hold_s=5)
        events = client.call(contract.READ_EVENTS, question).events
        after = events[-1].seq if events else after
    return run


def _in_role(home: Home, module: str) -> list[psutil.Process]:
    found = []
    for process in processes_of(home):
        with suppress(psutil.NoSuchProcess):
            if module in process.cmdline():
                found.append(process)
    return found


def _workers(home: Home) -> list[psutil.Process]:
    return _in_role(home, "nbdurable.runner.worker")


def _executors(home: Home) -> list[psutil.Process]:
    return _in_role(home, "nbdurable.runner.executor")


def _kernels(home: Home) -> list[psutil.Process]:
    return _in_role(home, "ipykernel_launcher")


def _wait_gone(*found: psutil.Process) -> None:
    """Wait until processes have ended; one that nobody has reaped yet has ended, too."""

    def left() -> list[psutil.Process]:
        return [p for p in psutil.wait_procs(found, timeout=0.1)[1] if p.status() != psutil.STATUS_ZOMBIE]

    until(lambda: not left(), what=f"{found} end")


def _wait_given_back(home: Home) -> None:
    """Wait until no executor and no kernel is left."""
    _wait_gone(*_executors(home), *_kernels(home))
    assert _executors(home) == _kernels(home) == []


def _until_printed(home: Home, run_id: str, text: str) -> None:
    """Wait until a run's log shows a text; the test fails with all logs where it does not."""
    log = home.run_log(run_id)
    try:
        until(
            lambda: log.exists() and text in log.read_text(),
            what=f"{text!r} is printed",
            deadline_s=DEADLINE_S,
        )
    except AssertionError as error:
        logs = "".join(f"\n{path.name}:\n{path.read_text()}" for path in home.logs.iterdir())
        raise AssertionError(f"{error}{logs}") from None


def _steps(run: RunDetail) -> dict[str, Step]:
    return {step.name: step for step in run.steps}


def _cells(home: Home, run: RunDetail) -> dict[str, Any]:
    return {cell.id: cell for cell in nbformat.read(output_path(home, run), as_version=4).cells}


def _gated(folder: Path) -> Path:
    """Write a notebook whose second step goes on once the file `go` is there; steps write to `journal`."""
    note = "def note(what):\n    with open('journal', 'a') as f:\n        f.write(what + '\\n')"
    return notebooks.write(
        folder / "gated.ipynb",
        [
            f"{LOAD}\nimport os, time\n{note}",
            "%%step first\nnote('first')\nx = 20\nprint('did first')",
            "%%step second\nprint('second waits', flush=True)\n"
            "while not os.path.exists('go'):\n    time.sleep(0.02)\nnote('second')\ny = x + 1",
            "%%step third\nnote('third')\ndurable.result(total=x + y)\nx + y",
        ],
    )


def test_run_completes_with_parameters_and_a_true_output(
    home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    """A headless run ends completed; its output notebook is true; no kernel is left, and at the end nothing."""
    path = notebooks.write(
        tmp_path / "a.ipynb",
        [LOAD, "%%step double\ntwice = n * 2\nprint('twice', twice)\ntwice", "print(twice + 1)"],
        parameters="n = 1",
    )
    output = tmp_path / "out.ipynb"
    run = create_headless(coordinator.client, path, parameters={"n": 21}, output=output)
    done = _wait(coordinator.client, run.id, RunStatus.COMPLETED)
    assert _steps(done)["double"].status is StepStatus.COMPLETED
    cells = _cells(home, done)
    assert list(cells) == ["parameters", "injected-parameters", "cell-0", "cell-1", "cell-2"]
    assert cells["cell-1"].outputs[0].text == "twice 42\n"
    assert cells["cell-2"].outputs[0].text == "43\n"
    assert {cell.metadata.papermill.status for cell in cells.values()} == {"completed"}
    assert cells["cell-1"].metadata.nbdurable == {"step": "double", "status": "executed"}
    log = home.run_log(run.id).read_text()
    assert "▶ step 'double'" in log
    assert "twice 42\n" in log
    _wait_given_back(home)
    assert list(Path(tempfile.gettempdir()).glob(f"nbdurable-{run.short}-*")) == []
    coordinator.client.call(contract.SHUTDOWN, contract.Nothing())
    _wait_gone(*processes_of(home))
    assert processes_of(home) == []


def _kill_worker(home: Home) -> None:
    [worker] = _workers(home)
    worker.send_signal(signal.SIGKILL)


def _kill_kernel(home: Home) -> None:
    [kernel] = _kernels(home)
    kernel.send_signal(signal.SIGKILL)


def _kill_executor(home: Home) -> None:
    [executor] = _executors(home)
    executor.send_signal(signal.SIGKILL)


def _stop_worker(home: Home) -> None:
    [worker] = _workers(home)
    worker.terminate()


def _kill_coordinator(home: Home) -> None:
    Coordinator(home).kill()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    "trouble", [_kill_kernel, _kill_executor, _kill_worker, _stop_worker, _kill_coordinator]
)
def test_run_survives(
    trouble: Callable[[Home], None], home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    """Guarantees 1, 4, 6: whatever dies in the middle, the run completes, and what had committed ran once.

    What was driving it is gone within ten seconds.
    """
    run = create_headless(coordinator.client, _gated(tmp_path))
    _until_printed(home, run.id, "second waits")
    [worker], [executor], [kernel] = _workers(home), _executors(home), _kernels(home)
    began = time.monotonic()
    trouble(home)
    if trouble is not _kill_coordinator:
        _wait_gone(kernel, executor, *((worker,) if trouble is _stop_worker else ()))
        assert time.monotonic() - began < 10
    (tmp_path / "go").touch()
    done = _wait(coordinator.client, run.id, RunStatus.COMPLETED)
    assert done.result == {"total": 41}
    assert (tmp_path / "journal").read_text().split() == ["first", "second", "third"]
    steps = _steps(done)
    assert steps["first"].executions == 1
    lost = trouble in (_kill_kernel, _kill_executor, _kill_worker)
    assert done.recoveries == (1 if lost else 0)
    cells = _cells(home, done)
    assert cells["cell-1"].outputs[0].text.startswith("did first\n")
    if trouble is not _kill_coordinator:
        assert cells["cell-1"].metadata.nbdurable.status == "restored"
    _wait_given_back(home)


def test_cancel_interrupts_the_kernel(home: Home, coordinator: Coordinator, tmp_path: Path) -> None:
    """A cancelled run's cell gets a KeyboardInterrupt, may clean up, and the kernel is gone."""
    path = notebooks.write(
        tmp_path / "a.ipynb",
        [
            LOAD,
            "%%step long\nimport time\ntry:\n    print('begun', flush=True)\n    time.sleep(600)\n"
            "finally:\n    open('cleaned', 'w').close()",
        ],
    )
    run = create_headless(coordinator.client, path)
    _until_printed(home, run.id, "begun")
    coordinator.client.call(contract.CANCEL_RUN, contract.ByRun(run_id=run.id))
    _wait(coordinator.client, run.id, RunStatus.CANCELLED)
    assert (tmp_path / "cleaned").exists()
    assert not _kernels(home)


def test_cancel_kills_a_kernel_that_does_not_listen(
    home: Home, coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell that swallows the interrupt is killed after the grace period."""
    monkeypatch.setenv("NBDURABLE_CANCEL_GRACE_S", "1")
    path = notebooks.write(
        tmp_path / "a.ipynb",
        [
            LOAD,
            "%%step deaf\nimport time\nprint('begun', flush=True)\nwhile True:\n"
            "    try:\n        time.sleep(600)\n    except KeyboardInterrupt:\n        pass",
        ],
    )
    run = create_headless(coordinator.client, path)
    _until_printed(home, run.id, "begun")
    coordinator.client.call(contract.CANCEL_RUN, contract.ByRun(run_id=run.id))
    _wait(coordinator.client, run.id, RunStatus.CANCELLED)
    _wait_given_back(home)


def test_waiting_run_has_no_kernel_and_goes_on_when_answered(
    home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    """Guarantee 5: waiting, a headless run holds no kernel; the answer lets it go on behind the gate.

    The coordinator dies before the answer, and again right after it acknowledged it.
    """
    path = notebooks.write(
        tmp_path / "a.ipynb",
        [
            LOAD,
            "%%step gate\nprint('before')\ndecision = durable.approve('draft', title='Publish?')",
            "durable.result(approved=decision.approved)",
        ],
    )
    run = create_headless(coordinator.client, path)
    waiting = _wait(coordinator.client, run.id, RunStatus.WAITING)
    _wait_given_back(home)
    cells = _cells(home, waiting)
    states = {cell_id: cell.metadata.papermill.status for cell_id, cell in cells.items()}
    assert states == {"cell-0": "completed", "cell-1": "pending", "cell-2": "pending"}
    assert cells["cell-1"].metadata.nbdurable == {"step": "gate", "status": "waiting"}
    assert "error" not in [output.output_type for output in cells["cell-1"].outputs]
    [wait] = waiting.waits
    coordinator.kill()
    answer = contract.AnswerWait(wait_id=wait.id, approved=True, by="test", nonce="n")
    coordinator.client.call(contract.ANSWER_WAIT, answer)
    coordinator.kill()
    done = _wait(coordinator.client, run.id, RunStatus.COMPLETED)
    assert done.result == {"approved": True}


def test_failed_run_says_why(home: Home, coordinator: Coordinator, tmp_path: Path) -> None:
    """Guarantee 9: the run's error is the user's own, with traceback; what came before is kept."""
    path = notebooks.write(tmp_path / "a.ipynb", [LOAD, "%%step a\nx = 1", "%%step b\n1 / 0", "%%step c\nx"])
    run = create_headless(coordinator.client, path)
    failed = _wait(coordinator.client, run.id, RunStatus.FAILED)
    assert failed.reason == "step 'b' raised ZeroDivisionError: division by zero"
    assert failed.error is not None
    assert (failed.error.name, failed.error.message) == ("ZeroDivisionError", "division by zero")
    assert "1 / 0" in failed.error.traceback
    cells = _cells(home, failed)
    assert [cell.metadata.papermill.status for cell in cells.values()] == [
        "completed",
        "completed",
        "failed",
        "pending",
    ]
    assert [cells[f"cell-{i}"].metadata.nbdurable.status for i in (1, 2, 3)] == [
        "executed",
        "failed",
        "pending",
    ]


@pytest.mark.parametrize(
    ("leave", "says"),
    [
        ("import sys\nsys.exit()", "sys.exit() ended it in cell cell-1, but 1 of 1 steps are not done: late"),
        ("exit()", "exit() ended it in cell cell-1, but 1 of 1 steps are not done: late"),
    ],
)
def test_early_exit_does_not_count_as_completed(
    leave: str, says: str, home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    """Guarantee 9: a run whose steps did not all run is not completed, and says which; nor is it tried again."""
    path = notebooks.write(tmp_path / "a.ipynb", [LOAD, leave, "%%step late\nx = 1"])
    run = create_headless(coordinator.client, path)
    failed = _wait(coordinator.client, run.id, RunStatus.FAILED)
    assert says in failed.reason
    assert failed.recoveries == 0


def test_every_cell_is_a_step_on_request(home: Home, coordinator: Coordinator, tmp_path: Path) -> None:
    """`--steps all`: an unmodified notebook's cells are steps, named by their cells."""
    path = notebooks.write(tmp_path / "a.ipynb", ["import math", "x = [1, 2]", "y = sum(x)\ny"])
    run = create_headless(coordinator.client, path, steps_mode="all")
    done = _wait(coordinator.client, run.id, RunStatus.COMPLETED)
    assert {"cell-1", "cell-2"} <= set(_steps(done))
    assert _cells(home, done)["cell-2"].metadata.nbdurable == {"step": "cell-2", "status": "executed"}
