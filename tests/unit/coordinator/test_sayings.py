"""What a run's code says about it counts once, and what can't be said changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from nbdurable.contract import Change
from nbdurable.coordinator.sayings import MAX_METADATA_BYTES, changed
from nbdurable.errors import UsageError

BEFORE = {"pages": 2, "titles": ["a"], "topic": "x"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change(how="set", name="topic", value={"deep": [1]}), {**BEFORE, "topic": {"deep": [1]}}),
        (Change(how="increment", name="pages", value=3), {**BEFORE, "pages": 5}),
        (Change(how="increment", name="new", value=0.5), {**BEFORE, "new": 0.5}),
        (Change(how="append", name="titles", value="b"), {**BEFORE, "titles": ["a", "b"]}),
        (Change(how="append", name="new", value=None), {**BEFORE, "new": [None]}),
        (Change(how="remove", name="topic"), {"pages": 2, "titles": ["a"]}),
        (Change(how="remove", name="missing"), BEFORE),
    ],
)
def test_changes(change: Change, expected: dict[str, Any]) -> None:
    """Each change does what its name says, to a copy."""
    assert changed(BEFORE, [change]) == expected
    assert BEFORE == {"pages": 2, "titles": ["a"], "topic": "x"}


@pytest.mark.parametrize(
    "change",
    [
        Change(how="increment", name="topic", value=1),
        Change(how="increment", name="titles", value=1),
        Change(how="increment", name="pages", value="1"),
        Change(how="increment", name="pages", value=True),
        Change(how="append", name="pages", value=1),
        Change(how="set", name="large", value="x" * MAX_METADATA_BYTES),
    ],
)
def test_what_can_not_be_said_is_refused_by_name(change: Change) -> None:
    """Guarantee 11: the error names what can't be changed; the other change of the question is not made either."""
    with pytest.raises(UsageError, match=r"metadata") as refused:
        changed(BEFORE, [Change(how="set", name="other", value=1), change])
    assert refused.value.todo
