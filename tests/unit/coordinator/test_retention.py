"""Which runs keep their checkpoints, and which checkpoints of a kept run are still within reach."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdurable.contract import Clean
from nbdurable.coordinator.retention import judge, out_of_reach
from nbdurable.models import Run, RunStatus
from tests.tools.changes import run

DAY = 86_400.0
NOW = 100 * DAY


def ended(number: int, days_ago: float, **fields: object) -> Run:
    status = fields.pop("status", RunStatus.COMPLETED)
    return run(number, status=status, ended_at=NOW - days_ago * DAY, **fields)


@pytest.mark.parametrize("status", [status for status in RunStatus if not status.is_final])
def test_an_open_run_keeps_everything_whatever_the_rules(status: RunStatus) -> None:
    """Guarantee 10: what a run may still need stays."""
    [verdict] = judge([run(1, status=status)], Clean(keep_last=0, keep_for_s=0, keep_tagged=True), NOW)
    assert verdict.keep
    assert str(status) in verdict.reason


def test_without_a_rule_every_run_is_kept() -> None:
    """Guarantee 10: nobody loses a run by a command without a rule."""
    assert all(verdict.keep for verdict in judge([ended(n, n * 100) for n in range(5)], Clean(), NOW))


def test_a_run_is_kept_by_any_rule_that_it_meets_and_each_verdict_has_its_reason() -> None:
    """Guarantees 9, 10: newest of its notebook, young, or tagged; else it goes, and the reason names each rule."""
    runs = [
        ended(5, 50),
        ended(4, 60),
        ended(3, 2),
        ended(2, 90, tags=("paper",)),
        ended(1, 90, notebook="/work/other.ipynb"),
    ]
    found = judge(runs, Clean(keep_last=1, keep_for_s=30 * DAY, keep_tagged=True), NOW)
    assert [(v.run.id[-1], v.keep) for v in found] == [
        ("5", True),
        ("4", False),
        ("3", True),
        ("2", True),
        ("1", True),
    ]
    reasons = [verdict.reason for verdict in found]
    assert reasons[0] == "it is among the newest 1 of agent.ipynb"
    assert reasons[1] == (
        "it completed 60 days ago, not among the newest 1 of agent.ipynb, longer than 30 days, without a tag"
    )
    assert reasons[2] == "it completed 2 days ago, within 30 days"
    assert reasons[3] == "it is tagged paper"


def test_only_what_was_shown_goes() -> None:
    """Guarantee 10: a run that became removable after the list was shown stays."""
    shown, later = ended(1, 40), ended(2, 31)
    found = judge([shown, later], Clean(keep_for_s=30 * DAY, only=(shown.id,)), NOW)
    assert [(verdict.run.id, verdict.keep) for verdict in found] == [(later.id, True), (shown.id, False)]


@given(st.lists(st.sampled_from("abcd"), max_size=12))
def test_what_any_state_of_the_run_is_made_of_is_within_reach(steps: list[str]) -> None:
    """Guarantee 10: a checkpoint is out of reach exactly if the state as of no step is made of it."""
    committed = list(enumerate(steps, 1))
    newest = {step: seq for seq, step in committed}
    needed = {
        seq
        for until in newest.values()
        for seq in {step: seq for seq, step in committed if seq <= until}.values()
    }
    assert out_of_reach(committed) == {seq for seq, _ in committed} - needed
