"""Blobs: content-addressed, immutable bytes beside the store.

Owns the layout `root/ab/abcdef…` and its durability: written to a draft in the same folder, fsync, rename,
fsync of the folder. Knows nothing of what the bytes mean. A blob is never rewritten and never truncated (a
mapped file that shrinks kills the process), only unlinked.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import secrets
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from blake3 import blake3

from nbdurable.checkpoint import mapped
from nbdurable.errors import BlobDamaged, BlobMissing, CheckpointError, StoreFull
from nbdurable.telemetry import fault_point

MAP_FROM_BYTES = 1 << 20  # below it, reading is cheaper than mapping
BUFFER_CHUNK = 16 << 20  # of data: one changed column of a frame, or part of an array, is written alone
_PARALLEL_FROM_BYTES = 4 << 20
_WRITERS = 6  # threads that write: an fsync waits, it does not compute
_BATCH_BYTES = 64 << 20  # are written, then made durable
_VERIFY_AFTER_S = 1.0  # a resumed notebook restores its other steps first
_SIP_BYTES = 1 << 20  # how much is read at a time where bytes are only verified
_log = logging.getLogger(__name__)
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

    def put_all(
        self, parts: Sequence[memoryview], looked: Mapping[mapped.Piece, str] = MappingProxyType({})
    ) -> list[str]:
        """Keep several pieces of bytes, as `put` does.

        `looked`: the digests that pieces of memory had a moment ago. Of these, what is kept already is not hashed
        again; what is written is.
        """

    def sync(self) -> None:
        """Make everything put so far durable; raises BlobDamaged where what was mapped is not what was written."""

    def map(self, parts: Sequence[tuple[str, int]], needed_by: str) -> memoryview:
        """Return blobs, given as (digest, size), one behind the other; writable without effect on them.

        Only for bytes that are never unpickled. Sizes are verified at once, digests by the next `sync` at
        the latest. Raises BlobMissing, BlobDamaged.
        """

    def read(self, digest: str, size: int | None = None) -> memoryview:
        """Return the verified bytes, writable without effect on the blob; raises BlobMissing, BlobDamaged."""

    def has(self, digest: str) -> bool:
        """Tell whether there is a blob of that name (its content is verified by `read`)."""

    def renew(self, digests: Iterable[str]) -> None:
        """Keep blobs, about to be committed, from being cleaned up for a while; raises BlobMissing."""


class _Mapped(NamedTuple):
    """A mapped blob whose digest is not verified yet; `memory` gives what it was mapped into, while that lives."""

    digest: str
    size: int
    needed_by: str
    memory: Callable[[], Any]


class LocalBlobs:
    """Blobs in a folder of this machine. Thread-safe; several processes may write to one folder.

    What `map` hands out is verified by a thread behind the notebook's back. It logs damage when it finds it,
    and as long as damaged memory is in use, `sync` (and so every commit) is refused: nothing that was
    computed from damaged bytes is ever committed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pending: list[_Mapped] = []
        self._damaged: list[tuple[_Mapped, BlobDamaged]] = []
        self._checker: threading.Timer | None = None
        self._verified: set[str] = set()
        self._unsynced: set[Path] = set()
        self._guard = threading.Lock()

    def path(self, digest: str) -> Path:
        """Return where the blob of that name stands."""
        return self.root / digest[:2] / digest

    def put(self, data: bytes | memoryview) -> str:
        """Keep bytes, return their digest. They are durable after the next `sync`. Raises StoreFull."""
        return self.put_all([memoryview(data).cast("B")])[0]

    def put_all(
        self, parts: Sequence[memoryview], looked: Mapping[mapped.Piece, str] = MappingProxyType({})
    ) -> list[str]:
        """Keep several pieces of bytes, as `put` does: the next is hashed while others are written.

        `looked`: the digests that pieces of memory had a moment ago. Of these, what is kept already is not hashed
        again; what is written is.
        """
        digests: list[str] = []
        drafts: dict[str, Future[Path | None]] = {}
        finished: list[Future[None]] = []
        started, unfinished, size = set[str](), list[str](), 0
        with ExitStack() as ending:
            writers: ThreadPoolExecutor | None = None

            def finish() -> None:
                # one by one a file costs a journal's commit; those that were written together share theirs
                for digest in unfinished:
                    draft = drafts[digest].result()
                    finished.append(writers.submit(self._finish, digest, draft))  # type: ignore[union-attr]
                unfinished.clear()

            try:
                for part in parts:
                    then = looked.get(piece) if looked and (piece := mapped.piece_of(part)) else None
                    if then is not None and (then in started or self._is_known(then, len(part))):
                        digests.append(then)
                        continue
                    digests.append(digest := mapped.digest_of(part, digest_of))
                    if digest in started or self._is_known(digest, len(part)):
                        continue
                    if len(parts) == 1:
                        self._finish(digest, self._draft(digest, part))
                        continue
                    writers = writers or ending.enter_context(ThreadPoolExecutor(_WRITERS, "nbdurable-blobs"))
                    drafts[digest] = writers.submit(self._draft, digest, part)
                    started.add(digest)
                    unfinished.append(digest)
                    size += len(part)
                    if size >= _BATCH_BYTES:
                        finish()
                        size = 0
                finish()
                for future in finished:
                    future.result()
            except BaseException:
                for written in drafts.values():
                    with contextlib.suppress(Exception):
                        if (draft := written.result()) is not None:
                            draft.unlink(missing_ok=True)
                raise
        return digests

    def _is_known(self, digest: str, size: int) -> bool:
        """Tell whether this process wrote or verified the blob, and it stands as it did; it is renewed."""
        if digest not in self._verified:
            return False
        path = self.path(digest)
        try:
            os.utime(path)
            return path.stat().st_size == size
        except OSError:
            return False

    def _draft(self, digest: str, view: memoryview) -> Path | None:
        """Write bytes to a file beside their place, not yet durable; None if they stand there already."""
        path = self.path(digest)
        try:
            return None if self._stands(digest, path, len(view)) else self._write(path, view)
        except OSError as error:
            raise _failure(error, path, f" of {len(view)} bytes") from error

    def _finish(self, digest: str, draft: Path | None) -> None:
        """Make a draft durable and put it in place."""
        path = self.path(digest)
        if draft is not None:
            try:
                _fsync(draft)
                os.replace(draft, path)
            except OSError as error:
                draft.unlink(missing_ok=True)
                raise _failure(error, path) from error
        with self._guard:
            self._verified.add(digest)
            self._unsynced.update((path.parent, self.root))
        fault_point("blob-written")

    def sync(self) -> None:
        """Make everything put so far durable: fsync of the folders that were touched.

        Waits until all that was mapped is verified; raises BlobDamaged while damaged memory is in use.
        """
        self.settle()
        with self._guard:
            folders, self._unsynced = self._unsynced, set()
        if os.name == "nt":  # folders can't be opened there; a rename is durable by itself
            return
        for folder in folders:
            _fsync(folder)

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
        self._compare(digest, digest_of(data))
        return memoryview(data)

    def _compare(self, digest: str, found: str) -> None:
        if digest == found:
            return
        with self._guard:
            self._verified.discard(digest)
        raise BlobDamaged(
            f"blob {digest} is not what was written: its digest differs ({self.path(digest)})", todo=_RERUN
        )

    def _check_mapped(self) -> None:
        """Verify what was mapped, until nothing is left."""
        while True:
            with self._guard:
                if not self._pending:
                    if self._checker is threading.current_thread():
                        self._checker = None
                    return
                item = self._pending.pop(0)
            try:
                found = self._digest_in_place(item.digest)
            except OSError:  # unlinked meanwhile: nobody can restore from it, or verify it, any more
                continue
            if found == item.digest:
                with self._guard:
                    self._verified.add(found)
                continue
            error = BlobDamaged(
                f"blob {item.digest} is not what was written: its digest differs "
                f"({self.path(item.digest)}); {item.needed_by}, which holds damaged data now",
                todo="nothing is committed while it does: restart the kernel, or make the variable again "
                "(`%durable rerun NAME`)",
            )
            with self._guard:
                self._verified.discard(item.digest)
                self._damaged.append((item, error))
            _log.error("%s", error)

    def _digest_in_place(self, digest: str) -> str:
        """Return the digest of a blob's file, reading it piece by piece: no memory is taken for it."""
        hasher = blake3()
        sip = memoryview(bytearray(_SIP_BYTES))
        with self.path(digest).open("rb", buffering=0) as file:
            while got := file.readinto(sip):
                hasher.update(sip[:got])
        return hasher.hexdigest()

    def settle(self, *, wait: bool = True) -> None:
        """Raise BlobDamaged while memory is in use into which a damaged blob was mapped.

        `wait`: until all that was mapped is verified; else only what is found so far counts.
        """
        if wait:
            with self._guard:
                checker, self._checker = self._checker, None
            if checker is not None:
                checker.cancel()
            self._check_mapped()
            if checker is not None:
                checker.join()
        with self._guard:
            self._damaged = [item for item in self._damaged if item[0].memory() is not None]
            if self._damaged:
                raise self._damaged[0][1]

    def map(self, parts: Sequence[tuple[str, int]], needed_by: str) -> memoryview:
        """Return blobs, given as (digest, size), one behind the other; writable without effect on them.

        Only for bytes that are never unpickled. Sizes are verified at once, digests behind the notebook's
        back, by the next `sync` at the latest. Raises BlobMissing, BlobDamaged.
        """
        try:
            view = mapped.map_files([(self.path(digest), size) for digest, size in parts])
        except mapped.WrongSize as error:
            name = error.path.name
            raise BlobDamaged(
                f"blob {name} has {error.found} bytes instead of {error.expected} ({error.path})", todo=_RERUN
            ) from error
        except FileNotFoundError as error:
            path = Path(error.filename)
            raise BlobMissing(f"blob {path.name} is missing ({path})", todo=_RERUN) from None
        except OSError as error:
            raise CheckpointError(f"blobs can't be mapped: {error} ({self.root})", todo=_RERUN) from error
        if not isinstance(view.obj, mmap.mmap):  # it was read, where nothing can be mapped
            place = 0
            for digest, size in parts:
                self._compare(digest, digest_of(view[place : place + size]))
                place += size
            return view
        mapped.remember(view, [size for _, size in parts], [digest for digest, _ in parts])
        memory = weakref.ref(view.obj)
        with self._guard:
            self._pending += [_Mapped(digest, size, needed_by, memory) for digest, size in parts]
            if self._checker is None:
                self._checker = threading.Timer(_VERIFY_AFTER_S, self._check_mapped)
                self._checker.name, self._checker.daemon = "nbdurable-verifier", True
                self._checker.start()
        return view

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
                    self._finish(digest, self._write(path, self.read(digest)))
            except (FileNotFoundError, BlobMissing):
                raise BlobMissing(
                    f"blob {digest} was removed before the step that needs it was committed ({path})",
                    todo="nothing was committed: run the step again",
                ) from None
            except OSError as error:
                raise _failure(error, path) from error

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
        try:
            self.read(digest, size)
            _fsync(path)  # whoever wrote it may have died before it was on disk
        except (BlobDamaged, BlobMissing, FileNotFoundError):
            return False
        return True

    def _write(self, path: Path, view: memoryview) -> Path:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name[:16]}.{os.getpid()}.{secrets.token_hex(4)}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o444)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                rest = view
                while rest:
                    rest = rest[file.write(rest) :]
                if os.name == "nt":  # where only a handle that writes can be synced
                    os.fsync(file.fileno())
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        return draft


def _fsync(path: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failure(error: OSError, path: Path, size: str = "") -> CheckpointError | StoreFull:
    if error.errno in _FULL:
        return StoreFull(
            f"no space left for a blob{size} at {path}",
            todo="nothing was committed. Free some space, then repeat it (a failed run: `nbdurable resume`)",
        )
    return CheckpointError(
        f"a blob{size} can't be written at {path}: {error}",
        todo="nothing was committed. Make the folder writable, then repeat it (a failed run: `nbdurable resume`)",
    )
