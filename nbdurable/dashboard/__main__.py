"""`python -m nbdurable.dashboard`: the process that serves the pages.

Owns its port, its file in the project's state folder, and its end: on SIGTERM or Ctrl-C, and with
`--with-parent` when the process that started it is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdurable import processes
from nbdurable.errors import DurableError, UsageError
from nbdurable.settings import Home, Settings

_PORTS = 50
_PARENT_LOOK_S = 0.5
_HOST = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """Return a socket that listens on the loopback interface, on `port` or the next free one.

    Raises UsageError where none of fifty is free.
    """
    for candidate in range(port, min(port + _PORTS, 65536)) if port else (0,):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if sys.platform != "win32":  # there it would share the port with whoever has it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, candidate))
            listener.listen(128)
        except OSError:
            listener.close()
            continue
        return listener
    raise UsageError(
        f"no port from {port} to {port + _PORTS - 1} is free for the pages",
        todo="set `dashboard_port` in .nbdurable/settings.toml, or NBDURABLE_DASHBOARD_PORT",
    )


async def serve(home: Home, listener: socket.socket, *, with_parent: bool = False) -> None:
    """Serve the pages until the process is asked to end."""
    import uvicorn

    from nbdurable.client import Client
    from nbdurable.dashboard.app import create_app

    parent = os.getppid()
    with Client(home, start=False, timeout_s=2.0) as client:
        config = uvicorn.Config(
            create_app(client),
            log_level="warning",
            access_log=False,  # addresses may hold the token
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)

        async def follow_parent() -> None:
            while os.getppid() == parent and processes.exists(parent):
                await asyncio.sleep(_PARENT_LOOK_S)
            server.should_exit = True

        follower = asyncio.create_task(follow_parent()) if with_parent else None
        with _announced(home, f"http://{_HOST}:{listener.getsockname()[1]}"):
            await server.serve(sockets=[listener])
        if follower is not None:
            follower.cancel()


@contextlib.contextmanager
def _announced(home: Home, url: str) -> Iterator[None]:
    """Say in the project's state folder where the pages are, as long as they are there."""
    mine = {"pid": os.getpid(), "url": url}
    draft = home.dashboard.with_name(f"{home.dashboard.name}.{os.getpid()}")
    draft.write_text(json.dumps(mine), encoding="utf-8")
    draft.replace(home.dashboard)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # another dashboard may have taken the place
            if json.loads(home.dashboard.read_text(encoding="utf-8")) == mine:
                home.dashboard.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the process; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nbdurable.dashboard", description="Serve nbdurable's pages."
    )
    parser.add_argument("--home", type=Path, required=True, help="the project's state folder (.nbdurable)")
    parser.add_argument("--port", type=int, help="default: the setting dashboard_port, or the next free one")
    parser.add_argument("--with-parent", action="store_true", help="end when the parent process is gone")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn ends cleanly, then raises it again
    home = Home(given.home.expanduser().resolve())
    try:
        settings = Settings.load(home)
        home.create()
        with listen(settings.dashboard_port if given.port is None else given.port) as listener:
            asyncio.run(serve(home, listener, with_parent=given.with_parent))
    except DurableError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
