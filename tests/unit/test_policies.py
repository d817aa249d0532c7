"""How durations read (design §6: `500ms`, `30s`, `10m`, `2h`, `3d` or a timedelta)."""

from datetime import timedelta

import pytest

from nbdurable.errors import UsageError
from nbdurable.policies import seconds, size, span


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500ms", 0.5),
        ("30s", 30),
        ("10m", 600),
        ("2h", 7200),
        ("3d", 259_200),
        ("1h 30m", 5400),
        ("1.5 h", 5400),
        (2, 2),
        (0.25, 0.25),
        (timedelta(minutes=1), 60),
    ],
)
def test_durations_read(text: object, expected: float) -> None:
    assert seconds(text) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "soon", "10", "5 m later", "-3s", -1, float("nan"), float("inf"), True, None]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    """Guarantee 11: the error shows what was said and how it is written."""
    with pytest.raises(UsageError, match="duration"):
        seconds(text)  # type: ignore[arg-type]


def test_figures_for_people() -> None:
    assert [span(s) for s in (0.24, 8.4, 720, 10_000, 500_000)] == [
        "0.2 s",
        "8.4 s",
        "12 min",
        "3 h",
        "6 days",
    ]
    assert [size(b) for b in (420, 4_200, 42_000, 1_300_000_000)] == ["420 B", "4.2 kB", "42 kB", "1.3 GB"]
