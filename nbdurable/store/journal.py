"""The journal: one append-only file that makes a commit durable before the database has it.

Owns the file's format and what a torn or a damaged record means; knows neither rows nor DuckDB.

A header names the store that the file belongs to. A record is a mark, its number, the length of its payload, a
checksum over all of these, and the payload. Numbers are consecutive, also over `begin_anew`. A record at the end
that is incomplete or fails its checksum is what a crash leaves while it was written: it was never acknowledged
and is cut off. One with a valid record behind it is damage.
"""

from __future__ import annotations

import errno
import os
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from shlex import quote
from struct import Struct

from nbdurable.errors import StoreDamaged, StoreError, StoreFull

_MAGIC = b"nbdurable journal 1\n"
_MARK = b"\xff\xfenb"
_RECORD = Struct("<4sQII")
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC, errno.EFBIG}


class Journal:
    """A store's journal, made where there is none; one thread appends.

    `store`: the id that the store keeps. `applied`: the number of the last record that the database has.
    `left`: the payloads that it lacks, with their numbers, as they were found. Raises StoreDamaged, StoreFull or
    StoreError.
    """

    def __init__(self, path: Path, *, store: str, applied: int) -> None:
        self._path = path
        self._header = _MAGIC + store.encode() + b"\n"
        self.number = applied
        self._handle = -1
        try:
            self._handle = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600
            )
            data = path.read_bytes()
            records, self.size = self._records(data)
            if len(data) < len(self._header):  # new, or left by a crash while it was made
                os.ftruncate(self._handle, 0)
                self._put(self._header)
            _sync_folder(path.parent)
        except OSError as error:
            self.close()
            raise self._explain(error) from error
        except StoreDamaged:
            self.close()
            raise
        self.left = [record for record in records if record[0] > applied]
        if self.left:
            self.number = self.left[-1][0]

    def append(self, payload: bytes) -> int:
        """Write a record and wait until it is on disk; return its number.

        Raises StoreFull or StoreError; then nothing of it is kept.
        """
        number = self.number + 1
        record = _sealed(number, payload)
        try:
            if os.fstat(self._handle).st_size != self.size:
                self._cut()  # what an earlier failure left and could not cut off
            self._put(record)
        except OSError as error:
            with suppress(OSError):
                self._cut()
            raise self._explain(error) from error
        self.number = number
        self.size += len(record)
        return number

    def begin_anew(self) -> None:
        """Drop all records; the caller knows that the database has them on disk."""
        self.size = len(self._header)
        try:
            self._cut()
        except OSError as error:
            raise self._explain(error) from error

    def remove(self) -> None:
        """Close and remove the file; the caller knows that the database has all of it on disk."""
        self.close()
        with suppress(OSError):  # it is not needed, and no harm: what is applied is not applied again
            self._path.unlink()

    def close(self) -> None:
        """Close the file and leave it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        _sync(self._handle)

    def _cut(self) -> None:
        os.ftruncate(self._handle, self.size)
        _sync(self._handle)

    def _records(self, data: bytes) -> tuple[list[tuple[int, bytes]], int]:
        """Return the whole records of a file, and where they end.

        Raises StoreDamaged where they are not all that was acknowledged.
        """
        found: list[tuple[int, bytes]] = []
        at = len(self._header)
        if not (data.startswith(self._header) or self._header.startswith(data)):
            raise self._damaged("it belongs to another store, or its beginning is damaged")
        while record := _record(data, at):
            expected = found[-1][0] + 1 if found else self.number + 1
            number, payload, at = record
            if number > expected or (found and number != expected):
                raise self._damaged(f"record {expected} is missing: the next one is {number}")
            found.append((number, payload))
        if _valid_behind(data, at):
            raise self._damaged(f"a record at byte {at} is damaged, and whole ones stand behind it")
        return found, at

    def _damaged(self, what: str) -> StoreDamaged:
        aside = f"`mv {quote(str(self._path))} {quote(f'{self._path}.damaged')} && nbdurable up`"
        return StoreDamaged(
            f"{self._path} holds acknowledged commits, but {what}",
            todo=f"it was left as it is. To go on without what only it holds: {aside}",
        )

    def _explain(self, error: OSError) -> StoreError:
        if error.errno in _FULL:
            return StoreFull(
                f"there is no space left to commit to {self._path}: {error.strerror}",
                todo=f"free space on the disk of {self._path.parent} and repeat; what was acknowledged is kept",
            )
        return StoreError(f"{self._path} can't be read or written: {error.strerror}")


def _sealed(number: int, payload: bytes) -> bytes:
    return _RECORD.pack(_MARK, number, len(payload), _checksum(number, payload)) + payload


def _checksum(number: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_RECORD.pack(_MARK, number, len(payload), 0)))


def _record(data: bytes, at: int) -> tuple[int, bytes, int] | None:
    """Return the number, the payload and the end of the record at a place, if there is a whole one."""
    begin = at + _RECORD.size
    if begin > len(data):
        return None
    mark, number, length, checksum = _RECORD.unpack_from(data, at)
    payload = data[begin : begin + length]
    if mark != _MARK or len(payload) != length or checksum != _checksum(number, payload):
        return None
    return number, payload, begin + length


def _valid_behind(data: bytes, at: int) -> bool:
    """Tell whether a whole record begins anywhere at or behind a place."""
    while (at := data.find(_MARK, at)) >= 0:
        if _record(data, at):
            return True
        at += 1
    return False


def _sync(handle: int) -> None:
    """Wait until what was written is on disk."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)  # fsync there leaves it in the disk's cache
        except OSError:  # a network's disk knows no such thing
            os.fsync(handle)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(handle)
    else:
        os.fsync(handle)


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows has no handle for a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
