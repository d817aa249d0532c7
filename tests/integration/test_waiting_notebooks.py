"""Waits in real notebooks: several at once, events, forms, questions; nothing above a gate runs twice (guarantee 6)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.errors import UsageError
from nbdurable.models import RunDetail, RunStatus, Wait, WaitStatus
from nbdurable.notebooks import create_headless
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel
from tests.tools.processes import Coordinator, end_processes_of, until

DEADLINE_S = 90.0

AGENT = [
    ("setup", "%load_ext nbdurable\nimport asyncio, getpass, pydantic\nimport nbdurable as durable\n"
              "class Edit(pydantic.BaseModel):\n    title: str\n    words: int = pydantic.Field(ge=1)\n"
              "    @pydantic.field_validator('title')\n    @classmethod\n    def loud(cls, title):\n"
              "        if title.isupper():\n            raise ValueError('do not shout')\n        return title\n"
              "async def grouped():\n    async with asyncio.TaskGroup() as group:\n"
              "        task = group.create_task(durable.approve_async('x', title='Group?'))\n"
              "    return task.result().by\n"
              "def journal(what):\n    with open('journal', 'a') as file:\n        file.write(what + ' ')"),
    ("secret", "password = getpass.getpass('Token: ')"),
    ("ask", "%%step ask\njournal('ask')\nname = input('Your name? ')"),
    ("both", "%%step both\njournal('both')\ntexts = ['a', 'b']\n"
             "found = await asyncio.gather(*(durable.approve_async(t, title=f'Text {t}?') for t in texts))\n"
             "answers = [(d.approved, d.by) for d in found]"),
    ("group", "%%step group\njournal('group')\nby = await grouped()"),
    ("race", "%%step race\njournal('race')\n"
             "first = durable.first_of(decision=durable.approval('x', title='Race?'), paid=durable.event('paid'))\n"
             "first = (first.name, first.result)"),
    ("form", "%%step form\njournal('form')\n"
             "edit = durable.approve({'title': 'Draft'}, title='Form?', form=Edit).value"),
    ("late", "%%step late\njournal('late')\ntry:\n    durable.wait_for('never', timeout='500ms')\n"
             "except durable.WaitTimeout as error:\n    late = str(error).splitlines()[0]"),
    ("end", "%%step end\ndurable.result(name=name, password=len(password), answers=answers, by=by, first=first,\n"
            "    edit=[type(edit).__name__, edit.title, edit.words], late=late.split(' until')[0])"),
]  # fmt: skip


def show(client: Client, run_id: str) -> RunDetail:
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))


def waiting(client: Client, run_id: str, *titles: str) -> dict[str, Wait]:
    """Wait until a run waits for just these; return them by title."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        run = show(client, run_id)
        found = {wait.title: wait for wait in run.waits if wait.status is WaitStatus.OPEN}
        if run.status is RunStatus.WAITING and set(found) == set(titles):
            return found
        assert time.monotonic() < deadline, f"{run.status}: {run.reason}; {list(found)}"
        assert run.status is not RunStatus.FAILED, run.error
        client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run_id, after=1 << 60, hold_s=0.2))


def answer(client: Client, wait: Wait, **more: Any) -> Wait:
    fields = {"approved": True, "by": "ann", "nonce": wait.id, **more}
    return client.call(contract.ANSWER_WAIT, contract.AnswerWait(wait_id=wait.id, **fields))


def test_a_headless_notebook_waits_for_everything(
    home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    """Guarantees 5 and 6: each gate is answered once, and nothing above it runs twice; secrets are not kept."""
    client = coordinator.client
    notebook = notebooks.write(tmp_path / "n.ipynb", AGENT)
    run = create_headless(client, notebook, output=tmp_path / "out.ipynb")

    asked = waiting(client, run.id, "Token:")["Token:"]
    assert asked.is_secret
    answer(client, asked, edited=True, value="s3cr3t-t0ken")

    asked = waiting(client, run.id, "Your name?")["Your name?"]
    with pytest.raises(UsageError, match="nbdurable answer"):
        answer(client, asked)
    answer(client, asked, edited=True, value="Ann")

    both = waiting(client, run.id, "Text a?", "Text b?")
    answer(client, both["Text a?"])
    assert show(client, run.id).status is RunStatus.WAITING
    answer(client, both["Text b?"], approved=False)

    answer(client, waiting(client, run.id, "Group?")["Group?"], by="bob")

    waiting(client, run.id, "Race?", "event paid")
    client.send("paid", {"sum": 3})

    form = waiting(client, run.id, "Form?")["Form?"]
    with pytest.raises(UsageError, match="'words' is a required property"):
        answer(client, form)
    answer(client, form, edited=True, value={"title": "LOUD", "words": 1})
    again = waiting(client, run.id, "Form?")["Form?"]
    assert "do not shout" in again.preview
    answer(client, again, edited=True, value={"title": "Quiet", "words": 2})

    deadline = time.monotonic() + DEADLINE_S
    while not (done := show(client, run.id)).status.is_final:
        assert time.monotonic() < deadline, done.reason
        client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id, after=1 << 60, hold_s=0.2))
    assert done.status is RunStatus.COMPLETED, done.error
    assert done.result == {
        "name": "Ann",
        "password": 12,
        "answers": [[True, "ann"], [False, "ann"]],
        "by": "bob",
        "first": ["paid", {"sum": 3}],
        "edit": ["Edit", "Quiet", 2],
        "late": "nobody answered `event never`",
    }
    assert (tmp_path / "journal").read_text().split() == ["ask", "both", "group", "race", "form", "late"]
    assert "Your name? Ann" in repr(notebooks.outputs(tmp_path / "out.ipynb"))

    silent = notebooks.write(tmp_path / "silent.ipynb", [("ask", "name = input('Your name? ')")])
    refused = create_headless(client, silent, questions=False)
    while not (ended := show(client, refused.id)).status.is_final:
        assert time.monotonic() < deadline + DEADLINE_S, ended.reason
        client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=refused.id, after=1 << 60, hold_s=0.2))
    assert (ended.status, ended.error and ended.error.name) == (RunStatus.FAILED, "StdinNotImplementedError")

    end_processes_of(home)
    kept = [path for path in [*home.root.rglob("*"), *tmp_path.glob("*.ipynb")] if path.is_file()]
    assert not [path for path in kept if b"s3cr3t-t0ken" in path.read_bytes()]


