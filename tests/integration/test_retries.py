"""Tries of a step in real kernels: backoff, the way back, time limits (guarantees 1, 6, 9, 11)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.models import RunDetail, RunStatus, Step, WaitKind
from nbdurable.notebooks import create_headless, output_path
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel

DEADLINE_S = 60.0
LOAD = """\
%load_ext nbdurable
import nbdurable as durable
from pathlib import Path
def count(name='count'):
    "Return how often this was called, whatever became of the caller."
    with open(name, 'a') as f:
        f.write('x')
    return len(Path(name).read_text())
"""
QUICK = "--min-wait 50ms --max-wait 50ms"


@pytest.fixture(scope="module")
def kernel(started_home: Callable[[], Home], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("retries")
    found = Kernel(started_home().root, notebooks.write(folder / "n.ipynb", []), folder)
    found.run(LOAD)
    yield found
    found.shutdown()


@pytest.fixture
def shared(kernel: Kernel) -> Kernel:
    """The module's kernel, at the beginning of a new run."""
    kernel.run("%reset -f")
    kernel.run("%durable new")
    (kernel.cwd / "count").unlink(missing_ok=True)
    kernel.run(LOAD)
    return kernel


def steps_of(kernel: Kernel) -> dict[str, Step]:
    client = Client(Home(Path(kernel.env["NBDURABLE_HOME"])))
    [run] = client.call(contract.LIST_RUNS, contract.ListRuns(limit=1)).runs
    detail = client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))
    return {step.name: step for step in detail.steps}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_failed_try_leaves_no_trace_and_the_next_one_counts(shared: Kernel) -> None:
    """Guarantees 6 and 9: it begins from the state before; each try, its error and its wait are on record."""
    base = "%%step base\nrows = [1]\nalias = rows"
    cell = (
        f"%%step a --retries 3 {QUICK}\nprint('try', len(rows))\nrows.append(2)\n"
        "left = locals().get('left', 0) + 1\nif count() < 3:\n    raise ValueError('busy')\nrows, alias is rows, left"
    )
    shared.run(base)
    reply = shared.run(cell)
    assert reply.status == "ok", reply.error
    assert reply.text == "try 1\n" * 3
    [shown] = [o for o in reply.own if o["output_type"] == "execute_result"]
    assert shown["data"]["text/plain"] == "([1, 2], True, 1)"
    told = r"↻ a  attempt (\d) of 4 failed \(ValueError: busy\) · again in 0.1 s"
    assert re.findall(told, reply.notes) == ["1", "2"]
    attempts = steps_of(shared)["a"].attempts
    assert [(one.status, one.again_in_s) for one in attempts] == [
        ("failed", 0.05),
        ("failed", 0.05),
        ("completed", None),
    ]
    assert [one.error and one.error.message for one in attempts] == ["busy", "busy", None]
    assert attempts[2].reason == "attempt 3 of 4; tried again after ValueError, waited 0.1 s"
    shared.restart()
    shared.run(LOAD)
    shared.run(base)
    again = shared.run(cell)
    assert again.text == "try 1\n"  # what the try that succeeded printed
    assert re.findall(told, again.notes) == ["1", "2"]
    assert "↺ a  restored" in again.notes


def test_spent_tries_and_refused_errors_end_with_the_users_own_traceback(shared: Kernel) -> None:
    """Guarantee 9: the last error is the cell's, on its own line, and the reason why nothing follows is said."""
    spent = shared.run(f"%%step a --retries 1 {QUICK}\nx = 1\n1 / 0\nx")
    assert "line 3" in plain(spent.error)
    assert "----> 3 1 / 0" in plain(spent.error)
    assert "nbdurable/kernel" not in plain(spent.error)
    assert "did not finish (its 2 attempts are spent)" in spent.notes
    assert shared.value("x") == "1"  # to look into: what the last try left
    aborted = shared.run(f"%%step b --retries 1 {QUICK}\nraise durable.Abort('gone')")
    assert aborted.content["ename"] == "Abort"
    named = shared.run(
        f"%%step c --retries 1 {QUICK} --retry-on KeyError,durable.RetryAfter\nraise ValueError(count())"
    )
    assert named.content["evalue"] == "1"
    asked = shared.run("%%step d --retries 1\nif count() < 3:\n    raise durable.RetryAfter('30ms')\n7")
    assert "again in 0.0 s" in asked.notes
    assert asked.status == "ok"
    unknown = shared.run("%%step e --retries 1 --retry-on Unheard\ny = 1")
    assert "there is no Unheard" in unknown.error
    by_name = {name: [one.status for one in step.attempts] for name, step in steps_of(shared).items()}
    assert by_name == {"a": ["failed"] * 2, "b": ["failed"], "c": ["failed"], "d": ["failed", "completed"]}


