"""What can't be saved is made again: `%%step --replay` and `durable.recipe` in real kernels (guarantees 6, 7, 9)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.models import RunDetail, StepStatus
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel, Reply

LOAD = "%load_ext nbdurable\nimport nbdurable as durable"

CONNECT = "%%step connect --replay\nimport sqlite3\ndb = sqlite3.connect('base.sqlite')\nprint('connected')"
ROWS = "%%step rows\nrows = db.execute('select 40 + 2').fetchall()\nprint('asked')"


@pytest.fixture
def kernel(home: Home, coordinator: Any, tmp_path: Path) -> Iterator[Kernel]:
    """A kernel of the notebook `n.ipynb`, with the extension loaded."""
    found = Kernel(home.root, notebooks.write(tmp_path / "n.ipynb", []), tmp_path)
    assert found.run(LOAD).status == "ok"
    yield found
    found.shutdown()


def restarted(kernel: Kernel) -> Reply:
    kernel.restart()
    return kernel.run(LOAD)


def run_all(kernel: Kernel, cells: list[str]) -> list[Reply]:
    replies = [kernel.run(cell, f"c{number}") for number, cell in enumerate(cells)]
    assert [reply.error for reply in replies] == [""] * len(cells)
    return replies


def the_run(home: Home) -> RunDetail:
    client = Client(home)
    [run] = client.call(contract.LIST_RUNS, contract.ListRuns()).runs
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))


def test_a_replay_cell_runs_in_every_kernel_and_what_it_made_counts_as_the_same(
    kernel: Kernel, home: Home
) -> None:
    """Guarantees 6 and 9: a connection is made anew each time, shown anew, and what was read through it is kept."""
    cells = [CONNECT, ROWS]
    first = run_all(kernel, cells)
    assert [reply.text for reply in first] == ["connected\n", "asked\n"]
    assert "↻ connect" in first[0].notes
    for again in (run_all(kernel, cells), (restarted(kernel), run_all(kernel, cells))[1]):
        assert "it is marked --replay: it runs in every attempt" in again[0].notes
        assert again[0].text == "connected\n"
        assert "↺ rows  restored" in again[1].notes
        assert "same code and inputs" in again[1].notes
        assert kernel.value("(rows, db.execute('select 1').fetchall())") == "([(42,)], [(1,)])"
    steps = {step.name: step for step in the_run(home).steps}
    assert (steps["connect"].status, steps["connect"].executions) == (StepStatus.REPLAY, 3)
    assert steps["connect"].reason == "it is marked --replay: it runs in every attempt"
    assert steps["connect"].variables == ()
    assert (steps["rows"].executions, steps["rows"].restores) == (1, 2)


def test_an_edited_replay_cell_makes_what_depends_on_it_run_again(kernel: Kernel) -> None:
    """Guarantee 1 (edited code): another connection is another input."""
    make = "%%step connect --replay\nlimit = 1"
    read = "%%step read\nfound = limit + 1"
    run_all(kernel, [make, read])
    restarted(kernel)
    again = run_all(kernel, [make.replace("= 1", "= 2"), read])
    assert "✓ read" in again[1].notes
    assert "its input `limit`" in again[1].notes
    assert kernel.value("found") == "3"


def test_a_cell_that_is_marked_no_more_is_kept_again(kernel: Kernel, home: Home) -> None:
    """A mark holds as long as it stands there."""
    run_all(kernel, ["%%step a --replay\na = 1"])
    run_all(kernel, ["%%step a\na = 1"])
    assert the_run(home).steps[0].status is StepStatus.COMPLETED
    restarted(kernel)
    assert "↺ a" in run_all(kernel, ["%%step a\na = 1"])[0].notes
    assert "↻ a" in run_all(kernel, ["%%step a --replay\na = 1"])[0].notes


def test_a_replay_cell_can_not_wait(kernel: Kernel) -> None:
    """Guarantee 5: a question is asked once; a cell that runs each time would ask it each time."""
    reply = kernel.run("%%step ask --replay\ndurable.approve('x')")
    assert reply.status == "error"
    assert "step `ask` can't wait: it is marked --replay" in reply.error


def plan(home: Home, notebook: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "nbdurable", "plan", str(notebook), "--json"]
    environment = {**os.environ, "NBDURABLE_HOME": str(home.root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return list(json.loads(done.stdout))


def test_a_plan_says_that_a_cell_is_marked(kernel: Kernel, home: Home, tmp_path: Path) -> None:
    """Guarantee 9: in the kernel and on the command line, and what depends on it is foreseen to be restored."""
    notebook = notebooks.write(
        tmp_path / "n.ipynb",
        [(f"c{number}", cell) for number, cell in enumerate([LOAD, CONNECT, ROWS])],
    )
    run_all(kernel, [LOAD, CONNECT, ROWS])
    said = [(item["name"], item["action"], item["reason"]) for item in plan(home, notebook)]
    assert said == [
        ("connect", "replay", "it is marked --replay: it runs in every attempt"),
        ("rows", "restore", "same code and inputs"),
    ]
    assert "connect  replay    it is marked --replay" in kernel.run("%durable plan").notes


# durable.recipe -----------------------------------------------------------------------------------------------------

DEFINE = """\
import sqlite3
class Agent:
    def __init__(self, client, log):
        self.client, self.log = client, log
    def ask(self):
        return self.client.execute('select 40 + 2').fetchone()[0]
