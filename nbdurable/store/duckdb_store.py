"""The store on DuckDB: a journal that commits in groups, one that applies it to the database, cursors for readers.

Owns the order of submissions, the shapes' rows and the read-only door for people's SQL; knows nothing of what
a status means. The database file is `database.py`'s, the journal's `journal.py`'s, the statements stand in
`sql/queries.sql`.

A commit of DuckDB's costs 1 ms, whatever is in it, for parsing and planning; an append to the journal and its
fdatasync 0.2 (measured, DuckDB 2.0, two cores, 1.5 KB rows). So a submission is acknowledged once the journal
has it, and the database gets many at once: some tenths of a second later, or at once where somebody reads, since
readers see all that was acknowledged. Each transaction of the database says up to which record it got, so that
opening after a crash applies what is missing, and nothing twice. Rows go as typed lists, one parameter per
column, unnested by one statement: 5 ms for 256, where a JSON parameter takes 6 and VALUES with 2,560 parameters
24; for one row alone VALUES saves 0.5. The journal's records are these rows as JSON: a migration that changes
the columns has to take the records of before as well.

What the journal holds must fit into the database. So `submit` refuses what does not fit, and while the database
takes nothing (a full disk), nothing more is acknowledged: each group and each reader tries again first.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import duckdb
from pydantic_core import from_json, to_json

from nbdurable.contract import KEY_LIFE_S, ListRuns, ListWaits, Query, ReadCalls, Table
from nbdurable.errors import StoreError, UsageError
from nbdurable.models import Checkpoint, Event, Run, RunStatus, SignedManifest, StepStatus, Wait, WaitStatus
from nbdurable.settings import Home
from nbdurable.store.database import Database, timestamp
from nbdurable.store.journal import Journal
from nbdurable.store.lock import SideLock
from nbdurable.store.port import Changes, NewEvent, StoredCall, StoredCheckpoint, StoredSent, Ticket
from nbdurable.store.sql import load
from nbdurable.telemetry import fault_point

APPLY_S = 0.25  # how long what is acknowledged may be in the journal alone, where nobody reads
BATCH_BYTES = 4 << 20  # bounds a record of the journal and a transaction of the database
MAX_BYTES = 32 << 20  # of one submission: what DuckDB takes within its memory
JOURNAL_BYTES = 16 << 20  # at which it begins anew, and its writer waits for the database: 0.3 s to apply
IDLE_S = 2.0
IDLE_BYTES = 4 << 20  # of journal or WAL: worth clearing while nobody waits
QUERY_S = 30.0
_PAGE = 500  # manifests in memory at once, while all are read
_TABLES = "the tables are runs, waits, events, steps and checkpoints; `DESCRIBE runs` helps"

_SQL = load()
_FINAL = [status.value for status in RunStatus if status.is_final]
_RELEASED = [status.value for status in RunStatus if status.is_final and status is not RunStatus.COMPLETED]
_INT64 = 1 << 63

_log = logging.getLogger("nbdurable.store")

_Row = Sequence[Any]
_Rows = Sequence[Sequence[_Row]]  # of events, of runs, of waits
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Submission:
    """Changes as rows, and as the journal holds them; no payload where there are none."""

    rows: _Rows
    payload: bytes
    done: Future[None]


@dataclass(frozen=True)
class _Record:
    """A record of the journal that the database does not have yet."""

    number: int
    size: int
    submissions: Sequence[_Rows]


class DuckDBStore:
    """`port.Store` on a journal and one DuckDB file; made by `open`.

    `commits` counts the records that were made durable, each a group of submissions.
    """

    def __init__(self, home: Home, clock: Callable[[], float]) -> None:
        home.create()
        self._applying = threading.Lock()  # held by whoever writes to the database
        self._pending: deque[_Record] = deque()
        self._batch: list[_Record] = []  # what is written now, or could not be
        self._failing = False
        self._ended = False
        with ExitStack() as undo:
            lock = SideLock(home.store_lock)
            undo.callback(lock.release)
            self._database = Database(home, clock)
            undo.callback(self._database.close)
            ((store, self._applied),) = self._rows_of("journal")
            self._journal = Journal(home.journal, store=store, applied=self._applied)
            undo.callback(self._journal.close)
            for number, payload in self._journal.left:
                self._pending.append(_Record(number, len(payload), from_json(payload)))
            self._journal.left.clear()
            self._committed = self._journal.number
            self._begin_anew()
            self._seq: int = self._rows_of("last_seq")[0][0]
            undo.pop_all()
        self.commits = 0
        self._lock = lock
        self._submitting = threading.Lock()
        self._backing_up = threading.Lock()
        self._closed = False
        self._queue: SimpleQueue[_Submission | None] = SimpleQueue()
        self._unapplied, self._closing = threading.Event(), threading.Event()
        self._applier = threading.Thread(target=self._apply_later, name="nbdurable-apply", daemon=True)
        self._writer = threading.Thread(target=self._write, name="nbdurable-store", daemon=True)
        self._applier.start()
        self._writer.start()

    @classmethod
    def open(cls, home: Home, *, clock: Callable[[], float] = time.time) -> DuckDBStore:
        """Open the store of a project, created where there is none.

        Raises StoreLocked where another process owns it, StoreTooNew, StoreDamaged (naming the newest backup;
        the files are left as they are), StoreFull or StoreError.
        """
        return cls(home, clock)

    # Committing --------------------------------------------------------------------------------------------

    def submit(self, changes: Changes) -> Ticket:
        """Number the events and hand everything to the writer; raises StoreError if the store is closed."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a submission can't be taken back
        with self._submitting:
            if self._closed:
                raise StoreError("the store is closed")
            first = self._seq + 1
            self._seq += len(changes.events)
            seqs = tuple(range(first, self._seq + 1))
            try:
                rows = (
                    [_event_row(seq, event) for seq, event in zip(seqs, changes.events, strict=True)],
                    [_run_row(run) for run in changes.runs],
                    [_wait_row(wait) for wait in changes.waits],
                )
                submission = _Submission(rows, _payload(rows) if any(rows) else b"", done)
            except Exception as error:
                done.set_exception(StoreError(f"these changes can't be written: {error}"))
            else:
                self._queue.put(submission)
        return Ticket(seqs, done)

    def flush(self) -> None:
        """Wait until everything submitted so far is on disk, or has failed."""
        self.submit(Changes()).done.result()

    def _write(self) -> None:
        open_ = True
        while open_:
            group, open_ = self._next_group()
            try:
                self._commit([submission for submission in group if submission.payload])
            except Exception as error:
                for submission in group:
                    submission.done.set_exception(self._database.explain(error))
            else:
                for submission in group:
                    submission.done.set_result(None)
        self._end()

    def _next_group(self) -> tuple[list[_Submission], bool]:
        """Return what was submitted while the last group was written, and whether the store stays open."""
        group: list[_Submission] = []
        size = 0
        while size < BATCH_BYTES:
            try:
                submission = self._queue.get(block=not group, timeout=IDLE_S)
            except Empty:
                if group:
                    break
                if self._journal.size > IDLE_BYTES:
                    with suppress(StoreError):  # the next submission hears of it
                        self._begin_anew()
                continue
            if submission is None:
                return group, False
            group.append(submission)
            size += len(submission.payload)
        return group, True

    def _commit(self, group: list[_Submission]) -> None:
        """Make a group durable; raises StoreFull or StoreError, and nothing of it is kept."""
        if not group:
            return
        if self._failing:
            self._apply()
        if self._journal.size > JOURNAL_BYTES:
            self._begin_anew()
        payload = b"[%b]" % b",".join([submission.payload for submission in group])
        fault_point("store-before-commit")
        number = self._journal.append(payload)
        fault_point("store-committed")
        self._pending.append(_Record(number, len(payload), [submission.rows for submission in group]))
        self._committed = number
        self.commits += 1
        self._unapplied.set()

    def _begin_anew(self) -> None:
        """Empty the journal, once the database has all of it."""
        self._apply()
        self._journal.begin_anew()

    # Applying ----------------------------------------------------------------------------------------------

    def _apply_later(self) -> None:
        """Write to the database what was acknowledged, a while later, so that much of it goes at once."""
        while not self._closing.is_set():
            if self._unapplied.wait(IDLE_S):
                self._closing.wait(APPLY_S)
                self._unapplied.clear()
                try:
                    self._apply()
                except StoreError:
                    self._unapplied.set()  # it is tried again
            elif self._database.wal_bytes > IDLE_BYTES:
                with self._applying, suppress(StoreError):
                    self._database.checkpoint()

    def _apply(self) -> None:
        """Bring the database up to what is acknowledged; raises StoreFull or StoreError, and nothing is lost."""
        wanted = self._committed
        if self._applied >= wanted:
            return
        with self._applying:
            if self._ended:
                raise StoreError("the store is closed")
            while self._applied < wanted:
                self._apply_batch()

    def _apply_batch(self) -> None:
        batch = self._batch
        size = sum(record.size for record in batch)
        while self._pending and size < BATCH_BYTES:
            batch.append(self._pending.popleft())
            size += batch[-1].size
        last = batch[-1].number
        try:
            self._insert([rows for record in batch for rows in record.submissions], last)
        except Exception as error:
            if not self._survived(last):
                if not self._failing:
                    _log.error("records %d to %d wait in the journal: %s", batch[0].number, last, error)
                self._failing = True
                raise self._database.explain(error) from error
            _log.warning("an error came after a commit, from a checkpoint: %s", error)
        self._failing = False
        self._applied = last
        batch.clear()
        fault_point("store-applied")

    def _insert(self, submissions: Sequence[_Rows], number: int) -> None:
        connection = self._database.writer
        connection.begin()
        events = [row for rows, _, _ in submissions for row in rows]
        if len(events) == 1:  # somebody follows
            connection.execute(_SQL["insert_event"], events[0])
        elif events:
            connection.execute(_SQL["insert_events"], _columns(events))
        for table, kind in (("runs", 1), ("waits", 2)):
            if newest := {row[0]: row for rows in submissions for row in rows[kind]}:
                connection.execute(_SQL[f"delete_{table}"], [list(newest)])
                connection.execute(_SQL[f"insert_{table}"], _columns(newest.values()))
        connection.execute(_SQL["set_applied"], (number,))
        connection.commit()

    def _survived(self, number: int) -> bool:
        """Make the connection usable again, and tell whether the failed transaction is on disk all the same.

        It is where a checkpoint after the commit ran out of space.
        """
        try:
            self._database.mend()
            return bool(self._rows_of("journal")[0][1] == number)
        except Exception:
            return False

    # Reading -----------------------------------------------------------------------------------------------

    def open_runs(self) -> list[Run]:
        """Return the runs that are not final, oldest first."""
        return self._runs("open_runs", {"final": _FINAL})

    def open_waits(self) -> list[Wait]:
        """Return the waits that nobody has answered, oldest first."""
        return self._waits("open_waits", {"open": WaitStatus.OPEN.value})

    def run(self, run_id: str) -> Run | None:
        """Return a run by its whole id."""
        return _only(self._runs("run", (run_id,)))

    def runs_matching(self, fragment: str) -> list[str]:
        """Return ids (at most 10, newest first) that begin or end with `fragment`."""
        return [row[0] for row in self._rows("runs_matching", {"fragment": fragment.lower()})]

    def runs_with_keys(self, idempotency_keys: Sequence[str], now: float) -> list[Run]:
        """Return, for each key that still counts at `now`, the first run that was created with it.

        A run that ended without having completed has given its key up. But not that of a call ("call:…"): of those
        it is the newest.
        """
        keys = {
            "idempotency_keys": list(idempotency_keys),
            "now": now,
            "life_s": KEY_LIFE_S,
            "released": _RELEASED,
        }
        return self._runs("runs_with_keys", keys)

    def runs(self, wanted: ListRuns) -> list[Run]:
        """Return runs that match, newest first."""
        return self._runs("runs", wanted.model_dump(mode="json"))

    def events(self, run_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """Return a run's events with numbers above `after`, in order; times are true to the microsecond."""
        rows = self._rows("events", {"run_id": run_id, "after": after, "limit": limit})
        return [_event(row) for row in rows]

    def calls(self, wanted: ReadCalls) -> list[StoredCall]:
        """Return the newest recorded calls of a run or a step, in order of commitment, without removed ones."""
        return [_call(row) for row in reversed(self._rows("calls", wanted.model_dump()))]

    def checkpoints(self, run_id: str, until: int | None = None) -> list[Checkpoint]:
        """Return the latest checkpoint of each step of a run, in order of commitment, without removed ones.

        `until`: the latest with numbers up to this one.
        """
        rows = self._rows("checkpoints", {"run_id": run_id, "until": _INT64 - 1 if until is None else until})
        return [_checkpoint(row) for row in rows]

    def all_checkpoints(self, run_id: str | None = None) -> Iterator[StoredCheckpoint]:
        """Yield checkpoints and calls, of one run or all, that no `checkpoints_removed` event names; in any order."""
        self._apply()
        with self._database.cursor() as cursor:
            cursor.execute(_SQL["all_checkpoints"], {"run_id": run_id})
            while rows := cursor.fetchmany(_PAGE):
                for row in rows:
                    yield StoredCheckpoint(*row)

    def checkpoint(self, run_id: str, step: str) -> Checkpoint | None:
        """Return the latest checkpoint of a step."""
        rows = self._rows("checkpoint", {"run_id": run_id, "step": step})
        return _only([_checkpoint(row) for row in rows])

    def wait(self, wait_id: str) -> Wait | None:
        """Return a wait by its id."""
        return _only(self._waits("wait", (wait_id,)))

    def waits(self, wanted: ListWaits) -> list[Wait]:
        """Return waits that match, oldest first."""
        return self._waits("waits", wanted.model_dump(mode="json"))

    def sent_events(self, since: float) -> list[StoredSent]:
        """Return the events that were sent at or after `since`, oldest first."""
        return [StoredSent(*row) for row in self._rows("sent_events", {"since": timestamp(since)})]

    def taken_events(self, since: float) -> list[tuple[int, str]]:
        """Return which sent event (its number) which run took at or after `since`."""
        return [(seq, run_id) for seq, run_id in self._rows("taken_events", {"since": timestamp(since)})]

    def query(self, wanted: Query) -> Table:
        """Run one SELECT of a person, read only, for at most 30 s.

        Values come back as JSON: times in ISO 8601, decimals as floats, bytes in hex, intervals in seconds.
        Raises UsageError, with DuckDB's words, for anything but a SELECT that works; files, network and
        settings are out of reach.
        """
        self._apply()
        with self._database.cursor() as cursor, _taught():
            statements = cursor.extract_statements(wanted.sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise UsageError(
                    "only one SELECT can be asked at a time",
                    todo=_TABLES,
                )
            clock = threading.Timer(QUERY_S, cursor.interrupt)
            clock.daemon = True
            clock.start()
            try:
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                cursor.execute(statements[0])
                columns = tuple(column[0] for column in cursor.description)
                rows = cursor.fetchmany(wanted.limit + 1)
            finally:
                clock.cancel()
        return Table(
            columns=columns,
            rows=tuple(tuple(_json_able(value) for value in row) for row in rows[: wanted.limit]),
            truncated=len(rows) > wanted.limit,
        )

    def _rows(self, name: str, parameters: Any) -> list[_Row]:
        self._apply()
        return self._rows_of(name, parameters)

    def _rows_of(self, name: str, parameters: Any = None) -> list[_Row]:
        """Return rows as the database has them now."""
        with self._database.cursor() as cursor:
            rows: list[_Row] = cursor.execute(_SQL[name], parameters).fetchall()
            return rows

    def _runs(self, name: str, parameters: Any) -> list[Run]:
        return [Run.model_validate_json(body) for (body,) in self._rows(name, parameters)]

    def _waits(self, name: str, parameters: Any) -> list[Wait]:
        return [Wait.model_validate_json(body) for (body,) in self._rows(name, parameters)]

    # The end -----------------------------------------------------------------------------------------------

    def backup(self) -> None:
        """Write a copy that can be opened as a store to the backups' folder, and keep the newest three."""
        with self._backing_up:
            self._apply()
            self._database.backup()

    def close(self) -> None:
        """Write what was submitted, close the files and give up the lock; nothing more where that was done."""
        with self._submitting:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if threading.current_thread() is not self._writer:
            self._writer.join()

    def _end(self) -> None:
        self._closing.set()
        self._unapplied.set()
        self._applier.join()
        with suppress(StoreError):  # it was logged; the journal keeps it until the next opening
            self._apply()
        with self._applying:
            self._ended = True
        self._database.close()
        if self._applied == self._committed:
            self._journal.remove()
        else:
            self._journal.close()
        self._lock.release()


def _payload(rows: _Rows) -> bytes:
    """Return rows as JSON; raises ValueError for what would not fit into the database."""
    for table in rows:
        for row in table:
            for value in row:
                if isinstance(value, int) and not -_INT64 <= value < _INT64:
                    raise ValueError(f"{value} is beyond 64 bits")
    payload = to_json(rows)
    if len(payload) > MAX_BYTES:
        raise ValueError(f"they have {len(payload):,} bytes, and at most {MAX_BYTES:,} go at once")
    return payload


def _event_row(seq: int, event: NewEvent) -> _Row:
    manifest = event.manifest
    return (
        seq,
        _time(event.at),
        event.run_id,
        event.epoch,
        event.kind,
        event.step,
        event.sentence,
        to_json(event.data, inf_nan_mode="null").decode(),
        manifest.text if manifest else None,
        manifest.signature if manifest else None,
    )


def _run_row(run: Run) -> _Row:
    return (
        run.id,
        run.status.value,
        run.kind.value,
        run.notebook,
        run.reason,
        list(run.tags),
        run.idempotency_key,
        run.epoch,
        run.recoveries,
        _time(run.created_at),
        _maybe(run.started_at),
        _maybe(run.ended_at),
        _time(run.updated_at),
        run.model_dump_json(),
    )


def _wait_row(wait: Wait) -> _Row:
    return (
        wait.id,
        wait.run_id,
        wait.status.value,
        wait.kind.value,
        wait.title,
        wait.step,
        list(wait.tags),
        _time(wait.created_at),
        _maybe(wait.due_at),
        _maybe(wait.answer.at if wait.answer else None),
        wait.model_dump_json(),
    )


def _time(seconds: float) -> str:
    return timestamp(seconds).isoformat()


def _maybe(seconds: float | None) -> str | None:
    return None if seconds is None else _time(seconds)


def _columns(rows: Iterable[_Row]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _event(row: _Row) -> Event:
    names = ("seq", "at", "run_id", "epoch", "kind", "step", "sentence")
    return Event(**dict(zip(names, row[:-1], strict=True)), data=from_json(row[-1]))


def _call(row: _Row) -> StoredCall:
    *facts, text, signature = row
    manifest = None if text is None else SignedManifest(text=text, signature=signature)
    return StoredCall(_event(facts), manifest)


def _checkpoint(row: _Row) -> Checkpoint:
    run_id, step, status, seq, at, manifest, signature = row
    return Checkpoint(
        run_id=run_id,
        step=step,
        status=StepStatus(status),
        seq=seq,
        at=at,
        manifest=SignedManifest(text=manifest, signature=signature),
    )


def _only(found: Sequence[_T]) -> _T | None:
    return found[0] if found else None


@contextmanager
def _taught() -> Iterator[None]:
    """Turn DuckDB's errors about a person's SQL into UsageErrors; damage and the like pass."""
    try:
        yield
    except duckdb.InterruptException:
        raise UsageError(f"the query took longer than {QUERY_S:.0f} s", todo="ask for less") from None
    except duckdb.InvalidInputException as error:
        raise UsageError(str(error)) from None
    except (duckdb.ProgrammingError, duckdb.DataError, duckdb.NotSupportedError) as error:
        raise UsageError(str(error).rstrip(), todo=_TABLES) from None
    except (duckdb.PermissionException, duckdb.TransactionException, duckdb.OutOfMemoryException) as error:
        raise UsageError(str(error)) from None


def _json_able(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float() | Decimal():
            return float(value) if math.isfinite(value) else None
        case date() | time_of_day():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes() | bytearray() | memoryview():
            return bytes(value).hex()
        case dict():
            return {str(key): _json_able(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_able(item) for item in value]
        case _:
            return str(value)
