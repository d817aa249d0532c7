"""`@durable.step` in a real kernel: recorded calls are made once (guarantees 1, 2, 3, 6, 7, 9, 11)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel
from tests.tools.processes import until

LOAD = "%load_ext nbdurable"
SETUP = """\
import asyncio, pathlib, threading
import nbdurable as durable
log = pathlib.Path('log')
log.write_text('')
def ran(what):
    with log.open('a') as file:
        file.write(f'{what} ')"""


@pytest.fixture(scope="module")
def lasting(started_home: Callable[[], Home], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("lasting")
    found = Kernel(started_home().root, notebooks.write(folder / "n.ipynb", []), folder)
    found.run(LOAD)
    yield found
    found.shutdown()


@pytest.fixture
def kernel(lasting: Kernel) -> Kernel:
    """The lasting kernel, at the beginning of a new run."""
    lasting.run("%reset -f")
    lasting.run("%durable new")
    assert lasting.run(SETUP).status == "ok"
    return lasting


def ran(kernel: Kernel) -> list[str]:
    """Return what ran since the last time."""
    found = (kernel.cwd / "log").read_text().split()
    (kernel.cwd / "log").write_text("")
    return found


def calls(kernel: Kernel) -> list[contract.RecordedCall]:
    client = Client(Home(Path(kernel.env["NBDURABLE_HOME"])))
    run = client.call(contract.LIST_RUNS, contract.ListRuns(limit=1)).runs[0]
    return list(client.call(contract.READ_CALLS, contract.ReadCalls(run_id=run.id)).calls)


def shows(kernel: Kernel, *more: str) -> str:
    """Return what `nbdurable show` prints of the newest run."""
    with Client(Home(Path(kernel.env["NBDURABLE_HOME"]))) as client:
        run = client.call(contract.LIST_RUNS, contract.ListRuns(limit=1)).runs[0]
    command = [sys.executable, "-m", "nbdurable", "show", run.id, *more]
    return subprocess.run(command, env=kernel.env, capture_output=True, text=True, check=True).stdout


TOOLS = """\
@durable.step
def model(prompt):
    ran('model')
    return {'tools': ['a', 'b', 'c'], 'prompt': prompt}
@durable.step
def tool(name):
    ran(name)
    if name == 'c' and not pathlib.Path('works').exists():
        raise RuntimeError('no network')
    return name * 2"""
AGENT = "%%step agent\nresults = [tool(name) for name in model('go')['tools']]\nresults"


def test_if_the_third_tool_fails_neither_the_model_nor_the_first_two_are_called_again(kernel: Kernel) -> None:
    """Guarantee 1, for calls: in the same kernel, and in the next one after a kill."""
    kernel.run(TOOLS)
    (kernel.cwd / "works").unlink(missing_ok=True)
    reply = kernel.run(AGENT, "agent")
    assert reply.content["ename"] == "RuntimeError"
    assert "3 calls recorded" in reply.notes
    assert ran(kernel) == ["model", "a", "b", "c"]
    assert kernel.run(AGENT, "agent").status == "error"
    assert ran(kernel) == ["c"]
    kernel.restart()
    for cell in (LOAD, SETUP, TOOLS):
        kernel.run(cell)
    (kernel.cwd / "works").touch()
    reply = kernel.run(AGENT, "agent")
    assert reply.status == "ok", reply.error
    assert ran(kernel) == ["c"]
    assert kernel.value("results") == "['aa', 'bb', 'cc']"
    assert "4 calls: 3 kept, 1 ran" in reply.notes
    shown = shows(kernel)
    assert re.search(r"agent +tool +'b' +str \d+ B +0.0 s +1, kept since", shown), shown
    assert json.loads(shows(kernel, "--json"))["calls"][3]["attempt"] == 3
    assert json.loads(shows(kernel, "--json"))["steps"][0]["calls"] == 4
    found = calls(kernel)
    assert [(c.call.name, c.call.given, c.call.attempt, c.call.replayed) for c in found] == [
        ("model", "'go'", 1, True),
        ("tool", "'a'", 1, True),
        ("tool", "'b'", 1, True),
        ("tool", "'c'", 3, False),
    ]


def test_what_runs_at_once_in_any_order_is_matched_by_its_arguments(kernel: Kernel) -> None:
    """Guarantee 1: coroutines, threads, methods, recursion and generators, though their order is another one."""
    kernel.run(
        """\
fail = True
@durable.step
async def ask(question):
    ran(question)
    await asyncio.sleep(0)
    return question.upper()
@durable.step
def square(n):
    ran(n)
    return n * n
