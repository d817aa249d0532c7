"""Restore or run, and why: the table of design §5 (guarantees 1 and 9)."""

import ast

import pytest

from nbdurable.checkpoint.analysis import analyse
from nbdurable.checkpoint.manifest import Blob, CodeFacts, Group, HelperFact, InputFact, Manifest, ModuleFact
from nbdurable.checkpoint.plan import Origins, decide
from nbdurable.checkpoint.sources import code_digest

HELPER = HelperFact(ast="h1", state={"default `n`": "s1"}, source="def f():\n    return 1")
MODULE = ModuleFact(digest="m1", file="mine.py", outline="1:aa 5:bb")
CODE = CodeFacts(
    source="x = f(n)", digest="d1", helpers={"f": HELPER}, modules={"mine": MODULE}, python="3.11"
)
INPUT = InputFact(value="v1", origin="o1", label="the cell `n = 5`")


def manifest(code: CodeFacts = CODE, resume_at: int | None = None, **inputs: InputFact) -> Manifest:
    return Manifest(
        run_id="r",
        step="a",
        created_at=0.0,
        duration_s=1.0,
        code=code,
        inputs=inputs or {"n": INPUT},
        resume_at=resume_at,
    )


def facts(**changes: object) -> CodeFacts:
    return CODE.model_copy(update=changes)


def watching(**watched: dict[str, str]) -> CodeFacts:
    return facts(watched=watched)


WATCHES = manifest(watching(**{"data.csv": {"data.csv": "1"}}))
DRIFTED = INPUT.model_copy(update={"value": "v2"})
ELSEWHERE = InputFact(value="v2", origin="o2", label="the cell `n = 6`")


