"""Hooks: functions of a notebook and of the settings are told what happens to a headless run, once each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.cli.doctor import examine
from nbdurable.client import Client
from nbdurable.models import RunDetail, RunStatus
from nbdurable.notebooks import create_headless
from nbdurable.settings import Home
from tests.tools import notebooks

LOAD = """%load_ext nbdurable
import nbdurable as durable, json
def note(function, said):
    error = said.error and said.error.name
    with open("told", "a") as file:
        print(json.dumps([function, said.kind, said.status, said.reason, said.result, said.waits, error]), file=file)
@durable.on("start")
async def starts(said):
    note("start", said)
@durable.on("resume")
def goes_on(said):
    note("resume", said)
@durable.on("wait")
def waits(said):
    print("HOOK PRINTS")
    note("wait", said)
@durable.on("success")
def breaks(said):
    note("success", said)
    raise KeyError("hook breaks")
@durable.on("failure")
@durable.on("cancel")
def ends(said):
    note("end", said)"""
GATE = '%%step gate\ndecision = durable.approve("x", title="Publish?")\ndurable.result(n=1)\nassert decision.approved'
ALERTS = """def tell(said):
    print("ALERT", said.kind, said.status, file=open("told-beside", "a"))
"""


def settle(client: Client, run_id: str, *until: RunStatus) -> RunDetail:
    """Wait until a run is in one of these states."""
    while True:
        run = client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))
        if run.status in until:
            return run
        client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id, after=1 << 60, hold_s=0.2))


def told(folder: Path) -> list[list[Any]]:
    """Return what the hooks have noted."""
    return [json.loads(line) for line in (folder / "told").read_text().splitlines()]


def hooks_of(client: Client, run_id: str) -> list[tuple[str, str]]:
    """Return which hooks ended how, by the run's history."""
    events = client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run_id)).events
    return [(event.kind, event.data["name"]) for event in events if event.kind in ("hook_ran", "hook_failed")]


@pytest.mark.parametrize("approved", [True, False])
def test_a_run_tells_its_hooks(
    approved: bool, home: Home, coordinator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 6: hooks hear of everything once, and neither their errors nor what they print changes the run."""
    (home.root.parent / "alerts.py").write_text(ALERTS)
    hooks = {"failure": "alerts:tell", "success": "alerts:missing", "wait": ["no-such-command"]}
    monkeypatch.setenv("NBDURABLE_HOOKS", json.dumps(hooks))
    client, output = Client(home), tmp_path / "out.ipynb"
    path = notebooks.write(tmp_path / "n.ipynb", [LOAD, "%%step one\none = 1", GATE])
    run = settle(client, create_headless(client, path, output=output).id, RunStatus.WAITING)
    answer = contract.AnswerWait(wait_id=run.waits[0].id, approved=approved, by="test", nonce="n")
    client.call(contract.ANSWER_WAIT, answer)
    run = settle(client, run.id, RunStatus.COMPLETED, RunStatus.FAILED)
    assert run.status is (RunStatus.COMPLETED if approved else RunStatus.FAILED), run.reason
    last = (
        ["success", "success", "completed", run.reason, {"n": 1}, [], None]
        if approved
        else ["end", "failure", "failed", run.reason, {"n": 1}, [], "AssertionError"]
    )
    noted = told(tmp_path)
    assert [one[:3] for one in noted[:3]] == [
        ["start", "start", "running"],
        ["wait", "wait", "waiting"],
        ["resume", "resume", "running"],
    ]
    assert noted[1][5] == ["Publish?"]
    assert noted[3:] == [last]
    log = home.run_log(run.id).read_text()
    assert "HOOK PRINTS" in log
    assert "HOOK PRINTS" not in repr(notebooks.outputs(output))
    assert hooks_of(client, run.id)[:4] == [
        ("hook_ran", "starts"),
        ("hook_ran", "waits"),
        ("hook_failed", "settings: no-such-command"),
        ("hook_ran", "goes_on"),
    ]
    if approved:
        assert hooks_of(client, run.id)[4:] == [
            ("hook_failed", "breaks"),
            ("hook_failed", "settings: alerts:missing"),
        ]
        assert "KeyError: 'hook breaks'" in log
        found = [check for check in examine(home) if check.name == "hooks"]
        assert [check.ok for check in found] == [True, False, False]
        assert "has no attribute 'missing'" in found[1].said
    else:
        assert hooks_of(client, run.id)[4:] == [("hook_ran", "ends"), ("hook_ran", "settings: alerts:tell")]
        assert (tmp_path / "told-beside").read_text() == "ALERT failure failed\n"


def test_a_cancelled_run_tells_so_in_time(
    home: Home, coordinator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that never ends is interrupted, one that fails is said; the run is cancelled all the same."""
    monkeypatch.setenv("NBDURABLE_HOOKS", '{"cancel": ["sh", "-c", "echo no network; exit 1"]}')
    monkeypatch.setenv("NBDURABLE_HOOK_TIMEOUT_S", "3")
    endless = LOAD + "\n@durable.on('cancel')\ndef endless(said):\n    import time\n    time.sleep(1000)"
    path = notebooks.write(tmp_path / "n.ipynb", [endless, "%%step hang\nimport time\ntime.sleep(1000)"])
    with Client(home) as client:
        run_id = create_headless(client, path).id
        while not client.call(contract.GET_RUN, contract.ByRun(run_id=run_id)).steps:
            client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run_id, after=1 << 60, hold_s=0.2))
        client.call(contract.CANCEL_RUN, contract.ByRun(run_id=run_id))
        run = settle(client, run_id, RunStatus.CANCELLED)
        assert run.reason == "cancelled"
        assert hooks_of(client, run_id) == [
            ("hook_ran", "starts"),
            ("hook_ran", "ends"),
            ("hook_failed", "endless"),
            ("hook_failed", "settings: sh -c echo no network; exit 1"),
        ]
        log = home.run_log(run_id).read_text()
        assert "hook endless (cancel) failed: TimeoutError: it took longer than 3 s" in log
        assert "it ended with status 1: no network" in log


def test_hooks_that_cannot_be(home: Home, coordinator: Any, tmp_path: Path) -> None:
    """Guarantee 11: a kind that does not exist, and a hook that a restore would lose, are refused with what to do."""
    from nbdurable.kernel.hooks import on

    with pytest.raises(Exception, match="there are no hooks of the kind 'sucess'"):
        on("sucess")  # type: ignore[arg-type]
    cell = "%%step one\n@durable.on('success')\ndef lost(said):\n    pass"
    path = notebooks.write(tmp_path / "n.ipynb", ["%load_ext nbdurable\nimport nbdurable as durable", cell])
    with Client(home) as client:
        run = settle(client, create_headless(client, path).id, RunStatus.FAILED)
        assert "registers a hook, which is gone once the step is restored" in run.reason