@durable.step
def fib(n):
    ran(f'fib{n}')
    return n if n < 2 else fib(n - 1) + fib(n - 2)
@durable.step
def words(text):
    for word in text.split():
        ran(word)
        yield word
    return len(text)
@durable.step
async def letters(text):
    for letter in text:
        ran(letter)
        yield letter
class Agent:
    def __init__(self, name):
        self.name = name
    @durable.step
    def greet(self, whom):
        ran(self.name + whom)
        return f'{self.name} greets {whom}'
    @durable.step
    @staticmethod
    def wave():
        ran('wave')
        return 'waves'
def in_thread(n, into):
    thread = threading.Thread(target=lambda: into.append(square(n)))
    thread.start()
    return thread"""
    )
    cell = """\
%%step all
found = {}
order = ORDER
for kind in order:
    if kind == 'gather':
        found['gather'] = await asyncio.gather(*[ask(q) for q in order])
    if kind == 'threads':
        into = []
        for thread in [in_thread(n, into) for n in range(3)]:
            thread.join()
        found['threads'] = sorted(into)
    if kind == 'fib':
        found['fib'] = fib(4)
    if kind == 'words':
        found['words'] = list(words('to be'))
    if kind == 'letters':
        found['letters'] = [one async for one in letters('xy')]
    if kind == 'agent':
        found['agent'] = Agent('a').greet('b'), Agent('c').greet('d'), Agent.wave()
if FAIL: raise ValueError('later')"""
    order = ["gather", "threads", "fib", "words", "letters", "agent"]
    first = kernel.run(cell.replace("ORDER", repr(order)).replace("FAIL", "True"), "all")
    assert first.content["ename"] == "ValueError", first.error
    assert len(ran(kernel)) == 6 + 3 + 9 + 2 + 2 + 3
    expected = kernel.value("sorted(found.items())")
    reply = kernel.run(cell.replace("ORDER", repr(order[::-1])).replace("FAIL", "False"), "all")
    assert reply.status == "ok", reply.error
    assert ran(kernel) == []
    assert kernel.value("sorted({**found, 'gather': found['gather'][::-1]}.items())") == expected
    assert "all kept" in reply.notes


def test_a_changed_function_runs_again_and_says_so(kernel: Kernel) -> None:
    """Guarantee 9: what a function stands on is compared; its other calls are kept."""
    define = """\
PROMPT = 'be {}'
def helper(x):
    return x
@durable.step
def ask(x):
    ran(x)
    return PROMPT.format(helper(x))"""
    other = "@durable.step\ndef other():\n    ran('other')\n    return 1"
    cell = "%%step s\nanswers = [ask('a'), ask('b'), other()]"
    kernel.run(define)
    kernel.run(other)
    assert kernel.run(cell, "s").status == "ok"
    assert ran(kernel) == ["a", "b", "other"]
    for old, new, why in (
        ("return x\n@", "return x + '!'\n@", "`helper` changed (cell"),
        ("ran(x)\n    return", "ran(x + '2')\n    return", "`ask` changed (cell"),
        ("be {}", "become {}", "variable `PROMPT` changed (cell"),
    ):
        define = define.replace(old, new)
        kernel.run(define)
        reply = kernel.run(cell, "s")
        assert "3 calls: 1 kept, 2 ran (" + why in reply.notes, reply.notes
        assert [what[:1] for what in ran(kernel)] == ["a", "b"]
    assert kernel.value("answers") == "['become a!', 'become b!', 1]"
    assert {c.call.reason.partition(" (")[0] for c in calls(kernel)} == {
        "",
        "`helper` changed",
        "`ask` changed",
        "variable `PROMPT` changed",
    }
    kernel.run(cell.replace("'b'", "'c'"), "s")
    assert ran(kernel) == ["c2"]
    kernel.run("%durable rerun s")
    kernel.run(cell.replace("'b'", "'c'"), "s")
    assert ran(kernel) == ["a2", "c2", "other"]


def test_a_call_leaves_what_it_printed_and_where_it_moved_random_state(kernel: Kernel) -> None:
    """Guarantee 6: a step that takes recorded results ends as one whose calls ran."""
    kernel.run("import random\n@durable.step\ndef draw():\n    print('drawing')\n    return random.random()")
    cell = (
        "%%step s\nprint('first')\nrandom.seed(3)\nfound = [draw(), draw(), random.random()]\nif FAIL: 1 / 0"
    )
    kernel.run(cell.replace("FAIL", "True"), "s")
    whole = kernel.value("found")
    reply = kernel.run(cell.replace("FAIL", "False"), "s")
    assert "all kept" in reply.notes
    assert reply.text == "first\ndrawing\ndrawing\n"
    assert kernel.value("found") == whole


def test_a_result_has_its_type_and_what_it_shares_with_arguments(kernel: Kernel) -> None:
    """Guarantee 7: the recorded result is the one that the call had returned."""
    kernel.run(
        """\