@pytest.mark.parametrize(
    ("recorded", "code", "inputs", "options", "action", "reason"),
    [
        (None, CODE, {"n": INPUT}, {}, "execute", "no checkpoint"),
        (manifest(), CODE, {"n": INPUT}, {}, "restore", "same code and inputs"),
        (manifest(), CODE, {"n": INPUT}, {"visited": True}, "restore", "same code and inputs"),
        (manifest(), CODE, {"n": INPUT}, {"forced": "forced by --force"}, "execute", "--force"),
        (manifest(), facts(digest="d2", source="x = 2"), {"n": INPUT}, {}, "execute", "its code changed"),
        (manifest(), facts(digest="d2", python="3.12"), {"n": INPUT}, {}, "restore", "same code"),
        (manifest(), facts(helpers={}), {"n": INPUT}, {}, "execute", "helper `f` is gone"),
        (
            manifest(),
            facts(helpers={"f": HELPER, "g": HELPER}),
            {"n": INPUT},
            {},
            "execute",
            "now uses helper `g`",
        ),
        (
            manifest(),
            facts(helpers={"f": HELPER.model_copy(update={"ast": "h2", "source": "def f():\n    return 2"})}),
            {"n": INPUT},
            {},
            "execute",
            "helper `f` changed, line 2",
        ),
        (
            manifest(),
            facts(modules={"mine": MODULE.model_copy(update={"digest": "m2", "outline": "1:aa 7:cc"})}),
            {"n": INPUT},
            {},
            "execute",
            "module `mine.py` changed, line 7",
        ),
        (manifest(), CODE, {"n": ELSEWHERE}, {}, "execute", "`n` now comes from the cell `n = 6`"),
        (manifest(), CODE, {"n": INPUT, "k": INPUT}, {}, "execute", "now reads `k`"),
        (manifest(), CODE, {}, {}, "execute", "`n` is gone"),
        (manifest(), CODE, {"n": DRIFTED}, {}, "restore", "`n` differs now"),
        (manifest(), CODE, {"n": DRIFTED}, {"visited": True}, "execute", "`n` changed"),
        (manifest(), CODE, {"n": DRIFTED}, {"visited": True, "on_drift": "keep"}, "restore", "differs"),
        (manifest(), CODE, {"n": DRIFTED}, {"on_drift": "rerun"}, "execute", "`n` changed"),
        (manifest(), CODE, {"n": DRIFTED}, {"on_drift": "error"}, "refuse", "`n` differs"),
        (WATCHES, watching(**{"data.csv": {"data.csv": "1"}}), {"n": INPUT}, {}, "restore", "same code"),
        (WATCHES, CODE, {"n": INPUT}, {}, "restore", "same code"),
        (
            WATCHES,
            watching(**{"data.csv": {"data.csv": "2"}}),
            {"n": INPUT},
            {},
            "execute",
            "watched file data.csv changed",
        ),
        (
            WATCHES,
            watching(**{"data.csv": {}}),
            {"n": INPUT},
            {},
            "execute",
            "watched file data.csv was removed",
        ),
        (
            WATCHES,
            watching(**{"*.csv": {}, "data.csv": {"data.csv": "1"}}),
            {"n": INPUT},
            {},
            "execute",
            "it now watches *.csv",
        ),
        (
            manifest(watching(**{"*.csv": {}})),
            watching(**{"*.csv": {"a.csv": "1", "b.csv": "2"}}),
            {"n": INPUT},
            {},
            "execute",
            "watched file a.csv was added, and 1 more",
        ),
        (
            manifest(watching(**{"env:MODE": {}})),
            watching(**{"env:MODE": {"env:MODE": "1"}}),
            {"n": INPUT},
            {},
            "execute",
            "watched environment variable MODE was set",
        ),
        (manifest(resume_at=2), CODE, {"n": INPUT}, {}, "continue", "goes on behind"),
        (
            manifest(resume_at=2),
            facts(digest="d2", source="x"),
            {"n": INPUT},
            {},
            "execute",
            "its code changed",
        ),
    ],
)
def test_the_table(recorded, code, inputs, options, action, reason) -> None:  # type: ignore[no-untyped-def]
    """Each row of the table, with the reason that is recorded before it is carried out."""
    verdict = decide(recorded, code, lambda: inputs, step="a", **{"visited": False, **options})
    assert verdict.action == action
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            INPUT,
            ELSEWHERE.model_copy(update={"cell": "cell 2", "line": 3}),
            "its input `n` changed (cell 2, line 3)",
        ),
        (
            INPUT,
            ELSEWHERE.model_copy(update={"cell": "cell 2", "via": "f"}),
            "`n`, which helper `f` reads, changed (cell 2)",
        ),
        (
            INPUT.model_copy(update={"label": "step a"}),
            ELSEWHERE.model_copy(update={"label": "step a"}),
            "its input `n` changed (step a)",
        ),
        (
            INPUT.model_copy(update={"label": "step a"}),
            ELSEWHERE.model_copy(update={"cell": "cell 2", "line": 1}),
            "its input `n` now comes from the cell `n = 6` (cell 2, line 1)",
        ),
        (INPUT, ELSEWHERE.model_copy(update={"label": "step a"}), "its input `n` now comes from step a"),
    ],
)
def test_where_an_input_comes_from_is_said(old: InputFact, new: InputFact, sentence: str) -> None:
    """Guarantee 9: also in parts, for programs."""
    verdict = decide(manifest(n=old), CODE, lambda: {"n": new}, step="a", visited=False)
    assert verdict.reason == sentence
    assert verdict.cause is not None
    assert (verdict.cause.kind, verdict.cause.name) == ("input", "n")
    assert (verdict.cause.cell, verdict.cause.line or 0) == (new.cell, new.line)


@pytest.mark.parametrize(
    ("recorded", "python", "here", "warning"),
    [
        ({}, "3.11", {}, ""),
        ({"pandas": "2.2"}, "3.11", {"pandas": "2.2"}, ""),
        ({"pandas": "2.2"}, "3.11", {"pandas": "3.0"}, "; made with pandas 2.2, this is 3.0"),
        ({"pandas": "2.2"}, "3.11", {}, "; made with pandas 2.2, which is not installed here"),
        ({}, "3.12", {}, "; made with Python 3.11, this is 3.12"),
        (
            dict.fromkeys("abc", "1"),
            "3.12",
            dict.fromkeys("abc", "2"),
            "; made with Python 3.11, this is 3.12; a 1, this is 2; b 1, this is 2; 1 more",
        ),
    ],
)
def test_other_versions_are_said_and_run_nothing(
    recorded: dict[str, str], python: str, here: dict[str, str], warning: str
) -> None:
    """Guarantee 9: what a checkpoint was made with is a warning, whatever else is decided."""
    kept = manifest(facts(packages=recorded))
    now = facts(python=python)
    found = decide(kept, now, lambda: {"n": INPUT}, step="a", visited=False, installed=here.get)
    assert (found.action, found.reason) == ("restore", f"same code and inputs{warning}")
    drifted = decide(kept, now, lambda: {"n": DRIFTED}, step="a", visited=False, installed=here.get)
    assert drifted.action == "restore"
    assert drifted.reason.endswith(f"runs it again){warning}")


