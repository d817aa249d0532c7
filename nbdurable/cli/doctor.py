"""Checks of what nbdurable stands on: one line each, and what to do about what is wrong.

Owns the list of checks; starts and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nbdurable import __version__, processes, security, trust
from nbdurable.cli.service import health
from nbdurable.errors import DurableError
from nbdurable.policies import size, span
from nbdurable.settings import Home, Settings

_LITTLE_SPACE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is well, and what to do if not."""

    name: str
    ok: bool
    said: str
    todo: str = ""


def examine(home: Home) -> Iterator[Check]:
    """Yield the checks as they are made; a check that itself fails is one that is not well."""
    for name, look in CHECKS.items():
        try:
            yield from look(name, home)
        except DurableError as error:
            yield Check(name, False, error.message, error.todo)
        except Exception as error:
            yield Check(name, False, f"could not be checked: {type(error).__name__}: {error}")


def _python(name: str, home: Home) -> Iterator[Check]:
    said = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    yield Check(name, sys.version_info >= (3, 11), said, "nbdurable needs Python 3.11 or newer")


def _packages(name: str, home: Home) -> Iterator[Check]:
    from packaging.requirements import Requirement

    wrong, found = [], []
    for text in metadata.requires("nbdurable") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
        if wanted.name in ("duckdb", "papermill", "ipykernel", "panel"):
            found.append(f"{wanted.name} {version}")
    said = "; ".join(wrong) or f"nbdurable {__version__}, {', '.join(sorted(found))}"
    yield Check(name, not wrong, said, "pip install --upgrade nbdurable")


def _home(name: str, home: Home) -> Iterator[Check]:
    if not home.root.exists():
        yield Check(name, True, f"{home.root} is not there yet: the first run creates it")
        return
    if not os.access(home.root, os.W_OK | os.X_OK):
        yield Check(
            name, False, f"{home.root} can't be written", "change its owner or mode, or use --home DIR"
        )
        return
    yield _private(name, home.root, 0o700)


def _private(name: str, path: Path, wanted: int) -> Check:
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        return Check(name, False, f"{path} is open to others (mode {mode:04o})", f"chmod {wanted:o} {path}")
    return Check(name, True, f"{path} (mode {mode:04o})")


def _secrets(name: str, home: Home) -> Iterator[Check]:
    there = [path for path in (home.key, home.token) if path.exists()]
    if not there:
        yield Check(name, True, "key and token are created when they are needed")
    for path in there:
        if len(path.read_text(encoding="ascii", errors="replace").strip()) != 64:
            yield Check(
                name,
                False,
                f"{path} is damaged",
                "put it back from a backup; without its key old checkpoints can't be restored",
            )
        else:
            yield _private(name, path, 0o600)


def _trust(name: str, home: Home) -> Iterator[Check]:
    refusal = security.standing(home)
    if refusal is not None:
        yield Check(name, False, refusal.message, refusal.todo)
    elif not home.key.exists():
        yield Check(name, True, "the store is trusted from its first run on")
    else:
        key = security.fingerprint(security.read_key(home))
        how = " by NBDURABLE_TRUST" if trust.by_environment(key) else ""
        yield Check(name, True, f"the store is trusted{how}, key {key}")
    lasting, *others = trust.folders()
    if others and not os.access(next(path for path in (lasting, *lasting.parents) if path.exists()), os.W_OK):
        said = f"{lasting} can't be written: {others[0]} is used, which may be cleaned"
        yield Check(name, False, said, "set NBDURABLE_CONFIG to a folder that you can write and that lasts")


def _settings(name: str, home: Home) -> Iterator[Check]:
    settings = Settings.load(home)
    changed = settings.model_dump(exclude_defaults=True)
    yield Check(name, True, ", ".join(f"{key}={value}" for key, value in changed.items()) or "as they come")


def _hooks(name: str, home: Home) -> Iterator[Check]:
    from nbdurable.runner.hooks import check

    settings = Settings.load(home)
    wrong = check(home, settings)
    for kind in settings.hooks:
        todo = f"mend [hooks] {kind} in {home.root / 'settings.toml'}: module:function, or a list of words"
        yield Check(name, kind not in wrong, wrong.get(kind, f"{kind} is told"), todo)
    if not settings.hooks:
        yield Check(name, True, "the settings have none")


def _disk(name: str, home: Home) -> Iterator[Check]:
    there = next(path for path in (home.root, *home.root.parents) if path.exists())
    free = shutil.disk_usage(there).free
    yield Check(
        name,
        free >= _LITTLE_SPACE_BYTES,
        f"{size(free)} free",
        "make room: a step that can't be committed fails",
    )


def _coordinator(name: str, home: Home) -> Iterator[Check]:
    found = health(home)
    if found is None:
        yield Check(name, True, "none runs; the next command or kernel that needs it starts one")
    else:
        age = span(max(0.0, time.time() - found.started_at))
        said = f"{found.pid}, version {found.version}, up {age}, {found.open_runs} runs open, {found.workers} workers"
        trouble, _, todo = found.trouble.partition("\n  → ")
        yield Check(name, not trouble, f"{said}; {trouble}" if trouble else said, todo)


def _store(name: str, home: Home) -> Iterator[Check]:
    if not home.store.exists():
        yield Check(name, True, "empty: nothing has run yet")
        return
    bytes_ = home.store.stat().st_size  # never opened here: only the coordinator may
    blobs = sum(path.stat().st_size for path in home.blobs.rglob("*") if path.is_file())
    yield Check(name, True, f"{home.store.name} {size(bytes_)}, blobs {size(blobs)}")


def _kernels(name: str, home: Home) -> Iterator[Check]:
    from nbdurable.notebooks import kernel_names

    names = kernel_names()
    yield Check(
        name, bool(names), ", ".join(names) or "no kernel is known", "python -m ipykernel install --user"
    )


def _logs(name: str, home: Home) -> Iterator[Check]:
    for log in (home.logs / "worker.log", home.logs / "coordinator.log", home.logs / "dashboard.log"):
        trouble = [line for line in processes.tail(log, 200) if "Error" in line or "ERROR" in line]
        if trouble:
            yield Check(name, True, f"the last error in {log.name}: {trouble[-1].strip()[:200]}")
    if not home.logs.is_dir():
        yield Check(name, True, "none yet")
    else:
        yield Check(name, True, f"{home.logs}")


def _stale(name: str, home: Home) -> Iterator[Check]:
    gone = []
    for path in (home.coordinator, home.dashboard):
        if not path.exists():
            continue
        pid = None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            pid = int(json.loads(path.read_text(encoding="utf-8"))["pid"])
        if pid is None or not processes.exists(pid):
            gone.append(path.name)
    if os.name == "posix" and home.socket.exists() and (gone or not home.coordinator.exists()):
        gone.append(home.socket.name)
    said = (
        f"{', '.join(gone)} of a process that is gone: it is replaced at the next start" if gone else "none"
    )
    yield Check(name, True, said)


CHECKS: dict[str, Callable[[str, Home], Iterator[Check]]] = {
    "python": _python,
    "packages": _packages,
    "home": _home,
    "secrets": _secrets,
    "trust": _trust,
    "settings": _settings,
    "hooks": _hooks,
    "disk": _disk,
    "coordinator": _coordinator,
    "store": _store,
    "kernels": _kernels,
    "logs": _logs,
    "stale files": _stale,
}
