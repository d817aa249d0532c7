"""Blobs: content-addressed, immutable bytes beside the store.

Owns the layout `root/ab/abcdef…` and its durability: written to a draft in the same folder, fsync, rename,
fsync of the folder. Knows nothing of what the bytes mean. A blob is never rewritten and never truncated (a
mapped file that shrinks kills the process), only unlinked.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from nbdurable.errors import BlobDamaged, BlobMissing, CheckpointError, StoreFull
from nbdurable.telemetry import fault_point

MAP_FROM_BYTES = 1 << 20  # below it, reading is cheaper than mapping
_PARALLEL_FROM_BYTES = 4 << 20
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_SHELF = re.compile("[0-9a-f]{2}")
_BLOB = re.compile("[0-9a-f]{64}")
_DRAFT = re.compile(r"\.[0-9a-f.]{1,16}\.[0-9]+\.[0-9a-f]{8}")
_RERUN = (
    "nothing was loaded from it. Put the file back, or run the step again "
    "(`%durable rerun NAME`; headless: a new run)"
)


def digest_of(data: bytes | bytearray | memoryview | mmap.mmap) -> str:
    """Return the hex BLAKE3 digest that names these bytes."""
    threads = blake3.AUTO if len(data) >= _PARALLEL_FROM_BYTES else 1
    return blake3(data, max_threads=threads).hexdigest()


@dataclass(frozen=True)
class BlobFile:
    """A file of the blob folder: a blob, or the draft of one whose writer is busy or dead."""

    digest: str  # "" for a draft
    path: Path
    size: int
    renewed_at: float  # when somebody last wrote, found or committed it


class BlobStore(Protocol):
    """Keeps bytes under the digest of their content."""

    def put(self, data: bytes | memoryview) -> str:
        """Keep bytes, return their digest. They are durable after the next `sync`. Raises StoreFull."""

    def sync(self) -> None:
        """Make everything put so far durable."""

    def read(self, digest: str, size: int | None = None) -> memoryview:
        """Return the verified bytes, writable without effect on the blob; raises BlobMissing, BlobDamaged."""

    def has(self, digest: str) -> bool:
        """Tell whether there is a blob of that name (its content is verified by `read`)."""

    def renew(self, digests: Iterable[str]) -> None:
        """Keep blobs, about to be committed, from being cleaned up for a while; raises BlobMissing."""


class LocalBlobs:
    """Blobs in a folder of this machine. Thread-safe; several processes may write to one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()
        self._unsynced: set[Path] = set()
        self._guard = threading.Lock()

    def path(self, digest: str) -> Path:
        """Return where the blob of that name stands."""
        return self.root / digest[:2] / digest

    def put(self, data: bytes | memoryview) -> str:
        """Keep bytes, return their digest. They are durable after the next `sync`. Raises StoreFull."""
        view = memoryview(data).cast("B")
        digest = digest_of(view)
        path = self.path(digest)
        try:
            if not self._stands(digest, path, len(view)):
                self._write(path, view)
        except OSError as error:
            raise _failure(error, path, len(view)) from error
        with self._guard:
            self._verified.add(digest)
            self._unsynced.update((path.parent, self.root))
        fault_point("blob-written")
        return digest

    def sync(self) -> None:
        """Make everything put so far durable: fsync of the folders that were touched."""
        with self._guard:
            folders, self._unsynced = self._unsynced, set()
        if os.name == "nt":  # folders can't be opened there; a rename is durable by itself
            return
        for folder in folders:
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def read(self, digest: str, size: int | None = None) -> memoryview:
        """Return the verified bytes, writable without effect on the blob; raises BlobMissing, BlobDamaged.

        From 1 MB on they are mapped, private, copy on write. Each call verifies the digest.
        """
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if size is not None and found != size:
                    raise BlobDamaged(
                        f"blob {digest} has {found} bytes instead of {size} ({path})", todo=_RERUN
                    )
                if found >= MAP_FROM_BYTES:
                    data: bytearray | mmap.mmap = mmap.mmap(file.fileno(), found, access=mmap.ACCESS_COPY)
                else:
                    data = bytearray(found)
                    if file.readinto(data) != found:
                        raise BlobDamaged(f"blob {digest} shrank while it was read ({path})", todo=_RERUN)
        except FileNotFoundError:
            raise BlobMissing(f"blob {digest} is missing ({path})", todo=_RERUN) from None
        except OSError as error:
            raise CheckpointError(f"blob {digest} can't be read: {error} ({path})", todo=_RERUN) from error
        if digest_of(data) != digest:
            with self._guard:
                self._verified.discard(digest)
            raise BlobDamaged(
                f"blob {digest} is not what was written: its digest differs ({path})", todo=_RERUN
            )
        return memoryview(data)

    def has(self, digest: str) -> bool:
        """Tell whether there is a blob of that name (its content is verified by `read`)."""
        return self.path(digest).is_file()

    def renew(self, digests: Iterable[str]) -> None:
        """Keep blobs, about to be committed, from being cleaned up for a while; raises BlobMissing.

        `remove` spares what was renewed lately, so no clean-up comes between a commit and the older blobs that
        it refers to.
        """
        for digest in digests:
            path = self.path(digest)
            try:
                try:
                    os.utime(path)
                except PermissionError:  # it is another user's: replaced by our own
                    self._write(path, self.read(digest))
            except (FileNotFoundError, BlobMissing):
                raise BlobMissing(
                    f"blob {digest} was removed before the step that needs it was committed ({path})",
                    todo="nothing was committed: run the step again",
                ) from None
            except OSError as error:
                raise _failure(error, path, 0) from error

    def files(self) -> Iterator[BlobFile]:
        """Yield every blob and draft in the folder; nothing else that may lie there."""
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if not _SHELF.fullmatch(folder.name) or not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                is_blob = bool(_BLOB.fullmatch(entry.name))
                if not is_blob and not _DRAFT.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):  # a draft has just become a blob
                    found = entry.stat()
                    yield BlobFile(
                        entry.name if is_blob else "", Path(entry.path), found.st_size, found.st_mtime
                    )

    def remove(self, file: BlobFile, *, unless_renewed_since: float) -> bool:
        """Unlink a file that nobody has renewed since then; return whether it is gone.

        It is moved aside first: whoever finds it from then on writes it anew, and whoever found it just before
        has renewed it, which shows now, and it is put back. Raises CheckpointError where the folder can't be written.
        """
        aside = file.path.with_name(f".{file.path.name[:16]}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            if file.path.stat().st_mtime >= unless_renewed_since:
                return False
            os.rename(file.path, aside)
            if aside.stat().st_mtime >= unless_renewed_since:
                os.replace(aside, file.path)
                return False
            if os.name == "nt":  # where what is read-only can't be unlinked
                aside.chmod(stat.S_IWRITE)
            aside.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise CheckpointError(
                f"a blob that is not needed can't be removed: {error}",
                todo=f"make {file.path.parent} writable, then repeat it: the rest goes then",
            ) from error
        with self._guard:
            self._verified.discard(file.digest)
        return True

    def _stands(self, digest: str, path: Path, size: int) -> bool:
        """Tell whether the blob is in place already, and is what it should be; it is renewed."""
        try:
            os.utime(path)
            if path.stat().st_size != size:
                return False
        except (
            FileNotFoundError,
            PermissionError,
        ):  # another user's is replaced, so that it counts as renewed
            return False
        if digest in self._verified:
            return True
        try:
            self.read(digest, size)
            # whoever wrote it may have died before it was on disk
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except (BlobDamaged, BlobMissing, FileNotFoundError):
            return False
        return True

    def _write(self, path: Path, view: memoryview) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name[:16]}.{os.getpid()}.{secrets.token_hex(4)}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o444)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                rest = view
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
            raise


def _failure(error: OSError, path: Path, size: int) -> CheckpointError | StoreFull:
    if error.errno in _FULL:
        return StoreFull(
            f"no space left for a blob of {size} bytes at {path}",
            todo="nothing was committed. Free some space, then repeat it (a failed run: `nbdurable resume`)",
        )
    return CheckpointError(
        f"a blob of {size} bytes can't be written at {path}: {error}",
        todo="nothing was committed. Make the folder writable, then repeat it (a failed run: `nbdurable resume`)",
    )