def test_what_can_not_be_put_back_is_said(shared: Kernel) -> None:
    shared.run("config = {'n': 0}")
    reply = shared.run(
        f"%%step a --retries 1 {QUICK}\nconfig['n'] += 1\nif count() < 2:\n    raise ValueError\nconfig['n']"
    )
    assert "`config` changed meanwhile, and no checkpoint holds what it was" in reply.notes


def test_awaiting_cells_are_tried_again_and_other_tasks_go_on(shared: Kernel) -> None:
    """The wait between tries does not hold the event loop up."""
    shared.run("import asyncio\nticks = []\nasync def tick():\n    while True:\n        ticks.append(1)\n"
               "        await asyncio.sleep(0.01)\ntask = asyncio.create_task(tick())")  # fmt: skip
    reply = shared.run(
        "%%step a --retries 1 --min-wait 300ms\nawait asyncio.sleep(0)\nn = len(ticks)\n"
        "if count() < 2:\n    seen = n\n    Path('seen').write_text(str(n))\n    raise ValueError\n"
        "n - int(Path('seen').read_text()) > 5"
    )
    shared.run("task.cancel()")
    assert reply.status == "ok", reply.error
    assert [o["data"]["text/plain"] for o in reply.own] == ["True"]


@pytest.mark.parametrize(
    "body",
    [
        "import time\ntime.sleep(60)",
        "import threading\nthreading.Lock().acquire() and threading.Event().wait()",
        "while True:\n    try:\n        import time; time.sleep(0.01)\n    except Exception:\n        pass",
        "!sleep 60",
        "import asyncio\nawait asyncio.sleep(60)",
        "import asyncio, time\nasync def f():\n    time.sleep(60)\nawait asyncio.gather(asyncio.sleep(60), f())",
    ],
)
def test_code_that_takes_too_long_is_ended_and_the_kernel_lives(shared: Kernel, body: str) -> None:
    """Whether it waits, works or swallows errors; and its limit counts as a failure that is tried again."""
    began = time.monotonic()
    reply = shared.run(f"%%step a --timeout 200ms --retries 1 {QUICK}\n{body}")
    assert time.monotonic() - began < 10
    assert (reply.status, reply.content["ename"]) == ("error", "TimedOut"), reply.error
    assert "step `a` took longer than 0.2 s" in reply.error
    assert "attempt 1 of 2 failed (TimedOut" in reply.notes
    assert shared.run("%%step b --timeout 60s\n1 + 1").status == "ok"
    assert shared.value("__import__('signal').getitimer(0)") == "(0.0, 0.0)"


def test_an_interrupt_of_the_wait_leaves_things_clean(shared: Kernel) -> None:
    """Ctrl-C between two tries: within half a second, the failure stands, and nothing else was begun."""
    for body in ("raise ValueError", "import asyncio\nawait asyncio.sleep(0)\nraise ValueError"):
        sent = shared.send(f"%%step a --retries 1 --min-wait 1m\n{body}")
        assert shared.client is not None
        while shared.client.get_iopub_msg(timeout=20)["msg_type"] != "display_data":
            pass
        began = time.monotonic()
        shared.interrupt()
        reply = shared.collect(sent)
        assert time.monotonic() - began < 1.5  # half of a second, and room for a busy machine
        assert "attempt 1 of a has failed" in reply.error
        assert "run the cell again" in reply.error
        assert [one.status for one in steps_of(shared)["a"].attempts][-1] == "failed"


