"""The store's port: what the coordinator asks of whatever keeps its state and history.

Owns the shapes `Changes`, `NewEvent` and the protocol `Store`; knows no SQL. The history (`events`) is
append-only and carries each checkpoint's manifest; the rows of runs and waits are replaced by their newest
version in the same transaction as the event that tells why. Steps have no rows: they are a fold of the run's
events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from nbdurable.contract import ListRuns, ListWaits, Query, ReadCalls, Table
from nbdurable.models import Checkpoint, Event, Run, SignedManifest, Wait


@dataclass(frozen=True)
class NewEvent:
    """An event before it has its number; `manifest` is set on events that commit a checkpoint."""

    at: float
    run_id: str
    epoch: int
    kind: str
    sentence: str
    step: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    manifest: SignedManifest | None = None


@dataclass(frozen=True)
class Changes:
    """What becomes durable together, or not at all. Later rows of one key replace earlier ones."""

    events: Sequence[NewEvent] = ()
    runs: Sequence[Run] = ()
    waits: Sequence[Wait] = ()


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint, or a recorded call, as clean-up and statistics see it: `text` is its manifest, not verified."""

    run_id: str
    step: str
    seq: int
    text: str
    is_call: bool = False


@dataclass(frozen=True)
class StoredCall:
    """The event that committed a call, with its manifest where it was asked for."""

    event: Event
    manifest: SignedManifest | None


@dataclass(frozen=True)
class StoredSent:
    """An event that somebody sent, without its payload. It stands in the history of no run (`run_id` is "")."""

    seq: int
    at: float
    event: str
    key: str | None
    digest: str
    expires_at: float


@dataclass(frozen=True)
class Ticket:
    """A submission: the sequence numbers of its events, and a future that resolves when it is on disk."""

    seqs: tuple[int, ...]
    done: Future[None]


class Store(Protocol):
    """Keeps everything. Thread-safe. Submissions become durable in the order in which they were made.

    Where one can't be written, its future raises StoreFull or StoreError, and nothing of it is kept. Readers see
    everything that was acknowledged before they asked, or raise StoreFull or StoreError.
    """

    def submit(self, changes: Changes) -> Ticket: ...

    def flush(self) -> None:
        """Wait until everything submitted so far is on disk."""

    def open_runs(self) -> list[Run]:
        """Return the runs that are not final."""

    def open_waits(self) -> list[Wait]: ...

    def run(self, run_id: str) -> Run | None: ...

    def runs_matching(self, fragment: str) -> list[str]:
        """Return ids (at most 10, newest first) that begin or end with `fragment`."""

    def runs_with_keys(self, idempotency_keys: Sequence[str], now: float) -> list[Run]:
        """Return, for each key that still counts at `now`, the first run that was created with it.

        A run that ended without having completed has given its key up. But not that of a call ("call:…"): of those
        it is the newest.
        """

    def runs(self, wanted: ListRuns) -> list[Run]: ...

    def events(self, run_id: str, after: int = 0, limit: int = 1000) -> list[Event]: ...

    def checkpoints(self, run_id: str, until: int | None = None) -> list[Checkpoint]:
        """Return the latest checkpoint of each step of a run, in order of commitment, without removed ones.

        `until`: the latest with numbers up to this one.
        """

    def checkpoint(self, run_id: str, step: str) -> Checkpoint | None: ...

    def all_checkpoints(self, run_id: str | None = None) -> Iterator[StoredCheckpoint]:
        """Yield checkpoints and calls, of one run or all, that no `checkpoints_removed` event names; in any order."""

    def calls(self, wanted: ReadCalls) -> list[StoredCall]:
        """Return the newest recorded calls of a run or a step, in order of commitment, without removed ones."""

    def wait(self, wait_id: str) -> Wait | None: ...

    def waits(self, wanted: ListWaits) -> list[Wait]: ...

    def sent_events(self, since: float) -> list[StoredSent]:
        """Return the events that were sent at or after `since`, oldest first."""

    def taken_events(self, since: float) -> list[tuple[int, str]]:
        """Return which sent event (its number) which run took at or after `since`."""

    def query(self, wanted: Query) -> Table:
        """Run one read-only statement; raises UsageError for anything else, files and network included."""

    def backup(self) -> None:
        """Write a copy that can be opened as a store, beside the last good one."""

    def close(self) -> None: ...
