"""The numbered steps from an empty database to today's store: forward only; a released one never changes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Migration:
    """One numbered `.sql` file: `0001_first.sql` has version 1 and the name `first`."""

    version: int
    name: str
    sql: str


def all_migrations() -> list[Migration]:
    """Return every migration, in the order in which they are applied."""
    found = []
    for file in files(__package__).iterdir():
        if file.name.endswith(".sql"):
            number, name = file.name.removesuffix(".sql").split("_", 1)
            found.append(Migration(int(number), name, file.read_text(encoding="utf-8")))
    return sorted(found, key=lambda migration: migration.version)
