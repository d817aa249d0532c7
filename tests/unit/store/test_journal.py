"""The journal by itself: what a crash, a full disk and a flipped byte leave of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdurable.errors import StoreDamaged, StoreFull
from nbdurable.store import journal as module
from nbdurable.store.journal import Journal

STORE = "0199f3c2-0000-7000-8000-000000000000"
PAYLOADS = [b"first", b"", b"third " * 9]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "it's here.journal"


def written(path: Path, payloads: list[bytes], applied: int = 0) -> list[int]:
    """Append records; return where each ends."""
    journal = Journal(path, store=STORE, applied=applied)
    ends = []
    for payload in payloads:
        journal.append(payload)
        ends.append(journal.size)
    journal.close()
    return ends


def found(path: Path, applied: int = 0) -> list[tuple[int, bytes]]:
    journal = Journal(path, store=STORE, applied=applied)
    journal.close()
    return journal.left


def test_what_was_appended_is_there_once(path: Path) -> None:
    """Guarantee 3: all records come back in order, without those that the database has."""
    written(path, PAYLOADS)

    assert found(path) == [(1, b"first"), (2, b""), (3, PAYLOADS[2])]
    assert found(path, applied=2) == [(3, PAYLOADS[2])]
    assert found(path, applied=3) == []


def test_each_record_is_synced_before_it_is_acknowledged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarantee 3: one sync per record, when all of it is written."""
    journal = Journal(path, store=STORE, applied=0)
    sizes: list[int] = []
    real = module._sync
    monkeypatch.setattr(
        module, "_sync", lambda handle: (real(handle), sizes.append(os.fstat(handle).st_size))[0]
    )
    for payload in PAYLOADS:
        journal.append(payload)
        assert sizes[-1] == journal.size
    journal.close()

    assert len(sizes) == len(PAYLOADS)


def test_a_record_torn_at_any_byte_is_cut_off_and_those_before_it_are_kept(path: Path) -> None:
    """Guarantees 2 and 3: whatever a crash left of the last record, work goes on behind the one before."""
    *_, before, end = written(path, PAYLOADS)
    whole = path.read_bytes()
    for size in range(before, end):
        path.write_bytes(whole[:size])
        assert found(path) == [(1, b"first"), (2, b"")]
        written(path, [b"again"])
        assert found(path) == [(1, b"first"), (2, b""), (3, b"again")]


def test_a_last_record_with_missing_pages_is_cut_off(path: Path) -> None:
    """Guarantee 2: a power failure may leave the length of a record and not its bytes."""
    *_, before, end = written(path, PAYLOADS)
    path.write_bytes(path.read_bytes()[:before].ljust(end, b"\0"))

    assert found(path) == [(1, b"first"), (2, b"")]


def test_a_header_torn_at_any_byte_is_an_empty_journal(path: Path) -> None:
    """Guarantee 2: a crash while the file was made lost nothing, since nothing was acknowledged."""
    written(path, [])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        written(path, [b"first"])
        assert found(path) == [(1, b"first")]


def test_a_flipped_byte_before_the_last_record_is_damage(path: Path) -> None:
    """Guarantee 11: no acknowledged record is left out silently; the file is named and stays as it is."""
    *_, before, _end = written(path, PAYLOADS)
    whole = path.read_bytes()
    for at in range(before):
        damaged = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        path.write_bytes(damaged)
        with pytest.raises(StoreDamaged) as refused:
            found(path)
        assert str(path) in refused.value.message
        assert path.read_bytes() == damaged


def test_a_flipped_byte_in_the_last_record_is_never_read_as_something_else(path: Path) -> None:
    """Guarantee 7's sister: it can't be told from a torn one, and is left out, not misread."""
    *_, before, end = written(path, PAYLOADS)
    whole = path.read_bytes()
    for at in range(before, end):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert found(path) == [(1, b"first"), (2, b"")]


def test_a_missing_record_is_damage(path: Path) -> None:
    """Guarantee 11: a journal that goes on later than the database (an old copy of it) is refused."""
    written(path, PAYLOADS, applied=7)

    assert [number for number, _ in found(path, applied=8)] == [9, 10]
    with pytest.raises(StoreDamaged, match="record 6 is missing: the next one is 8"):
        found(path, applied=5)


def test_the_journal_of_another_store_is_refused(path: Path) -> None:
    """Guarantee 11: a database that was exchanged does not get a stranger's rows."""
    written(path, PAYLOADS)
    with pytest.raises(StoreDamaged, match="another store"):
        Journal(path, store=STORE[:-1] + "1", applied=0)


def test_numbers_go_on_when_it_begins_anew(path: Path) -> None:
    """Guarantee 3: a number names one record for good, so that none is applied twice."""
    journal = Journal(path, store=STORE, applied=0)
    assert [journal.append(payload) for payload in PAYLOADS] == [1, 2, 3]
    journal.begin_anew()
    assert journal.append(b"fourth") == 4
    journal.close()

    assert found(path, applied=3) == [(4, b"fourth")]


FULL = """
import resource, sys
from pathlib import Path
from nbdurable.errors import StoreFull
from nbdurable.store.journal import Journal
journal = Journal(Path(sys.argv[1]), store=sys.argv[2], applied=0)
journal.append(b"first")
size = journal.size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        journal.append(b"x" * 200)
        sys.exit("no error")
    except StoreFull as error:
        assert "free space" in error.todo, error.todo
    assert Path(sys.argv[1]).stat().st_size == size == journal.size
journal.append(b"short")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append(b"x" * 200)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_record_that_finds_no_space_is_cut_off_again(path: Path) -> None:
    """Guarantees 2, 3 and 11: it says StoreFull, nothing of it stays, and what fits goes on to be written."""
    subprocess.run([sys.executable, "-c", FULL, str(path), STORE], check=True)

    assert found(path) == [(1, b"first"), (2, b"short"), (3, b"x" * 200)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_half_record_that_could_not_be_cut_off_is_cut_before_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 2: where even the cutting fails, the next append does it first."""
    journal = Journal(path, store=STORE, applied=0)
    journal.append(b"first")
    real, full = os.write, os.open("/dev/full", os.O_WRONLY)

    def torn(handle: int, data: bytes) -> int:
        real(handle, data[:7])
        return real(full, data[7:])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", torn)
        patched.setattr(Journal, "_cut", lambda _: (_ for _ in ()).throw(OSError(5, "cut failed")))
        with pytest.raises(StoreFull):
            journal.append(b"second")
    os.close(full)
    assert path.stat().st_size == journal.size + 7
    assert journal.append(b"again") == 2
    journal.close()

    assert found(path) == [(1, b"first"), (2, b"again")]
