"""Trust in a store: what it is, shown before anybody is asked; the register, listed and shortened.

Owns the words and the question; what trust means is `security.py`'s. Nothing of a store is unpickled here.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import typer

from nbdurable import security
from nbdurable import trust as register
from nbdurable.cli.project import near
from nbdurable.cli.screen import Screen, warn
from nbdurable.cli.service import end
from nbdurable.client import Client
from nbdurable.contract import SQL, Query
from nbdurable.errors import DurableError, NotFound, Untrusted, UsageError
from nbdurable.models import Shape
from nbdurable.policies import size, span
from nbdurable.settings import FOLDER, Home, find_home, find_project

_RUNS = "select status, count(*), min(created_at), max(updated_at) from runs group by status order by status"


class Store(Shape):
    """What is known of a store without unpickling anything of it."""

    path: str
    owner: str
    yours: bool
    fingerprint: str | None
    trusted: bool
    by_environment: bool
    changed_at: float
    runs: dict[str, int]
    first_at: str | None
    last_at: str | None
    bytes: int


def home_at(path: str | None) -> Home:
    """Return the state that `path` names: a project, a file in it, or a `.nbdurable`; None: this project's."""
    if path is None:
        return find_home()
    there = Path(path).expanduser().absolute()
    if not there.exists():
        raise NotFound(f"there is no {there}", todo="name a project's folder, or its .nbdurable")
    if there.name == FOLDER or ((there / "blobs").is_dir() and (there / "logs").is_dir()):
        return Home(there.resolve())
    return Home(find_project(there) / FOLDER)


def trust(home: Home, screen: Screen, *, yes: bool) -> None:
    """Show a store; then, once a person agrees (or `yes`), trust it. Its queued runs begin when a command needs it."""
    if not home.root.is_dir():
        raise NotFound(f"there is no store at {home.root}", todo="name a project's folder, or its .nbdurable")
    found = _look(home)
    if not screen.json_mode:
        _show(found, screen)
    if found.trusted and not found.by_environment:
        screen.say(("✓", "green"), " it is trusted")
    elif yes or _agreed(found, screen):
        name = security.accept(home)
        found = found.model_copy(update={"trusted": True, "fingerprint": name})
        screen.say(("✓", "green"), " it is trusted from now on")
    if screen.json_mode:
        screen.data(found)
    if not found.trusted:
        screen.say("it is not trusted: nothing was changed")
        raise typer.Exit(1)


def _agreed(found: Store, screen: Screen) -> bool:
    if screen.json_mode or found.trusted:
        return False
    if not sys.stdin.isatty():
        raise UsageError(
            "nobody is there to be asked", todo="look at what it is; then `nbdurable trust --yes`"
        )
    return typer.confirm("Do you trust who made it?", default=False, err=True)


def _look(home: Home) -> Store:
    """Return what a store is; the runs are told by its coordinator, which only looks as long as it isn't trusted."""
    refusal = security.standing(home)
    name = None
    try:
        name = security.fingerprint(security.read_key(home))
    except Untrusted as why:
        refusal = why
    rows: tuple[tuple[object, ...], ...] = ()
    if home.store.exists() or home.journal.exists():
        with Client(home) as client:
            rows = tuple(tuple(row) for row in client.call(SQL, Query(sql=_RUNS, limit=100)).rows)
    status = home.root.stat()
    files = [path for path in home.root.rglob("*") if path.is_file() and not path.is_symlink()]
    return Store(
        path=str(home.root),
        owner=_name(status.st_uid),
        yours=not hasattr(os, "getuid") or status.st_uid == os.getuid(),
        fingerprint=name,
        trusted=refusal is None,
        by_environment=name is not None and register.by_environment(name),
        changed_at=max(
            (path.stat().st_mtime for path in (home.store, home.journal, home.key) if path.exists()),
            default=status.st_mtime,
        ),
        runs={str(row[0]): int(str(row[1])) for row in rows},
        first_at=min((str(row[2]) for row in rows), default=None),
        last_at=max((str(row[3]) for row in rows), default=None),
        bytes=sum(path.stat().st_size for path in files),
    )


def _name(uid: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return f"user {uid}"


def _show(found: Store, screen: Screen) -> None:
    runs = ", ".join(f"{count} {status}" for status, count in found.runs.items()) or "none"
    screen.say(("store   ", "dim"), found.path)
    screen.say(("files   ", "dim"), f"{size(found.bytes)}, of {'you' if found.yours else found.owner}")
    screen.say(
        ("runs    ", "dim"), runs, *((f", {found.first_at} to {found.last_at}",) if found.runs else ())
    )
    screen.say(("key     ", "dim"), found.fingerprint or "it has none")
    if not found.trusted:
        screen.say(
            "Once it is trusted, restoring its checkpoints runs code of whoever made it, in your kernels."
        )
        if queued := sum(found.runs.get(status, 0) for status in ("queued", "running")):
            screen.say((f"{queued} of its runs would be executed at once.", "yellow"))
    if found.by_environment:
        screen.say("it is trusted where NBDURABLE_TRUST names it")


def print_trusted(screen: Screen) -> None:
    """List the register."""
    found = register.entries()
    if screen.json_mode:
        screen.data([{"fingerprint": one.fingerprint, "path": one.path, "at": one.at} for one in found])
    elif not found:
        screen.say("no store is trusted yet: one that you begin is, from then on")
    else:
        screen.table(
            ("KEY", "SINCE", "WHERE IT STOOD"),
            [
                (
                    one.fingerprint,
                    f"{span(max(0.0, time.time() - one.at))} ago" if one.at else "",
                    near(Path(one.path)) if one.path else "",
                )
                for one in found
            ],
        )


def distrust(named: str | None, screen: Screen) -> None:
    """Take a store out of the register, named by its place or its fingerprint, and end what runs for it.

    Kernels that are up keep what they have.
    """
    known = [one.fingerprint for one in register.entries()]
    matching = [one for one in known if named and len(named) >= 8 and one.startswith(named)]
    if len(matching) == 1 and not Path(str(named)).exists():
        name, home = matching[0], None
    else:
        home = home_at(named)
        name = security.fingerprint(security.read_key(home))
    if not register.remove(name):
        raise NotFound(
            f"you do not trust a store with the key {name}", todo="`nbdurable trust --ls` lists them"
        )
    if home is not None:
        try:
            end(home)
        except DurableError as error:
            warn(("note: ", "yellow"), f"what runs for it goes on: {error.message}")
    screen.say(f"the store with the key {name} is trusted no more")
    if screen.json_mode:
        screen.data({"fingerprint": name, "trusted": False})
