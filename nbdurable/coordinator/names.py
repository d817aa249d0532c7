"""Names that the coordinator gives: ids of runs and waits.

Owns their form; knows nothing of what exists.
"""

from __future__ import annotations

import secrets

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_MISREAD = str.maketrans("OIL", "011")


def new_run_id(at: float) -> str:
    """Return a UUIDv7 (RFC 9562) as 32 hex digits; `at` in seconds since the epoch."""
    random = secrets.randbits(74)
    value = int(at * 1000) << 80 | 0x7 << 76 | (random >> 62) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    return f"{value:032x}"


def new_wait_id() -> str:
    """Return six random characters that can be read out: Crockford's base 32."""
    return "".join(secrets.choice(_CROCKFORD) for _ in range(6))


def as_wait_id(typed: str) -> str:
    """Return the wait id that somebody typed: in any case, with O for 0 and I or L for 1."""
    return typed.strip().upper().translate(_MISREAD)


def as_run_id(typed: str) -> str:
    """Return the run id, or the part of one, that somebody typed: in any case, with or without hyphens."""
    return typed.strip().lower().replace("-", "")
