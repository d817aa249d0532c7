"""`durable.ledger` in real kernels, against a real server: an answer is paid for once (guarantees 1, 3, 6, 7, 11)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.models import Budget, RunDetail, RunStatus
from nbdurable.notebooks import create_headless
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.commands import Project
from tests.tools.kernels import Kernel
from tests.tools.models import ModelServer

DEADLINE_S = 60.0
KEY = "SK-A-SECRET-THAT-NOBODY-MAY-KEEP"
PRICES = """\
[prices."gpt-small"]
input = 1.0
output = 10.0
cached_input = 0.5
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    with ModelServer() as found:
        yield found


@pytest.fixture(scope="module")
def lasting(started_home: Callable[[], Home], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("ledger")
    home = started_home()
    (home.root / "settings.toml").write_text(PRICES)
    found = Kernel(home.root, notebooks.write(folder / "n.ipynb", []), folder)
    yield found
    found.shutdown()


def setup(server: ModelServer) -> str:
    """Return a plain cell with clients; the ledger is there before their library is imported."""
    return f"""\
%load_ext nbdurable
import nbdurable as durable
durable.ledger()
import asyncio, openai, httpx
gpt = openai.OpenAI(base_url={server.url!r}, api_key={KEY!r})
agpt = openai.AsyncOpenAI(base_url={server.url!r}, api_key={KEY!r})
def said(text):
    return [{{'role': 'user', 'content': text}}]
def ask(text, **more):
    answer = gpt.chat.completions.create(model='gpt-small', messages=said(text), **more)
    return answer if more else answer.choices[0].message.content"""


@pytest.fixture
def kernel(lasting: Kernel, server: ModelServer) -> Kernel:
    """The lasting kernel, at the beginning of a new run."""
    lasting.run("%load_ext nbdurable")
    lasting.run("%reset -f")
    lasting.run("%durable new")
    reply = lasting.run(setup(server))
    assert reply.status == "ok", reply.error
    server.count()
    return lasting


def shown(kernel: Kernel) -> RunDetail:
    client = Client(Home(Path(kernel.env["NBDURABLE_HOME"])))
    run = client.call(contract.LIST_RUNS, contract.ListRuns(limit=1)).runs[0]
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))


def model_calls(kernel: Kernel) -> list[Any]:
    client = Client(Home(Path(kernel.env["NBDURABLE_HOME"])))
    question = contract.ReadCalls(run_id=shown(kernel).id)
    return [one.call for one in client.call(contract.READ_CALLS, question).calls]


def test_after_a_crash_behind_the_second_of_three_calls_one_request_is_made(
    kernel: Kernel, server: ModelServer
) -> None:
    """Guarantees 1 and 3: what was answered is on disk, and asked for no second time; nor by the client's retries."""
    cell = """\
%%step agent
import os, pathlib
first = ask('who are you')
second = ask('who are you')  # the same again: another call
if not pathlib.Path('works').exists():
    os.kill(os.getpid(), 9)
third = ask('who am i')"""
    (kernel.cwd / "works").unlink(missing_ok=True)
    server.failures[:] = [500, 429]
    waiting = kernel.send(cell, "agent")
    deadline = time.monotonic() + DEADLINE_S
    while kernel.manager.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert waiting
    assert server.count() == 4  # two of them were errors, which openai tries again
    kernel.restart()
    kernel.run(setup(server))
    (kernel.cwd / "works").touch()
    reply = kernel.run(cell, "agent")
    assert reply.status == "ok", reply.error
    assert server.count() == 1
    assert "3 calls: 2 kept, 1 ran" in reply.notes
    assert kernel.value("(first, second, third)") == "('WHO ARE YOU', 'WHO ARE YOU', 'WHO AM I')"
    found = model_calls(kernel)
    assert [(one.name, one.given, one.replayed) for one in found] == [
        ("chat/completions", "gpt-small", True),
        ("chat/completions", "gpt-small", True),
        ("chat/completions", "gpt-small", False),
    ]
    use = found[0].model
    assert (use.model, use.input_tokens, use.output_tokens, use.cost) == ("gpt-small", 10, 3, 40e-6)
    assert found[0].model.prompt == found[1].model.prompt != found[2].model.prompt
    usage = shown(kernel).usage
    assert (usage.calls, usage.input_tokens, usage.output_tokens) == (3, 30, 9)
    assert usage.cost == pytest.approx(120e-6)
    assert list(usage.by_model) == ["gpt-small"]
    assert shown(kernel).steps[0].usage == usage
    assert kernel.value("durable.current_run().usage().calls") == "3"
    edited = kernel.run(cell.replace("who am i", "where am i"), "agent")
    assert "3 calls: 2 kept, 1 ran" in edited.notes
    assert [one["messages"][0]["content"] for one in server.asked] == ["where am i"]


