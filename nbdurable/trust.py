"""Which stores this user trusts: a register of their keys' fingerprints, outside of every project.

Owns the register's folder and who may write there; knows no key, and nothing of what a store holds. An entry is a file
named by the fingerprint: adding one is a single move of the file system, so no process waits for another, and a damaged
note harms no other entry.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nbdurable.errors import StoreError

FINGERPRINT_DIGITS = 32


@dataclass(frozen=True)
class Entry:
    """A store that is trusted, and where it stood and when, as far as the note can be read."""

    fingerprint: str
    path: str = ""
    at: float | None = None


def folders() -> list[Path]:
    """Return where the register is kept: the first that can be written takes new entries, all are read.

    `NBDURABLE_CONFIG` names the only one. Else it is the user's configuration folder, and where that can't be written
    (containers) a folder of this user's alone among the temporary ones, which lasts until that is cleaned.
    """
    if explicit := os.environ.get("NBDURABLE_CONFIG"):
        return [Path(explicit).expanduser().absolute() / "trusted"]
    from platformdirs import user_config_path

    user = os.getuid() if hasattr(os, "getuid") else "me"
    return [
        user_config_path("nbdurable", appauthor=False) / "trusted",
        Path(tempfile.gettempdir()) / f"nbdurable-trusted-{user}",
    ]


def by_environment(fingerprint: str) -> bool:
    """Tell whether `NBDURABLE_TRUST` names this fingerprint (several: with commas between)."""
    return fingerprint in os.environ.get("NBDURABLE_TRUST", "").replace(",", " ").split()


def is_trusted(fingerprint: str) -> bool:
    """Tell whether this user trusts the store of this key; raises StoreError for a register open to others."""
    return by_environment(fingerprint) or any(
        _is_there(folder) and (folder / fingerprint).is_file() for folder in folders()
    )


def add(fingerprint: str, path: Path) -> None:
    """Trust a store that stands at `path` now; durable. Raises StoreError where the register can't be written."""
    text = json.dumps({"path": str(path), "at": time.time()})
    trouble: OSError | None = None
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _is_there(folder)
            _write(folder, fingerprint, text)
        except OSError as error:
            trouble = trouble or error
        else:
            return
    raise StoreError(
        f"which stores you trust can't be noted: {trouble}",
        todo="set NBDURABLE_CONFIG to a folder that you can write and that lasts; nothing was begun",
    )


def remove(fingerprint: str) -> bool:
    """Trust a store no more; tell whether there was an entry."""
    there = [folder / fingerprint for folder in folders() if (folder / fingerprint).is_file()]
    for path in there:
        path.unlink(missing_ok=True)
    return bool(there)


def entries() -> list[Entry]:
    """Return the register, the oldest first; raises StoreError for a register open to others."""
    found: dict[str, Entry] = {}
    for folder in folders():
        if _is_there(folder):
            for path in folder.iterdir():
                if len(path.name) == FINGERPRINT_DIGITS:
                    found.setdefault(path.name, _read(path))
    return sorted(found.values(), key=lambda entry: entry.at or 0.0)


def _read(path: Path) -> Entry:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return Entry(path.name, str(note["path"]), float(note["at"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Entry(path.name)


def _write(folder: Path, name: str, text: str) -> None:
    draft = folder / f"draft.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / name)
    finally:
        draft.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system lets folders be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_there(folder: Path) -> bool:
    """Tell whether a folder of the register is there; raises StoreError where others than this user could write it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is no folder"
    elif hasattr(os, "getuid") and found.st_uid != os.getuid():
        wrong = "belongs to another user"
    elif os.name == "posix" and found.st_mode & 0o022:
        wrong = "can be written by other users"
    else:
        return True
    raise StoreError(
        f"the register of stores that you trust can't be used: {folder} {wrong}",
        todo=f"look who changed it; then `chmod 700 {folder}`, or move it away and trust your stores again. "
        "NBDURABLE_CONFIG names another place",
    )
