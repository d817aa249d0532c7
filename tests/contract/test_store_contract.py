"""What every store must do: one suite over the protocol `nbdurable.store.port.Store`.

A store is a line in `STORES`: a function that opens the one of a home, made where there is none. "On disk" is
tested by closing and opening again; crashes are tested beside each implementation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdurable.contract import KEY_LIFE_S, ListRuns, ListWaits, Query, ReadCalls
from nbdurable.errors import DurableError, StoreError, UsageError
from nbdurable.models import (
    Driver,
    DriverKind,
    ErrorInfo,
    Event,
    ProcessIdentity,
    Run,
    RunStatus,
    StepStatus,
    WaitAnswer,
    WaitKind,
    WaitStatus,
)
from nbdurable.settings import Home
from nbdurable.store.duckdb_store import DuckDBStore
from nbdurable.store.port import Changes, NewEvent, Store
from tests.tools.changes import commit, event, run, run_id, wait

Opener = Callable[[], Store]

STORES: dict[str, Callable[[Home], Store]] = {"duckdb": DuckDBStore.open}
DEADLINE_S = 30


@pytest.fixture(params=STORES)
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Close the store that was opened last, and open it again."""
    opened: list[Store] = []

    def again() -> Store:
        for old in opened:
            old.close()
        opened.append(STORES[request.param](Home(tmp_path / ".nbdurable")))
        return opened[-1]

    yield again
    for old in opened:
        old.close()


@pytest.fixture
def store(reopen: Opener) -> Store:
    return reopen()


def put(store: Store, *events: object, runs: object = (), waits: object = ()) -> tuple[int, ...]:
    """Submit and wait until it is on disk."""
    ticket = store.submit(Changes(events, runs, waits))  # type: ignore[arg-type]
    ticket.done.result(DEADLINE_S)
    return ticket.seqs


# Submissions ----------------------------------------------------------------------------------------------


def test_acknowledged_changes_are_visible_to_every_reader(store: Store) -> None:
    """Guarantee 3: once the future resolves, each way of reading shows the rows and the event, together."""
    (seq,) = put(store, commit("search"), runs=[run()], waits=[wait()])

    assert store.run(run_id(1)) == run()
    assert store.runs(ListRuns()) == [run()]
    assert store.open_runs() == [run()]
    assert store.wait("7K2M00") == wait()
    assert store.open_waits() == [wait()]
    assert [found.seq for found in store.events(run_id(1))] == [seq]
    assert [found.seq for found in store.checkpoints(run_id(1))] == [seq]


def test_everything_is_there_after_reopening(reopen: Opener) -> None:
    """Guarantee 3: a store that is closed and opened again answers as before."""
    first = reopen()
    put(first, event(), commit("search", text='{"b": 1}'), runs=[run(), run(2)], waits=[wait()])
    before = (
        first.runs(ListRuns()),
        first.events(run_id(1)),
        first.checkpoints(run_id(1)),
        first.open_waits(),
    )

    second = reopen()

    assert before == (
        second.runs(ListRuns()),
        second.events(run_id(1)),
        second.checkpoints(run_id(1)),
        second.open_waits(),
    )


def test_events_are_numbered_in_the_order_of_submission_and_on_after_reopening(reopen: Opener) -> None:
    """Guarantee 10: numbers only grow, over submissions, runs and openings."""
    first = reopen()
    seqs = [*put(first, event(), event()), *put(first, event(2))]
    first.flush()
    seqs += put(reopen(), event())

    assert seqs == sorted(set(seqs))
    assert min(seqs) > 0


def test_flush_waits_for_what_was_submitted_before(store: Store) -> None:
    """Guarantee 3: after `flush`, every earlier future has resolved."""
    tickets = [store.submit(Changes([event()])) for _ in range(50)]
    store.flush()

    assert all(ticket.done.done() for ticket in tickets)


def test_the_latest_row_of_a_key_replaces_the_earlier_ones(store: Store) -> None:
    """A run's row is its newest version, within one submission and over several."""
    put(store, runs=[run(epoch=1), run(epoch=2)], waits=[wait(title="old")])
    assert store.run(run_id(1)) == run(epoch=2)

    for epoch in range(3, 40):
        store.submit(Changes(runs=[run(epoch=epoch, tags=("a",) * (epoch % 3))]))
    put(store, waits=[wait()])

    assert store.runs(ListRuns()) == [run(epoch=39)]
    assert store.waits(ListWaits()) == [wait()]


def test_an_empty_submission_is_acknowledged(store: Store) -> None:
    """Nothing to write is no error."""
    assert put(store) == ()