EVERY_WAY = """\
%%step all
import pathlib
chunks = [c.choices[0].delta.content for c in ask('tell a tale', stream=True) if c.choices]
counted = [c for c in ask('count it', stream=True, stream_options={'include_usage': True})]
kinds = [event.type for event in gpt.responses.create(model='gpt-small', input='respond to me', stream=True)]
response = gpt.responses.create(model='gpt-small', input='respond').output_text
vectors = gpt.embeddings.create(model='embed', input=['a', 'bcd'], encoding_format='float').data[1].embedding
claude_said = claude.messages.create(model='claude', max_tokens=9, messages=said('hello claude')).content[0].text
with claude.messages.stream(model='claude', max_tokens=9, messages=said('flow on')) as stream:
    claude_words = list(stream.text_stream)
async def one(n):
    found = await agpt.chat.completions.create(model='gpt-small', messages=said(f'number {n % 2}'))
    return found.choices[0].message.content
many = await asyncio.gather(*(one(n) for n in range(4)))
streamed = await agpt.chat.completions.create(model='gpt-small', messages=said('a b c'), stream=True)
letters = [c.choices[0].delta.content async for c in streamed]
async with aclaude.messages.stream(model='claude', max_tokens=9, messages=said('x y')) as stream:
    async_words = [text async for text in stream.text_stream]
raw = httpx.post(f'{gpt.base_url}chat/completions', json={'model': 'gpt-small', 'messages': said('raw')},
                 headers={'Authorization': f'Bearer {gpt.api_key}'})
status, kind, told = raw.status_code, raw.headers['content-type'], raw.json()['choices'][0]['message']['content']
del stream, streamed, raw
if not pathlib.Path('works').exists():
    raise RuntimeError('later')"""
NAMES = (
    "chunks, [c.usage and c.usage.total_tokens for c in counted], kinds, response, vectors, claude_said, claude_words,"
    " many, letters, async_words, status, kind, told"
)


def test_every_library_whole_and_streamed_sync_and_async_is_replayed_without_a_request(
    kernel: Kernel, server: ModelServer
) -> None:
    """Guarantee 7: a replayed answer is the recorded one, chunk by chunk; secrets are nowhere in the store."""
    (kernel.cwd / "works").unlink(missing_ok=True)
    url = server.url.removesuffix("/v1")
    reply = kernel.run(
        f"import anthropic\nclaude = anthropic.Anthropic(base_url={url!r}, api_key={KEY!r})\n"
        f"aclaude = anthropic.AsyncAnthropic(base_url={url!r}, api_key={KEY!r})"
    )
    assert reply.status == "ok", reply.error
    reply = kernel.run(EVERY_WAY, "all")
    assert reply.content["ename"] == "RuntimeError", reply.error
    assert server.count() == 14
    assert "`embed` has no price, so its tokens are counted only" in reply.notes
    assert "a stream of `gpt-small` does not tell its tokens" in reply.notes
    first = kernel.value(f"({NAMES})")
    assert "['TELL ', 'A ', 'TALE ', None]" in first
    assert "['NUMBER 0', 'NUMBER 1', 'NUMBER 0', 'NUMBER 1']" in first
    (kernel.cwd / "works").touch()
    again = kernel.run(EVERY_WAY, "all")
    assert again.status == "ok", again.error
    assert server.count() == 0
    assert "14 calls: all kept" in again.notes
    assert kernel.value(f"({NAMES})") == first
    by_model = shown(kernel).usage.by_model
    used = {name: (one.calls, one.input_tokens, one.output_tokens) for name, one in by_model.items()}
    assert used == {"gpt-small": (10, 80, 15), "embed": (1, 6, 0), "claude": (3, 30, 6)}
    cost = [one.model.cost for one in model_calls(kernel) if one.name == "responses"]
    assert cost == pytest.approx([38e-6, 18e-6])  # of ten tokens given, four were cached

    home = Path(kernel.env["NBDURABLE_HOME"])
    files = [path for path in home.rglob("*") if path.is_file()]
    assert any(b"chat/completions" in path.read_bytes() for path in files)
    for path in files:
        content = path.read_bytes()
        assert KEY.encode() not in content, path
        assert b"cookie-of-the-server" not in content, path


