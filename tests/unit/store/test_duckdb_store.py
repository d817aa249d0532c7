"""The DuckDB store beyond the protocol: groups, people's SQL, copies, damage, migrations."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdurable.contract import ListRuns, Query
from nbdurable.errors import StoreDamaged, StoreError, StoreFull, StoreLocked, StoreTooNew, UsageError
from nbdurable.settings import Home
from nbdurable.store import database, duckdb_store, journal
from nbdurable.store.duckdb_store import DuckDBStore
from nbdurable.store.migrations import Migration, all_migrations
from nbdurable.store.port import Changes, Ticket
from nbdurable.store.sql import load
from tests.tools.changes import commit, event, run, run_id, wait

DEADLINE_S = 30


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "it's here" / ".nbdurable")


@pytest.fixture
def store(home: Home) -> Iterator[DuckDBStore]:
    opened = DuckDBStore.open(home)
    yield opened
    opened.close()


def filled(home: Home, events: int = 200) -> None:
    """Make a store with a backup, closed."""
    store = DuckDBStore.open(home)
    for number in range(events):
        store.submit(Changes([commit(f"step {number}", text=os.urandom(400).hex())], [run(number % 9)]))
    store.flush()
    store.backup()
    store.close()


def digests(home: Home) -> dict[str, str]:
    """Return what the closed store's files hold."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in home.root.glob("store.*")
        if path != home.store_lock
    }


# Groups ---------------------------------------------------------------------------------------------------


def together(store: DuckDBStore, submissions: list[Changes]) -> list[Ticket]:
    """Submit while the writer is kept busy by a callback, so that they become one group."""
    entered, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        entered.set()
        go_on.wait(DEADLINE_S)

    # Only a callback that is added before the future resolves runs in the writer's thread.
    while not entered.is_set():
        ticket = store.submit(Changes([event(99)]))
        if not ticket.done.done():
            ticket.done.add_done_callback(
                lambda done: hold(done) if threading.current_thread().name == "nbdurable-store" else None
            )
        with suppress(TimeoutError):
            ticket.done.result(0.05)
        entered.wait(0.05)
    tickets = [store.submit(changes) for changes in submissions]
    go_on.set()
    return tickets