@pytest.mark.parametrize(
    "bad", [{"sentence": "\ud800"}, {"data": {"f": lambda: 0}}, {"epoch": 1 << 70}, {"at": float("nan")}]
)
def test_what_cant_be_written_fails_alone_and_leaves_nothing(store: Store, bad: dict[str, object]) -> None:
    """Guarantees 2 and 11: a submission with a bad event fails whole; those around it are kept, in order."""
    first = store.submit(Changes([event()]))
    refused = store.submit(Changes([event(), event(**bad)], [run()]))
    last = store.submit(Changes([event()]))

    with pytest.raises(StoreError):
        refused.done.result(DEADLINE_S)
    first.done.result(DEADLINE_S)
    last.done.result(DEADLINE_S)
    assert [found.seq for found in store.events(run_id(1))] == [*first.seqs, *last.seqs]
    assert store.run(run_id(1)) is None


def test_submissions_of_many_threads_are_all_kept_each_threads_in_order(store: Store) -> None:
    """Guarantee 3 under concurrency: eight threads commit and read what they committed."""
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for epoch in range(1, 41):
                put(store, event(number, epoch=epoch), runs=[run(number, epoch=epoch)])
                assert store.run(run_id(number)) == run(number, epoch=epoch)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)

    assert failures == []
    for number in range(8):
        assert [found.epoch for found in store.events(run_id(number))] == list(range(1, 41))


def test_closing_writes_what_was_submitted_and_can_be_repeated(reopen: Opener) -> None:
    """Guarantee 3: `close`, from several threads at once, loses nothing; then the store says it is closed."""
    store = reopen()
    tickets = [store.submit(Changes([event()])) for _ in range(100)]
    threads = [threading.Thread(target=store.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    store.close()

    assert all(ticket.done.result(0) is None for ticket in tickets)
    with pytest.raises(StoreError, match="closed"):
        store.submit(Changes())
    with pytest.raises(StoreError, match="closed"):
        store.run(run_id(1))
    assert len(reopen().events(run_id(1))) == 100


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(list(RunStatus)), st.text(max_size=5), st.booleans()),
        max_size=12,
    )
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history_reads_as_a_dictionary_and_a_list_would(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, RunStatus, str, bool]]
) -> None:
    """Guarantees 3 and 10: whatever is submitted, over several openings: runs are a dict, events a list."""
    for opener in STORES.values():
        home = Home(tmp_path_factory.mktemp("history") / ".nbdurable")
        store = opener(home)
        runs: dict[str, Run] = {}
        told: list[tuple[str, str]] = []
        for number, status, text, again in steps:
            row = run(number, status=status, reason=text, parameters={"text": text})
            store.submit(Changes([event(number, sentence=text, data={text: [text]})], [row]))
            runs[row.id] = row
            told.append((row.id, text))
            if again:
                store.close()
                store = opener(home)
        store.flush()
        try:
            assert store.runs(ListRuns()) == sorted(runs.values(), key=lambda row: row.id, reverse=True)
            for identity in runs:
                assert [(found.run_id, found.sentence) for found in store.events(identity) if found.data] == [
                    pair for pair in told if pair[0] == identity
                ]
            assert {row.id for row in store.open_runs()} == {
                row.id for row in runs.values() if not row.status.is_final
            }
        finally:
            store.close()


# Runs -----------------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was_given(store: Store) -> None:
    """Guarantee 7's sister for rows: every field, whatever text it holds."""
    process = ProcessIdentity(host="h", pid=1, started_at=0.1 + 0.2, role="executor")
    whole = run(
        parameters={"q": "it's \"'; DROP TABLE runs; --", "n": None, "nul": "\0", "ü": [1, 2.5, {"a": []}]},
        tags=("nightly", "ü,'[]"),
        driver=Driver(kind=DriverKind.HEADLESS, process=process, label="worker 1"),
        error=ErrorInfo(name="ValueError", message="\x1b[31mno", traceback="a\n  b\n"),
        result={"big": 2**80},
        started_at=1_795_347_199.725209,
        idempotency_key="k",
        steps_total=3,
    )
    put(store, runs=[whole])

    assert store.run(run_id(1)) == whole


