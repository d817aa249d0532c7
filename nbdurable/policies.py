"""Rules about time that people type, pure.

Owns how durations read and how they and ages are written for people.
"""

from __future__ import annotations

import re
from datetime import timedelta

from nbdurable.errors import UsageError

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*")


def seconds(duration: str | float | timedelta) -> float:
    """Return a duration in seconds: a number of seconds, a timedelta, or text such as `500ms`, `30s`, `1h 30m`, `3d`.

    Raises UsageError for anything else, and for durations below zero.
    """
    if isinstance(duration, timedelta):
        total = duration.total_seconds()
    elif isinstance(duration, int | float) and not isinstance(duration, bool):
        total = float(duration)
    else:
        text = str(duration)
        parts = list(_DURATION.finditer(text))
        if not parts or "".join(part.group() for part in parts) != text:
            raise UsageError(
                f"{duration!r} is no duration", todo="write it as 500ms, 30s, 10m, 2h, 3d or 1h 30m"
            )
        total = sum(float(part[1]) * _UNITS_S[part[2]] for part in parts)
    if not 0 <= total < float("inf"):
        raise UsageError(f"a duration can't be {duration!r}", todo="it must be finite and not below zero")
    return total


def span(seconds_: float) -> str:
    """Write a duration for people: `0.2 s`, `8.4 s`, `12 min`, `3 h`, `5 days`."""
    if seconds_ < 60:
        return f"{seconds_:.1f} s"
    for unit, size, limit in (("min", 60, 3600), ("h", 3600, 172_800)):
        if seconds_ < limit:
            return f"{seconds_ / size:.0f} {unit}"
    return f"{seconds_ / 86400:.0f} days"


def size(bytes_: int) -> str:
    """Write a number of bytes for people, in powers of 1000: `420 B`, `42 kB`, `1.3 GB`."""
    if bytes_ < 1000:
        return f"{bytes_} B"
    value = float(bytes_)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"
