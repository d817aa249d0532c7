"""A process that submits to a store and prints each acknowledged number, to be killed by tests.

`python writer.py HOME alone|threads|full`. `alone`: one submission at a time. `threads`: four at once, without end.
`full`: one at a time while no file may grow beyond a limit, then without it; prints `ack SEQ`, `full SEQ`, `error SEQ`.
Each submission is an event and its run's row, both with the same epoch.
"""

from __future__ import annotations

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


def fill(store: DuckDBStore) -> None:
    import resource

    unlimited = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (GROWTH_BYTES, unlimited))
    failures = 0
    for change in changes(store, 1, text="m" * 50_000):
        ticket = store.submit(change)
        try:
            ticket.done.result()
            say("ack", ticket.seqs[0])
        except StoreFull:
            say("full", ticket.seqs[0])
            failures += 1
            if failures == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        except Exception:
            say("error", ticket.seqs[0])
        if ticket.seqs[0] == 40:
            store.close()
            return


def main() -> None:
    home, mode = Home(Path(sys.argv[1])), sys.argv[2]
    store = DuckDBStore.open(home)
    if mode == "full":
        fill(store)
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
