"""A project that came from somebody else: looked at, neither loaded nor executed, until `nbdurable trust`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import nbdurable as durable
from nbdurable.cli.commands import app
from nbdurable.client import Client
from nbdurable.contract import LIST_RUNS, ListRuns
from nbdurable.errors import Untrusted
from nbdurable.models import RunStatus
from nbdurable.notebooks import create_headless
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel
from tests.tools.processes import end_processes_of, until

# What restoring its value does is up to whoever made the checkpoint.
TRAP = """%%step trap
class Trap:
    def __init__(self):
        self.n = 1
    def __setstate__(self, state):
        open({mark!r}, "a").close()
        self.__dict__.update(state)
trap = Trap()"""
CHANGE = "%%step change\ntrap.n = 2"
QUEUED = "%%step queued\nopen({mark!r}, 'a').close()"


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Copy a project with checkpoints and a queued run to a user who never saw it."""
    theirs, mine = (Home(tmp_path / name / ".nbdurable") for name in ("theirs", "mine"))
    theirs.create()
    monkeypatch.chdir(theirs.root.parent)
    monkeypatch.setenv("NBDURABLE_WORKER_SLOTS", "0")
    monkeypatch.setenv("NBDURABLE_HOME", str(theirs.root))
    monkeypatch.setenv("NBDURABLE_CONFIG", str(tmp_path / "their-config"))
    try:
        kernel = Kernel(theirs.root, theirs.root.parent / "n.ipynb", theirs.root.parent)
        try:
            for cell in ("%load_ext nbdurable", TRAP.format(mark=str(tmp_path / "restored")), CHANGE):
                assert kernel.run(cell).status == "ok"
        finally:
            kernel.shutdown()
        cell = QUEUED.format(mark=str(tmp_path / "executed"))
        book = notebooks.write(theirs.root.parent / "queued.ipynb", ["%load_ext nbdurable", cell])
        with Client(theirs) as client:
            until(
                lambda: not client.call(LIST_RUNS, ListRuns(status=RunStatus.RUNNING)).runs,
                what="the coordinator sees that the kernel has ended",
            )
            create_headless(client, book)
        assert CliRunner().invoke(app, ["down"]).exit_code == 0
        shutil.copytree(theirs.root.parent, mine.root.parent)
        (tmp_path / "restored").unlink(missing_ok=True)
        monkeypatch.chdir(mine.root.parent)
        monkeypatch.delenv("NBDURABLE_WORKER_SLOTS")
        monkeypatch.setenv("NBDURABLE_HOME", str(mine.root))
        monkeypatch.setenv("NBDURABLE_CONFIG", str(tmp_path / "my-config"))
        yield mine
    finally:
        end_processes_of(theirs)
        end_processes_of(mine)


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_a_foreign_store_is_looked_at_only_until_it_is_trusted(foreign: Home, tmp_path: Path) -> None:
    """Guarantee 8: of a stranger's store nothing is unpickled and nothing executed before somebody says so."""
    restored, executed = tmp_path / "restored", tmp_path / "executed"
    queued, run = json.loads(typed("ls", "--json").stdout)
    assert [queued["status"], run["status"]] == ["queued", "paused"]

    for look in (("show", run["id"]), ("stats", run["id"]), ("waits",), ("sql", "select 1")):
        done = typed(*look)
        assert done.exit_code == 0, done.output
        assert "is not trusted" in done.stderr
        assert "nbdurable trust" in done.stderr
    found = json.loads(typed("diff", f"{run['id']}:trap", f"{run['id']}:change", "--json").stdout)
    (variable,) = found["variables"]
    assert (variable["name"], variable["change"], variable["difference"]) == ("trap", "changed", None)
    assert "not trusted" in variable["why"]

    for change in (
        ("run", "queued.ipynb"),
        ("resume", run["id"]),
        ("cancel", queued["id"]),
        ("plan", run["id"]),
        ("approve", "7K2MXD"),
        ("gc", "--keep-last", "0", "--yes"),
        ("worker",),
    ):
        done = typed(*change)
        assert done.exit_code == 1, (change, done.output)
        assert f"the store {foreign.root} is not trusted" in done.stderr
        assert f"`nbdurable trust {foreign.root}`" in done.stderr
    with pytest.raises(Untrusted):
        durable.load(run["id"], "trap", "trap")
    checks = {check["name"]: check for check in json.loads(typed("doctor", "--json").stdout)}
    assert not checks["trust"]["ok"]

    kernel = Kernel(foreign.root, foreign.root.parent / "n.ipynb", foreign.root.parent)
    try:
        refused = kernel.run("%load_ext nbdurable")
        assert refused.status == "error"
        assert "is not trusted" in refused.error
        assert "Traceback" not in refused.error

        asked = typed("trust")
        assert asked.exit_code == 2, "nobody is there to be asked"
        assert "1 paused, 1 queued" in asked.output
        assert "1 of its runs would be executed" in asked.output
        looked = typed("trust", str(foreign.root.parent), "--json")
        assert (looked.exit_code, json.loads(looked.stdout)["trusted"]) == (1, False)
        assert [one["status"] for one in json.loads(typed("ls", "--json").stdout)] == ["queued", "paused"]
        assert not restored.exists()
        assert not executed.exists()

        assert typed("trust", "--yes").exit_code == 0
        assert kernel.run("%load_ext nbdurable").status == "ok"
        assert kernel.run(f"%durable checkout {run['id']} trap").status == "ok"
        assert kernel.run("print(trap.n)").text.strip() == "1"
        assert restored.exists(), "the trap is one"
        until(executed.exists, what="the queued run goes on", deadline_s=60)
    finally:
        kernel.shutdown()
    (entry,) = json.loads(typed("trust", "--ls", "--json").stdout)
    assert entry["path"] == str(foreign.root)
    assert typed("trust", "--rm", entry["fingerprint"][:8]).exit_code == 0
    with pytest.raises(Untrusted):
        durable.load(run["id"], "trap", "trap")
    assert typed("trust", "--rm").exit_code == 2
