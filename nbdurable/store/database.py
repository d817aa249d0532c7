"""The database file: opening it, migrating it, copying it, and saying what is wrong with it.

Owns every connection to DuckDB and the meaning of DuckDB's errors; knows nothing of runs and events. The
caller holds the side-file lock. The file is never opened but by DuckDB, whose own lock would be lost.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any

import duckdb

from nbdurable.errors import StoreDamaged, StoreError, StoreFull, StoreLocked, StoreTooNew
from nbdurable.settings import Home
from nbdurable.store.migrations import Migration, all_migrations
from nbdurable.store.sql import load

KEPT_BACKUPS = 3
READ_THROUGH_BYTES = 64 << 20  # a store up to this size is read whole at opening: under 0.1 s

_CONFIG = {
    "threads": 1,  # measured fastest for single rows
    "memory_limit": "256MB",  # DuckDB's default, 80 % of the machine, belongs to the kernels
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
_SQL = load()

_FULL = ("No space left", "not enough space", "File too large", "Disk quota exceeded")
_TOO_NEW = ("storage version number", "storage version greater")
_DAMAGED = (
    "Corrupt",
    "checksum",
    "Could not read enough bytes",
    "not a valid DuckDB database",
    "Serialization",
    "deserialize",
    "WAL file",
    "WAL was created",
    "INTERNAL",
)


def timestamp(seconds: float) -> datetime:
    """Return seconds since the epoch as DuckDB takes them: UTC without a zone, to the microsecond."""
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)


class Database:
    """One open store file: cursors for readers, one connection for whoever writes, reopened after a fatal error.

    Raises StoreTooNew, StoreDamaged, StoreLocked, StoreFull or StoreError; none changes the file.
    """

    def __init__(self, home: Home, clock: Callable[[], float]) -> None:
        self._home = home
        self._clock = clock
        self._draft = home.backups / "draft"
        self._readers = 0
        self._reopening = False
        self._gate = threading.Condition()
        self._root: Any = None
        home.create()
        for folder in (home.backups, self._draft):
            folder.mkdir(mode=0o700, exist_ok=True)
        if not home.store.exists():
            self._create()
        with self._explained():
            version = self._inspect()
        self._root = self._open()
        if waiting := all_migrations()[version:]:
            try:
                self.backup()
                with self._explained():
                    _migrate(self._root, waiting, self._clock())
            except BaseException:
                self.close()
                raise

    # Connections -------------------------------------------------------------------------------------------

    @contextmanager
    def cursor(self) -> Iterator[Any]:
        """Lend a connection of one's own, for reading. DuckDB's errors come out as StoreErrors."""
        with self._gate:
            self._gate.wait_for(lambda: not self._reopening)
            if self._root is None:
                raise StoreError(f"{self._home.store} is closed", todo="open it again")
            cursor = self._root.cursor()
            self._readers += 1
        try:
            with self._explained():
                yield cursor
        finally:
            cursor.close()
            with self._gate:
                self._readers -= 1
                self._gate.notify_all()

    @property
    def writer(self) -> Any:
        """Return the connection for writing; one thread at a time may use it."""
        if self._root is None:
            self._root = self._open()
        return self._root

    def mend(self) -> None:
        """Make the writer's connection usable again after a failed transaction."""
        connection = self.writer
        with suppress(duckdb.Error):  # no transaction is open where it ended with the error
            connection.rollback()
        try:
            connection.execute("SELECT 1").fetchall()
        except duckdb.Error:
            with self._gate:
                self._reopening = True
            try:
                self.close()
                self._root = self._open()
            finally:
                with self._gate:
                    self._reopening = False
                    self._gate.notify_all()

    def close(self) -> None:
        """Close the file once its readers are done; DuckDB writes its WAL into it."""
        with self._gate:
            root, self._root = self._root, None
            self._gate.wait_for(lambda: self._readers == 0)
        if root is not None:
            with suppress(duckdb.Error):  # where the last checkpoint fails, everything is in the WAL
                root.close()

    def checkpoint(self) -> None:
        """Write the WAL into the file, unless a reader is in the way."""
        try:
            self.writer.execute("CHECKPOINT")
        except duckdb.TransactionException:
            pass  # it is tried again after the next pause
        except duckdb.Error:
            self.mend()  # a checkpoint that fails makes DuckDB give the file up; everything is in the WAL

    @property
    def wal_bytes(self) -> int:
        """Return the size of the WAL, asked of the folder: the file is not opened."""
        try:
            return os.stat(_wal(self._home.store)).st_size
        except FileNotFoundError:
            return 0

    # Copies ------------------------------------------------------------------------------------------------

    def backup(self) -> Path:
        """Copy the store, while it is used, to a file of the backups' folder; keep the newest few.

        The copy is written inside a folder of its own, the only one that this DuckDB may write to, and gets
        its name when it is whole and on disk.
        """
        for left in self._draft.iterdir():
            left.unlink()
        draft = self._draft / "store.duckdb"
        stamp = timestamp(self._clock()).strftime("%Y%m%dT%H%M%S%fZ")
        with self.cursor() as cursor:
            cursor.execute(f"ATTACH {_quoted(str(draft))} AS backup")
            try:
                cursor.execute("COPY FROM DATABASE store TO backup")
                cursor.execute("CHECKPOINT backup")
            finally:
                cursor.execute("DETACH backup")
        done = self._home.backups / f"store-{stamp}.duckdb"
        _publish(draft, done)
        for old in backups(self._home)[KEPT_BACKUPS:]:
            old.unlink()
        return done

    # Opening -----------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Make an empty store under another name, so that a crash leaves none or a whole one."""
        store = self._home.store
        for log in (_wal(store), self._home.journal):
            if log.exists():
                raise StoreDamaged(
                    f"{store} is missing, but {log.name}, which belongs to it, is there: a new store loses it",
                    todo=f"put {store.name} back beside it, or move {log.name} away. {_way_back(self._home)}",
                )
        draft = store.with_name("store.duckdb.new")
        for left in (draft, _wal(draft)):
            left.unlink(missing_ok=True)
        with self._explained():
            connection = duckdb.connect(str(draft), config=_CONFIG)
            _migrate(connection, all_migrations(), self._clock())
            connection.close()
            _publish(draft, store)

    def _inspect(self) -> int:
        """Look at the store, read only, so that one that can't be used stays as it is; return its version."""
        store = self._home.store
        with duckdb.connect(str(store), config=_CONFIG | {"access_mode": "READ_ONLY"}) as connection:
            if not _value(connection, "is_nbdurable"):
                raise StoreDamaged(
                    f"{store} is a DuckDB database, but not one of nbdurable",
                    todo=f"it was left as it is: move it away. {_way_back(self._home)}",
                )
            version: int = _value(connection, "version")
            newest = all_migrations()[-1].version
            if version > newest:
                raise StoreTooNew(
                    f"{store} has version {version}; this nbdurable knows versions up to {newest}",
                    todo="install the newer nbdurable that wrote it (`pip install --upgrade nbdurable`); "
                    "it was left as it is",
                )
            if store.stat().st_size <= READ_THROUGH_BYTES:
                connection.execute(_SQL["read_through"]).fetchall()
            return version

    def _open(self) -> Any:
        """Connect for writing, and shut files, network and settings out."""
        with self._explained():
            connection = duckdb.connect(str(self._home.store), config=_CONFIG)
            try:
                _shut(connection, self._draft)
            except BaseException:
                connection.close()
                raise
            return connection

    # Errors ------------------------------------------------------------------------------------------------

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, OSError) as error:
            raise self.explain(error) from error

    def explain(self, error: BaseException) -> StoreError:
        """Return what an error of DuckDB or of the system means to a user, and what to do."""
        if isinstance(error, StoreError):
            return error
        store, text = self._home.store, str(error).strip()
        if any(sign in text for sign in _FULL):
            return StoreFull(
                f"there is no space left to commit to {store}: {_first_line(text)}",
                todo=f"free space on the disk of {store.parent} and repeat; what was acknowledged is kept",
            )
        if "Could not set lock" in text:
            return StoreLocked(
                f"another program has opened {store}: {_first_line(text)}",
                todo="close it: only nbdurable's coordinator opens this file (`nbdurable sql` asks it)",
            )
        if any(sign in text for sign in _TOO_NEW):
            return StoreTooNew(
                f"{store} was written by a newer DuckDB: {_first_line(text)}",
                todo="install the newer nbdurable that wrote it; the file was left as it is",
            )
        if any(sign in text for sign in _DAMAGED):
            return StoreDamaged(
                f"{store} is damaged: {_first_line(text)}",
                todo=f"it was left as it is. {_way_back(self._home)}",
            )
        return StoreError(f"an operation on {store} failed: {_first_line(text)}")


