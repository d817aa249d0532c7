"""Blobs: immutable, durable, verified."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdurable.checkpoint import mapped
from nbdurable.checkpoint.blobs import MAP_FROM_BYTES, LocalBlobs, digest_of
from nbdurable.errors import BlobDamaged, BlobMissing, CheckpointError, StoreFull

SIZES = [0, 1, 1000, MAP_FROM_BYTES - 1, MAP_FROM_BYTES, 5 << 20]


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "blobs")


@pytest.mark.parametrize("size", SIZES)
def test_what_was_put_is_read(blobs: LocalBlobs, size: int) -> None:
    """Guarantee 7: the bytes come back, to another process too."""
    data = os.urandom(size)
    digest = blobs.put(memoryview(data))
    blobs.sync()
    assert blobs.has(digest)
    assert bytes(LocalBlobs(blobs.root).read(digest, size)) == data
    assert [path.name for path in blobs.path(digest).parent.iterdir()] == [digest]


def test_a_blob_is_read_only_and_named_by_its_digest(blobs: LocalBlobs) -> None:
    """A mapped file that shrinks would kill the kernel: nobody may write to it."""
    digest = blobs.put(b"some bytes")
    path = blobs.root / digest[:2] / digest
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


@pytest.mark.parametrize("size", [1000, 2 << 20])
def test_what_is_read_can_be_written_to_without_touching_the_blob(blobs: LocalBlobs, size: int) -> None:
    """Guarantee 10: a restored array that is changed in place leaves its checkpoint as it was."""
    digest = blobs.put(bytes(size))
    view = blobs.read(digest)
    view[0] = 1
    assert bytes(blobs.read(digest)) == bytes(size)


def test_the_same_bytes_are_kept_once(blobs: LocalBlobs) -> None:
    """An unchanged value costs no space."""
    digest = blobs.put(b"x" * 100)
    first = blobs.path(digest).stat().st_ino
    assert LocalBlobs(blobs.root).put(b"x" * 100) == digest
    assert blobs.path(digest).stat().st_ino == first


@pytest.mark.parametrize("size", [1000, 2 << 20])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "grow"])
def test_a_damaged_blob_is_refused_by_name_and_replaced(blobs: LocalBlobs, size: int, damage: str) -> None:
    """Guarantee 8: nothing whose digest differs is handed out; putting the bytes again mends the blob."""
    data = os.urandom(size)
    digest = blobs.put(data)
    path = blobs.path(digest)
    changed = {
        "truncate": data[: size // 2],
        "flip": bytes([data[0] ^ 1]) + data[1:],
        "empty": b"",
        "grow": data + b"x",
    }[damage]
    path.chmod(0o644)
    path.write_bytes(changed)

    with pytest.raises(BlobDamaged) as with_size:
        blobs.read(digest, size)
    with pytest.raises(BlobDamaged):
        blobs.read(digest)
    assert digest in str(with_size.value)
    assert str(path) in str(with_size.value)
    assert with_size.value.todo

    assert LocalBlobs(blobs.root).put(data) == digest
    assert bytes(blobs.read(digest, size)) == data


def test_a_missing_blob_is_named(blobs: LocalBlobs) -> None:
    """Guarantee 11."""
    digest = blobs.put(b"gone")
    blobs.path(digest).unlink()
    with pytest.raises(BlobMissing, match=digest):
        blobs.read(digest)
    assert not blobs.has(digest)


def test_a_blob_that_goes_away_while_it_is_mapped_stays_readable(blobs: LocalBlobs) -> None:
    """Guarantee 10: clean-up may unlink what a kernel still looks at."""
    data = os.urandom(2 << 20)
    view = blobs.read(blobs.put(data))
    blobs.path(next(iter(blobs._verified))).unlink()
    assert bytes(view) == data


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_no_space_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Guarantee 11: the error names path and size; no half-written file stays."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from nbdurable.checkpoint.blobs import LocalBlobs\n"
        "from nbdurable.errors import StoreFull\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    LocalBlobs(Path(sys.argv[1])).put(bytes(5000))\n"
        "except StoreFull as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "blobs")], capture_output=True, text=True, check=True
    )
    assert "5000 bytes" in done.stdout
    assert str(tmp_path / "blobs") in done.stdout
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Guarantee 11."""
    (tmp_path / "blobs").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=str(tmp_path)) as error:
        LocalBlobs(tmp_path / "blobs").put(b"x")
    assert not isinstance(error.value, StoreFull)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    """Guarantee 11."""
    (tmp_path / "blobs").write_text("I am a file")
    with pytest.raises(CheckpointError, match="blobs"):
        LocalBlobs(tmp_path / "blobs").put(b"x")


CHUNK = 1 << 20


def _parts(blobs: LocalBlobs, data: bytes) -> list[tuple[str, int]]:
    pieces = [memoryview(data)[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    return [(digest, len(piece)) for digest, piece in zip(blobs.put_all(pieces), pieces, strict=True)]


def _spoil(blobs: LocalBlobs, digest: str, data: bytes) -> None:
    path = blobs.path(digest)
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 5 * CHUNK - 7])
def test_chunks_are_mapped_side_by_side(blobs: LocalBlobs, size: int) -> None:
    """Guarantees 7 and 10: one piece of memory, writable, without effect on the blobs; unlinking does not matter."""
    data = os.urandom(size)
    parts = _parts(blobs, data)
    view = LocalBlobs(blobs.root).map(parts, "x")
    again = blobs.map(parts, "x")
    view[0] ^= 1
    view[-1] ^= 2
    assert bytes(again) == data
    for digest, _ in parts:
        blobs.path(digest).unlink()
    assert bytes(again) == data
    assert bytes(view[1:-1]) == data[1:-1]


