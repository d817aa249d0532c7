"""Where a project's state lives and the few knobs there are.

Owns the layout of `.nbdurable/` and `Settings`; reads the environment only in `find_home` and `Settings.load`.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import tomllib
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nbdurable import spending
from nbdurable.errors import StoreError, StoreFull, UsageError
from nbdurable.models import Budget, HookKind, Price

FOLDER = ".nbdurable"
_PROJECT_MARKS = ("pyproject.toml", ".git", "setup.py", "setup.cfg")
_MAX_SOCKET_PATH_BYTES = 100  # sun_path is 104 on macOS, 108 on Linux


class Settings(BaseModel):
    """Settings of a project: `.nbdurable/settings.toml`, each overridden by `NBDURABLE_<NAME>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_drift: Literal["keep", "rerun", "error"] | None = None
    """What a step does when only the value of an input differs; None: the rule of the README."""
    worker_slots: int = 2
    """Headless runs that one worker executes at once; 0: this host executes none."""
    lease_s: float = 20.0
    """Seconds without a heartbeat after which a driver that can't be watched counts as dead."""
    idle_exit_s: float = 60.0
    """Seconds without work or clients after which a coordinator that a client started ends."""
    cancel_grace_s: float = 10.0
    """Seconds that an interrupted kernel has before a cancelled run's kernel is killed."""
    hooks: dict[
        HookKind, Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]
    ] = {}
    """What is run when a headless run starts, fails, …: `module:function` or a command; in the environment as JSON."""
    hook_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that a hook may take before it is interrupted and counts as failed."""
    questions: bool = True
    """Whether a headless `input()` or `getpass()` waits for an answer; else it fails as in papermill."""
    pages_url: str = ""
    """Address under which others reach the pages, e.g. of a tunnel: callback URLs begin with it."""
    dashboard_port: int = 8977
    """Port of the pages on the loopback interface; the next free one is taken where it is in use."""
    ledger: bool = False
    """Whether calls of models inside steps are recorded in every notebook, without `durable.ledger()`."""
    budget: Budget | None = None
    """What the model calls of a run may take, where nothing else is said: `2.50`, `200k tokens`."""
    prices: dict[str, Price] = Field(default_factory=dict)
    """What a million tokens cost, by model: `[prices."gpt-4o-mini"]` with `input`, `output`, `cached_input`."""

    @field_validator("budget", mode="before")
    @classmethod
    def _read_budget(cls, given: Any) -> Any:
        if given is None:
            return None
        try:
            return spending.budget(given)
        except UsageError as error:
            raise ValueError(f"{error.message}: {error.todo}") from None

    @field_validator("hooks", mode="before")
    @classmethod
    def _read_hooks(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @classmethod
    def load(cls, home: Home) -> Settings:
        """Read the settings of a project.

        Raises UsageError, naming file and setting, for an unknown setting or a wrong value.
        """
        path = home.root / "settings.toml"
        values: dict[str, Any] = {}
        if path.exists():
            try:
                values = tomllib.loads(path.read_text(encoding="utf-8"))
            except tomllib.TOMLDecodeError as error:
                raise UsageError(f"{path} is not TOML: {error}", todo="mend or remove the file") from None
        for name in cls.model_fields:
            if (value := os.environ.get(f"NBDURABLE_{name.upper()}")) is not None:
                values[name] = value
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if name.startswith("hooks."):
                kind = ".".join(name.split(".")[:2])
                raise UsageError(
                    f"the setting {kind!r} can't be used: {first['msg']}",
                    todo=f'mend it in {path}: [hooks] failure = "module:function", or a command as a list of words',
                ) from None
            if first["loc"][0] not in cls.model_fields:
                raise UsageError(
                    f"there is no setting {name!r} ({path}); those there are: {', '.join(cls.model_fields)}",
                    todo="mend its name or remove it",
                ) from None
            raise UsageError(
                f"the setting {name!r} can't be used: {first['msg']}",
                todo=f"mend it in {path} or in the environment (NBDURABLE_{name.upper()})",
            ) from None


@dataclass(frozen=True)
class Home:
    """The folder with all state of a project (`.nbdurable/`, mode 0700), and the paths within."""

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "store.duckdb"

    @property
    def journal(self) -> Path:
        """Return the file with what is committed and not in the store yet."""
        return self.root / "store.journal"

    @property
    def store_lock(self) -> Path:
        return self.root / "store.lock"

    @property
    def start_lock(self) -> Path:
        return self.root / "start.lock"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def key(self) -> Path:
        return self.root / "key"

    @property
    def token(self) -> Path:
        return self.root / "token"

    @property
    def coordinator(self) -> Path:
        """Return the file that says where the coordinator is: pid, url, version."""
        return self.root / "coordinator.json"

    @property
    def dashboard(self) -> Path:
        """Return the file that says where the pages are: pid, url."""
        return self.root / "dashboard.json"

    def served(self) -> str | None:
        """Return where pages are served now."""
        try:
            return str(json.loads(self.dashboard.read_text(encoding="utf-8"))["url"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def backups(self) -> Path:
        return self.root / "backups"

    def run_log(self, run_id: str) -> Path:
        return self.logs / f"run-{run_id}.log"

    def last_words(self, run_id: str, epoch: int) -> tuple[Path, Path]:
        """Return where a kernel leaves what is to be said, and its stacks, if it has to end itself."""
        return self.logs / f"last-{run_id}-{epoch}.json", self.logs / f"last-{run_id}-{epoch}.txt"

    @property
    def socket(self) -> Path:
        """Return the Unix socket's path: in the folder, or in the temporary one where that path is too long."""
        near = self.root / "coordinator.sock"
        if len(os.fsencode(near)) <= _MAX_SOCKET_PATH_BYTES:
            return near
        name = blake2b(os.fsencode(self.root), digest_size=8).hexdigest()
        return Path(tempfile.gettempdir()) / f"nbdurable-{os.getuid()}-{name}" / "coordinator.sock"

    def create(self) -> Home:
        """Make the folder (mode 0700) and those within, where they are missing; raises StoreError."""
        try:
            for folder in (self.root, self.blobs, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            ignore = self.root / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n", encoding="utf-8")
        except OSError as error:
            kind = StoreFull if error.errno == errno.ENOSPC else StoreError
            raise kind(
                f"the project's state can't be kept in {self.root}: {error.strerror}: {error.filename}",
                todo="make room, change its owner or mode, or name another folder: --home DIR or NBDURABLE_HOME",
            ) from None
        return self


def find_home(start: Path | None = None) -> Home:
    """Find a project's state folder, without creating it.

    `NBDURABLE_HOME` decides where it is set. Else it is `.nbdurable` in the project's root, see `find_project`.
    """
    if explicit := os.environ.get("NBDURABLE_HOME"):
        return Home(Path(explicit).expanduser().resolve())
    return Home(find_project(start) / FOLDER)


def find_project(start: Path | None = None) -> Path:
    """Find the root of a project: its modules count as code of its notebooks.

    The nearest folder at or above `start` (a folder or a file; default: the working directory) that has a
    `.nbdurable`, else the nearest with a `pyproject.toml`, `.git`, …, else the folder of `start` itself.
    """
    here = (start or Path.cwd()).resolve()
    if here.suffix or here.is_file():
        here = here.parent
    above = [here, *here.parents]
    for folder in above:
        if (folder / FOLDER).is_dir():
            return folder
    for folder in above:
        if any((folder / mark).exists() for mark in _PROJECT_MARKS):
            return folder
    return here