def test_a_try_behind_a_gate_asks_nobody_again(shared: Kernel) -> None:
    """Guarantee 5, and statements above the gate, which are checkpointed, do not run again."""
    sent = shared.send(
        f"%%step a --retries 2 {QUICK}\nabove = count('above')\nfound = [above]\nprint('above', flush=True)\n"
        "decision = durable.approve('x', title='Go?')\nfound.append(7)\n"
        "if count() < 3:\n    raise ValueError('busy')\nfound, above, decision.value"
    )
    client = Client(Home(Path(shared.env["NBDURABLE_HOME"])))
    deadline = time.monotonic() + DEADLINE_S
    while not (waits := client.call(contract.LIST_WAITS, contract.ListWaits()).waits):
        assert time.monotonic() < deadline
    answer = contract.AnswerWait(wait_id=waits[0].id, approved=True, by="test", nonce="n")
    client.call(contract.ANSWER_WAIT, answer)
    reply = shared.collect(sent)
    assert reply.status == "ok", reply.error
    assert [o["data"]["text/plain"] for o in reply.own if o["output_type"] == "execute_result"] == [
        "([1, 7], 1, 'x')"
    ]
    assert (shared.cwd / "above").read_text() == "x"
    assert reply.text == "above\n"
    assert len(client.call(contract.LIST_WAITS, contract.ListWaits(status=None)).waits) == 1


# Headless ----------------------------------------------------------------------------------------------------


def ended(client: Client, run_id: str, *others: RunStatus) -> RunDetail:
    deadline, after = time.monotonic() + DEADLINE_S, 0
    while True:
        run = client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))
        if run.status.is_final or run.status in others:
            return run
        assert time.monotonic() < deadline, f"{run.status}: {run.reason}"
        question = contract.ReadEvents(run_id=run_id, after=after, hold_s=5)
        events = client.call(contract.READ_EVENTS, question).events
        after = events[-1].seq if events else after


@pytest.mark.parametrize("crashes", [False, True])
def test_a_headless_run_waits_between_tries_without_a_kernel(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashes: bool
) -> None:
    """A long wait, and a state that can't be put back, give the kernel back; a short wait does not.

    The output notebook shows each failure in one line, and what the try that succeeded displayed. Guarantee 6: all is
    the same where each kernel dies as soon as a step's first failure is recorded; no try begins before it is due.
    """
    (tmp_path / "fuses").mkdir()
    if crashes:
        monkeypatch.setenv("NBDURABLE_FAULT", f"attempt-failed:each:{tmp_path / 'fuses'}")
    notebook = notebooks.write(
        tmp_path / "n.ipynb",
        [
            LOAD + "config = {'n': 0}\nimport os",
            f"%%step short --retries 2 {QUICK}\nprint('short', os.getpid())\n"
            "if count('short') < 3:\n    raise ValueError('busy')",
            f"%%step inexact --retries 2 {QUICK}\nconfig['n'] += 1\n"
            "if count('inexact') < 2:\n    raise ValueError('busy')\nn = config['n']",
            "%%step long --retries 2\nif count('long') < 2:\n    raise durable.RetryAfter('2.1s')\nm = 1",
            "%%step end\ndurable.result(n=n, m=m)",
        ],
    )  # fmt: skip
    client = Client(home)
    run = create_headless(client, notebook)
    done = ended(client, run.id)
    assert done.status is RunStatus.COMPLETED, done.reason
    assert done.result == {"n": 1, "m": 1}
    assert done.recoveries == len(list((tmp_path / "fuses").iterdir())) == (3 if crashes else 0)
    tries = {step.name: [one.status for one in step.attempts] for step in done.steps}
    assert tries == {
        "short": ["failed", "failed", "completed"],
        "inexact": ["failed", "completed"],
        "long": ["failed", "completed"],
        "end": ["completed"],
    }
    epochs = {step.name: sorted({one.epoch for one in step.attempts}) for step in done.steps}
    assert crashes or epochs == {"short": [1], "inexact": [1, 2], "long": [2, 3], "end": [3]}
    assert done.steps[2].reason == "it has no checkpoint yet; tried again after RetryAfter, waited 2.1 s"
    first, second = next(step for step in done.steps if step.name == "long").attempts
    assert first.ended_at is not None
    assert second.started_at - first.ended_at >= 2.1
    assert [(wait.kind, wait.step) for wait in done.waits] == [
        (WaitKind.TIMER, "inexact"),
        (WaitKind.TIMER, "long"),
    ]
    cells: Any = nbformat.read(output_path(home, run), as_version=4).cells
    shown = ["".join(o.get("text") or o["data"]["text/plain"] for o in cell.outputs) for cell in cells]
    assert re.fullmatch(r"↻ short  attempt 1 .*?↻ short  attempt 2 of 3 failed \(ValueError: busy\) · again in 0.1 s"
                        r"short \d+\n", shown[1], re.DOTALL)  # fmt: skip
    assert re.fullmatch(r"↻ inexact  attempt 1 of 3 failed \(ValueError: busy\) · again in 0.1 s", shown[2])
    assert re.fullmatch(
        r"↻ long  attempt 1 of 3 failed \(RetryAfter: again after 2.1 s\) · again in 2.1 s", shown[3]
    )