def test_the_same_chunks_are_written_once(blobs: LocalBlobs) -> None:
    """What did not change costs no space, also where the writers work side by side."""
    piece = memoryview(os.urandom(CHUNK))
    assert len(set(blobs.put_all([piece] * 20))) == 1
    assert len([path for path in blobs.root.rglob("*") if path.is_file()]) == 1


@pytest.mark.parametrize("damage", ["truncate", "grow", "empty", "missing"])
def test_a_chunk_of_another_size_is_refused_before_it_is_mapped(blobs: LocalBlobs, damage: str) -> None:
    """Guarantees 8 and 11: a mapped file that is too short would kill the kernel where it is read."""
    data = os.urandom(3 * CHUNK)
    parts = _parts(blobs, data)
    digest = parts[1][0]
    if damage == "missing":
        blobs.path(digest).unlink()
    else:
        _spoil(blobs, digest, {"truncate": data[:99], "grow": data, "empty": b""}[damage])
    with pytest.raises(BlobMissing if damage == "missing" else BlobDamaged, match=digest) as error:
        blobs.map(parts, "x")
    assert error.value.todo


def test_damaged_memory_keeps_commits_away_until_it_is_gone(
    blobs: LocalBlobs, caplog: pytest.LogCaptureFixture
) -> None:
    """Guarantee 7: bytes that flipped on disk are found behind the notebook's back, and nothing is built on them."""
    data = os.urandom(3 * CHUNK)
    parts = _parts(blobs, data)
    _spoil(blobs, parts[2][0], bytes(CHUNK))
    fresh = LocalBlobs(blobs.root)
    view = fresh.map(parts, "step `train` needs it for `big`")
    for _ in range(2):
        with pytest.raises(BlobDamaged, match="step `train` needs it for `big`") as error:
            fresh.sync()
        assert parts[2][0] in str(error.value)
    del error
    assert "`train`" in caplog.text  # said when it was found, not only when something is committed
    del view
    fresh.sync()

    assert fresh.put(memoryview(data)[2 * CHUNK :]) == parts[2][0]  # putting the bytes again mends it
    mended = fresh.map(parts, "x")
    fresh.sync()
    assert bytes(mended) == data


def test_what_was_mapped_and_verified_is_not_read_again_to_be_kept(blobs: LocalBlobs) -> None:
    """A restored value that did not change costs one pass over memory, none over the disk."""
    parts = _parts(blobs, os.urandom(2 * CHUNK))
    fresh = LocalBlobs(blobs.root)
    fresh.map(parts, "x")
    fresh.sync()
    assert {digest for digest, _ in parts} <= fresh._verified


def test_without_mapping_all_is_read_and_verified_at_once(
    blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 8, on systems that can't map side by side."""
    monkeypatch.setattr(mapped, "_CAN_MAP", False)
    data = os.urandom(2 * CHUNK + 5)
    parts = _parts(blobs, data)
    assert bytes(blobs.map(parts, "x")) == data
    _spoil(blobs, parts[0][0], bytes(CHUNK))
    with pytest.raises(BlobDamaged, match=parts[0][0]):
        blobs.map(parts, "x")


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages by /proc")
def test_mapping_takes_no_memory_until_it_is_touched(tmp_path: Path) -> None:
    """A notebook with gigabytes of checkpoints is ready at once."""
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from nbdurable.checkpoint.blobs import LocalBlobs\n"
        "def resident():\n"
        "    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "blobs = LocalBlobs(Path(sys.argv[1]))\n"
        "data = os.urandom(16 << 20)\n"
        "parts = [(digest, 8 << 20) for digest in blobs.put_all([memoryview(data)[: 8 << 20]] * 8)]\n"
        "del data\n"
        "before = resident()\n"
        "view = blobs.map(parts, 'x')\n"
        "blobs.sync()\n"
        "assert len(view) == 64 << 20\n"
        "print(resident() - before)\n"
        "sum(view[:: 4096])\n"
        "assert resident() - before >= 60 << 20\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "blobs")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 5 << 20


def test_a_blob_found_again_survives_its_removal_at_the_same_moment(tmp_path: Path) -> None:
    """Guarantees 3, 10: whenever a clean-up and a writer meet over an old blob, it stands once `put` has returned."""
    blobs, cleaner = LocalBlobs(tmp_path), LocalBlobs(tmp_path)
    outcomes = set()
    digest = blobs.put(b"x" * 20_000)
    for _ in range(200):
        os.utime(blobs.path(digest), (1.0, 1.0))
        [file] = cleaner.files()
        with ThreadPoolExecutor(2) as pool:
            written = pool.submit(blobs.put, b"x" * 20_000)
            outcomes.add(pool.submit(cleaner.remove, file, unless_renewed_since=2.0).result())
            written.result()
        assert blobs.has(digest)
        assert len(list(cleaner.files())) == 1, "nothing is left aside"
    assert outcomes


def test_only_what_is_kept_is_not_hashed_again(tmp_path: Path) -> None:
    """Guarantee 7: what is written is named after the bytes that are written, whatever they were a moment ago."""
    blobs = LocalBlobs(tmp_path)
    memory = memoryview(bytearray(os.urandom(100_000)))
    piece = mapped.piece_of(memory)
    assert piece is not None
    then, content = digest_of(memory), bytes(memory)
    memory[0] ^= 1
    assert blobs.put_all([memory], {piece: then}) == [digest_of(memory)] != [then]
    assert blobs.put(content) == then
    memory[0] ^= 3
    assert blobs.put_all([memory], {piece: then}) == [then]  # the value as it was when it was looked at
    assert bytes(blobs.read(then)) == content
