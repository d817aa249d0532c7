"""The legal moves of a run (guarantee 9, design §4)."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdurable.errors import IllegalMove
from nbdurable.lifecycle import MAX_RECOVERIES, MOVES, Effect, Happening, cancellation, loss, mermaid, move
from nbdurable.models import DriverKind, RunStatus

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_shows_the_table() -> None:
    """The state diagram in the README is the one made from the table."""
    shown = re.search(r"```mermaid\n(.*?)\n```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert shown[1] == mermaid()


def test_what_has_ended_does_not_run_by_itself() -> None:
    """From a final status only a person leads on: into the queue, or into a kernel; what is complete is repaired."""
    leading_on = {(s, h): m.to for (s, h), m in MOVES.items() if s.is_final}
    assert {h for (_, h), to in leading_on.items() if to is RunStatus.RUNNING} == {Happening.ATTACH}
    assert {h for (_, h), to in leading_on.items() if to is RunStatus.QUEUED} == {
        Happening.RESUME,
        Happening.REPAIR,
    }
    assert [h for s, h in leading_on if s is RunStatus.COMPLETED] == [Happening.REPAIR]


def test_leaving_running_drops_the_driver_and_entering_it_makes_an_epoch() -> None:
    """Guarantee 4: no run has a driver unless it is running, and each driver has an epoch of its own."""
    for (status, _), found in MOVES.items():
        if status is RunStatus.RUNNING and found.to is not RunStatus.RUNNING:
            assert Effect.DROP_DRIVER in found.effects
        if found.to is RunStatus.RUNNING and status is not RunStatus.RUNNING:
            assert Effect.NEW_EPOCH in found.effects


def test_every_end_is_marked_as_one() -> None:
    """A move to a final status says so, and no other does."""
    for found in MOVES.values():
        assert (Effect.END in found.effects) == found.to.is_final


@given(st.sampled_from(RunStatus), st.sampled_from(Happening))
def test_a_move_is_in_the_table_or_refused(status: RunStatus, happening: Happening) -> None:
    """Whatever is not in the table is refused, with the run's name and what it can't do."""
    if (status, happening) in MOVES:
        assert move(status, happening) is MOVES[status, happening]
    else:
        with pytest.raises(IllegalMove, match=f"run 7 is {status}: it can't {happening}"):
            move(status, happening, run="run 7")


def test_losing_a_driver() -> None:
    """A headless run is recovered until it counts as poison; an interactive one is paused."""
    assert loss(DriverKind.HEADLESS, 0) is Happening.LOSE
    assert loss(DriverKind.HEADLESS, MAX_RECOVERIES - 1) is Happening.LOSE
    assert loss(DriverKind.HEADLESS, MAX_RECOVERIES) is Happening.POISON
    assert loss(DriverKind.INTERACTIVE, MAX_RECOVERIES) is Happening.LEAVE


def test_cancelling_asks_a_worker_and_stops_everything_else() -> None:
    """A worker gets the chance to stop its kernel; what nobody drives headless ends at once."""
    assert cancellation(RunStatus.RUNNING, DriverKind.HEADLESS) is Happening.REQUEST_CANCEL
    for status in (RunStatus.QUEUED, RunStatus.WAITING, RunStatus.PAUSED):
        assert cancellation(status, DriverKind.HEADLESS) is Happening.CANCEL
    assert cancellation(RunStatus.RUNNING, DriverKind.INTERACTIVE) is Happening.CANCEL
