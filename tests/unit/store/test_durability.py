"""Crashes of the process that owns a DuckDB store, and full disks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdurable.contract import ListRuns
from nbdurable.errors import StoreLocked
from nbdurable.settings import Home
from nbdurable.store.duckdb_store import DuckDBStore
from tests.tools.changes import run_id

WRITER = Path(__file__).with_name("writer.py")
ROUNDS = 12

posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@contextmanager
def writing(home: Home, mode: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Run `writer.py` over a home; killed at the end where it still lives."""
    command = [sys.executable, str(WRITER), str(home.root), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | env) as process:
        try:
            yield process
        finally:
            process.kill()


def said(line: str) -> tuple[str, int]:
    word, number = line.split()
    return word, int(number)


def check(home: Home, acknowledged: set[int]) -> set[int]:
    """Open a store after a crash: nothing acknowledged is missing, nothing is torn; return its numbers."""
    store = DuckDBStore.open(home)
    try:
        kept: set[int] = set()
        for row in store.runs(ListRuns()):
            events = store.events(row.id, limit=1_000_000)
            assert [found.epoch for found in events] == list(range(1, row.epoch + 1)), (
                "an event or a row is torn"
            )
            kept |= {found.seq for found in events}
            assert len(store.checkpoints(row.id)) == min(7, row.epoch)
        assert acknowledged <= kept, "an acknowledged event is lost"
        return kept
    finally:
        store.close()


@posix
def test_sigkill_at_any_moment_loses_nothing_acknowledged_and_tears_nothing(tmp_path: Path) -> None:
    """Guarantees 2 and 3: fifteen kills of one store, whose log is taken up again each time."""
    home = Home(tmp_path / ".nbdurable")
    moments = random.Random(20261122)
    acknowledged: set[int] = set()
    for _ in range(ROUNDS):
        with writing(home, "threads") as process:
            assert process.stdout is not None
            left = moments.randrange(1, 400)
            while left and (line := process.stdout.readline()):
                left -= 1
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().splitlines(keepends=True)
            whole = [line, *(text for text in rest if text.endswith("\n"))]
            acknowledged |= {number for word, number in map(said, whole) if word == "ack"}
            assert process.wait() == -signal.SIGKILL
        kept = check(home, acknowledged)
        acknowledged = kept
    assert len(acknowledged) > ROUNDS


@posix
@pytest.mark.parametrize(("point", "kept"), [("store-before-commit", 4), ("store-committed", 5)])
def test_a_crash_at_a_fault_point_leaves_the_group_whole_or_absent(
    tmp_path: Path, point: str, kept: int
) -> None:
    """Guarantees 2 and 3: before the commit nothing of the fifth group is there, after it everything is."""
    home = Home(tmp_path / ".nbdurable")
    with writing(home, "alone", NBDURABLE_FAULT=f"{point}:5:{tmp_path / 'fuse'}") as process:
        assert process.stdout is not None
        acknowledged = {number for word, number in map(said, process.stdout) if word == "ack"}
        assert process.wait() == -signal.SIGKILL

    assert len(acknowledged) == 4
    assert len(check(home, acknowledged)) == kept


@posix
def test_a_crash_after_the_database_got_the_rows_repeats_none(tmp_path: Path) -> None:
    """Guarantees 2 and 3: the journal still holds what the database has; each event is there once."""
    home = Home(tmp_path / ".nbdurable")
    with writing(home, "threads", NBDURABLE_FAULT=f"store-applied:2:{tmp_path / 'fuse'}") as process:
        assert process.stdout is not None
        acknowledged = {number for word, number in map(said, process.stdout) if word == "ack"}
        assert process.wait() == -signal.SIGKILL

    assert len(acknowledged) > 4
    check(home, acknowledged)


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_refuses_with_its_name_and_work_goes_on_once_there_is_space(tmp_path: Path) -> None:
    """Guarantees 3 and 11: refused commits say StoreFull and are absent, the others are all there."""
    home = Home(tmp_path / ".nbdurable")
    with writing(home, "full") as process:
        assert process.stdout is not None
        heard = [said(line) for line in process.stdout]
        assert process.wait() == 0

    words = [word for word, _ in heard]
    assert words.count("full") == 3
    assert words.count("ack") == len(words) - 3
    assert words[-1] == "ack"
    store = DuckDBStore.open(home)
    try:
        found = [event.seq for event in store.events(run_id(1))]
        assert found == [number for word, number in heard if word == "ack"]
    finally:
        store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_database_without_space_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Guarantees 2, 3 and 11: first its checkpoints find no space, then its commits; each row is there once."""
    home = Home(tmp_path / ".nbdurable")
    with writing(home, "stuck") as process:
        assert process.stdout is not None
        *heard, (_, survivors) = [said(line) for line in process.stdout]
        assert process.wait() == 0

    assert survivors > 0, "no commit was followed by an error"
    words = [word for word, _ in heard]
    assert "unread" in words
    assert set(words) <= {"ack", "full", "unread"}
    assert words[-1] == "ack"
    store = DuckDBStore.open(home)
    try:
        assert [event.seq for event in store.events(run_id(1))] == [
            number for word, number in heard if word == "ack"
        ]
    finally:
        store.close()


@posix
def test_a_second_owner_is_told_who_the_first_is_until_that_is_dead(tmp_path: Path) -> None:
    """Guarantee 3: nobody opens a store that another process owns; the lock ends with its process."""
    home = Home(tmp_path / ".nbdurable")
    with writing(home, "alone") as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StoreLocked, match=f"pid {process.pid}\\b"):
            DuckDBStore.open(home)
        process.kill()
        process.stdout.read()
        process.wait()

    DuckDBStore.open(home).close()