class Session:
    def __init__(self, client):
        self.client, self.lock = client, __import__('threading').Lock()"""
MAKE = """\
%%step connect
path = 'base.sqlite'
def make_client():
    print('connecting')
    return sqlite3.connect(path)
client = durable.recipe('client', make_client)
log = ['began']
agent = Agent(client, log)
session = durable.recipe('session', lambda: Session(client))
pair = {'agent': agent, 'session': session}"""
USE = "%%step use\nanswer = agent.ask()\nagent.log.append(answer)\nboth = [agent, client]"


def test_values_by_recipe_are_made_again_in_order_and_what_holds_them_is_kept(
    kernel: Kernel, home: Home
) -> None:
    """Guarantees 6 and 7: they are new ones, held by all that held the old ones, and nothing is shown twice."""
    cells = [DEFINE, MAKE, USE]
    first = run_all(kernel, cells)
    assert "client by recipe `make_client`" in first[1].notes
    assert "not saved" not in "".join(reply.notes for reply in first)
    expression = (
        "(agent.client is client, session.client is client, pair['session'] is session, pair['agent'] is agent,"
        " both[0] is agent, both[1] is client, agent.log is log, log, answer, agent.ask(), type(client).__name__)"
    )
    expected = f"({', '.join(['True'] * 7)}, ['began', 42], 42, 42, 'Connection')"
    assert kernel.value(expression) == expected
    for _ in range(2):
        again = (restarted(kernel), run_all(kernel, cells))[1]
        assert ["same code and inputs" in reply.notes for reply in again] == [False, True, True]
        assert [reply.text for reply in again] == ["", "connecting\n", ""]
        assert kernel.value(expression) == expected
    again = run_all(kernel, cells)  # in the kernel that has them already
    assert ["↺" in reply.notes for reply in again] == [False, True, True]
    assert kernel.value(expression) == expected
    states = {variable.name: variable.state for variable in the_run(home).steps[0].variables}
    assert (states["client"], states["session"], states["agent"]) == ("recipe", "recipe", "saved")


def test_an_edited_recipe_makes_what_depends_on_it_run_again(kernel: Kernel) -> None:
    """What a recipe makes counts by the recipe and by all that it stands on."""
    run_all(kernel, [DEFINE, MAKE, USE])
    restarted(kernel)
    edited = run_all(kernel, [DEFINE, MAKE.replace("base.sqlite", "other.sqlite"), USE])
    assert "✓ use" in edited[2].notes
    assert "↺" not in edited[2].notes


def test_a_recipe_of_a_plain_cell_lets_steps_hold_what_it_makes(kernel: Kernel) -> None:
    """Plain cells run again anyway; what holds the object is saved, and restored with the one made anew."""
    cells = [
        DEFINE,
        "client = durable.recipe('client', lambda: sqlite3.connect(':memory:'))",
        "%%step a\nagent = Agent(client, [])",
        "%%step b\nanswer = agent.ask()",
    ]
    run_all(kernel, cells)
    restarted(kernel)
    again = run_all(kernel, cells)
    assert ["same code and inputs" in reply.notes for reply in again] == [False, False, True, True]
    assert kernel.value("(agent.client is client, agent.ask())") == "(True, 42)"


def test_what_a_replay_cell_made_may_be_held(kernel: Kernel) -> None:
    """Guarantee 7: a value that holds the connection of a `--replay` cell is restored with the new connection."""
    cells = [DEFINE, CONNECT, "%%step a\nagent = Agent(db, [])"]
    assert "not saved" not in run_all(kernel, cells)[2].notes
    restarted(kernel)
    assert "same code and inputs" in run_all(kernel, cells)[2].notes
    assert kernel.value("(agent.client is db, agent.ask())") == "(True, 42)"


def test_data_beside_what_a_replay_cell_can_not_save_is_still_watched(kernel: Kernel) -> None:
    """Guarantee 7: an object of the notebook's own with a lock in it does not lose a change without a word."""
    cells = [
        "%%step make --replay\nimport threading\nclass Tally:\n    def __init__(self):\n"
        "        self.seen, self.lock = [], threading.Lock()\ntally = Tally()",
        "%%step count\ntally.seen.append(1)",
    ]
    assert "tally not saved: `tally.lock`: a lock" in run_all(kernel, cells)[1].notes


