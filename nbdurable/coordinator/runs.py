"""Runs as people see them: created, listed, shown, followed, cancelled, closed.

Knows nothing of how a run is driven beyond its row.
"""

from __future__ import annotations

import asyncio
import codecs
import os
from collections.abc import Awaitable, Callable
from typing import Any

from nbdurable import contract, lifecycle, spending
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Core, fence, hold_deadline, label
from nbdurable.coordinator.fold import Fold, Kind
from nbdurable.coordinator.names import new_run_id
from nbdurable.coordinator.state import Live
from nbdurable.errors import StoreFull, UsageError
from nbdurable.lifecycle import Happening
from nbdurable.models import (
    DriverKind,
    Run,
    RunDetail,
    RunStatus,
)
from nbdurable.policies import span

KEY_LIFE_S = 30 * 86_400.0  # how long an idempotency key returns the first run
GATHER_S = 0.1  # a follower gets what happens within it at once: reading each event singly slows the run down
_ALL = 1_000_000_000


class Runs:
    """What is asked about runs."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.CREATE_RUN: self.create_run,
            contract.LIST_RUNS: self.list_runs,
            contract.GET_RUN: self.get_run,
            contract.READ_EVENTS: self.read_events,
            contract.READ_LOG: self.read_log,
            contract.CANCEL_RUN: self.cancel_run,
            contract.SET_BUDGET: self.set_budget,
            contract.CLOSE_RUN: self.close_run,
        }

    async def create_run(self, wanted: contract.CreateRun) -> Run:
        headless = wanted.kind is DriverKind.HEADLESS
        if headless and wanted.snapshot is None:
            raise UsageError(
                "a headless run needs the snapshot of its notebook", todo="write it as a blob first"
            )
        if headless != (wanted.driver is None):
            raise UsageError(
                "an interactive run is created by its driver, a headless one without", todo="mend `driver`"
            )
        if not headless and (wanted.delay_s or wanted.ttl_s or wanted.timeout_s or wanted.retries):
            raise UsageError(
                "only a headless run can be delayed, expire, time out or be retried",
                todo="leave those out, or create it headless",
            )
        async with self._core.creating:
            if wanted.idempotency_key is not None:
                since = self._core.clock.now() - KEY_LIFE_S
                first = await self._core.read(self._core.store.run_with_key, wanted.idempotency_key, since)
                if first is not None:
                    live = self._core.runs.get(first.id)
                    return first if live is None else live.run
            at = self._core.clock.now()
            fields = {name: value for name, value in wanted if name not in ("driver", "delay_s", "ttl_s")}
            reason = f"{label(wanted.driver)} drives it" if wanted.driver else "waits for a worker"
            status, begins_at = RunStatus.QUEUED if headless else RunStatus.RUNNING, at + wanted.delay_s
            if wanted.delay_s:
                status, reason = RunStatus.DELAYED, f"begins in {span(wanted.delay_s)}"
            run = Run(
                id=new_run_id(at),
                status=status,
                reason=reason,
                begins_at=begins_at if wanted.delay_s else None,
                expires_at=None if wanted.ttl_s is None else begins_at + wanted.ttl_s,
                driven_since=None if headless else at,
                epoch=0 if headless else 1,
                driver=None if headless else wanted.driver,
                created_at=at,
                started_at=None if headless else at,
                updated_at=at,
                **fields,
            )
            live = Live(run, fold=None if headless else Fold())
            async with live.lock:
                if not headless and wanted.driver is not None:
                    live.lease = self._core.new_lease(wanted.driver)
                self._core.runs[run.id] = live
                try:
                    await self._core.commit(
                        live, [self._core.event(run, Kind.RUN_CREATED, f"created; {reason}")], run=run
                    )
                except BaseException:
                    del self._core.runs[run.id]
                    raise
            return run

    async def list_runs(self, wanted: contract.ListRuns) -> contract.Runs:
        if wanted.before is not None:
            wanted = wanted.model_copy(update={"before": await self._core.resolve(wanted.before)})
        return contract.Runs(runs=tuple(await self._core.read(self._core.store.runs, wanted)))

    async def get_run(self, wanted: contract.ByRun) -> RunDetail:
        run = await self._core.current(wanted.run_id)
        live = self._core.runs.get(run.id)
        fold = live.fold if live is not None and live.fold is not None else await self._core.read_fold(run.id)
        waits = await self._core.read(
            self._core.store.waits, contract.ListWaits(run_id=run.id, status=None, limit=_ALL)
        )
        return RunDetail(**dict(run), steps=fold.steps(), waits=tuple(waits), usage=fold.usage)

    async def read_events(self, wanted: contract.ReadEvents) -> contract.Events:
        run = await self._core.current(wanted.run_id)
        deadline = hold_deadline(wanted.hold_s)
        if wanted.hold_s and run.id in self._core.runs:
            await asyncio.sleep(min(GATHER_S, wanted.hold_s))
        while True:
            live = self._core.runs.get(run.id)
            changed = live.changed.next() if live is not None else None
            try:
                events = await self._core.read(self._core.store.events, run.id, wanted.after, wanted.limit)
            except StoreFull:
                if not wanted.hold_s:
                    raise
                events = []  # who follows goes on following: `Health.trouble` says what keeps the run
            run = await self._core.current(run.id)
            if (
                events
                or changed is None
                or run.status.is_final
                or not await self._core.hold(changed, deadline)
            ):
                return contract.Events(events=tuple(events), run=run)

    async def read_log(self, wanted: contract.ReadLog) -> contract.Log:
        run_id = await self._core.resolve(wanted.run_id)
        return await self._core.read(_read_log, self._core.home.run_log(run_id), wanted.offset, wanted.limit)

    async def cancel_run(self, wanted: contract.ByRun) -> Run:
        async with self._core.locked(await self._core.resolve(wanted.run_id)) as live:
            run = live.run
            if run.status is RunStatus.CANCELLED or (
                run.status is RunStatus.RUNNING and run.cancel_requested
            ):
                return run  # asked for before
            happening = lifecycle.cancellation(run.status, run.driver.kind if run.driver else run.kind)
            if happening is Happening.REQUEST_CANCEL:
                reason = "asked to cancel; its worker stops it"
                run = await self._core.move(live, happening, Kind.RUN_CANCEL_REQUESTED, reason)
                if live.lease is not None:
                    live.lease.cancel_by = self._core.cancel_deadline()
                return run
            return await self._core.move(live, happening, Kind.RUN_CANCELLED, "cancelled by hand")

    async def set_budget(self, wanted: contract.SetBudget) -> Run:
        async with self._core.locked(await self._core.resolve(wanted.run_id)) as live:
            if live.run.budget != wanted.budget:
                run = live.run.model_copy(update={"budget": wanted.budget})
                sentence = f"its budget is {spending.say_budget(wanted.budget)}"
                data = {"budget": wanted.budget.model_dump()}
                await self._core.commit(
                    live, [self._core.event(run, Kind.BUDGET_SET, sentence, **data)], run=run
                )
            return live.run

    async def close_run(self, wanted: contract.CloseRun) -> Run:
        async with self._core.locked(await self._core.resolve(wanted.run_id)) as live:
            run = live.run
            if run.status is RunStatus.COMPLETED and run.epoch == wanted.epoch:
                return run  # asked for before
            if run.status is RunStatus.RUNNING or run.epoch != wanted.epoch:
                fence(run, wanted.epoch)
            return await self._core.move(live, Happening.CLOSE, Kind.RUN_CLOSED, wanted.reason)


def _read_log(path: os.PathLike[str], offset: int, limit: int) -> contract.Log:
    """Read a piece of a log, cut at whole characters."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, offset))
            data = file.read(max(0, limit))
    except FileNotFoundError:
        data = b""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return contract.Log(text=text, next_offset=offset + len(data) - len(decoder.getstate()[0]))