RACE = (
    "%%step race\nasked = globals().get('asked', 0) + 1\n"
    "first = durable.first_of(decision=durable.approval('x', title='Race?'), late=durable.timer('1h'))\n"
    "first = (first.name, first.result.by)"
)
BOTH = (
    "%%step both\ntried = globals().get('tried', 0) + 1\n"
    "found = await asyncio.gather(*(durable.approve_async(t, title=t) for t in 'ab'))\nfound = [d.by for d in found]"
)


def opened(client: Client, *titles: str) -> dict[str, Wait]:
    """Wait until just these are open; return them by title."""

    def found() -> list[dict[str, Wait]]:
        waits = {w.title: w for w in client.call(contract.LIST_WAITS, contract.ListWaits()).waits}
        return [waits] if set(waits) == set(titles) else []

    [waits] = until(found, what=f"just {titles} are open")
    return waits  # type: ignore[no-any-return]


def test_a_person_waits_for_several_things(home: Home, coordinator: Coordinator, tmp_path: Path) -> None:
    """Guarantees 5, 6, 11: a kernel that dies at a gate, an interrupt, several at once, words that can't be meant."""
    client = coordinator.client
    kernel = Kernel(home.root, notebooks.write(tmp_path / "n.ipynb", []), tmp_path)
    setup = "%load_ext nbdurable\nimport asyncio, datetime\nimport nbdurable as durable"
    try:
        kernel.run(setup)
        kernel.send(RACE, "r")
        race = opened(client, "Race?", "sleep 1h")["Race?"]
        kernel.kill()
        answer(client, race)
        assert opened(client) == {}
        kernel.restart()
        kernel.run(setup)
        reply = kernel.run(RACE, "r")
        assert reply.status == "ok", reply.error
        assert kernel.value("(asked, first)") == "(1, ('decision', 'ann'))"

        sent = kernel.send(BOTH, "b")
        waits = opened(client, "a", "b")
        answer(client, waits["b"], by="bob")
        opened(client, "a")
        kernel.interrupt()
        assert f"approval {waits['a'].id} stays open" in kernel.collect(sent).error
        sent = kernel.send(BOTH, "b")
        answer(client, waits["a"])
        reply = kernel.collect(sent)
        assert reply.status == "ok", reply.error
        assert kernel.value("(tried, found)") == "(1, ['ann', 'bob'])"

        sent = kernel.send("durable.wait_for('never')", "w")
        opened(client, "event never")
        kernel.interrupt()
        assert "event never is waited for on" in kernel.collect(sent).error
        sent = kernel.send("durable.wait_for('never')", "w")
        client.send("never", {"n": 1})
        assert kernel.collect(sent).outputs[-1]["data"]["text/plain"] == "{'n': 1}"

        for code, said in (
            ("durable.first_of()", "first_of of nothing"),
            ("durable.all_of(x=3)", "x can't be waited for"),
            ("durable.approve(1, default=True)", "has a default and no timeout"),
            ("durable.approve(1, timeout=0)", "is zero"),
            ("durable.approve(1, timeout=datetime.datetime(2020, 1, 1))", "the deadline of 'Approve?' was"),
            ("durable.approve(1, reviewers='ann')", "reviewers=['ann']"),
            ("durable.approve(1, form=7)", "7 can't be a form"),
            ("durable.approve(1, remind_every='1ms')", "is too often"),
            ("durable.wait_for('')", "can't name an event"),
            ("durable.wait_for('e', match={1: 2})", "can't be matched"),
            ("durable.wait_for('e', schema={'type': 3})", "is no JSON schema"),
            ("durable.sleep_until('noon')", "is no moment"),
            ("durable.sleep(datetime.datetime.now())", "is no duration"),
        ):
            error = kernel.run(code, "bad").error
            assert said in error, f"{code}: {error}"
            assert "Traceback" not in error
        assert kernel.run("durable.sleep_until(datetime.datetime(2020, 1, 1))", "past").status == "ok"
        assert opened(client) == {}
    finally:
        kernel.shutdown()