import numpy as np, pandas as pd
class Note:
    def __init__(self, text):
        self.text = text
@durable.step
def enrich(paper):
    return {'paper': paper, 'notes': [Note('x')], 'table': pd.DataFrame({'a': np.arange(3)}), 'at': (1, {2})}"""
    )
    cell = "%%step s\npaper = ['p']\nfound = enrich(paper)\nif FAIL: 1 / 0"
    kernel.run(cell.replace("FAIL", "True"), "s")
    assert "all kept" in kernel.run(cell.replace("FAIL", "False"), "s").notes
    assert kernel.value("found['paper'] is paper and type(found['notes'][0]) is Note") == "True"
    assert kernel.value("found['at'], list(found['table']['a']), found['notes'][0].text") == (
        "((1, {2}), [0, 1, 2], 'x')"
    )


def test_calls_that_cannot_be_recorded_run_and_say_why(kernel: Kernel) -> None:
    """Guarantee 11: named, with what to do, once; nothing is lost by it."""
    kernel.run(
        """\
@durable.step
def ask(client, question):
    ran(question)
    return question
@durable.step(key=lambda client, question: question)
def keyed(client, question):
    ran(question)
    return question
@durable.step
def grow(items):
    items.append(1)
    return len(items)
memory = []
@durable.step
def remember(item):
    memory.append(item)
@durable.step
def opened():
    return open('log')
@durable.step(key='one')
def fixed(n):
    return n"""
    )
    cell = """\
%%step s
client = threading.Lock()
ask(client, 'a'), ask(client, 'b'), keyed(client, 'c')
grow([]), remember('x')
opened().close()"""
    reply = kernel.run(cell, "s")
    assert reply.status == "ok", reply.error
    said = reply.notes
    assert "call `ask` is not recorded: its argument `client` can't be compared (a lock" in said
    assert said.count("call `ask`") == 1
    assert "call `grow` is not recorded: it changes its argument `items`" in said
    assert "call `remember` is not recorded: it changes the variable `memory`" in said
    assert "call `opened` is not recorded: an open file" in said
    assert ran(kernel) == ["a", "b", "c"]
    kernel.run(cell + "\n1", "s")
    assert ran(kernel) == ["a", "b"]
    reply = kernel.run("%%step t\nfixed(1)\nfixed(2)", "t")
    assert "two calls of `fixed` have the key 'one', and different arguments: (1) and (2)" in reply.error
    assert "key=lambda" in reply.error
    outside = kernel.run("ask(1, 'z')\nask(1, 'z')")
    assert outside.notes == "`ask` is called outside a step: it runs, and nothing is recorded"
    for bad in (
        "durable.step(1)",
        "durable.step(key=1)",
        "durable.step('name')",
        "@durable.step\nclass A: pass",
    ):
        assert re.search("UsageError: .*\n  → ", kernel.run(bad).error)


def test_an_interrupted_call_is_not_recorded_and_those_before_it_are(kernel: Kernel) -> None:
    """Ctrl-C in a call: earlier calls are kept."""
    kernel.run(
        "@durable.step\ndef slow(n):\n    ran(n)\n    while n and not pathlib.Path('go').exists(): pass"
    )
    sent = kernel.send("%%step s\nslow(0)\nprint('now', flush=True)\nslow(1)", "s")
    assert kernel.client is not None
    while True:
        message = kernel.client.get_iopub_msg(timeout=20)
        if message["msg_type"] == "stream":
            break
    kernel.interrupt()
    assert kernel.collect(sent).content["ename"] == "KeyboardInterrupt"
    (kernel.cwd / "go").touch()
    assert "2 calls: 1 kept, 1 ran" in kernel.run("%%step s\nslow(0)\nslow(1)", "s").notes


def test_the_plan_says_which_calls_function_changed(kernel: Kernel) -> None:
    """A recorded function is a helper of its step like any other."""
    define = "@durable.step\ndef ask(x):\n    return x"
    step = "%%step s\nanswer = ask(1)"
    path = kernel.cwd / "n.ipynb"
    notebooks.write(path, [("d", define), ("s", step)])
    kernel.run(define)
    kernel.run(step, "s")
    reply = kernel.run("%durable plan")
    assert "restore" in reply.notes, reply.notes
    notebooks.write(path, [("d", define.replace("return x", "return x + 1")), ("s", step)])
    assert "helper `ask` changed (cell 1, line 3)" in kernel.run("%durable plan").notes


def test_a_recorded_function_that_a_step_defines_comes_back_recorded(kernel: Kernel) -> None:
    kernel.run("%%step d\n@durable.step(key='k')\ndef ask(x):\n    ran('ask')\n    return x", "d")
    kernel.restart()
    for cell in (LOAD, SETUP):
        kernel.run(cell)
    assert (
        "restored"
        in kernel.run(
            "%%step d\n@durable.step(key='k')\ndef ask(x):\n    ran('ask')\n    return x", "d"
        ).notes
    )
    kernel.run("%%step s\nanswer = ask(1)\n1 / 0", "s")
    assert "all kept" in kernel.run("%%step s\nanswer = ask(1)", "s").notes


MAP = """\
import os
bad = {3, 5}
def double(n):
    return n * 2
