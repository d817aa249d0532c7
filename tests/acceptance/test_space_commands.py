"""`stats` and `gc` as they are typed: what they print, and what is left afterwards. Processes only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.commands import Project

CELL = "%%step big\nimport numpy as np\nvalues = np.arange(n, n + 50_000)"


def blobs(project: Project) -> list[Path]:
    return [path for path in (project.home / "blobs").rglob("*") if path.is_file()]


def test_a_clean_up_is_shown_first_and_then_removes_what_no_kept_run_needs(project: Project) -> None:
    """Guarantees 9, 10, 11: reasons before anything goes; the kept run stays whole; the removed one says so."""
    project.notebook("n.ipynb", CELL, parameters="n = 1")
    runs = [
        json.loads(project.run("run", "n.ipynb", "-p", "n", str(n), "--json").stdout)["id"] for n in (1, 2)
    ]
    for path in blobs(project):
        os.utime(path, (1.0, 1.0))

    found = project.json("stats")
    assert {run["id"]: run["unique"] > 300_000 for run in found["runs"]} == dict.fromkeys(runs, True)
    assert found["blobs"] == len(blobs(project))
    assert "values" in project.run("stats", runs[0]).stdout

    count = len(blobs(project))
    shown = project.run("gc", "--keep-last", "1", "--dry-run")
    assert shown.returncode == 0
    assert f"run {runs[0][-8:]} of n.ipynb" in shown.stdout
    assert "not among the newest 1 of n.ipynb" in shown.stdout
    assert len(blobs(project)) == count
    kept = project.json("gc")
    assert {fate["action"] for fate in kept["fates"]} == {"keep"}

    done = project.json("gc", "--keep-last", "1")
    assert [(fate["id"], fate["action"]) for fate in done["fates"]] == [
        (runs[0], "remove"),
        (runs[1], "keep"),
    ]
    assert (done["files"], len(blobs(project))) == (1, count - 1)
    assert "removed by a clean-up" in project.run("show", runs[0]).stdout
    assert project.json("show", runs[1])["steps"][0]["removed"] == ""
    assert "can't be resumed: 1 checkpoint removed" in project.run("plan", runs[0]).stderr
    assert "nothing to remove" in project.run("gc", "--keep-last", "1").stdout

    wrong = project.run("gc", "--keep-for", "soon")
    assert wrong.returncode == 2
    assert "'soon' is no duration" in wrong.stderr


@pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")
def test_a_person_is_asked_after_the_list_and_before_anything_goes(project: Project) -> None:
    """Guarantee 10: on a terminal, "no" removes nothing; --yes does not ask."""
    project.notebook("asked.ipynb", CELL, parameters="n = 7")
    json.loads(project.run("run", "asked.ipynb", "--json").stdout)
    for path in blobs(project):
        os.utime(path, (1.0, 1.0))
    before = blobs(project)
    words = [sys.executable, "-m", "nbdurable", "gc", "--keep-last", "0"]
    ours, theirs = os.openpty()
    try:
        os.write(ours, b"n\n")
        done = subprocess.run(
            words, stdin=theirs, capture_output=True, text=True, env=project.environment, timeout=60
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout.index("of asked.ipynb") < done.stdout.index("nothing was removed")
    assert "Remove them?" in done.stderr
    assert blobs(project) == before
    assert "\nremoved " in project.run("gc", "--keep-last", "0", "--yes").stdout
    assert len(blobs(project)) < len(before)