def test_everything_submitted_meanwhile_is_one_record(
    store: DuckDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred submissions that wait for the writer cost one sync."""
    syncs: list[int] = []
    real = journal._sync
    monkeypatch.setattr(journal, "_sync", lambda handle: (syncs.append(handle), real(handle))[1])
    tickets = together(
        store,
        [Changes([event(), commit("s")], [run(number % 5, epoch=number)], [wait()]) for number in range(100)],
    )
    for ticket in tickets:
        ticket.done.result(DEADLINE_S)
    store.flush()
    others = len(store.events(run_id(99)))

    assert store.commits == len(syncs) == others + 1
    assert len(store.events(run_id(1))) == 200
    assert store.runs(ListRuns()) == [run(number, epoch=95 + number) for number in (4, 3, 2, 1, 0)]


def test_a_bad_row_in_a_group_fails_only_itself(store: DuckDBStore) -> None:
    """Guarantee 2: its neighbours are committed, each once."""
    good = [Changes([event(epoch=number)], [run(number)]) for number in range(10)]
    bad = Changes([event(sentence="\ud800")], [run(50)])
    tickets = together(store, [*good[:5], bad, *good[5:]])

    for ticket in tickets[:5] + tickets[6:]:
        ticket.done.result(DEADLINE_S)
    with pytest.raises(StoreError, match="surrogate"):
        tickets[5].done.result(DEADLINE_S)
    assert [found.epoch for found in store.events(run_id(1))] == list(range(10))
    assert store.run(run_id(50)) is None


def test_an_open_reader_disturbs_no_row_that_is_replaced(store: DuckDBStore) -> None:
    """Guarantee 3: a long query or a backup keeps its own view, and commits go on beside it."""
    store.submit(Changes(runs=[run(epoch=0)])).done.result(DEADLINE_S)
    assert store.run(run_id(1)) == run(epoch=0)
    with store._database.cursor() as reader:
        reader.begin()
        reader.execute("SELECT count(*) FROM runs").fetchall()
        for epoch in range(1, 101):
            store.submit(Changes([event()], [run(epoch=epoch)], [wait()])).done.result(DEADLINE_S)
            assert store.run(run_id(1)) == run(epoch=epoch)
        assert reader.execute("SELECT max(epoch), count(*) FROM runs").fetchone() == (0, 1)

    assert store.runs(ListRuns()) == [run(epoch=100)]
    assert store.open_waits() == [wait()]


def test_an_abandoned_future_does_not_stop_the_writer(store: DuckDBStore) -> None:
    """A client that stops waiting (asyncio cancels the future) takes nothing back and harms nobody."""
    tickets = [store.submit(Changes([event()])) for _ in range(20)]
    assert not any(ticket.done.cancel() for ticket in tickets)
    store.flush()

    assert len(store.events(run_id(1))) == 20


def test_a_store_can_be_closed_from_the_callback_of_a_submission(home: Home) -> None:
    """`close` from the writer's own thread does not wait for itself."""
    store = DuckDBStore.open(home)
    store.submit(Changes([event()])).done.add_done_callback(lambda _: store.close())
    store.close()

    DuckDBStore.open(home).close()


# The journal and the database -----------------------------------------------------------------------------


def crashed(store: DuckDBStore, home: Home, image: Home) -> None:
    """Copy what a crash of this moment would leave; nobody commits meanwhile."""
    image.create()
    with store._applying:
        for path in home.root.glob("store.*"):
            if path != home.store_lock:
                (image.root / path.name).write_bytes(path.read_bytes())


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 2), st.text(max_size=9)),
            st.tuples(st.just("ask"), st.integers(0, 2), st.just("")),
            st.tuples(st.sampled_from(["crash", "close", "copy"]), st.just(0), st.just("")),
        ),
        max_size=14,
    )
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_crashes_and_readers_at_any_place_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, str]]
) -> None:
    """Guarantees 2 and 3: whatever is acknowledged is read at once, and after each crash, whole and once."""
    home = Home(tmp_path_factory.mktemp("crash") / "0")
    store = DuckDBStore.open(home)
    told: dict[str, list[str]] = {run_id(number): [] for number in range(3)}
    rows: dict[str, Any] = {}

    def check(identity: str) -> None:
        assert [found.sentence for found in store.events(identity)] == told[identity]
        assert store.run(identity) == rows.get(identity)

    try:
        for count, (what, number, text) in enumerate(steps, 1):
            if what == "put":
                row = run(number, reason=text, epoch=len(told[run_id(number)]))
                store.submit(Changes([event(number, sentence=text)], [row])).done.result(DEADLINE_S)
                told[row.id].append(text)
                rows[row.id] = row
            elif what == "ask":
                check(run_id(number))
            else:
                image = Home(home.root.with_name(str(count)))
                if what == "copy":
                    store.backup()
                    image.create().store.write_bytes(database.backups(home)[0].read_bytes())
                elif what == "crash":
                    crashed(store, home, image)
                else:
                    image = home
                store.close()
                store, home = DuckDBStore.open(image), image
        for identity in told:
            check(identity)
    finally:
        store.close()


def test_what_the_database_has_is_not_applied_again(home: Home) -> None:
    """Guarantee 3: a crash between the database's commit and the journal's new beginning repeats nothing."""
    store = DuckDBStore.open(home)
    for epoch in range(20):
        store.submit(Changes([event(epoch=epoch)], [run(epoch=epoch)])).done.result(DEADLINE_S)
    records = home.journal.read_bytes()
    store.close()
    assert not home.journal.exists()
    for _ in range(2):
        home.journal.write_bytes(records)
        store = DuckDBStore.open(home)
        assert [found.epoch for found in store.events(run_id(1))] == list(range(20))
        assert store.runs(ListRuns()) == [run(epoch=19)]
        store.close()