def backups(home: Home) -> list[Path]:
    """Return the copies that `backup` has made, newest first."""
    return sorted(home.backups.glob("store-*.duckdb"), reverse=True)


def _way_back(home: Home) -> str:
    """Return the commands that put the newest backup in the store's place, and keep what was there."""
    present = [path for path in (home.store, _wal(home.store), home.journal) if path.exists()]
    commands = [f"mv {quote(str(path))} {quote(f'{path}.damaged')}" for path in present]
    newest = backups(home)
    if not newest:
        line = " && ".join([*commands, "nbdurable up"])
        return f"There is no backup in {home.backups}. To begin with an empty store: `{line}`"
    line = " && ".join([*commands, f"cp {quote(str(newest[0]))} {quote(str(home.store))}"])
    return f"The newest backup is {newest[0]}. To go back to it: `{line}`"


def _migrate(connection: Any, migrations: list[Migration], now: float) -> None:
    for migration in migrations:
        connection.begin()
        connection.execute(migration.sql)
        connection.execute(_SQL["insert_migration"], (migration.version, migration.name, timestamp(now)))
        connection.commit()


def _shut(connection: Any, draft: Path) -> None:
    """Close this DuckDB to files, network and settings; only copies of the store may be written."""
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    connection.execute(f"SET GLOBAL allowed_directories = [{_quoted(str(draft))}]")
    connection.execute("SET GLOBAL enable_external_access = false")
    connection.execute("SET GLOBAL lock_configuration = true")


def _value(connection: Any, name: str) -> Any:
    return connection.execute(_SQL[name]).fetchone()[0]


def _publish(draft: Path, done: Path) -> None:
    """Give a finished file its name, with bytes and name on disk."""
    _sync(draft)
    os.replace(draft, done)
    if os.name != "nt":  # Windows has no handle for a folder
        _sync(done.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _wal(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "no reason given"
