"""What a step declares to stand on beside its code (`--watch`): files and environment variables.

Owns what a declaration names at a moment, and its digests. Knows no kernel and gives no verdicts. The value of an
environment variable may be a secret: nothing but a digest under the project's key leaves this module.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from glob import glob, has_magic
from pathlib import Path

from blake3 import blake3

from nbdurable.errors import UsageError

ENVIRONMENT = "env:"  # begins the declaration of an environment variable
Watched = dict[
    str, dict[str, str]
]  # declaration → each file or variable that it names and that is there → digest
_READ_BYTES = 1 << 20
_SETTLED_S = 2.0  # clocks of file systems are coarse: what changed a moment ago may change again unseen


class Watcher:
    """Looks at what steps of one notebook declare; a file whose status is the same is not read again."""

    def __init__(self, folder: Path, key: bytes) -> None:
        """Begin in the notebook's `folder`, with the project's key."""
        self._folder = folder
        self._key = key
        self._known: dict[Path, tuple[tuple[int, ...], str]] = {}

    def look(self, declared: Iterable[str]) -> Watched:
        """Return what declarations name now; raises UsageError for what is no file, or can't be read."""
        return {declaration: dict(self._members(declaration)) for declaration in declared}

    def _members(self, declaration: str) -> Iterator[tuple[str, str]]:
        if declaration.startswith(ENVIRONMENT):
            value = os.environ.get(declaration.removeprefix(ENVIRONMENT))
            if value is not None:
                yield declaration, blake3(os.fsencode(value), key=self._key).hexdigest(16)
            return
        names = [declaration]
        if has_magic(declaration) and not os.path.lexists(self._folder / declaration):
            found = glob(os.path.expanduser(declaration), root_dir=self._folder, recursive=True)
            names = sorted(name for name in found if not (self._folder / name).is_dir())
        for name in names:
            if (digest := self._digest(name)) is not None:
                yield name, digest

    def _digest(self, name: str) -> str | None:
        path = self._folder / Path(name).expanduser()
        try:
            before = path.stat()
            if stat.S_ISDIR(before.st_mode):
                raise UsageError(f"`--watch {name}`: {path} is a folder", todo=f"watch its files: {name}/*")
            if not stat.S_ISREG(before.st_mode):
                raise UsageError(f"`--watch {name}`: {path} is not a file", todo="watch regular files only")
            known = self._known.get(path)
            if known is not None and known[0] == _status(before):
                return known[1]
            with path.open("rb", buffering=0) as file:
                hasher = blake3()
                while data := file.read(_READ_BYTES):
                    hasher.update(data)
                after = os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            why = error.strerror or str(error)
            raise UsageError(
                f"`--watch {name}`: {path} can't be read: {why}", todo="check its rights"
            ) from error
        digest = hasher.hexdigest(16)
        if (
            _status(before) == _status(after)
            and time.time() - max(after.st_ctime, after.st_mtime) > _SETTLED_S
        ):
            self._known[path] = (_status(after), digest)
        return digest


def _status(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def missing(watched: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Say which declarations name nothing that is there."""
    return [_nothing(declaration) for declaration, members in watched.items() if not members]


def _nothing(declaration: str) -> str:
    if declaration.startswith(ENVIRONMENT):
        return f"watched environment variable {declaration.removeprefix(ENVIRONMENT)} is not set"
    if has_magic(declaration):
        return f"no file matches the watched {declaration}"
    return f"watched file {declaration} does not exist"