def test_the_journal_begins_anew_when_it_is_long(
    home: Home, store: DuckDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 3: its length is bounded, and nothing is lost by it."""
    monkeypatch.setattr(duckdb_store, "JOURNAL_BYTES", 20_000)
    sizes = []
    for number in range(60):
        store.submit(Changes([commit(f"s{number}", text="m" * 1000)])).done.result(DEADLINE_S)
        sizes.append(home.journal.stat().st_size)

    assert 15_000 < max(sizes) < 25_000
    assert len(store.checkpoints(run_id(1))) == 60


def test_a_database_that_takes_nothing_stops_readers_and_commits_and_loses_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantees 3 and 11: what was acknowledged stays in the journal, nothing more is, until it works again."""
    store = DuckDBStore.open(home)
    store.submit(Changes([event(epoch=1)])).done.result(DEADLINE_S)
    assert len(store.events(run_id(1))) == 1
    monkeypatch.setitem(duckdb_store._SQL, "set_applied", "UPDATE no_such_table SET applied = ?")
    acknowledged = [1]
    for epoch in (2, 3):
        with suppress(StoreError):
            store.submit(Changes([event(epoch=epoch)], [run(epoch=epoch)])).done.result(DEADLINE_S)
            acknowledged.append(epoch)
        with pytest.raises(StoreError, match="no_such_table"):
            store.run(run_id(1))
    assert acknowledged == [1, 2]
    with pytest.raises(StoreError, match="no_such_table"):
        store.backup()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.run(run_id(1))
    with pytest.raises(StoreError, match="no_such_table"):
        DuckDBStore.open(home)
    monkeypatch.undo()

    store = DuckDBStore.open(home)
    assert [found.epoch for found in store.events(run_id(1))] == acknowledged
    assert store.run(run_id(1)) == run(epoch=2)
    monkeypatch.setitem(duckdb_store._SQL, "set_applied", "UPDATE no_such_table SET applied = ?")
    store.submit(Changes([event(epoch=4)])).done.result(DEADLINE_S)
    with pytest.raises(StoreError, match="no_such_table"):
        store.run(run_id(1))
    monkeypatch.undo()
    store.submit(Changes([event(epoch=5)])).done.result(DEADLINE_S)
    assert [found.epoch for found in store.events(run_id(1))] == [*acknowledged, 4, 5]
    store.close()


def test_the_largest_submission_fits_into_the_database(store: DuckDBStore) -> None:
    """Guarantee 3: what is too large is refused before it is acknowledged, not after."""
    most = duckdb_store.MAX_BYTES - 10_000
    row = run(parameters={"text": "x" * (most // 2)})
    store.submit(Changes([commit("s", text="m" * (most // 2))], [row])).done.result(DEADLINE_S)
    assert store.run(run_id(1)) == row
    with pytest.raises(StoreError, match="at most"):
        store.submit(Changes([commit("s", text="m" * (most + 10_000))])).done.result(DEADLINE_S)


def test_whatever_json_can_say_fits_into_the_database(store: DuckDBStore) -> None:
    """Guarantee 3: nothing that is acknowledged is refused by the database afterwards."""
    odd = {"far": 10**400, "nan": float("nan"), "deep": deep(150), "nul": "\0", "e": 1e308, "far apart": -0.0}
    times = [-62_135_596_800.0, 1e-7, 253_402_300_799.0]
    store.submit(
        Changes(
            [event(data=odd), *(event(at=at, sentence="\0\uffff") for at in times)],
            [run(parameters={"nan": float("nan"), "inf": float("inf"), "far": 10**30}, tags=("", "\0", "'"))],
        )
    ).done.result(DEADLINE_S)

    assert [found.sentence for found in store.events(run_id(1))][1:] == ["\0\uffff"] * 3
    assert store.events(run_id(1))[0].data["deep"] == deep(150)
    assert store.run(run_id(1)) is not None


def deep(levels: int) -> list[Any]:
    return [deep(levels - 1)] if levels else []


def test_a_damaged_journal_says_so_and_how_to_go_on(home: Home) -> None:
    """Guarantee 11: the file is named, nothing is changed, and the command that the error gives works."""
    store = DuckDBStore.open(home)
    store.submit(Changes(runs=[run(1)])).done.result(DEADLINE_S)
    assert store.run(run_id(1))
    for number in (2, 3):
        store.submit(Changes(runs=[run(number)])).done.result(DEADLINE_S)
    image = Home(home.root.with_name("image"))
    crashed(store, home, image)
    store.close()
    data = image.journal.read_bytes()
    image.journal.write_bytes(data.replace(run_id(2).encode(), run_id(7).encode()))
    before = digests(image)

    with pytest.raises(StoreDamaged) as refused:
        DuckDBStore.open(image)

    after = digests(image)
    assert after["store.journal"] == before["store.journal"]
    assert str(image.journal) in refused.value.message
    command = refused.value.todo.split("`")[1].split(" && ")[0]
    subprocess.run(command, shell=True, check=True)
    store = DuckDBStore.open(image)
    assert store.run(run_id(1))
    store.close()


# People's SQL ---------------------------------------------------------------------------------------------


def test_steps_are_a_view_of_the_history(store: DuckDBStore) -> None:
    """Guarantee 10: what `nbdurable sql` shows of steps is folded from events."""
    history = [
        event(kind="step_started", step="a"),
        event(kind="step_failed", step="a", sentence="ValueError"),
        event(kind="step_started", step="a"),
        commit("a"),
        event(kind="step_restored", step="a", sentence="restored", at=1_700.5),
        event(kind="step_started", step="b"),
        event(kind="step_restored", step="c"),
        commit("d", kind="step_waiting"),
        event(kind="run_moved"),
    ]
    store.submit(Changes(history)).done.result(DEADLINE_S)

    table = store.query(
        Query(sql="SELECT name, status, executions, restores, sentence, occurred_at FROM steps ORDER BY name")
    )

    assert table.rows == (
        ("a", "completed", 2, 1, "restored", "1970-01-01T00:28:20.500000"),
        ("b", "running", 1, 0, "leased to worker 1", "1970-01-01T00:16:40.250000"),
        ("c", "completed", 0, 1, "leased to worker 1", "1970-01-01T00:16:40.250000"),
        ("d", "waiting", 0, 0, "d committed", "1970-01-01T00:16:40.250000"),
    )


def test_values_of_a_query_are_json(store: DuckDBStore) -> None:
    """Every type of DuckDB's that people meet has one plain JSON form."""
    sql = """
        SELECT DATE '2026-11-22', TIME '10:00:00', 1.5::DECIMAL(4, 1), 'ab'::BLOB, INTERVAL 90 SECOND,
            [1, NULL], {'a': DATE '2026-11-22'}, MAP {1: 'x'}, 'nan'::DOUBLE, 2::HUGEINT ** 70,
            '0199f3c2-0000-7000-8000-000000000000'::UUID, true
    """
    (row,) = store.query(Query(sql=sql)).rows

    assert row == (
        "2026-11-22",
        "10:00:00",
        1.5,
        "6162",
        90.0,
        [1, None],
        {"a": "2026-11-22"},
        {"1": "x"},
        None,
        2.0**70,
        "0199f3c2-0000-7000-8000-000000000000",
        True,
    )


def test_now_is_utc(store: DuckDBStore) -> None:
    """Times in the store are UTC, so a comparison with `now()` must be in UTC wherever the machine stands."""
    assert store.query(Query(sql="SELECT current_setting('TimeZone')")).rows == (("UTC",),)
    assert store.query(Query(sql="SELECT count(*) FROM runs WHERE created_at > now() - INTERVAL 1 DAY")).rows
    assert str(store.query(Query(sql="SELECT now()")).rows[0][0]).endswith("+00:00")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_csv('{secret}')",
        "FROM '{secret}'",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM read_text('{folder}/backups/draft/../../key')",
        "SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')",
        "SELECT * FROM sniff_csv('{secret}')",
        "COPY runs TO '{folder}/backups/draft/out.csv'",
        "EXPLAIN ANALYZE COPY runs TO '{folder}/backups/draft/out.csv'",
        "ATTACH '{folder}/backups/draft/x.duckdb' AS x",
        "SET threads = 4",
        "PRAGMA enable_profiling",
        "SELECT * FROM enable_logging()",
        "INSTALL httpfs",
        "LOAD httpfs",
        "INSERT INTO runs SELECT * FROM runs",
        "UPDATE runs SET status = 'failed'",
        "CREATE TABLE x (a INTEGER)",
        "CALL pragma_version()",
        "CHECKPOINT",
        "BEGIN",
        "WITH a AS (SELECT 1) INSERT INTO migrations SELECT 9, 'x', now()::TIMESTAMP",
    ],
)
def test_a_query_reaches_no_file_no_network_and_no_setting(store: DuckDBStore, home: Home, sql: str) -> None:
    """Guarantee 11: people's SQL reads the store and nothing else."""
    secret = home.root / "key"
    secret.write_text("secret\n")
    folder = str(home.root).replace("'", "''")

    with pytest.raises(UsageError) as refused:
        store.query(Query(sql=sql.format(secret=f"{folder}/key", folder=folder)))

    assert "secret\n" not in str(refused.value)
    assert list((home.backups / "draft").iterdir()) == []
    store.submit(Changes([event()])).done.result(DEADLINE_S)


def test_a_query_that_takes_too_long_is_ended(store: DuckDBStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarantee 11: a question without end does not keep the coordinator."""
    monkeypatch.setattr("nbdurable.store.duckdb_store.QUERY_S", 0.05)
    with pytest.raises(UsageError, match="longer than"):
        store.query(Query(sql="SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b"))


# Copies ---------------------------------------------------------------------------------------------------


def test_a_backup_is_a_store(home: Home, tmp_path: Path) -> None:
    """Guarantee 3: what a backup holds can be opened, read and gone on with."""
    filled(home)
    (copy,) = database.backups(home)
    other = Home(tmp_path / "other").create()
    other.store.write_bytes(copy.read_bytes())
    first, second = DuckDBStore.open(home), DuckDBStore.open(other)

    try:
        assert first.runs(ListRuns()) == second.runs(ListRuns())
        assert [first.events(run_id(1)), first.checkpoints(run_id(1))] == [
            second.events(run_id(1)),
            second.checkpoints(run_id(1)),
        ]
        assert second.submit(Changes([event()])).seqs == first.submit(Changes([event()])).seqs
    finally:
        first.close()
        second.close()


def test_three_backups_are_kept_and_what_a_crash_left_is_cleared(home: Home) -> None:
    """Guarantee 10: copies do not pile up; names sort by time."""
    times = iter(range(1, 100))
    store = DuckDBStore.open(home, clock=lambda: float(next(times)))
    left = home.backups / "draft" / "store.duckdb"
    left.write_text("half a copy")
    for _ in range(5):
        store.backup()
    store.close()

    names = [path.name for path in database.backups(home)]
    assert names == sorted(names, reverse=True)
    assert len(names) == database.KEPT_BACKUPS
    assert list((home.backups / "draft").iterdir()) == []
    assert stat.S_IMODE(home.backups.stat().st_mode) == 0o700 or os.name == "nt"


# Stores that can't be used --------------------------------------------------------------------------------


def flipped(position: float) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        at = int(position * len(data))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte flipped": flipped(0),
    "header flipped": lambda data: data[:4100] + bytes([data[4100] ^ 0x80]) + data[4101:],
    "early block flipped": lambda data: data[:12_300] + bytes([data[12_300] ^ 1]) + data[12_301:],
    "garbage": lambda data: hashlib.sha256(data).digest() * 1000,
    "text": lambda _: b"not a database\n",
    "empty": lambda _: b"",
    "truncated to the magic": lambda data: data[:20],
    "truncated to the header": lambda data: data[:12_288],
    "truncated in the middle": lambda data: data[: len(data) // 2],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_store_says_so_and_how_to_go_back(home: Home, damage: Callable[[bytes], bytes]) -> None:
    """Guarantee 11: the file is named and left as it is, and the commands that the error gives work."""
    filled(home)
    home.store.write_bytes(damage(home.store.read_bytes()))
    before = digests(home)

    with pytest.raises(StoreDamaged) as refused:
        DuckDBStore.open(home)

    assert digests(home) == before
    assert str(home.store) in refused.value.message
    assert str(database.backups(home)[0]) in refused.value.todo
    subprocess.run(refused.value.todo.split("`")[1], shell=True, check=True)
    store = DuckDBStore.open(home)
    assert len(store.runs(ListRuns())) == 9
    store.close()


def test_any_flipped_byte_is_noticed_or_harmless(home: Home) -> None:
    """Guarantee 7's sister for rows: a store never answers with anything but what was written."""
    filled(home)
    whole = home.store.read_bytes()
    store = DuckDBStore.open(home)
    truth = (store.runs(ListRuns()), [store.events(run_id(n), limit=999) for n in range(9)])
    points = store.checkpoints(run_id(1))
    store.close()
    noticed = 0
    for sixteenth in range(16):
        home.store.write_bytes(flipped((sixteenth + 0.37) / 16)(whole))
        try:
            store = DuckDBStore.open(home)
        except StoreDamaged:
            noticed += 1
            continue
        assert (store.runs(ListRuns()), [store.events(run_id(n), limit=999) for n in range(9)]) == truth
        assert store.checkpoints(run_id(1)) == points
        store.close()
    assert noticed > 4


def test_a_damaged_log_is_noticed_and_left_alone(home: Home) -> None:
    """Guarantee 11: a flipped byte in the write-ahead log of a crashed store is damage, too.

    Not every one: in an entry's length it reads to DuckDB like the torn last entry of a crash.
    """
    script = (
        "import os, sys; from pathlib import Path; from nbdurable.settings import Home\n"
        "from nbdurable.store.duckdb_store import DuckDBStore; from nbdurable.store.port import *\n"
        "store = DuckDBStore.open(Home(Path(sys.argv[1])))\n"
        "for n in range(50):\n"
        "    store.submit(Changes([NewEvent(1.0, 'r', n, 'k', 'sentence')])).done.result()\n"
        "    assert len(store.events('r')) == n + 1\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(home.root)], check=True)
    log = home.store.with_name("store.duckdb.wal")
    data = log.read_bytes()
    text = data.index(b"sentence", len(data) // 2)
    log.write_bytes(data[:text] + b"S" + data[text + 1 :])
    before = digests(home)

    with pytest.raises(StoreDamaged) as refused:
        DuckDBStore.open(home)

    assert digests(home) == before
    assert "There is no backup" in refused.value.todo
    assert shlex.quote(str(log)) in refused.value.todo


@pytest.mark.parametrize("name", ["store.duckdb.wal", "store.journal"])
def test_a_log_without_its_store_is_not_thrown_away(home: Home, name: str) -> None:
    """Guarantee 3: a new store would drop the log of the old one; it refuses instead."""
    home.create()
    log = home.root / name
    log.write_bytes(b"acknowledged commits")

    with pytest.raises(StoreDamaged, match="missing"):
        DuckDBStore.open(home)

    assert digests(home) == {log.name: hashlib.sha256(b"acknowledged commits").hexdigest()}


def test_another_database_is_not_taken_for_a_store(home: Home) -> None:
    """Guarantee 11: somebody's own DuckDB file of that name stays as it is."""
    home.create()
    with duckdb.connect(str(home.store)) as connection:
        connection.execute("CREATE TABLE mine (a INTEGER)")
    before = digests(home)

    with pytest.raises(StoreDamaged, match="not one of nbdurable"):
        DuckDBStore.open(home)
    assert digests(home) == before


def test_a_store_of_a_newer_version_is_refused(home: Home) -> None:
    """Guarantee 11: an old nbdurable names both versions, says what to install, and touches nothing."""
    filled(home, events=1)
    with duckdb.connect(str(home.store)) as connection:
        connection.execute("INSERT INTO migrations VALUES (99, 'later', TIMESTAMP '2027-01-01')")
    before = digests(home)

    with pytest.raises(StoreTooNew, match=r"version 99.*up to \d") as refused:
        DuckDBStore.open(home)

    assert "install" in refused.value.todo
    assert digests(home) == before


def test_a_store_that_another_program_has_opened_is_refused(home: Home) -> None:
    """Guarantee 3: a DuckDB shell on the file is named as such."""
    filled(home, events=1)
    script = (
        "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(home.store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        with pytest.raises(StoreLocked, match="another program"):
            DuckDBStore.open(home)
        shell.communicate()
    DuckDBStore.open(home).close()


def test_a_store_is_opened_once_in_a_process(home: Home, store: DuckDBStore) -> None:
    """Guarantee 3: the side file is locked against the same process, too."""
    with pytest.raises(StoreLocked, match=f"pid {os.getpid()}"):
        DuckDBStore.open(home)
    store.submit(Changes([event()])).done.result(DEADLINE_S)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("IO Error: Could not write file: No space left on device", StoreFull),
        (
            "Trying to read a database file with storage version number 99, but we can only read …",
            StoreTooNew,
        ),
        ('IO Error: Cannot open file "x": Permission denied', StoreError),
    ],
)
def test_errors_of_duckdb_have_a_name(store: DuckDBStore, text: str, kind: type[StoreError]) -> None:
    """Guarantee 11: what DuckDB says is told apart by what a user can do about it."""
    assert type(store._database.explain(duckdb.IOException(text))) is kind


# Migrations -----------------------------------------------------------------------------------------------


def schema(connection: Any) -> list[Any]:
    """Return tables, columns, constraints and views."""
    return [
        connection.execute(f"SELECT {columns} FROM {source} ORDER BY ALL").fetchall()
        for columns, source in (
            (
                "table_name, column_name, column_index, data_type, is_nullable, column_default",
                "duckdb_columns()",
            ),
            ("table_name, constraint_text", "duckdb_constraints()"),
            ("view_name, sql", "duckdb_views() WHERE NOT internal"),
            ("index_name, sql", "duckdb_indexes()"),
        )
    ]


def test_a_fresh_store_is_what_the_migrations_make_one_by_one(home: Home, tmp_path: Path) -> None:
    """Guarantee 3 over versions: 0001 and those after it, one by one, end in a fresh store's schema."""
    DuckDBStore.open(home).close()
    by_hand = tmp_path / "store.duckdb"
    for migration in all_migrations():
        with duckdb.connect(str(by_hand)) as connection:
            connection.execute(migration.sql)

    with duckdb.connect(str(home.store)) as fresh, duckdb.connect(str(by_hand)) as migrated:
        assert schema(fresh) == schema(migrated)
        known = fresh.execute("SELECT version, name FROM migrations ORDER BY version").fetchall()
    assert known == [(migration.version, migration.name) for migration in all_migrations()]
    assert [number for number, _ in known] == list(range(1, len(known) + 1))


def upgraded_by(monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    later = [*all_migrations(), Migration(len(all_migrations()) + 1, "later", sql)]
    monkeypatch.setattr(database, "all_migrations", lambda: later)


def test_an_older_store_is_copied_then_migrated(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarantee 3 over versions: nothing is lost, and the store of before is among the backups."""
    filled(home)
    known = set(database.backups(home))
    upgraded_by(monkeypatch, "ALTER TABLE waits ADD COLUMN owner VARCHAR; CREATE TABLE queues (name VARCHAR)")

    store = DuckDBStore.open(home)

    assert len(store.runs(ListRuns())) == 9
    assert store.query(Query(sql="SELECT max(version) FROM migrations")).rows == (
        (len(all_migrations()) + 1,),
    )
    store.close()
    (copy,) = set(database.backups(home)) - known
    with duckdb.connect(str(copy), config={"access_mode": "READ_ONLY"}) as connection:
        assert connection.execute("SELECT max(version) FROM migrations").fetchone() == (
            len(all_migrations()),
        )


def test_a_store_from_before_the_journal_is_taken_over(home: Home) -> None:
    """Guarantee 3 over versions: a store of version 1 keeps its rows, and goes on with a journal."""
    home.create()
    first = all_migrations()[0]
    with duckdb.connect(str(home.store)) as connection:
        connection.execute(first.sql)
        connection.execute(load()["insert_migration"], (first.version, first.name, "2026-11-22"))
        connection.execute(
            "INSERT INTO events VALUES (41, '2026-11-22', 'r', 1, 'k', NULL, 'old', '{}', NULL, NULL)"
        )

    store = DuckDBStore.open(home)
    assert store.submit(Changes([event()])).seqs == (42,)
    assert [found.sentence for found in store.events("r")] == ["old"]
    store.close()
    (copy,) = database.backups(home)
    with duckdb.connect(str(copy), config={"access_mode": "READ_ONLY"}) as connection:
        assert connection.execute("SELECT max(version) FROM migrations").fetchone() == (1,)


def test_a_migration_that_fails_leaves_the_store_as_it_was(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 2 over versions: a migration is applied whole or not at all."""
    filled(home)
    with monkeypatch.context() as patched:
        upgraded_by(patched, "CREATE TABLE queues (name VARCHAR); DROP TABLE no_such_table")
        with pytest.raises(StoreError, match="no_such_table"):
            DuckDBStore.open(home)

    store = DuckDBStore.open(home)
    assert len(store.runs(ListRuns())) == 9
    with pytest.raises(UsageError):
        store.query(Query(sql="SELECT * FROM queues"))
    store.close()


def test_the_loader_finds_statements_by_name() -> None:
    """SQL stands in files, by name; a comment above the first name belongs to nobody."""
    assert load("-- about\n\n-- name: one\nSELECT 1\n\n-- name: two\nSELECT 2 -- two\n") == {
        "one": "SELECT 1",
        "two": "SELECT 2 -- two",
    }
    assert {"insert_events", "runs", "checkpoints"} <= load().keys()
