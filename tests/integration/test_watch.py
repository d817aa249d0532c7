"""`--watch`: files and environment variables that a step stands on, by hand and headless (guarantees 1, 9, 11)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.commands import DEADLINE_S, Project
from tests.tools.kernels import Kernel
from tests.tools.processes import end_processes_of

LOAD = "%load_ext nbdurable"
STEP = "%%step clean --watch data.csv,parts/*.txt --watch env:WATCHED_MODE\nrows = 1"


@pytest.fixture
def kernel(home: Home, coordinator: Any, tmp_path: Path) -> Iterator[Kernel]:
    """A kernel of `book/n.ipynb` that works in another folder."""
    (tmp_path / "book").mkdir()
    found = Kernel(home.root, notebooks.write(tmp_path / "book" / "n.ipynb", [("c", STEP)]), tmp_path)
    found.run(LOAD)
    yield found
    found.shutdown()


def test_a_step_runs_again_when_what_it_watches_changes(kernel: Kernel, tmp_path: Path) -> None:
    """Guarantees 1, 9: with the reason, also in the plan before; what is not there is said; nothing else runs it."""
    data = tmp_path / "book" / "data.csv"
    first = kernel.run(STEP, "c").notes
    assert "✓ clean" in first
    assert "watched file data.csv does not exist" in first
    assert "no file matches the watched parts/*.txt" in first
    assert "watched environment variable WATCHED_MODE is not set" in first
    changes = [
        (lambda: data.write_text("a"), "watched file data.csv was added"),
        (lambda: data.write_text("b"), "watched file data.csv changed"),
        (data.unlink, "watched file data.csv was removed"),
        (lambda: kernel.run("%env WATCHED_MODE=s3cret"), "watched environment variable WATCHED_MODE was set"),
        (lambda: kernel.run("%env WATCHED_MODE=other"), "watched environment variable WATCHED_MODE changed"),
        (lambda: (data.parent / "parts").mkdir(), ""),
        (lambda: (data.parent / "parts" / "a.txt").write_text("a"), "watched file parts/a.txt was added"),
    ]
    for change, reason in changes:
        change()
        plan, said = kernel.run("%durable plan").notes, kernel.run(STEP, "c").notes
        if reason:
            assert f"clean  run       {reason}" in plan
            assert said.startswith("✓ clean")
            assert f"({reason})" in said
        else:
            assert "clean  restore" in plan
            assert said.startswith("↺ clean")
        again = kernel.run(STEP, "c").notes
        assert again.startswith("↺ clean"), again
    kernel.restart()
    kernel.run(LOAD)
    assert "WATCHED_MODE was unset" in kernel.run(STEP, "c").notes


def test_a_folder_is_refused_with_what_to_write_instead(kernel: Kernel, tmp_path: Path) -> None:
    """Guarantee 11."""
    (tmp_path / "book" / "data.csv").mkdir()
    reply = kernel.run(STEP, "c")
    assert reply.status == "error"
    assert "is a folder" in reply.error
    assert "data.csv/*" in reply.error
    assert "$WATCHED" not in reply.error
    reply = kernel.run("%%step b --watch $WATCHED_MODE\nx = 1")
    assert "written env:WATCHED_MODE" in reply.error


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    yield Project(tmp_path)
    end_processes_of(Home(tmp_path / ".nbdurable"))


def test_a_resumed_headless_run_sees_a_changed_file(project: Project) -> None:
    """Guarantees 1, 9: what is declared counts like code, in every mode; what stands on the step follows it."""
    data = project.folder / "data.csv"
    data.write_text("1")
    project.notebook(
        "n.ipynb",
        "%%step clean --watch data.csv\nrows = open('data.csv').read()",
        "%%step other\nother = 1",
        "%%step total\nassert rows != '1', 'not yet'\ntotal = rows",
    )
    with project.start("run", "n.ipynb", "--json") as process:
        run = json.loads(process.communicate(timeout=DEADLINE_S)[0])
    assert run["status"] == "failed"
    data.write_text("2")
    planned = {step["name"]: step for step in project.json("plan", run["id"])}
    assert planned["clean"]["action"] == "run"
    assert planned["clean"]["reason"] == "watched file data.csv changed"
    project.run("resume", run["id"])
    project.run("logs", "-f", run["id"])
    shown = project.json("show", run["id"])
    assert shown["status"] == "completed"
    steps = {step["name"]: step for step in shown["steps"]}
    assert (steps["clean"]["executions"], steps["other"]["executions"]) == (2, 1)
    assert steps["clean"]["reason"] == "watched file data.csv changed"