def test_spent_tries_pause_a_headless_run_that_wants_it(home: Home, tmp_path: Path) -> None:
    """Design §4: a person looks after it, and `resume` tries it again, from the first try."""
    notebook = notebooks.write(
        tmp_path / "n.ipynb",
        [
            LOAD,
            f"%%step a --retries 1 {QUICK} --on-exhausted pause\nif count() < 4:\n    raise ValueError('busy')",
        ],
    )
    client = Client(home)
    run = create_headless(client, notebook)
    paused = ended(client, run.id, RunStatus.PAUSED)
    assert paused.status is RunStatus.PAUSED
    assert "its attempts are spent" in paused.reason
    assert paused.error is not None
    assert paused.error.name == "ValueError"
    client.call(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
    done = ended(client, run.id, RunStatus.PAUSED)
    assert done.status is RunStatus.COMPLETED
    assert [one.status for one in done.steps[0].attempts] == ["failed", "failed", "failed", "completed"]


def test_code_in_c_ends_its_kernel_and_a_run_that_fails_begins_again(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop in C can't be interrupted: the try counts as timed out, shows where it stood, and another kernel goes on.

    Guarantee 1: a run that is begun again keeps its steps.
    """
    monkeypatch.setenv("NBDURABLE_CANCEL_GRACE_S", "0.5")
    notebook = notebooks.write(
        tmp_path / "n.ipynb",
        [
            LOAD,
            "%%step busy --retries 1 --min-wait 50ms --timeout 300ms\ndef crunch():\n    return sum(range(10**12))\n"
            "if count('busy') < 2:\n    crunch()",
            "%%step last\nif count('last') < 2:\n    raise ValueError('busy')\ndurable.result(done=True)",
        ],
    )
    client = Client(home)
    run = create_headless(client, notebook, retries=1)
    done = ended(client, run.id)
    assert (done.status, done.result) == (RunStatus.COMPLETED, {"done": True}), done.reason
    assert (done.recoveries, done.failures) == (0, 1)
    busy, last = done.steps
    assert [one.status for one in busy.attempts] == ["failed", "completed"]
    assert [one.status for one in last.attempts] == ["failed", "completed"]
    assert busy.restores == 1
    error = busy.attempts[0].error
    assert error is not None
    assert error.name == "TimedOut"
    assert "in crunch" in error.traceback
    assert not list(home.logs.glob("last-*"))


def test_a_run_that_has_had_its_time_is_ended(home: Home, tmp_path: Path) -> None:
    """Design §4: it is interrupted, and that is no failure which its retries would count."""
    notebook = notebooks.write(tmp_path / "n.ipynb", ["import time\ntime.sleep(60)"])
    client = Client(home)
    run = create_headless(client, notebook, timeout="1s", retries=3)
    done = ended(client, run.id)
    assert (done.status, done.reason) == (RunStatus.TIMED_OUT, "it was driven for the 1.0 s that it may be")
    assert done.failures == 0
