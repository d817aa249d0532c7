"""`waits`, `approve`, `answer` and `send` as they are typed (design §6, guarantees 5 and 11)."""

from __future__ import annotations

from typing import Any

import pytest

from nbdurable import contract, processes
from nbdurable.client import Client
from nbdurable.models import Driver, DriverKind, Wait, WaitKind
from nbdurable.settings import Home
from tests.tools.commands import Project


def ask(project: Project, *specs: dict[str, Any]) -> tuple[Wait, ...]:
    """Open waits of an interactive run that this process drives."""
    driver = Driver(kind=DriverKind.INTERACTIVE, process=processes.identity("kernel"))
    created = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.INTERACTIVE, driver=driver)
    with Client(Home(project.home)) as client:
        run = client.call(contract.CREATE_RUN, created)
        waits = tuple(contract.WaitSpec(key=spec["title"], **spec) for spec in specs)
        gate = contract.OpenGate(run_id=run.id, epoch=run.epoch, waits=waits)
        return client.call(contract.OPEN_GATE, gate).waits


FORM = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}


def test_forms_questions_and_events_are_answered_in_a_terminal(project: Project) -> None:
    """What fits is taken, what does not is named; a password is neither printed nor kept."""
    early = project.json("send", "early", '{"a": 1}', "--key", "k")
    assert (early["event"], early["runs"]) == ("early", [])
    form, question, password, paid, taken = ask(
        project,
        {
            "kind": WaitKind.APPROVAL,
            "title": "Publish?",
            "form": FORM,
            "reviewers": ("ann",),
            "deadline_in_s": 1e6,
        },
        {"kind": WaitKind.QUESTION, "title": "City?", "form": {"type": "string"}},
        {"kind": WaitKind.QUESTION, "title": "Token?", "form": {"type": "string"}, "is_secret": True},
        {"kind": WaitKind.EVENT, "title": "event paid", "event": "paid", "match": {"order.id": 7}},
        {"kind": WaitKind.EVENT, "title": "event early", "event": "early"},
    )
    assert taken.answer is not None
    listed = project.run("waits").stdout
    for part in (
        f"approve {form.id} --value JSON",
        f"answer {question.id} TEXT",
        "send paid",
        "asks ann",
        "takes n",
    ):
        assert part in listed

    assert "is not asked for 'Publish?'" in project.run("approve", form.id, "--by", "eve").stderr
    refused = project.run("approve", form.id, "--by", "ann", "--value", '{"n": 0}')
    assert (refused.returncode, "n: 0 is less than the minimum of 1" in refused.stderr) == (2, True)
    done = project.json("approve", form.id, "--by", "ann", "--value", '{"n": 2}')
    assert (done["answer"]["value"], done["answer"]["by"]) == ({"n": 2}, "ann")

    assert "answered: “City?”" in project.run("answer", question.id, "Berlin").stdout
    told = project.run("answer", password.id, "hunter2", "--json")
    assert (told.returncode, "hunter2" in told.stdout) == (0, False)
    assert "hunter2" not in project.run("waits", "--all", "--json").stdout

    missed = project.json("send", "paid", '{"order": {"id": 8}}')
    assert missed["runs"] == []
    sent = project.run("send", "paid", '{"order": {"id": 7}}', "--by", "bank")
    assert f"run {paid.run_id[-8:]} goes on" in sent.stdout
    found = {wait["id"]: wait["answer"] for wait in project.json("waits", "--all")}
    assert found[paid.id]["value"] == {"order": {"id": 7}}
    assert project.run("waits").stdout.strip() == "no run waits for anything"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["send", "e", "{n: 1}"], "is not JSON"),
        (["send", "e", "1", "--ttl", "40d"], "at most 30d"),
        (["send", "e", "1", "--ttl", "soon"], "is no duration"),
        (["send", "", "1"], "1 to 200 characters"),
        (["answer", "ZZZZZZ", "x"], "ZZZZZZ"),
    ],
)
def test_what_cannot_be_sent_is_said(project: Project, words: list[str], said: str) -> None:
    found = project.run(*words)
    assert (found.returncode, found.stdout) == (2, "")
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_a_key_with_another_payload_is_refused(project: Project) -> None:
    assert project.run("send", "once", "1", "--key", "k").returncode == 0
    found = project.run("send", "once", "2", "--key", "k")
    assert (found.returncode, "was used with another payload" in found.stderr) == (1, True)