def test_a_stream_is_live_and_one_that_is_left_early_is_not_kept(kernel: Kernel, server: ModelServer) -> None:
    """A person sees words as they come; what was not read to its end is asked for again, and said."""
    import threading

    server.gate = threading.Event()
    server.first_word.clear()
    cell = "%%step live\nfor c in ask('slow it is', stream=True):\n    print(c.choices[0].delta.content)"
    waiting = kernel.send(cell, "live")
    assert server.first_word.wait(DEADLINE_S)
    assert kernel.client is not None
    while True:  # its first words arrive though the server holds the rest back
        message = kernel.client.get_iopub_msg(timeout=DEADLINE_S)
        if message["msg_type"] == "stream" and "SLOW" in message["content"]["text"]:
            break
    server.gate.set()
    assert kernel.collect(waiting).status == "ok"
    server.gate = None
    server.count()
    early = (
        "%%step early\nstream = ask('one two three', stream=True)\nfor c in stream:\n    break\nstream.close()\n"
        "del stream\nraise ValueError"
    )
    reply = kernel.run(early, "early")
    assert "`chat/completions` is not recorded: its stream was not read to its end" in reply.notes
    kernel.run(early, "early")
    assert server.count() == 2


def test_it_may_be_said_twice_and_taken_back_and_other_requests_pass(
    kernel: Kernel, server: ModelServer
) -> None:
    """Guarantee 11: nothing of it is left when it is off; what is no call of a model, or in no step, only passes."""
    kernel.run("durable.ledger()\ndurable.ledger()")
    assert kernel.run("ask('outside')").status == "ok"
    kernel.run("%%step a\nx = ask('inside')\nnotes = httpx.Client().send")
    assert shown(kernel).usage.calls == 1
    kernel.run("durable.ledger(on=False)")
    assert kernel.value("hasattr(httpx.Client.send, '__nbdurable_former__')") == "False"
    kernel.run("%%step b\nx = ask('unseen')")
    assert shown(kernel).usage.calls == 1
    assert server.count() == 3
    wrong = kernel.run("durable.ledger(budget='a lot')")
    assert "'a lot' is no budget" in wrong.error
    for body in ({"text": "no model"}, ["a", "list"]):
        kernel.run(f"durable.ledger()\nbody, address = {json.dumps(body)}, f'{{gpt.base_url}}messages'")
        reply = kernel.run(
            "%%step c --force\ntry:\n    httpx.post(address, json=body)\nexcept httpx.HTTPError:\n    pass"
        )
        assert reply.status == "ok", reply.error
    assert shown(kernel).usage.calls == 1
    server.count()
    nested = (
        "%%step d\n@durable.step\ndef tool(question):\n    return ask(question)\n"
        "x = tool('again'), ask('again')\nif ran():\n    raise ValueError"
    )
    kernel.run("import itertools\nruns = itertools.count()\ndef ran():\n    return next(runs) == 0")
    assert kernel.run(nested, "d").content["ename"] == "ValueError"
    assert server.count() == 2
    assert kernel.run(nested, "d").status == "ok"
    assert (server.count(), shown(kernel).usage.calls) == (0, 3)
    echo = kernel.run("%%step e\nx = len(ask(gpt.api_key))")  # which the server says again
    assert "`chat/completions` is not recorded: its answer holds the key" in echo.notes
    assert shown(kernel).usage.calls == 3


