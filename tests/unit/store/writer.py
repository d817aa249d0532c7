"""A process that submits to a store and prints each acknowledged number, to be killed by tests.

`python writer.py HOME MODE`; each submission is an event and its run's row, both with the same epoch. Modes:
`alone`: one submission at a time, without end; `threads`: four.
`full`: some while no file may grow beyond a limit, some without it; prints `ack`, `full` or `error SEQ`.
`stuck`: events alone, each followed by a reader; the limit leaves room for the journal and for the database's
log until that is long, but none to write the log into the file. Prints `unread 0` too, and `survivors COUNT`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from nbdurable.errors import StoreFull
from nbdurable.settings import Home
from nbdurable.store.duckdb_store import DuckDBStore
from nbdurable.store.port import Changes
from tests.tools.changes import commit, run, run_id

GROWTH_BYTES = 600_000
STUCK_BYTES = 20 << 20  # more than the log may hold before DuckDB writes it into the file


def say(word: str, seq: int) -> None:
    """Print in one write, so that threads do not mix and nothing waits in a buffer."""
    os.write(1, f"{word} {seq}\n".encode())


def changes(store: DuckDBStore, number: int, text: str = "{}") -> Iterator[Changes]:
    """Go on where the run's row stands."""
    known = store.run(run_id(number))
    for epoch in count(known.epoch + 1 if known else 1):
        made = commit(f"step {epoch % 7}", text=text, number=number)
        yield Changes([type(made)(**{**vars(made), "epoch": epoch})], [run(number, epoch=epoch)])


def submit(store: DuckDBStore, number: int) -> None:
    for change in changes(store, number):
        ticket = store.submit(change)
        ticket.done.result()
        say("ack", ticket.seqs[0])


def limit(size_bytes: int | None) -> None:
    """Let no file of this process grow beyond a size: what a full disk does, without one."""
    import resource

    soft = resource.RLIM_INFINITY if size_bytes is None else size_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))


def attempt(store: DuckDBStore, change: Changes) -> str:
    ticket = store.submit(change)
    try:
        ticket.done.result()
        word = "ack"
    except StoreFull:
        word = "full"
    except Exception:
        word = "error"
    say(word, ticket.seqs[0])
    return word


def fill(store: DuckDBStore) -> None:
    wanted = changes(store, 1, text="m" * 50_000)
    limit(GROWTH_BYTES)
    failures = 0
    while failures < 3:
        failures += attempt(store, next(wanted)) != "ack"
    limit(None)
    for _ in range(20):
        attempt(store, next(wanted))
    store.close()


class Count(logging.Handler):
    """Counts commits that were followed by an error."""

    seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += record.levelno == logging.WARNING


def stick(store: DuckDBStore, home: Home) -> None:
    survivors = Count()
    logging.getLogger("nbdurable.store").addHandler(survivors)

    def big() -> None:
        attempt(store, Changes([commit("step", text=os.urandom(500_000).hex())]))
        try:
            store.run(run_id(1))
        except StoreFull:
            say("unread", 0)

    while home.store.stat().st_size < STUCK_BYTES:
        big()
    limit(home.store.stat().st_size + 100_000)
    for _ in range(30):
        big()
    limit(None)
    big()
    say("survivors", survivors.seen)
    store.close()


def main() -> None:
    home, mode = Home(Path(sys.argv[1])), sys.argv[2]
    store = DuckDBStore.open(home)
    if mode == "full":
        fill(store)
    elif mode == "stuck":
        stick(store, home)
    else:
        numbers = [1] if mode == "alone" else [1, 2, 3, 4]
        threads = [threading.Thread(target=submit, args=(store, number)) for number in numbers]
        for thread in threads:
            thread.start()
        say("open", os.getpid())
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
