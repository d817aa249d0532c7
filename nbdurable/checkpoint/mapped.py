"""Mapped memory: files of blobs, side by side in one private, copy-on-write piece of memory.

Owns the system calls, and what is known of memory that nobody has written to since it was mapped: its digest.
The system itself says whether a page was written to (it has its own copy then), whoever did it and by whatever
way. Writing to the memory never changes a file, and unlinking a file never
changes the memory. A file that is truncated while it is mapped kills the process: sizes are compared on the very
handle that is mapped, and whoever makes the files never rewrites them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_FIXED = 0x10  # MAP_FIXED, on Linux and macOS
_CAN_MAP = sys.platform in ("linux", "darwin") and ctypes.sizeof(ctypes.c_void_p) == 8
_FAILED = ctypes.c_void_p(-1).value
_abandoned: list[mmap.mmap] = []  # half mapped: unmapping them could hit what somebody else put into a hole

Piece = tuple[int, int]  # of memory: its address, and its size in bytes


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


def piece_of(data: memoryview) -> Piece | None:
    """Return where bytes begin in memory, and how many they are; None where that can't be found out."""
    if not data.readonly:
        return address_of(data), len(data)
    if (numpy := sys.modules.get("numpy")) is None:
        return None
    return numpy.frombuffer(data, "u1").__array_interface__["data"][0], len(data)


# What is known of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """A mapped piece of memory, and the digests of parts of it, by (offset, size) in bytes, as they were mapped."""

    start: int
    size: int
    memory: Callable[[], Any]  # gives None once it is unmapped
    digests: dict[tuple[int, int], str] = field(default_factory=dict)


_regions: dict[int, _Region] = {}  # by start
_guard = threading.Lock()


def remember(view: memoryview, sizes: Sequence[int], digests: Sequence[str]) -> None:
    """Note the digests of the parts of memory that `map_files` has just returned."""
    if not isinstance(view.obj, mmap.mmap) or not _tells_written_pages():
        return
    region = _Region(address_of(view), len(view), weakref.ref(view.obj))
    place = 0
    for size, digest in zip(sizes, digests, strict=True):
        region.digests[place, size] = digest
        place += size
    with _guard:
        _regions[region.start] = region


def digest_of(data: memoryview, compute: Callable[[memoryview], str]) -> str:
    """Return the digest of bytes; it is not computed where they are mapped, known, and untouched by writers."""
    found = _region_of(data) if _regions and len(data) >= mmap.PAGESIZE else None
    if found is None:
        return compute(data)
    region, place = found
    key = (place, len(data))
    if not _is_untouched(region.start + place, len(data)):
        return compute(data)
    if (known := region.digests.get(key)) is None:
        known = compute(data)
        if _is_untouched(region.start + place, len(data)):
            region.digests[key] = known
    return known


def _region_of(data: memoryview) -> tuple[_Region, int] | None:
    """Return the region that holds these bytes, and where in it they begin."""
    if (piece := piece_of(data)) is None:
        return None
    start, _ = piece
    with _guard:
        for gone in [key for key, region in _regions.items() if region.memory() is None]:
            del _regions[gone]
        starts = sorted(_regions)
        index = bisect_right(starts, start) - 1
        region = _regions[starts[index]] if index >= 0 else None
    if region is None or start + len(data) > region.start + region.size:
        return None
    return region, start - region.start


def _is_untouched(start: int, size: int) -> bool:
    """Tell whether no page of private file mappings was written to, as the system's page table has it."""
    first, end = start // mmap.PAGESIZE, -(-(start + size) // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            table.seek(first * 8)
            entries = table.read((end - first) * 8)
    except OSError:
        return False
    if len(entries) != (end - first) * 8:
        return False
    # the highest byte of each entry: 0x80 in memory, 0x40 swapped out (so it was written to), 0x20 of a file
    return all(not flags & 0x40 and (not flags & 0x80 or flags & 0x20) for flags in set(entries[7::8]))


@cache
def _tells_written_pages() -> bool:
    """Find out whether this system's page table can be read and says what we think it says."""
    if not sys.platform.startswith("linux") or sys.byteorder != "little":
        return False
    page = mmap.PAGESIZE
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * 3 * page)
            file.flush()
            memory = mmap.mmap(file.fileno(), 3 * page, access=mmap.ACCESS_COPY)
        start = address_of(memoryview(memory))
        if memory[0] != memory[page]:
            return False
        before = [_is_untouched(start + number * page, page) for number in range(3)]
        memory[page] = memory[page]  # the same byte: a write all the same
        after = [_is_untouched(start + number * page, page) for number in range(3)]
    except (OSError, ValueError):
        return False
    return before == [True, True, True] and after == [True, False, True]


def _open(path: Path, size: int) -> int:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    if (found := os.fstat(handle).st_size) != size:
        os.close(handle)
        raise WrongSize(path, found, size)
    return handle


def _map_at(place: int, size: int, handle: int) -> bool:
    flags = mmap.MAP_PRIVATE | _FIXED | getattr(mmap, "MAP_NORESERVE", 0)
    got = _libc().mmap(place, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, handle, 0)
    return bool(got != _FAILED)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    number, size, offset = ctypes.c_int, ctypes.c_size_t, ctypes.c_longlong
    libc.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, offset]
    return libc


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