def test_an_unknown_run_is_none(store: Store) -> None:
    """Reading what is not there is no error."""
    assert store.run("nothing") is None
    assert store.wait("NOTHIN") is None
    assert store.checkpoint("nothing", "step") is None
    assert store.events("nothing") == []
    assert store.checkpoints("nothing") == []
    assert store.runs_matching("nothing") == []


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (ListRuns(), [5, 4, 3, 2, 1]),
        (ListRuns(limit=2), [5, 4]),
        (ListRuns(before=run_id(4)), [3, 2, 1]),
        (ListRuns(before=run_id(4), limit=1), [3]),
        (ListRuns(status=RunStatus.FAILED), [5, 2]),
        (ListRuns(notebook="/b.ipynb"), [3]),
        (ListRuns(kind=DriverKind.INTERACTIVE), [4]),
        (ListRuns(tag="nightly"), [2, 1]),
        (ListRuns(tag="night"), []),
        (ListRuns(tag="nightly", status=RunStatus.FAILED), [2]),
    ],
)
def test_lists_of_runs_are_filtered_newest_first(store: Store, wanted: ListRuns, expected: list[int]) -> None:
    """Every filter, alone and with others."""
    put(
        store,
        runs=[
            run(1, tags=("x", "nightly")),
            run(2, tags=("nightly",), status=RunStatus.FAILED),
            run(3, notebook="/b.ipynb"),
            run(4, kind=DriverKind.INTERACTIVE),
            run(5, status=RunStatus.FAILED),
        ],
    )

    assert [found.id for found in store.runs(wanted)] == [run_id(number) for number in expected]


def test_open_runs_are_those_that_are_not_final(store: Store) -> None:
    """Guarantee 6: what a new coordinator takes up again is exactly what has not ended."""
    put(store, runs=[run(number, status=status) for number, status in enumerate(RunStatus)])

    assert {found.status for found in store.open_runs()} == {
        RunStatus.DELAYED,
        RunStatus.QUEUED,
        RunStatus.RUNNING,
        RunStatus.WAITING,
        RunStatus.PAUSED,
    }


def test_a_fragment_matches_at_either_end_and_literally(store: Store) -> None:
    """What people type of an id is no pattern; at most ten come back, newest first."""
    put(store, runs=[run(number) for number in range(0x100, 0x10C)])

    assert store.runs_matching("0000010a") == [run_id(0x10A)]
    assert store.runs_matching("0000010A") == [run_id(0x10A)]
    assert store.runs_matching("%") == []
    assert store.runs_matching("0000010_") == []
    assert store.runs_matching("0000") == [run_id(number) for number in range(0x10B, 0x101, -1)]


def test_an_idempotency_key_returns_its_first_living_run(store: Store) -> None:
    """A key holds for its life, and is free again when its run failed or was cancelled; that of a call is not."""
    key, call = {"idempotency_key": "daily"}, {"idempotency_key": "call:1"}
    short = {"idempotency_key": "short", "key_expires_at": run(1).created_at + 10}
    put(
        store,
        runs=[
            run(1, **key),
            run(2, **key, status=RunStatus.FAILED),
            run(3, **key, status=RunStatus.CANCELLED),
            run(4, **key, status=RunStatus.COMPLETED),
            run(5, **key),
            run(6),
            run(7, **short),
            run(8, **call, status=RunStatus.FAILED),
        ],
    )
    now, life_s = run(1).created_at, KEY_LIFE_S

    assert store.runs_with_keys(["daily", "other"], now) == [run(1, **key)]
    first_over = run(1).created_at + life_s
    assert store.runs_with_keys(["daily"], first_over) == [run(4, **key, status=RunStatus.COMPLETED)]
    assert store.runs_with_keys(["daily"], run(6).created_at + life_s) == []
    assert store.runs_with_keys(["short"], now + 9) == [run(7, **short)]
    assert store.runs_with_keys(["short"], now + 10) == []
    assert store.runs_with_keys(["call:1"], now) == [run(8, **call, status=RunStatus.FAILED)]


# Events and checkpoints -----------------------------------------------------------------------------------


def test_an_event_comes_back_as_it_was_given(store: Store) -> None:
    """Guarantee 10: every field of the history; times to the microsecond."""
    data = {"ü\0": [None, True, 1, 2.5, "'"], "nested": {"a": {}}}
    (seq,) = put(
        store, event(step="sté'p", data=data, at=1_795_347_199.725209, epoch=7, sentence="a\0\n\"b'")
    )

    assert store.events(run_id(1)) == [
        Event(
            seq=seq,
            at=1_795_347_199.725209,
            run_id=run_id(1),
            epoch=7,
            kind="run_moved",
            step="sté'p",
            sentence="a\0\n\"b'",
            data=data,
        )
    ]


def test_events_are_read_in_pages(store: Store) -> None:
    """Following a run by the last number seen shows each event once."""
    seqs = [seq for _ in range(10) for seq in put(store, event(), event(2))[:1]]

    page = store.events(run_id(1), limit=4)
    rest = store.events(run_id(1), after=page[-1].seq)

    assert [found.seq for found in page + rest] == seqs
    assert len(page) == 4
    assert store.events(run_id(1), after=seqs[-1]) == []


