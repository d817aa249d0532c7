"""`diff` as it is typed: two runs, two steps; for people and as JSON. Processes only."""

from __future__ import annotations

import json

from tests.tools.commands import Project

LOAD = "%%step load\nimport pandas as pd\ntable = pd.DataFrame({'a': [1, 2], 'b': ['x', 'y']})\nprint('loaded', n)"
CLEAN = "%%step clean\ntable['a'] *= n\nfactor = 2\ndurable.result(n=n)"


def test_two_runs_are_compared(project: Project) -> None:
    """Issue 3, item 9: parameters, code, outputs, frames by their values, the result."""
    project.notebook("n.ipynb", LOAD, CLEAN, parameters="n = 1")
    first = json.loads(project.run("run", "n.ipynb", "--json").stdout)["id"]
    project.notebook("n.ipynb", LOAD, CLEAN.replace("factor = 2", "power = 2"), parameters="n = 1")
    second = json.loads(project.run("run", "n.ipynb", "-p", "n", "3", "--json").stdout)["id"]

    found = project.json("diff", first, second)
    assert found["parameters"] == {"n": {"after": 3}}
    assert found["result"] == {"before": {"n": 1}, "after": {"n": 3}}
    load, clean = found["steps"]
    assert (load["code"], load["outputs"][1:]) == ([], ["-loaded 1", "+loaded 3"])
    assert {"-factor = 2", "+power = 2"} <= set(clean["code"])
    changes = {one["name"]: one["change"] for one in found["variables"]}
    assert changes == {"table": "changed", "factor": "removed", "power": "added"}
    [table] = [one for one in found["variables"] if one["name"] == "table"]
    assert table["difference"]["columns"] == {
        "a": {"changed": 2, "examples": [["0", "1", "3"], ["1", "2", "6"]]}
    }

    shown = project.run("diff", first[-8:], second[-8:])
    assert shown.returncode == 0
    assert "column a: 2 values differ: [0] 1 → 3; [1] 2 → 6" in shown.stdout

    assert "nothing differs" in project.run("diff", first, first).stdout
    steps = project.json("diff", f"{second}:load", f"{second}:clean")
    assert {one["name"]: one["change"] for one in steps["variables"]} == {
        "table": "changed",
        "power": "added",
    }
    wrong = project.run("diff", first, f"{second}:nothing")
    assert wrong.returncode == 2
    assert "its steps: load, clean" in wrong.stderr
