"""Runs as people see them: created, listed, shown, followed, cancelled, closed.

Knows nothing of how a run is driven beyond its row.
"""

from __future__ import annotations

import asyncio
import codecs
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from nbdurable import contract, spending
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Change, Core, fence, hold_deadline
from nbdurable.coordinator.creation import Creation
from nbdurable.coordinator.families import Families, started
from nbdurable.coordinator.fold import Fold, Kind
from nbdurable.errors import StoreFull
from nbdurable.lifecycle import Happening
from nbdurable.models import (
    ChildRun,
    Run,
    RunDetail,
    RunStatus,
)

GATHER_S = 0.1  # a follower gets what happens within it at once: reading each event singly slows the run down
_ALL = 1_000_000_000


class Runs:
    """What is asked about runs."""

    def __init__(self, core: Core, creation: Creation, families: Families) -> None:
        self._core, self._creation, self._families = core, creation, families

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.CREATE_RUN: self.create_run,
            contract.CREATE_RUNS: self.create_runs,
            contract.START_CHILDREN: self.start_children,
            contract.LIST_RUNS: self.list_runs,
            contract.GET_RUN: self.get_run,
            contract.READ_EVENTS: self.read_events,
            contract.READ_LOG: self.read_log,
            contract.CANCEL_RUN: self.cancel_run,
            contract.SET_BUDGET: self.set_budget,
            contract.CLOSE_RUN: self.close_run,
        }

    async def create_run(self, wanted: contract.CreateRun) -> Run:
        return (await self._create((wanted,)))[0]

    async def create_runs(self, wanted: contract.CreateRuns) -> contract.Runs:
        return contract.Runs(runs=tuple(await self._create(wanted.runs)))

    async def start_children(self, wanted: contract.StartChildren) -> contract.Runs:
        async with self._core.creating:
            fence(await self._core.current(wanted.run_id), wanted.epoch)
            await self._creation.put_off(wanted.children, wanted.run_id)
            made = await self._start(wanted)
        await self._families.see_to()
        return contract.Runs(runs=tuple(made))

    async def _start(self, wanted: contract.StartChildren) -> list[Run]:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            parent = await self._creation.parent(live, wanted.step)
            made = await self._creation.make(wanted.children, parent)
            new = [one.change for one in made if one.change is not None]
            said = [
                self._core.step_event(live.run, Kind.CHILD_STARTED, wanted.step, *started(one.run))
                for one in made
                if one.change is not None
            ]
            if new:
                async with self._core.born(change.live for change in new):
                    await self._core.commit_all([Change(live, tuple(said)), *new])
            return [one.run for one in made]

    async def _create(self, wanted: Sequence[contract.CreateRun]) -> list[Run]:
        async with self._core.creating:
            await self._creation.put_off(wanted)
            made = await self._creation.make(wanted)
            new = [one.change for one in made if one.change is not None]
            if new:
                async with self._core.born(change.live for change in new):
                    await self._core.commit_all(new)
        await self._families.see_to()
        return [one.run for one in made]

    async def list_runs(self, wanted: contract.ListRuns) -> contract.Runs:
        typed = {name: getattr(wanted, name) for name in ("before", "parent", "root")}
        named = {name: await self._core.resolve(run) for name, run in typed.items() if run is not None}
        wanted = wanted.model_copy(update=named)
        return contract.Runs(runs=tuple(await self._core.read(self._core.store.runs, wanted)))

    async def get_run(self, wanted: contract.ByRun) -> RunDetail:
        run = await self._core.current(wanted.run_id)
        live = self._core.runs.get(run.id)
        fold = live.fold if live is not None and live.fold is not None else await self._core.read_fold(run.id)
        waits = await self._core.read(
            self._core.store.waits, contract.ListWaits(run_id=run.id, status=None, limit=_ALL)
        )
        return RunDetail(
            **dict(run),
            steps=fold.steps(),
            waits=tuple(waits),
            usage=fold.usage,
            children=await self._children(run.id, fold),
        )

    async def _children(self, run_id: str, fold: Fold) -> tuple[ChildRun, ...]:
        """Return the runs that a run started, oldest first; its history says whether there are any."""
        if not fold.has_children:
            return ()
        found = await self._core.read(self._core.store.runs, contract.ListRuns(parent=run_id, limit=_ALL))
        newest = [
            self._core.runs[one.id].run if one.id in self._core.runs else one for one in reversed(found)
        ]
        return tuple(
            ChildRun(
                id=one.id, notebook=one.notebook, status=one.status, reason=one.reason, step=one.parent_step
            )
            for one in newest
        )

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
        run = await self._families.cancel(await self._core.resolve(wanted.run_id), "cancelled by hand")
        await self._families.see_to()
        return run

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