def test_a_manifest_comes_back_to_the_byte(store: Store) -> None:
    """Guarantee 8: the signature is over this text, so nothing may be tidied."""
    text = '{ "b":1,\t"a": 1.0, "a": 2,\r\n "ü": "\\u00fc\0" }  '
    put(store, commit("search", text=text))
    found = store.checkpoint(run_id(1), "search")

    assert found is not None
    assert (found.manifest.text, found.manifest.signature) == (text, "5" * 64)


def test_the_latest_checkpoint_of_each_step_in_order_of_commitment(store: Store) -> None:
    """Guarantees 1 and 2: what a resumed run restores from is the last commit of each step."""
    seqs = put(
        store,
        commit("a", text="1"),
        event(kind="step_started", step="b"),
        commit("b", kind="step_waiting", text="2"),
        commit("c", kind="step_replay", text="3"),
        event(kind="step_failed", step="c"),
        commit("a", text="4", number=2),
        commit("b", text="5"),
        event(kind="step_restored", step="b"),
    )

    found = store.checkpoints(run_id(1))

    assert [(point.step, point.status, point.seq, point.manifest.text) for point in found] == [
        ("a", StepStatus.COMPLETED, seqs[0], "1"),
        ("c", StepStatus.REPLAY, seqs[3], "3"),
        ("b", StepStatus.COMPLETED, seqs[6], "5"),
    ]
    assert [store.checkpoint(run_id(1), step) for step in "acb"] == found


# Waits ----------------------------------------------------------------------------------------------------


def test_waits_are_listed_oldest_first_by_run_status_and_kind(store: Store) -> None:
    """Guarantee 5: what is open stays listed until it is answered, and an answer stays."""
    answer = WaitAnswer(approved=True, value={"n": 1}, by="ann", at=1_700.5)
    answered = wait("C00000", created_at=1, status=WaitStatus.ANSWERED, answer=answer, value=[1], tags=("x",))
    newest = wait("A00000", created_at=3)
    oldest = wait("B00000", created_at=0.5, run_id=run_id(2), form={"type": "object"})
    timer = wait("D00000", created_at=2, kind=WaitKind.TIMER, due_at=9.5)
    put(store, waits=[newest, oldest, answered, timer])

    assert store.open_waits() == [oldest, timer, newest]
    assert store.waits(ListWaits()) == [oldest, timer, newest]
    assert store.waits(ListWaits(status=None)) == [oldest, answered, timer, newest]
    assert store.waits(ListWaits(status=None, limit=1)) == [oldest]
    assert store.waits(ListWaits(run_id=run_id(1))) == [timer, newest]
    assert store.waits(ListWaits(kind=WaitKind.TIMER)) == [timer]
    assert store.wait("C00000") == answered


def test_sent_events_and_who_took_them_are_read_from_a_time_on(reopen: Opener) -> None:
    """Guarantee 3: events that were sent stand in no run's history, and are there after a reopening."""
    store = reopen()

    def sent(at: float, key: str | None) -> NewEvent:
        data = {"event": "paid", "payload": {"n": at}, "key": key, "digest": "d", "expires_at": at + 0.5}
        return NewEvent(at, "", 0, "event_sent", "sent", data=data)

    seqs = put(store, sent(10, "k"), event(), sent(20, None), sent(30.25, "l"))
    waits = [
        wait(f"{n}00000", run_id=run_id(n), kind=WaitKind.EVENT, event="paid", status=WaitStatus.ANSWERED,
             answer=WaitAnswer(approved=True, by="event", at=10.0 * n, event_seq=seq))
        for n, seq in ((1, seqs[0]), (2, seqs[2]), (3, None))
    ]  # fmt: skip
    put(store, waits=[*waits, wait("E00000", kind=WaitKind.EVENT, event="paid")])
    store = reopen()
    found = store.sent_events(20)
    assert [(one.seq, one.at, one.event, one.key, one.digest, one.expires_at) for one in found] == [
        (seqs[2], 20.0, "paid", None, "d", 20.5),
        (seqs[3], 30.25, "paid", "l", "d", 30.75),
    ]
    assert sorted(store.taken_events(0)) == [(seqs[0], run_id(1)), (seqs[2], run_id(2))]
    assert store.taken_events(15) == [(seqs[2], run_id(2))]
    assert store.events("", seqs[2] - 1, 1)[0].data["payload"] == {"n": 20}
    assert len(store.events(run_id(1))) == 1


# Questions ------------------------------------------------------------------------------------------------


