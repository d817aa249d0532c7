"""Blobs: immutable, durable, verified."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdurable.checkpoint.blobs import MAP_FROM_BYTES, LocalBlobs
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
