"""Mapped memory: what is known of it holds exactly as long as nobody has written to it."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbdurable.checkpoint import mapped
from nbdurable.checkpoint.blobs import BUFFER_CHUNK, LocalBlobs, digest_of
from nbdurable.checkpoint.fingerprint import fingerprint
from tests.tools.cells import Cells

SIZE = 2 * BUFFER_CHUNK + 123_456
tells = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not mapped._tells_written_pages(),
    reason="the system does not say which pages were written to",
)


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def view(tmp_path: Path, content: bytes) -> memoryview:
    blobs = LocalBlobs(tmp_path)
    pieces = [memoryview(content)[start : start + BUFFER_CHUNK] for start in range(0, SIZE, BUFFER_CHUNK)]
    parts = [(digest, len(piece)) for digest, piece in zip(blobs.put_all(pieces), pieces, strict=True)]
    view = blobs.map(parts, "x")
    blobs.sync()
    return view


def _never(data: memoryview) -> str:
    raise AssertionError("computed, though it is known")


@tells
def test_untouched_memory_is_known_by_its_chunks_and_not_read(view: memoryview) -> None:
    """A restored value costs nothing to look at until it is changed."""
    for start in range(0, SIZE, BUFFER_CHUNK):
        mapped.digest_of(view[start : start + BUFFER_CHUNK], _never)
    bytes(view)  # reading it is no change
    mapped.digest_of(view[:BUFFER_CHUNK], _never)
    part = view[1000:5_000_000]
    assert mapped.digest_of(part, digest_of) == digest_of(part) == mapped.digest_of(part, _never)


WRITES: dict[str, Callable[[memoryview, int], None]] = {
    "by the view": lambda view, place: view.__setitem__(place, view[place] ^ 1),
    "by an array": lambda view, place: np.bitwise_xor.at(np.frombuffer(view, "u1"), [place], 1),
    "by an address": lambda view, place: ctypes.memset(
        mapped.address_of(view) + place, (view[place] ^ 1), 1
    ) and None,
    "by a file": lambda view, place: _read_into(view[place : place + 1]),
}  # fmt: skip


def _read_into(view: memoryview) -> None:
    read, write = os.pipe()
    os.write(write, bytes([view[0] ^ 1]))
    os.readv(read, [view])
    os.close(read)
    os.close(write)


@tells
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("place", [0, BUFFER_CHUNK - 1, BUFFER_CHUNK, SIZE - 1])
def test_a_write_is_noticed_whoever_made_it(view: memoryview, content: bytes, write: str, place: int) -> None:
    """No change is missed: the system itself knows of it. The other chunks stay known."""
    mapped.digest_of(view[:BUFFER_CHUNK], _never)
    WRITES[write](view, place)
    changed = place // BUFFER_CHUNK * BUFFER_CHUNK
    for start in range(0, SIZE, BUFFER_CHUNK):
        piece = view[start : start + BUFFER_CHUNK]
        if start == changed:
            assert (
                mapped.digest_of(piece, digest_of)
                == digest_of(piece)
                != digest_of(content[start : start + BUFFER_CHUNK])
            )
        else:
            mapped.digest_of(piece, _never)
    # the same bytes again: they were written to, so they are looked at
    WRITES[write](view, place)
    assert mapped.digest_of(view[changed : changed + BUFFER_CHUNK], digest_of) == digest_of(
        content[changed : changed + BUFFER_CHUNK]
    )


def test_memory_that_is_gone_is_forgotten(view: memoryview) -> None:
    """An address that is used again says nothing about what stands there."""
    start = mapped.address_of(view)
    assert start in mapped._regions or not mapped._tells_written_pages()
    del view
    gc.collect()
    mapped.digest_of(memoryview(bytearray(2 << 20)), digest_of)
    assert all(region.memory() is not None for region in mapped._regions.values())


@pytest.mark.parametrize("can_tell", [True, False])
def test_a_restored_array_has_the_fingerprint_of_its_values(
    tmp_path: Path, can_tell: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 7: whether or not it was read to know it, through any view, after any write."""
    if not can_tell:
        monkeypatch.setattr(mapped, "_tells_written_pages", lambda: False)
    plain = "import numpy as np, pandas as pd"
    before = Cells(tmp_path, plain)
    signed = before.step(
        "a = np.arange(3_000_000.)\nframe = pd.DataFrame(np.arange(4_000_000.).reshape(-1, 4), columns=list('wxyz'))"
    )
    after = Cells(tmp_path, plain)
    after.restore(signed)
    source = random.Random(1)
    for _ in range(5):
        for name in ("a", "frame"):
            assert fingerprint(after[name]) == fingerprint(before[name])
            assert fingerprint(after[name]) == fingerprint(after[name].copy())
        place, value = source.randrange(3_000_000), source.random()
        for cells in (before, after):
            cells["a"][1:][place - 1] = value
            cells["frame"].loc[place % 1_000_000, "x"] = value
    assert after.watch("a[::-1][3] += 1; frame.iloc[3, 2] = 0.5").written == {"a", "frame"}
    assert after.watch("a.sum(); frame.describe()").written == set()
