"""A project that came from somebody else: looked at, neither loaded nor executed, until `nbdurable trust`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdurable.settings import Home
from tests.tools.commands import Project
from tests.tools.kernels import Kernel
from tests.tools.processes import end_processes_of, until

# What restoring its value does is up to whoever made the checkpoint.
TRAP = """%%step trap
class Trap:
    def __init__(self):
        self.n = n
    def __setstate__(self, state):
        open({mark!r}, "a").close()
        self.__dict__.update(state)
trap = Trap()"""
QUEUED = "%%step queued\nopen({mark!r}, 'a').close()"


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Project]:
    """Copy a project with two finished runs and a queued one to a user who never saw it."""
    restored, executed = tmp_path / "restored", tmp_path / "executed"
    (tmp_path / "theirs").mkdir()
    theirs = Project(tmp_path / "theirs", tmp_path / "their-config")
    try:
        theirs.notebook("n.ipynb", TRAP.format(mark=str(restored)), parameters="n = 1")
        for n in ("1", "2"):
            assert theirs.run("run", "n.ipynb", "-p", "n", n).returncode == 0
        assert theirs.run("down").returncode == 0
        settings = theirs.home / "settings.toml"
        settings.write_text("worker_slots = 0\n")
        theirs.notebook("queued.ipynb", QUEUED.format(mark=str(executed)))
        assert theirs.run("run", "queued.ipynb", "--detach").returncode == 0
        assert theirs.run("down").returncode == 0
        settings.unlink()
        shutil.copytree(theirs.folder, tmp_path / "mine", symlinks=True)
        restored.unlink(missing_ok=True)  # the step's own verification may have loaded it
        yield Project(tmp_path / "mine", tmp_path / "my-config")
    finally:
        end_processes_of(Home(theirs.home))
        end_processes_of(Home(tmp_path / "mine" / ".nbdurable"))


def load(project: Project, run: str) -> subprocess.CompletedProcess[str]:
    program = f"import nbdurable as durable; print(durable.load({run!r}, 'trap', 'trap').n)"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_foreign_store_is_looked_at_only_until_it_is_trusted(foreign: Project, tmp_path: Path) -> None:
    """Guarantee 8: of a stranger's store nothing is unpickled and nothing executed before somebody says so."""
    restored, executed = tmp_path / "restored", tmp_path / "executed"
    queued, second, first = foreign.json("ls")
    assert [queued["status"], second["status"], first["status"]] == ["queued", "completed", "completed"]

    for look in (("show", first["id"]), ("diff", first["id"], second["id"]), ("stats", first["id"])):
        done = foreign.run(*look)
        assert done.returncode == 0, done.stderr
        assert "is not trusted" in done.stderr
        assert "nbdurable trust" in done.stderr
    difference = foreign.json("diff", first["id"], second["id"])
    assert difference["parameters"] == {"n": {"before": 1, "after": 2}}
    (variable,) = (one for one in difference["variables"] if one["name"] == "trap")
    assert (variable["change"], variable["difference"]) == ("changed", None)
    assert "not trusted" in variable["why"]

    for change in (
        ("run", "n.ipynb"),
        ("resume", first["id"]),
        ("cancel", queued["id"]),
        ("plan", "n.ipynb"),
        ("approve", "7K2MXD"),
        ("gc", "--keep-last", "0", "--yes"),
        ("worker",),
    ):
        done = foreign.run(*change)
        assert done.returncode == 1, (change, done.stdout, done.stderr)
        assert f"the store {foreign.home} is not trusted" in done.stderr
        assert f"nbdurable trust {foreign.home}" in done.stderr
    refused = load(foreign, first["id"])
    assert refused.returncode == 1
    assert "Untrusted" in refused.stderr

    checks = {check["name"]: check for check in json.loads(foreign.run("doctor", "--json").stdout)}
    assert not checks["trust"]["ok"]
    assert not restored.exists()
    assert not executed.exists()
    assert [run["status"] for run in foreign.json("ls")] == ["queued", "completed", "completed"]

    asked = foreign.run("trust")
    assert asked.returncode == 2, "nobody is there to be asked"
    assert "2 completed, 1 queued" in asked.stderr + asked.stdout
    assert "would be executed" in asked.stderr + asked.stdout
    looked = foreign.run("trust", str(foreign.folder), "--json")
    assert (looked.returncode, json.loads(looked.stdout)["trusted"]) == (1, False)
    assert not foreign.json("trust", "--ls")
    assert not executed.exists()

    assert foreign.run("trust", "--yes").returncode == 0
    loaded = load(foreign, first["id"])
    assert (loaded.returncode, loaded.stdout.strip()) == (0, "1"), loaded.stderr
    assert restored.exists()
    until(executed.exists, what="the queued run goes on", deadline_s=60)
    (entry,) = foreign.json("trust", "--ls")
    assert entry["path"] == str(foreign.home)

    assert foreign.run("trust", "--rm", entry["fingerprint"][:8]).returncode == 0
    assert load(foreign, first["id"]).returncode == 1
    assert foreign.run("trust", "--rm").returncode == 2


def test_no_kernel_begins_with_a_foreign_store(foreign: Project, tmp_path: Path) -> None:
    """Guarantee 8: opening a notebook that somebody sent restores nothing; once trusted, the same kernel goes on."""
    run = foreign.json("ls")[-1]["id"]
    kernel = Kernel(
        foreign.home, foreign.folder / "n.ipynb", foreign.folder, {"NBDURABLE_CONFIG": str(foreign.config)}
    )
    try:
        refused = kernel.run("%load_ext nbdurable")
        assert refused.status == "error"
        assert "is not trusted" in refused.error
        assert "nbdurable trust" in refused.error
        assert "Traceback" not in refused.error
        kernel.run(f"%durable checkout {run} trap")
        assert kernel.run("trap").status == "error", "there is no such magic, and nothing is bound"
        assert not (tmp_path / "restored").exists()
        assert foreign.run("trust", "--yes").returncode == 0
        assert kernel.run("%load_ext nbdurable").status == "ok"
        assert kernel.run(f"%durable checkout {run} trap").status == "ok"
        assert kernel.run("print(trap.n)").text.strip() == "1"
        assert (tmp_path / "restored").exists()
    finally:
        kernel.shutdown()