def test_functions_of_another_python_are_not_loaded() -> None:
    """Guarantee 7: bytecode means something else there; the interpreter could crash on it."""
    group = Group(names=("f",), stream=Blob(digest="0", size=0), code=True)
    kept = manifest().model_copy(update={"groups": (group,)})
    assert decide(kept, CODE, lambda: {"n": INPUT}, step="a", visited=False).action == "restore"
    found = decide(kept, facts(python="3.12"), lambda: {"n": INPUT}, step="a", visited=False)
    assert found.action == "execute"
    assert found.reason == "it left functions or classes of Python 3.11, which Python 3.12 can't load"


def test_a_name_that_means_another_thing_is_said() -> None:
    """Guarantees 1, 9."""
    kept = manifest(facts(imports={"f": "math:floor"}))
    found = decide(kept, facts(imports={"f": "math:ceil"}), lambda: {"n": INPUT}, step="a", visited=False)
    assert (found.action, found.reason) == ("execute", "`f` means math.ceil, and meant math.floor")


def test_inputs_are_not_looked_at_where_the_code_decides() -> None:
    """Fingerprints cost time: they are taken only if they matter."""

    def never() -> dict[str, InputFact]:
        raise AssertionError("asked for")

    assert (
        decide(manifest(), facts(digest="d2", source="x"), never, step="a", visited=False).action == "execute"
    )


def run_plain(origins: Origins, source: str) -> None:
    origins.plain_cell(analyse(ast.parse(source), source), code_digest(source), f"`{source}`")


def test_an_origin_changes_with_anything_behind_it() -> None:
    """A change is seen through any number of plain cells, and through a step whose value changed."""

    def origin(first: str, value: str) -> str:
        origins = Origins()
        run_plain(origins, first)
        origins.step("s", {"results": value}, ())
        run_plain(origins, "m = n + len(results)")
        run_plain(origins, "k = m * 2")
        return origins["k"].digest

    assert origin("n = 5", "v1") == origin("n = 5  # five", "v1")
    assert len({origin("n = 5", "v1"), origin("n = 6", "v1"), origin("n = 5", "v2")}) == 3


def test_an_origin_knows_its_step() -> None:
    origins = Origins()
    origins.step("s", {"x": "v"}, ())
    assert origins["x"].step == "s"
    run_plain(origins, "x = 1")
    assert origins["x"].step is None
    origins.step("s", {}, ("x",))
    assert origins["x"].digest == ""


def test_a_cell_that_touches_a_variable_is_behind_it_once() -> None:
    """Guarantee 1: `rows.append(2)` is edited code of `rows`; executed twice, it is the same code."""

    def origin(*cells: str) -> str:
        origins = Origins()
        for cell in cells:
            run_plain(origins, cell)
        return origins["rows"].digest

    plain = origin("rows = [1]")
    assert origin("rows = [1]", "print(rows); n = len(rows)") == plain
    for touch in (
        "rows.append(2)",
        "rows[0] = 2",
        "fill(rows)",
        "rows += [1]",
        "del rows[0]",
        "rows.x.y = 1",
    ):
        assert origin("rows = [1]", touch) != plain, touch
        assert origin("rows = [1]", touch, touch) == origin("rows = [1]", touch) or "+=" in touch
    assert origin("rows = [1]", "rows.append(2)") != origin("rows = [1]", "rows.append(3)")
    assert origin("rows = [1]", "rows.append(2)", "rows = [1]") == plain