def page(n):
    ran(n)
    if n in bad:
        raise ValueError(f'no page {n}')
    if n == 30 and not pathlib.Path('safe').exists():
        os.kill(os.getpid(), 9)
    return double(n)"""


def test_map_keeps_finished_items_over_a_kill(kernel: Kernel) -> None:
    """Guarantees 1 and 6: only what is missing runs, and the output is that of a run without a crash."""
    setup = MAP.replace("{3, 5}", "set()")
    kernel.run(setup)
    (kernel.cwd / "safe").unlink(missing_ok=True)
    cell = "%%step s\nfound = durable.map(page, range(60), concurrency=4, desc='pages')"
    kernel.send(cell, "s")
    kernel.manager.provisioner.process.wait(timeout=60)  # type: ignore[union-attr]
    first = {int(n) for n in ran(kernel)}
    (kernel.cwd / "safe").touch()
    kernel.restart()
    for one in (LOAD, SETUP, setup):
        kernel.run(one)
    reply = kernel.run(cell, "s")
    again = [int(n) for n in ran(kernel)]
    assert first | set(again) == set(range(60))
    assert len(again) == len(set(again))
    assert len(first & set(again)) <= 4  # those in flight
    assert f"60 calls: {60 - len(again)} kept, {len(again)} ran" in reply.notes
    assert kernel.value("found == [n * 2 for n in range(60)]") == "True"
    bar = next(o["data"]["text/plain"] for o in reply.outputs if "text/html" in o["data"])
    assert bar == f"pages  {'━' * 20}  60/60"


def test_what_a_failed_item_does(kernel: Kernel) -> None:
    """Stop lets those in flight finish and raises; collect says what failed; a number tolerates so many."""
    kernel.run(MAP)
    reply = kernel.run("%%step s\nfound = durable.map(page, range(8), concurrency=1)", "s")
    assert reply.content["ename"] == "ValueError"
    assert "item 3 (3) failed with ValueError: no page 3; 3 items are finished" in reply.error
    assert ran(kernel) == ["0", "1", "2", "3"]
    reply = kernel.run("%%step s\nfound = durable.map(page, range(8), on_error='collect')", "s")
    assert reply.status == "ok", reply.error
    assert sorted(ran(kernel)) == ["3", "4", "5", "6", "7"]
    assert kernel.value("str([str(one) for one in found])").strip('"') == (
        "['0', '2', '4', 'item 3 (3) failed with ValueError: no page 3', '8', "
        "'item 5 (5) failed with ValueError: no page 5', '12', '14']"
    )
    assert "8/8, 2 failed" in reply.outputs[0]["data"]["text/plain"]
    assert (
        kernel.run("%%step t\nlen(durable.map(page, range(8), on_error=2, ordered=False))", "t").status
        == "ok"
    )
    assert (
        kernel.run("%%step u\ndurable.map(page, range(8), on_error=1)", "u").content["ename"] == "ValueError"
    )
    for wrong in ("0", "concurrency=0", "on_error='raise'", "on_error=-1"):
        call = f"durable.map(page, {wrong})" if "=" not in wrong else f"durable.map(page, [1], {wrong})"
        assert "UsageError" in kernel.run(call).error


def test_map_of_coroutines_and_methods(kernel: Kernel) -> None:
    """Tasks for coroutines, threads for plain functions, what a method is bound to is an argument."""
    kernel.run(
        """\
class Site:
    def __init__(self, name):
        self.name = name
    async def load(self, n):
        ran(n)
        await asyncio.sleep(0)
        return f'{self.name}{n}'
