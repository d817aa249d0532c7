"""The side-file lock: one process owns a store. Owns the lock file, and knows nothing of the database.

It stands beside the database because DuckDB's own lock is lost as soon as its process opens and closes the
database file by any other way.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nbdurable.errors import StoreLocked

_LOCKED_BYTE = 1 << 30  # Windows locks ranges, and a locked range can't be read: lock one far behind the pid


class SideLock:
    """A lock that is held from construction to `release`, or to the end of the process.

    Raises StoreLocked, naming the process that holds it.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(self._handle)
        except OSError:
            holder = os.pread(self._handle, 32, 0) if hasattr(os, "pread") else os.read(self._handle, 32)
            os.close(self._handle)
            pid = holder.decode("ascii", "replace").strip() or "unknown"
            raise StoreLocked(
                f"the store beside {path} belongs to the coordinator with pid {pid}",
                todo="let it work: only one process may own the store. `nbdurable down` ends it",
            ) from None
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Give the lock up; the file stays, since removing it would let two processes lock two files."""
        os.close(self._handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