def test_a_recipe_that_fails_is_named_and_nothing_of_the_step_is_bound(
    kernel: Kernel, tmp_path: Path
) -> None:
    """Guarantees 7 and 11: once it is mended, the cell is restored."""
    cells = [
        "import sqlite3",
        "%%step a\nrows = [1]\n"
        "def make():\n    return sqlite3.connect('file:base.sqlite?mode=rw', uri=True)\n"
        "open('base.sqlite', 'a').close()\nclient = durable.recipe('client', make)",
    ]
    run_all(kernel, cells)
    (tmp_path / "base.sqlite").unlink()
    restarted(kernel)
    kernel.run(cells[0], "c0")
    reply = kernel.run(cells[1], "c1")
    assert reply.status == "error"
    said = "variable `client` of step `a` can't be made again: its recipe `make` raised OperationalError"
    assert said in reply.error
    assert kernel.value("[name for name in ('rows', 'client', 'make') if name in globals()]") == "[]"
    (tmp_path / "base.sqlite").touch()
    assert "↺ a" in kernel.run(cells[1], "c1").notes
    assert kernel.value("(rows, type(client).__name__)") == "([1], 'Connection')"


def test_recipes_that_need_each_other_are_refused_by_name(kernel: Kernel) -> None:
    """Guarantee 7: what can't come back in any order is named when it is saved, with both names."""
    cell = (
        "%%step a\nclass Holder:\n    pass\nholder = Holder()\n"
        "def make():\n    holder.seen = True\n    return sqlite3.connect(':memory:')\n"
        "client = durable.recipe('client', make)\nholder.client = client\nfine = 1"
    )
    notes = run_all(kernel, ["import sqlite3", cell])[1].notes
    assert "client not saved: its recipe reads `holder`, which can't be there before `client` is" in notes
    assert "holder not saved: it needs `client`" in notes
    assert "fine" in notes


