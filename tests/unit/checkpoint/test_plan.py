"""Restore or run, and why: the table of design §5 (guarantees 1 and 9)."""

import ast

import pytest

from nbdurable.checkpoint.analysis import analyse
from nbdurable.checkpoint.manifest import CodeFacts, HelperFact, InputFact, Manifest, ModuleFact
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
