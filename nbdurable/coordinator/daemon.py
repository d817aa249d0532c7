"""The coordinator as a process: it owns the store, listens, ticks, and ends when idle or told to.

Owns the socket, `coordinator.json`, signals and the daily backup; knows nothing of runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from nbdurable import __version__
from nbdurable.coordinator.app import create_app
from nbdurable.coordinator.engine import Engine
from nbdurable.coordinator.state import SystemClock
from nbdurable.coordinator.workers import WorkerPool, start_worker
from nbdurable.errors import StoreError, StoreLocked, Untrusted, UsageError
from nbdurable.security import load_key, load_token, standing
from nbdurable.settings import Home, Settings
from nbdurable.store.duckdb_store import DuckDBStore
from nbdurable.store.port import Store

TICK_S = 0.5
UNIX_SOCKETS = hasattr(socket, "AF_UNIX") and sys.platform != "win32"
_LOCKED_S = 15.0  # how long a coordinator that ends may still hold the store
_BACKUP_EVERY_S = 86_400.0

_log = logging.getLogger("nbdurable.coordinator")


def serve(home: Home, *, stay: bool = False) -> None:
    """Own the project's store and serve its API until idle (unless `stay`), asked to end, or signalled.

    A store that is not trusted is only looked at. Raises StoreLocked where another coordinator keeps the store, and
    what opening the store raises.
    """
    home.create()
    settings = Settings.load(home)
    with contextlib.suppress(Untrusted):
        load_key(home)  # comes before the store: see `security`
    token = load_token(home)
    store = _open_store(home)
    try:
        listener, url = _listen(home)
        try:
            _run(home, settings, store, token, listener, url, stay)
        finally:
            _forget(home)
            listener.close()
    finally:
        _backup_if_due(home, store)
        store.close()


def _open_store(home: Home) -> DuckDBStore:
    deadline = time.monotonic() + _LOCKED_S
    while True:
        try:
            return DuckDBStore.open(home)
        except StoreLocked:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def _run(
    home: Home, settings: Settings, store: Store, token: str, listener: socket.socket, url: str, stay: bool
) -> None:
    clock = SystemClock()
    workers = WorkerPool(home, clock, start_worker if settings.worker_slots > 0 else None)

    async def main() -> None:
        engine = Engine(
            store,
            home,
            settings,
            clock=clock,
            workers=workers,
            on_shutdown=lambda: server.end(),
            standing=lambda: standing(home),
        )
        config = uvicorn.Config(
            create_app(engine.handlers, token),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            ws="none",
            timeout_keep_alive=3600,  # a connection that is open is a client that is there
            timeout_graceful_shutdown=10,
        )
        server = _Server(config, engine)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.001)
        if not serving.done():
            _announce(home, url)
            _log.info("coordinator %s serves %s at %s", __version__, home.root, url)
            idle_exit_s = None if stay else settings.idle_exit_s
            ticking = asyncio.create_task(_tick(engine, server, home, store, url, idle_exit_s))
            await serving
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
        await serving
        engine.close()

    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())


class _Server(uvicorn.Server):
    """uvicorn, ended by a signal without dying of it, and with long polls answered first."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def end(self) -> None:
        """End soon."""
        self.should_exit = True

    @property
    def clients(self) -> int:
        """Return how many connections are open."""
        return len(self.server_state.connections)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        names = ("SIGTERM", "SIGINT", "SIGBREAK")
        former = {
            number: signal.signal(number, lambda *_: self.end())
            for number in (getattr(signal, name) for name in names if hasattr(signal, name))
        }
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop()
        await super().shutdown(sockets)


async def _tick(
    engine: Engine, server: _Server, home: Home, store: Store, url: str, idle_exit_s: float | None
) -> None:
    idle_since = time.monotonic()
    while True:
        due_in_s = engine.due_in_s
        await asyncio.sleep(TICK_S if due_in_s is None else min(TICK_S, max(0.02, due_in_s)))
        try:
            await engine.tick()
        except StoreError:  # e.g. no space left: it is logged, and the next tick tries again
            pass
        except Exception:
            _log.exception("a tick failed")
        if not home.root.exists():
            server.end()  # somebody removed the project's state: there is nothing to keep
        elif not home.coordinator.exists():
            _announce(home, url)
        if not engine.is_idle or server.clients:
            idle_since = time.monotonic()
        idle_s = time.monotonic() - idle_since
        if idle_exit_s is None:
            if idle_s > 60:
                await asyncio.to_thread(_backup_if_due, home, store)
        elif idle_s >= idle_exit_s:
            _log.info("nothing to do for %.0f s: the coordinator ends", idle_s)
            server.end()


# Where it is -----------------------------------------------------------------------------------------------


def _listen(home: Home) -> tuple[socket.socket, str]:
    """Bind the socket; a stale one is removed, which is safe because this process owns the store."""
    home.coordinator.unlink(missing_ok=True)
    if not UNIX_SOCKETS:
        listener = socket.create_server(("127.0.0.1", 0))
        return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"
    path = home.socket
    _secure_folder(path.parent)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener, f"unix:{path}"


def _secure_folder(folder: Path) -> None:
    """Make the socket's folder, or check that it is this user's alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UsageError(f"{folder} belongs to somebody else: the socket can't stand there", todo="remove it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def _announce(home: Home, url: str) -> None:
    """Write `coordinator.json` as a whole, for this user alone."""
    place: dict[str, Any] = {"pid": os.getpid(), "url": url, "version": __version__}
    draft = home.coordinator.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(place, file)
    draft.replace(home.coordinator)


def _forget(home: Home) -> None:
    home.coordinator.unlink(missing_ok=True)
    if UNIX_SOCKETS:
        home.socket.unlink(missing_ok=True)


def _backup_if_due(home: Home, store: Store) -> None:
    """Back the store up where the last copy is a day old; a failure is logged: the store itself is whole."""
    if not home.root.exists():
        return
    with contextlib.suppress(FileNotFoundError):
        newest = max((copy.stat().st_mtime for copy in home.backups.iterdir()), default=0.0)
        if time.time() - newest < _BACKUP_EVERY_S:
            return
    try:
        store.backup()
    except Exception:
        _log.exception("the backup failed")