def test_a_recipe_under_another_name_is_refused(kernel: Kernel) -> None:
    """Guarantee 11: it would come back under a name that nobody reads."""
    reply = kernel.run(
        "%%step a\nimport sqlite3\nc = durable.recipe('client', lambda: sqlite3.connect(':memory:'))"
    )
    assert reply.status == "error"
    assert "what the recipe `client` made is held by the variable `c`" in reply.error
    inline = (
        "%%step a\nimport sqlite3\nkept = [durable.recipe('client', lambda: sqlite3.connect(':memory:'))]"
    )
    assert "the recipe `client` ran, but the cell left no variable `client`" in kernel.run(inline).error
    closed = (
        "%%step a\nimport sqlite3\nclient = durable.recipe('client', lambda: sqlite3.connect(':memory:'))\n"
    )
    assert kernel.run(closed + "client.close()\ndel client").status == "ok"


def test_a_recipe_whose_function_can_not_be_saved_is_named(kernel: Kernel) -> None:
    """Guarantee 7: at once, with what refers to it."""
    cell = (
        "%%step a\nimport threading\ndef outer():\n    lock = threading.Lock()\n    return lambda: Holder(lock)\n"
        "class Holder:\n    def __init__(self, lock):\n        self.lock = lock\n"
        "client = durable.recipe('client', outer())\nkept = {'client': client}\nfine = 1"
    )
    notes = run_all(kernel, [cell])[0].notes
    assert "client not saved: its recipe" in notes
    assert "a lock" in notes
    assert "kept not saved: it needs `client`" in notes


def test_time_travel_makes_what_is_by_recipe(kernel: Kernel) -> None:
    """`checkout` and `durable.load` run recipes; `diff` runs none, and says so."""
    run_all(kernel, [DEFINE, MAKE, USE])
    run = kernel.value("durable.current_run().id").strip("'")
    kernel.run("%reset -f")
    kernel.run("import nbdurable as durable\n" + DEFINE)
    reply = kernel.run(f"%durable checkout {run} use")
    assert reply.status == "ok", reply.error
    assert kernel.value("(agent.client is client, session.client is client, agent.ask(), log)") == (
        "(True, True, 42, ['began', 42])"
    )
    assert kernel.value(f"durable.load('{run}', 'connect', 'agent').ask()") == "42"
    assert kernel.value(f"durable.load('{run}', 'connect', 'client') is client") == "False"
    kernel.run("%durable new")
    run_all(kernel, [DEFINE, MAKE.replace("base.sqlite", "other.sqlite"), USE])
    reply = kernel.run(f"%durable diff {run}")
    assert "variable client changed" in reply.notes
    assert "a recipe makes it" in reply.notes
    assert "connecting" not in reply.text


def test_a_killed_headless_run_makes_what_is_by_recipe_again(
    home: Home, coordinator: Any, tmp_path: Path
) -> None:
    """Guarantee 6: killed in a later step, it ends with the values and outputs of a run that was not."""
    notebook = notebooks.write(
        tmp_path / "n.ipynb",
        [
            ("load", LOAD),
            ("define", DEFINE),
            ("connect", MAKE),
            ("replay", CONNECT.replace("connect ", "replay ")),
            ("use", USE.replace("answer =", "first = db.execute('select 1').fetchone()[0]\nanswer =")),
            (
                "die",
                "%%step die\nimport os, signal\nif durable.current_run().recoveries == 0:\n"
                "    os.kill(os.getpid(), signal.SIGKILL)\nagent.log.append(agent.ask() + first)",
            ),
            ("result", "durable.result(log=log, same=agent.client is session.client is client is both[1])"),
        ],
    )
    command = [sys.executable, "-m", "nbdurable", "run", str(notebook), "--json"]
    environment = {**os.environ, "NBDURABLE_HOME": str(home.root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = json.loads(done.stdout)
    assert (found["status"], found["recoveries"]) == ("completed", 1), done.stderr
    assert found["result"] == {"log": ["began", 42, 43], "same": True}
    steps = {step["name"]: (step["executions"], step["restores"]) for step in found["steps"]}
    assert steps == {"connect": (1, 1), "replay": (2, 0), "use": (1, 1), "die": (2, 0)}
    shown = notebooks.outputs(Path(found["output"]))
    assert [output["text"] for output in shown["connect"]] == ["connecting\n"]
