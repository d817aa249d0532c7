"""The store on DuckDB: one writer thread that commits in groups, cursors for readers.

Owns the order of submissions, the shapes' rows and the read-only door for people's SQL; knows nothing of what
a status means. The file itself is `database.py`'s, the statements stand in `sql/queries.sql`.

How a group is written (measured, DuckDB 2.0, two cores, 1.5 KB rows): a single row bound to VALUES commits
in 1.05 ms; typed lists, one parameter per column, unnested by one statement, cost 0.35 more for one row, the
same for four, and 5 ms for 256 rows, where a JSON parameter takes 6 and VALUES with 2,560 parameters 24 ms.
BEGIN and COMMIT of our own cost 0.2 ms, so a group of one statement leaves them to DuckDB.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import duckdb
from pydantic_core import from_json, to_json

from nbdurable.contract import ListRuns, ListWaits, Query, Table
from nbdurable.errors import StoreError, UsageError
from nbdurable.models import Checkpoint, Event, Run, RunStatus, SignedManifest, StepStatus, Wait, WaitStatus
from nbdurable.settings import Home
from nbdurable.store.database import Database, timestamp
from nbdurable.store.lock import SideLock
from nbdurable.store.port import Changes, NewEvent, Ticket
from nbdurable.store.sql import load
from nbdurable.telemetry import fault_point

MAX_GROUP = 1000  # submissions; bounds the time that the last of them waits
IDLE_S = 2.0
IDLE_CHECKPOINT_BYTES = (
    4 << 20
)  # WAL worth writing into the file while nobody waits; at 16 MB DuckDB does it itself
QUERY_S = 30.0
_TABLES = "the tables are runs, waits, events, steps and checkpoints; `DESCRIBE runs` helps"

_SQL = load()
_FINAL = [status.value for status in RunStatus if status.is_final]
_RELEASED = [RunStatus.FAILED.value, RunStatus.CANCELLED.value]

_Row = tuple[Any, ...]
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Submission:
    """Changes as rows, before they are written."""

    events: Sequence[_Row]
    runs: Sequence[_Row]
    waits: Sequence[_Row]
    done: Future[None]


class DuckDBStore:
    """`port.Store` on one DuckDB file; made by `open`.

    `commits` counts the transactions that DuckDB reported as committed.
    """

    def __init__(self, home: Home, clock: Callable[[], float]) -> None:
        home.create()
        lock = SideLock(home.store_lock)
        try:
            self._database = Database(home, clock)
            with self._database.cursor() as cursor:
                self._seq: int = cursor.execute(_SQL["last_seq"]).fetchone()[0]
        except BaseException:
            lock.release()
            raise
        self.commits = 0
        self._lock = lock
        self._submitting = threading.Lock()
        self._backing_up = threading.Lock()
        self._closed = False
        self._queue: SimpleQueue[_Submission | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="nbdurable-store", daemon=True)
        self._writer.start()

    @classmethod
    def open(cls, home: Home, *, clock: Callable[[], float] = time.time) -> DuckDBStore:
        """Open the store of a project, created where there is none.

        Raises StoreLocked where another process owns it, StoreTooNew, StoreDamaged (naming the newest backup;
        the file is left as it is), StoreFull or StoreError.
        """
        return cls(home, clock)

    # Writing -----------------------------------------------------------------------------------------------

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
                submission = _Submission(
                    events=[_event_row(seq, event) for seq, event in zip(seqs, changes.events, strict=True)],
                    runs=[_run_row(run) for run in changes.runs],
                    waits=[_wait_row(wait) for wait in changes.waits],
                    done=done,
                )
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
            self._settle(group)
        self._database.close()
        self._lock.release()

    def _next_group(self) -> tuple[list[_Submission], bool]:
        """Return what was submitted while the last group was written, and whether the store stays open."""
        group: list[_Submission] = []
        while len(group) < MAX_GROUP:
            try:
                submission = self._queue.get(block=not group, timeout=IDLE_S)
            except Empty:
                if group:
                    break
                if self._database.wal_bytes > IDLE_CHECKPOINT_BYTES:
                    with suppress(StoreError):  # the next submission hears of it
                        self._database.checkpoint()
                continue
            if submission is None:
                return group, False
            group.append(submission)
        return group, True

    def _settle(self, group: list[_Submission]) -> None:
        """Make a group durable. If that fails, each of it singly, so that a bad row fails only itself."""
        try:
            self._commit(group)
        except Exception as error:
            if self._survived(group):
                pass  # the error came after the commit, from a checkpoint
            elif len(group) > 1:
                for submission in group:
                    self._settle([submission])
                return
            else:
                group[0].done.set_exception(self._database.explain(error))
                return
        for submission in group:
            submission.done.set_result(None)

    def _commit(self, group: list[_Submission]) -> None:
        events = [row for submission in group for row in submission.events]
        runs = {row[0]: row for submission in group for row in submission.runs}
        waits = {row[0]: row for submission in group for row in submission.waits}
        statements: list[tuple[str, Sequence[Any]]] = []
        if len(events) == 1:
            statements.append((_SQL["insert_event"], events[0]))
        elif events:
            statements.append((_SQL["insert_events"], _columns(events)))
        for table, rows in (("runs", runs), ("waits", waits)):
            if rows:
                statements.append((_SQL[f"delete_{table}"], [list(rows)]))
                statements.append((_SQL[f"insert_{table}"], _columns(rows.values())))
        if not statements:
            return
        connection = self._database.writer
        if len(statements) == 1:
            fault_point("store-before-commit")
            connection.execute(*statements[0])
        else:
            connection.begin()
            for statement in statements:
                connection.execute(*statement)
            fault_point("store-before-commit")
            connection.commit()
        self.commits += 1
        fault_point("store-committed")

    def _survived(self, group: list[_Submission]) -> bool:
        """Make the connection usable again, and tell whether the failed group is on disk all the same.

        It is where a checkpoint after the commit ran out of space. A transaction is whole, so one row tells.
        """
        try:
            self._database.mend()
            for submission in group:
                for event in submission.events:
                    return bool(self._rows("has_seq", event[:1])[0][0])
                for name, rows in (("run", submission.runs), ("wait", submission.waits)):
                    for row in rows[-1:]:
                        return self._rows(name, row[:1]) == [(row[-1],)]
        except Exception:
            return False
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

    def run_with_key(self, idempotency_key: str, since: float) -> Run | None:
        """Return the first run created with the key at or after `since`, but no failed or cancelled one."""
        key = {"idempotency_key": idempotency_key, "since": timestamp(since), "released": _RELEASED}
        return _only(self._runs("run_with_key", key))

    def runs(self, wanted: ListRuns) -> list[Run]:
        """Return runs that match, newest first."""
        return self._runs("runs", wanted.model_dump(mode="json"))

    def events(self, run_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """Return a run's events with numbers above `after`, in order; times are true to the microsecond."""
        rows = self._rows("events", {"run_id": run_id, "after": after, "limit": limit})
        names = ("seq", "at", "run_id", "epoch", "kind", "step", "sentence")
        return [Event(**dict(zip(names, row[:-1], strict=True)), data=from_json(row[-1])) for row in rows]

    def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Return the latest checkpoint of each step of a run, in order of commitment."""
        return [_checkpoint(row) for row in self._rows("checkpoints", {"run_id": run_id})]

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

    def query(self, wanted: Query) -> Table:
        """Run one SELECT of a person, read only, for at most 30 s.

        Values come back as JSON: times in ISO 8601, decimals as floats, bytes in hex, intervals in seconds.
        Raises UsageError, with DuckDB's words, for anything but a SELECT that works; files, network and
        settings are out of reach.
        """
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
            self._database.backup()

    def close(self) -> None:
        """Write what was submitted, close the file and give up the lock; nothing more where that was done."""
        with self._submitting:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if threading.current_thread() is not self._writer:
            self._writer.join()


def _event_row(seq: int, event: NewEvent) -> _Row:
    manifest = event.manifest
    return (
        seq,
        timestamp(event.at),
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
        timestamp(run.created_at),
        _maybe(run.started_at),
        _maybe(run.ended_at),
        timestamp(run.updated_at),
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
        timestamp(wait.created_at),
        _maybe(wait.due_at),
        _maybe(wait.answer.at if wait.answer else None),
        wait.model_dump_json(),
    )


def _maybe(seconds: float | None) -> Any:
    return None if seconds is None else timestamp(seconds)


def _columns(rows: Iterable[_Row]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


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
        if "pytz" not in str(error):
            raise UsageError(str(error)) from None
        raise UsageError(
            "the result has a TIMESTAMP WITH TIME ZONE",
            todo="cast it: `now()::TIMESTAMP`; all times are in UTC",
        ) from None
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
