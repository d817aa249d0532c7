"""`fork`, `repair`, `replay` and `resample` as they are typed: plans first, shapes, what is refused. Processes only."""

from __future__ import annotations

import json

import pytest

from tests.tools.commands import Project

ONE = "%%step one\nx = [n] * 10\nprint('one ran')"
TWO = "%%step two\ny = x[0] / 0"
FIXED = TWO.replace("/ 0", "/ 2")


@pytest.fixture(scope="module")
def forked(project: Project) -> str:
    """Return the id of a fork that completed, of a run that failed; nothing in the project goes on."""
    project.notebook("n.ipynb", ONE, TWO, parameters="n = 1")
    project.notebook("fixed.ipynb", ONE, FIXED, parameters="n = 1")
    assert project.run("run", "n.ipynb").returncode == 1
    [source] = project.json("ls", "--status", "failed")
    return str(project.json("fork", source["id"], "--notebook", "fixed.ipynb")["id"])


def test_a_failed_run_goes_on_as_a_fork(own_project: Project) -> None:
    """Guarantees 1, 9, 11: a dry run only says what would happen; a fork keeps what was done, and says whose."""
    own_project.notebook("n.ipynb", ONE, TWO, parameters="n = 1")
    own_project.notebook("fixed.ipynb", ONE, FIXED, parameters="n = 1")
    assert own_project.run("run", "n.ipynb", "-p", "n", "4").returncode == 1
    [source] = own_project.json("ls", "--status", "failed")

    for words in (
        ["fork", source["id"], "--notebook", "fixed.ipynb"],
        ["repair", source["id"], "--notebook", "fixed.ipynb"],
    ):
        planned = own_project.json(*words, "--dry-run")
        assert planned["run"] == source["id"]
        assert [(step["name"], step["action"]) for step in planned["plan"]] == [
            ("one", "keep"),
            ("two", "run"),
        ]
        assert all(step["reason"] for step in planned["plan"])
        assert "nothing was changed" in own_project.run(*words, "--dry-run").stdout
    [planned] = own_project.json(
        "replay", "--status", "failed", "--notebook", "n.ipynb", "--since", "1h", "--dry-run"
    )
    assert [step["action"] for step in planned["plan"]] == ["run", "run"]
    assert [run["id"] for run in own_project.json("ls")] == [source["id"]]

    found = own_project.run("fork", source["id"], "--notebook", "fixed.ipynb", "--json")
    assert found.returncode == 0, found.stderr
    forked = json.loads(found.stdout)
    assert (forked["status"], forked["forked_from"], forked["forked_at"]) == (
        "completed",
        source["id"],
        "two",
    )
    assert [(step["name"], step["executions"]) for step in forked["steps"]] == [("one", 0), ("two", 1)]
    assert f"fork of {source['id'][-8:]} at two" in own_project.run("show", forked["id"]).stdout
    assert f"fork of {source['id'][-8:]} at two" in own_project.run("ls").stdout

    queued = own_project.json(
        "repair", source["id"], "--set", "y=2", "--mark-done", "two", "--comment", "by phone"
    )
    assert (queued["id"], queued["status"]) == (source["id"], "queued")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fork", "{run}", "--from", "three"], "its steps: one, two"),
        (["fork", "{run}", "--from", "two", "--set", "y=[1"], "Text needs its own quotes"),
        (["fork", "{run}", "--from", "two", "--set", "1y=1"], "is not NAME=JSON"),
        (["fork", "{run}", "--notebook", "gone.ipynb"], "there is no notebook"),
        (["fork", "{run}"], "say from which one to go"),
        (["repair", "{run}", "--from", "three"], "its steps: one, two"),
        (["repair", "{run}"], "nothing to repair was named"),
        (["replay"], "needs either runs or a filter"),
        (["replay", "{run}", "--status", "failed"], "needs either runs or a filter"),
        (["replay", "{run}", "-p", "q", "1"], "no parameter 'q'"),
        (["resample", "{run}", "one", "--n", "0"], "--n"),
        (["resample", "{run}", "one", "--n", "1000"], "--n"),
        (["run", "n.ipynb", "--until", "three"], "its steps: one, two"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_happens(
    project: Project, forked: str, words: list[str], says: str
) -> None:
    """Guarantee 11: one clear error that names what there is; no run is made or changed."""
    before = project.json("ls")
    found = project.run(*(word.format(run=forked) for word in words))
    assert found.returncode in (1, 2)
    assert says in " ".join(found.stderr.split())
    assert project.json("ls") == before
