"""The SQL that the store speaks, by name. Owns the loader; the statements stand in `queries.sql`."""

from __future__ import annotations

import re
from importlib.resources import files

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load(text: str | None = None) -> dict[str, str]:
    """Return the statements of `queries.sql` (or of `text`) by the name in the `-- name:` line above each."""
    if text is None:
        text = files(__package__).joinpath("queries.sql").read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    return {name: statement.strip() for name, statement in zip(parts[::2], parts[1::2], strict=True)}
