"""The coordinator without its HTTP: who answers which question, and what time brings.

Owns how the parts are put together; knows nothing of HTTP, and never imports the runner.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from nbdurable import __version__, contract
from nbdurable.contract import Endpoint
from nbdurable.coordinator.calls import Calls
from nbdurable.coordinator.core import Core
from nbdurable.coordinator.creation import Creation
from nbdurable.coordinator.driving import Driving
from nbdurable.coordinator.families import Families
from nbdurable.coordinator.hooks import Hooks
from nbdurable.coordinator.past import Past
from nbdurable.coordinator.runs import Runs
from nbdurable.coordinator.sayings import Sayings
from nbdurable.coordinator.space import Space
from nbdurable.coordinator.state import Clock
from nbdurable.coordinator.steps import Steps
from nbdurable.coordinator.waits import Waits
from nbdurable.coordinator.workers import WorkerPool
from nbdurable.errors import DurableError
from nbdurable.models import RunStatus, Shape
from nbdurable.settings import Home, Settings
from nbdurable.store.port import Store

Question = TypeVar("Question", bound=Shape)
Answer = TypeVar("Answer", bound=Shape)


class Engine:
    """Answers each question of the contract (`answer`), and acts when time passes (`tick`).

    `clock`: injected in tests. `workers`: None where runs are only taken by workers from elsewhere.
    `on_shutdown`: called when a client asks the coordinator to end. `standing`: says why the store is not trusted, as
    long as it isn't; until then questions that only look are answered, and nothing is handed out, timed or ended.
    `draw`: throws the dice of backoffs, from 0 to 1.
    """

    def __init__(
        self,
        store: Store,
        home: Home,
        settings: Settings,
        *,
        clock: Clock | None = None,
        workers: WorkerPool | None = None,
        on_shutdown: Callable[[], None] = lambda: None,
        standing: Callable[[], DurableError | None] = lambda: None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._core = Core(store, home, settings, clock=clock, workers=workers, draw=draw)
        self._on_shutdown = on_shutdown
        self._started_at = self._core.clock.now()
        self._driving = Driving(self._core)
        creation, self._families = Creation(self._core), Families(self._core)
        self._waits = Waits(self._core, creation)
        self.handlers: dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]] = {
            contract.HEALTH: self._health,
            contract.SHUTDOWN: self._shutdown,
            contract.SQL: self._sql,
            **Past(self._core, creation).handlers(),
            **Runs(self._core, creation, self._families).handlers(),
            **self._driving.handlers(),
            **Sayings(self._core).handlers(),
            **Hooks(self._core, self._driving).handlers(),
            **Steps(self._core).handlers(),
            **Calls(self._core).handlers(),
            **self._waits.handlers(),
            **Space(self._core).handlers(),
        }
        self._standing = standing
        self._trusted = standing() is None
        if not self._trusted:
            self.handlers = {
                endpoint: handler if endpoint in contract.LOOKING else self._guarded(handler)
                for endpoint, handler in self.handlers.items()
            }

    def _guarded(self, handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def answer(question: Any) -> Any:
            if (refusal := self._refusal()) is not None:
                raise refusal
            return await handler(question)

        return answer

    def _refusal(self) -> DurableError | None:
        """Return why nothing may be changed; a store that was trusted meanwhile is from now on."""
        if self._trusted:
            return None
        refusal = self._standing()
        self._trusted = refusal is None
        return refusal

    async def answer(self, endpoint: Endpoint[Question, Answer], question: Question) -> Answer:
        """Answer a question; raises what the client is to see."""
        found: Answer = await self.handlers[endpoint](question)
        return found

    async def _sql(self, wanted: contract.Query) -> contract.Table:
        return await asyncio.to_thread(self._core.store.query, wanted)

    async def _health(self, _: contract.Nothing) -> contract.Health:
        return contract.Health(
            pid=os.getpid(),
            version=__version__,
            home=str(self._core.home.root),
            started_at=self._started_at,
            open_runs=len(self._core.runs),
            workers=self._core.workers.alive(),
            trouble=self._core.trouble,
        )

    async def _shutdown(self, _: contract.Nothing) -> contract.Nothing:
        self._on_shutdown()
        return contract.Nothing()

    async def tick(self) -> None:
        """Act on what time brings: timers that are over, drivers that died, cancelled runs that go on."""
        if self._refusal() is not None:
            return
        await self._waits.catch_up()
        await self._families.see_to()
        now, elapsed = self._core.clock.now(), self._core.clock.elapsed()
        for wait_id in [wait_id for wait_id, due_at in self._core.timers.items() if due_at <= now]:
            await self._waits.time_over(wait_id)
        for run_id in [run_id for run_id, at in self._core.expiring.items() if at <= now]:
            await self._driving.expire(run_id)
        for run_id in [run_id for run_id, at in self._core.delayed.items() if at <= now]:
            await self._driving.due(run_id)
        for run_id, live in list(self._core.runs.items()):
            if live.lease is not None:
                await self._driving.look_after(run_id, live.lease, live.run.epoch, elapsed)
        if self._core.queue and not self._core.stopping:
            self._core.workers.provide()
            await self._driving.tell_trouble()

    @property
    def due_in_s(self) -> float | None:
        """Return after how many seconds time brings the next thing, or None where it brings nothing."""
        if not self._trusted:
            return None
        timed = (self._core.timers, self._core.delayed, self._core.expiring)
        first = min((at for times in timed for at in times.values()), default=None)
        return None if first is None else first - self._core.clock.now()

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing is driven, queued or timed, so that the coordinator may end.

        What a store that is not trusted holds does not count: it is left alone.
        """
        return not self._trusted or not (
            self._core.queue
            or self._core.timers
            or self._core.delayed
            or self._core.expiring
            or self._core.fallen
            or any(live.run.status is RunStatus.RUNNING for live in self._core.runs.values())
        )

    def stop(self) -> None:
        """Answer all long polls now, and hand out no more work; runs stay as they are."""
        self._core.stop()

    def close(self) -> None:
        """End the readers' threads."""
        self._core.close()