def test_a_query_sees_what_was_acknowledged_and_says_when_it_stops_short(store: Store) -> None:
    """`nbdurable sql` reads the living store; a limit is never silent."""
    put(store, *[event() for _ in range(5)], runs=[run()])

    whole = store.query(Query(sql="SELECT count(*) AS n, min(id) AS id FROM events, runs"))
    short = store.query(Query(sql="SELECT seq FROM events ORDER BY seq", limit=3))

    assert (whole.columns, whole.rows, whole.truncated) == (("n", "id"), ((5, run_id(1)),), False)
    assert (len(short.rows), short.truncated) == (3, True)
    assert not store.query(Query(sql="SELECT seq FROM events", limit=5)).truncated


@pytest.mark.parametrize(
    "sql",
    ["", "DROP TABLE runs", "DELETE FROM runs", "SELECT 1; SELECT 2", "SELECT * FROM nothing", "SELEC 1"],
)
def test_a_query_that_is_not_one_select_is_refused(store: Store, sql: str) -> None:
    """Guarantee 11: a clear error, and nothing has changed."""
    put(store, runs=[run()])

    with pytest.raises(UsageError):
        store.query(Query(sql=sql))
    assert store.runs(ListRuns()) == [run()]


def test_a_backup_is_written_while_the_store_is_used(store: Store) -> None:
    """Guarantee 3: a backup disturbs no submission."""
    tickets = [store.submit(Changes([event()], [run(number)])) for number in range(20)]
    store.backup()
    tickets += [store.submit(Changes([event()])) for _ in range(20)]
    store.flush()

    assert all(ticket.done.result(DEADLINE_S) is None for ticket in tickets)
    assert len(store.events(run_id(1))) == 40


def test_errors_are_of_our_tree() -> None:
    """Guarantee 11: what a store raises survives HTTP."""
    assert issubclass(StoreError, DurableError)


# Removed checkpoints ---------------------------------------------------------------------------------------


def test_a_state_is_read_up_to_a_number_and_without_what_was_removed(reopen: Opener) -> None:
    """Guarantee 10: the history keeps every event; a removed checkpoint is not handed out any more."""
    store = reopen()
    first = put(store, commit("a", text="a1"), commit("b", text="b1"), commit("a", text="a2"))
    other = put(store, commit("a", text="other", number=2))

    def texts(until: int | None = None) -> list[str]:
        return [found.manifest.text for found in store.checkpoints(run_id(1), until)]

    assert texts() == ["b1", "a2"]
    assert texts(first[1]) == ["a1", "b1"]
    assert texts(first[0]) == ["a1"]
    assert {(c.run_id, c.step, c.seq, c.text) for c in store.all_checkpoints()} == {
        (run_id(1), "a", first[0], "a1"),
        (run_id(1), "b", first[1], "b1"),
        (run_id(1), "a", first[2], "a2"),
        (run_id(2), "a", other[0], "other"),
    }

    put(store, event(1, kind="checkpoints_removed", data={"seqs": [first[1], first[0]], "reason": "r"}))
    for again in (False, True):
        store = reopen() if again else store
        assert texts() == ["a2"]
        assert texts(first[1]) == []
        assert store.checkpoint(run_id(1), "b") is None
        assert [c.text for c in store.all_checkpoints(run_id(1))] == ["a2"]
        assert len(list(store.all_checkpoints())) == 2
        assert len(store.events(run_id(1))) == 4


def test_calls_are_read_newest_first_cut_and_without_what_was_removed(reopen: Opener) -> None:
    """Calls carry manifests as checkpoints do, and are counted with them; a step's state is not made of them."""
    store = reopen()
    calls = [replace(commit(step, text=text), kind="call_completed") for step, text in
             (("a", "a1"), ("b", "b1"), ("a", "a2"))]  # fmt: skip
    seqs = put(store, *calls, commit("a", text="checkpoint"))
    assert [one.manifest.text for one in store.checkpoints(run_id(1))] == ["checkpoint"]
    assert {one.text: one.is_call for one in store.all_checkpoints()} == {
        **dict.fromkeys(("a1", "a2", "b1"), True),
        "checkpoint": False,
    }
    put(store, event(1, kind="checkpoints_removed", data={"seqs": [seqs[0]], "reason": "r"}))

    def texts(**wanted: Any) -> list[str | None]:
        found = store.calls(ReadCalls(run_id=run_id(1), **wanted))
        return [one.manifest.text if one.manifest else None for one in found]

    assert texts(results=True) == ["b1", "a2"]
    assert texts(results=True, step="a") == ["a2"]
    assert texts(results=True, limit=1) == ["a2"]
    assert texts() == [None, None]
