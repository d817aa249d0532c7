"""A coordinator's engine without its process: a real store, a clock and dice that a test sets, what drivers say."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from nbdurable import contract, processes
from nbdurable.coordinator.engine import Engine
from nbdurable.coordinator.workers import WorkerPool
from nbdurable.errors import DurableError
from nbdurable.models import Driver, DriverKind, ProcessIdentity, Run, SignedManifest
from nbdurable.settings import Home, Settings
from nbdurable.store.duckdb_store import DuckDBStore

T = TypeVar("T")
SETTINGS = Settings(lease_s=20, cancel_grace_s=10, idle_exit_s=60)


class SetClock:
    """A clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self.at = 1_790_000_000.0

    def now(self) -> float:
        return self.at

    def elapsed(self) -> float:
        return self.at


class World:
    """A store, a clock, and an engine over them that can be restarted."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.clock = SetClock()
        self.start: Callable[[Home], subprocess.Popen[bytes]] | None = None
        self.refusal: DurableError | None = None

    def play(self, story: Callable[[Engine], Awaitable[T]]) -> T:
        """Let one coordinator live for as long as the story goes."""

        async def main() -> T:
            store = DuckDBStore.open(self.home, clock=self.clock.now)
            workers = WorkerPool(self.home, self.clock, self.start)
            engine = Engine(
                store,
                self.home,
                SETTINGS,
                clock=self.clock,
                workers=workers,
                standing=lambda: self.refusal,
                draw=lambda: 0.5,
            )
            try:
                return await story(engine)
            finally:
                engine.close()
                store.close()

        return asyncio.run(main())


def driver(kind: str = "headless", pid: int | None = None, host: str | None = None) -> Driver:
    role: Any = "worker" if kind == "headless" else "kernel"
    found = processes.identity(role, pid)
    if host is not None:
        found = found.model_copy(update={"host": host})
    return Driver(kind=DriverKind(kind), process=found)


async def headless(engine: Engine, key: str | None = None) -> Run:
    return await engine.answer(
        contract.CREATE_RUN,
        contract.CreateRun(
            notebook="/n.ipynb", kind=DriverKind.HEADLESS, snapshot="0" * 64, idempotency_key=key
        ),
    )


async def interactive(engine: Engine, by: Driver) -> Run:
    return await engine.answer(
        contract.CREATE_RUN, contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.INTERACTIVE, driver=by)
    )


async def lease(engine: Engine, worker: Driver, **more: Any) -> Run:
    (run,) = (
        await engine.answer(contract.LEASE_WORK, contract.LeaseWork(driver=worker, slots=1, **more))
    ).runs
    return run


async def show(engine: Engine, run: Run) -> Any:
    return await engine.answer(contract.GET_RUN, contract.ByRun(run_id=run.id))


async def beat(engine: Engine, run: Run, *processes: ProcessIdentity) -> contract.Orders:
    return await engine.answer(
        contract.HEARTBEAT, contract.Heartbeat(run_id=run.id, epoch=run.epoch, processes=processes)
    )


async def begin(engine: Engine, run: Run, step: str = "s") -> int:
    asked = contract.BeginStep(run_id=run.id, epoch=run.epoch, step=step, action="execute", reason="new")
    return (await engine.answer(contract.BEGIN_STEP, asked)).attempt


async def commit(engine: Engine, run: Run, attempt: int, step: str = "s") -> int:
    asked = contract.CommitStep(
        run_id=run.id,
        epoch=run.epoch,
        step=step,
        attempt=attempt,
        status="completed",
        manifest=SignedManifest(text="{}", signature="0"),
    )
    return (await engine.answer(contract.COMMIT_STEP, asked)).seq