def test_a_spent_budget_pauses_in_front_of_a_person_too(kernel: Kernel, server: ModelServer) -> None:
    """Guarantee 9: what was spent and how to go on; a broad `except`, or the client's retries, change nothing."""
    cell = """\
%%step b
told = []
for n in range(4):
    try:
        told.append(ask(f'number {n}'))
    except Exception:
        pass"""
    kernel.run("durable.ledger(budget='24 tokens')")
    reply = kernel.run(cell, "b")
    assert reply.content["ename"] == "Paused"
    assert "the budget of 24 tokens is spent: 2 model calls, 20 + 4 tokens" in reply.error
    assert server.count() == 2
    kernel.run("durable.ledger(budget='48 tokens')")
    assert kernel.run(cell, "b").status == "ok"
    assert server.count() == 2
    grouped = """\
%%step d
async def one(text):
    await agpt.chat.completions.create(model='gpt-small', messages=said(text))
async with asyncio.TaskGroup() as tasks:
    tasks.create_task(one('in a group'))"""
    assert kernel.run(grouped, "d").content["ename"] == "Paused"
    kernel.run("durable.ledger(budget=1)")
    reply = kernel.run("%%step c\ngpt.embeddings.create(model='dear', input='x')")
    assert "the budget is money, and `dear` has no price" in reply.error
    assert server.count() == 0


def ended(client: Client, run_id: str) -> RunDetail:
    deadline = time.monotonic() + DEADLINE_S
    after = 0
    while True:
        asked = contract.ReadEvents(run_id=run_id, after=after, hold_s=2.0)
        events = client.call(contract.READ_EVENTS, asked)
        after = events.events[-1].seq if events.events else after
        if events.run.status.is_final or events.run.status is RunStatus.PAUSED:
            return client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))
        assert time.monotonic() < deadline, events.run.reason


def test_a_spent_budget_pauses_a_headless_run_and_a_larger_one_lets_it_go_on(
    home: Home, tmp_path: Path, server: ModelServer
) -> None:
    """Guarantees 1 and 6: nothing that was answered is asked for again."""
    (home.root / "settings.toml").write_text(f"ledger = true\n{PRICES}")
    cell = """\
%%step agent --retries 2
import httpx, nbdurable as durable
def ask(text):
    body = {'model': 'gpt-small', 'messages': [{'role': 'user', 'content': text}]}
    return httpx.post(URL + '/chat/completions', json=body).json()['choices'][0]['message']['content']
said = [ask(f'n {n}') for n in range(4)]
durable.result(said=said)""".replace("URL", repr(server.url))
    notebook = notebooks.write(tmp_path / "n.ipynb", [cell])
    client = Client(home)
    server.count()
    run = create_headless(client, notebook, budget=Budget(amount=50e-6, of="money"))
    paused = ended(client, run.id)
    assert paused.status is RunStatus.PAUSED
    assert "the budget of 0.00005 is spent: 2 model calls, 20 + 4 tokens, 0.00006" in paused.reason
    assert f"`nbdurable resume {run.short} --budget 0.0001` goes on" in paused.reason
    assert paused.steps[0].attempts[0].status == "failed"
    assert server.count() == 2
    project = Project(tmp_path)
    assert project.run("resume", run.short, "--budget", "1").returncode == 0
    done = ended(client, run.id)
    assert done.status is RunStatus.COMPLETED, done.reason
    assert done.result == {"said": ["N 0", "N 1", "N 2", "N 3"]}
    assert server.count() == 2
    told = project.run("show", run.short).stdout
    assert "4 model calls, 40 + 8 tokens, 0.00012" in told
    assert len(re.findall(r"agent +chat/completions +gpt-small +10 \+ 2 tokens, 0.00003", told)) == 4
    assert done.usage.by_model["gpt-small"].output_tokens == 8