def plain(n):
    ran(n)
    return -n"""
    )
    cell = """\
%%step s
a = await durable.map_async(Site('a').load, range(20), concurrency=5)
b = await durable.map_async(plain, (n for n in range(3)))
if FAIL: 1 / 0"""
    kernel.run(cell.replace("FAIL", "True"), "s")
    assert len(ran(kernel)) == 23
    assert "all kept" in kernel.run(cell.replace("FAIL", "False"), "s").notes
    assert ran(kernel) == []
    assert kernel.value("a == [f'a{n}' for n in range(20)] and b == [0, -1, -2]") == "True"
    assert "await durable.map_async" in kernel.run("durable.map(Site('a').load, [1])").error


def test_a_call_is_tried_again_and_has_a_time_limit(kernel: Kernel) -> None:
    """Retries and timeouts of calls, for functions and coroutines; what makes no sense is refused at once."""
    kernel.run(
        """\
import time
@durable.step(retries=2, min_wait='10ms', timeout='20s')
def flaky(n):
    ran(n)
    if not pathlib.Path(f'flaky{n}').exists():
        pathlib.Path(f'flaky{n}').touch()
        raise ConnectionError('reset')
    return n
@durable.step(retries=1, min_wait='10ms', timeout=0.05)
async def slow(n):
    ran(n)
    await asyncio.sleep(60)
@durable.step(timeout=0.05)
def blocked():
    ran('blocked')
    time.sleep(60)
@durable.step(retries=3, retry_on=KeyError)
def other():
    ran('other')
    raise ValueError('no')"""
    )
    assert kernel.run("%%step s\nflaky(1)", "s").status == "ok"
    assert ran(kernel) == ["1", "1"]
    assert calls(kernel)[0].call.reason == "try 2, after ConnectionError: reset"
    for cell, expected in (
        ("await slow(2)", ["2", "2"]),
        ("blocked()", ["blocked"]),
        ("other()", ["other"]),
    ):
        reply = kernel.run(f"%%step t\n{cell}", "t")
        assert reply.status == "error"
        assert ran(kernel) == expected, cell
    assert kernel.run("1 + 1").status == "ok"
    for wrong in ("retries=-1", "timeout=0", "timeout='soon'", "retry_on=3", "min_wait='2m', max_wait='1s'"):
        assert "UsageError" in kernel.run(f"durable.step({wrong})").error, wrong
    generator = "@durable.step(retries=1)\ndef words():\n    yield 1"
    assert "`words` is a generator" in kernel.run(generator).error


def test_equal_calls_on_both_sides_of_a_gate_are_two_calls(kernel: Kernel) -> None:
    """Guarantee 6: what goes on behind a gate counts on the calls above it, in the next kernel."""
    tick = "import time\n@durable.step\ndef tick():\n    ran('tick')\n    return time.time_ns()"
    cell = "%%step both\nbefore = tick()\ndurable.approve('go', title='both?')\nafter = tick()"
    kernel.run(tick)
    kernel.send(cell, "both")
    client = Client(Home(Path(kernel.env["NBDURABLE_HOME"])))
    until(lambda: client.call(contract.LIST_WAITS, contract.ListWaits()).waits, what="the gate opens")
    assert ran(kernel) == ["tick"]
    kernel.restart()
    [wait] = client.call(contract.LIST_WAITS, contract.ListWaits()).waits
    client.call(
        contract.ANSWER_WAIT, contract.AnswerWait(wait_id=wait.id, approved=True, by="test", nonce="n")
    )
    for plain in (LOAD, SETUP, tick):
        kernel.run(plain)
    reply = kernel.run(cell, "both")
    assert reply.status == "ok", reply.error
    assert ran(kernel) == ["tick"]
    assert kernel.value("before < after") == "True"


def test_a_second_try_takes_the_calls_of_the_first(kernel: Kernel) -> None:
    """Guarantee 1, for calls: a step that is tried again in place numbers its calls from the beginning."""
    kernel.run(
        "@durable.step\ndef tick():\n    ran('tick')\n    return len(ran.__name__)\n"
        "def flaky():\n    if not pathlib.Path('again').exists():\n        pathlib.Path('again').touch()\n"
        "        raise OSError('once')"
    )
    (kernel.cwd / "again").unlink(missing_ok=True)
    reply = kernel.run(
        "%%step tried --retries 1 --min-wait 1ms\none = tick()\ntwo = tick()\nflaky()", "tried"
    )
    assert reply.status == "ok", reply.error
    assert ran(kernel) == ["tick", "tick"]
