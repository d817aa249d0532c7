"""The project that a command is about: its state folder, its coordinator, its pages.

Owns how a command finds them, and how a hint names a command that works from where the user is.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdurable import processes
from nbdurable.cli.screen import warn
from nbdurable.errors import NotFound
from nbdurable.models import DriverKind, RunDetail, Wait
from nbdurable.settings import Home, find_home

if TYPE_CHECKING:
    from nbdurable.client import Client

_before_option: Home | None = None


def choose_home(folder: Path | None) -> None:
    """Let this command, and the processes that it starts, use the state in `folder` (`--home`)."""
    global _before_option
    _before_option = find_home()
    if folder is not None:
        os.environ["NBDURABLE_HOME"] = str(folder.expanduser().resolve())


def connect(start: Path | None = None, *, existing: bool = True, look: bool = False) -> Client:
    """Return a client of the project at `start`; the coordinator is started by the first call that needs it.

    `look`: the command changes nothing, so that it may be asked of a store that is not trusted; people are told.
    Raises NotFound, if `existing` is asked for, where the project has no state yet, and Untrusted.
    """
    from nbdurable.client import Client
    from nbdurable.security import standing

    home = find_home(start)
    if existing and not home.root.exists():
        raise NotFound(
            f"nothing has run here yet: there is no {home.root}",
            todo="go to the project's folder, or name its state: nbdurable --home DIR …",
        )
    if not home.root.is_dir() and home.root.exists():
        home.create()  # says what is wrong with it
    if (refusal := standing(home)) is not None:
        if not look:
            raise refusal
        warn(("note: ", "yellow"), refusal.message)
        warn("  → ", hint(home)("trust"))
    return Client(home)


def hint(home: Home) -> Callable[[str], str]:
    """Return how commands about the state in `home` must be typed in the user's shell."""
    prefix = "nbdurable " if home == _before_option else f"nbdurable --home {shlex.quote(near(home.root))} "
    return lambda command: prefix + command


def near(path: Path) -> str:
    """Return a path as it is typed from here: relative where it is below the working directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def with_output(home: Home, run: RunDetail) -> RunDetail:
    """Return a run that says where its output notebook stands, where the user named no place for it."""
    from nbdurable.notebooks import output_path

    if (
        run.output is not None
        or run.kind is DriverKind.INTERACTIVE
        or not (path := output_path(home, run)).exists()
    ):
        return run
    return run.model_copy(update={"output": str(path)})


def pages(home: Home) -> str | None:
    """Return the address of the project's pages, None where they are not up."""
    try:
        found: dict[str, Any] = json.loads(home.dashboard.read_text(encoding="utf-8"))
        pid, url = int(found["pid"]), str(found["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return url if processes.exists(pid) else None


def approval_page(home: Home) -> Callable[[Wait], str | None]:
    """Return how to find the page on which a wait is answered."""

    def address(wait: Wait) -> str | None:
        url = pages(home)
        return url and f"{url.removesuffix('/ui')}/ui/approvals/{wait.id}"

    return address
