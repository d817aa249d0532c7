"""Mapped memory: files of blobs, side by side in one private, copy-on-write piece of memory.

Owns the system calls. Knows no digests. Writing to the memory never changes a file, and unlinking a file never
changes the memory. A file that is truncated while it is mapped kills the process: sizes are compared on the very
handle that is mapped, and whoever makes the files never rewrites them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_FIXED = 0x10  # MAP_FIXED, on Linux and macOS
_CAN_MAP = sys.platform in ("linux", "darwin") and ctypes.sizeof(ctypes.c_void_p) == 8
_FAILED = ctypes.c_void_p(-1).value
_abandoned: list[mmap.mmap] = []  # half mapped: unmapping them could hit what somebody else put into a hole


class WrongSize(Exception):
    """A file has not the size that it should have."""

    def __init__(self, path: Path, found: int, expected: int) -> None:
        super().__init__(f"{path} has {found} bytes instead of {expected}")
        self.path, self.found, self.expected = path, found, expected


def map_files(files: Sequence[tuple[Path, int]]) -> memoryview:
    """Return the contents of files, given with their sizes, one behind the other; writable, lazy, private.

    Every size but the last is a multiple of the page size. Nothing is read before it is touched; where the
    system can't do that, all is read at once. Raises WrongSize, OSError.
    """
    total = sum(size for _, size in files)
    if not total:
        return memoryview(bytearray())
    if not _CAN_MAP or any(size % mmap.PAGESIZE for _, size in files[:-1]):
        return _read_files(files, total)
    # one reservation, whose end unmaps all that was put into it
    memory = mmap.mmap(
        -1,
        total,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0),
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )
    start = address_of(memoryview(memory))
    place = start
    for path, size in files:
        handle = _open(path, size)
        try:
            mapped = size == 0 or _map_at(place, size, handle)
        finally:
            os.close(handle)
        if not mapped:  # too many maps
            _abandoned.append(memory)
            return _read_files(files, total)
        place += size
    return memoryview(memory)


def address_of(view: memoryview) -> int:
    """Return where writable memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _open(path: Path, size: int) -> int:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    if (found := os.fstat(handle).st_size) != size:
        os.close(handle)
        raise WrongSize(path, found, size)
    return handle


def _map_at(place: int, size: int, handle: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_longlong,
    ]
    flags = mmap.MAP_PRIVATE | _FIXED | getattr(mmap, "MAP_NORESERVE", 0)
    got = libc.mmap(place, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, handle, 0)
    return bool(got != _FAILED)


def _read_files(files: Sequence[tuple[Path, int]], total: int) -> memoryview:
    data = memoryview(bytearray(total))
    place = 0
    for path, size in files:
        handle = _open(path, size)
        with os.fdopen(handle, "rb", buffering=0) as file:
            end = place + size
            while place < end:
                got = file.readinto(data[place:end])
                if not got:
                    raise WrongSize(path, size - (end - place), size)
                place += got
    return data
