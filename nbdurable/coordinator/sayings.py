"""What a run's own code says about it: result, metadata, log and progress.

Owns that each saying counts once, however often it is sent; decides nothing by what is said.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from nbdurable import contract
from nbdurable.contract import Change, Endpoint
from nbdurable.coordinator.core import Core
from nbdurable.coordinator.fold import Kind
from nbdurable.coordinator.state import Live
from nbdurable.errors import UsageError

MAX_METADATA_BYTES = 256_000


class Sayings:
    """What drivers say about their run in its own words."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {
            contract.SET_RESULT: self.set_result,
            contract.CHANGE_METADATA: self.change_metadata,
            contract.ADD_LOG: self.add_log,
            contract.SET_PROGRESS: self.set_progress,
        }

    async def set_result(self, wanted: contract.SetResult) -> contract.Nothing:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            run = live.run.model_copy(update={"result": wanted.result, "updated_at": self._core.clock.now()})
            await self._core.commit(
                live, [self._core.event(run, Kind.RESULT_SET, "its result was set")], run=run
            )
        return contract.Nothing()

    async def change_metadata(self, wanted: contract.ChangeMetadata) -> contract.Metadata:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            nonces = await self._nonces(live)
            if wanted.nonce not in nonces:
                values = changed(live.run.metadata, wanted.changes)
                run = live.run.model_copy(update={"metadata": values, "updated_at": self._core.clock.now()})
                said = ", ".join(f"{change.how} {change.name}" for change in wanted.changes)
                data = {"nonce": wanted.nonce, "changes": [change.model_dump() for change in wanted.changes]}
                event = self._core.step_event(
                    run, Kind.METADATA_CHANGED, wanted.step, f"metadata: {said}", data
                )
                await self._core.commit(live, [event], run=run)
                nonces.add(wanted.nonce)
            return contract.Metadata(values=live.run.metadata)

    async def add_log(self, wanted: contract.AddLog) -> contract.Nothing:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            nonces = await self._nonces(live)
            if wanted.nonce not in nonces:
                data = {"nonce": wanted.nonce, "level": wanted.level, "fields": wanted.fields}
                event = self._core.step_event(live.run, Kind.LOGGED, wanted.step, wanted.message, data)
                await self._core.commit(live, [event])
                nonces.add(wanted.nonce)
        return contract.Nothing()

    async def set_progress(self, wanted: contract.SetProgress) -> contract.Nothing:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            live.run = live.run.model_copy(update={"progress": wanted.progress})
            live.changed.notify()
        return contract.Nothing()

    async def _nonces(self, live: Live) -> set[str]:
        if live.nonces is None:
            live.nonces = {
                str(event.data["nonce"])
                async for event in self._core.history(live.run.id)
                if event.kind in (Kind.METADATA_CHANGED, Kind.LOGGED)
            }
        return live.nonces


def changed(values: dict[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    """Return metadata after changes; raises UsageError, naming what can't be changed so, and nothing is."""
    values = dict(values)
    for change in changes:
        before = values.get(change.name)
        match change.how:
            case "set":
                values[change.name] = change.value
            case "remove":
                values.pop(change.name, None)
            case "increment":
                if not _is_number(before if change.name in values else 0) or not _is_number(change.value):
                    raise UsageError(
                        f"metadata {change.name!r} can't be incremented by {change.value!r}: it is {before!r}",
                        todo="increment numbers by numbers; `set` replaces what is there",
                    )
                values[change.name] = (before or 0) + change.value
            case "append":
                if not isinstance(before if change.name in values else [], list):
                    raise UsageError(
                        f"metadata {change.name!r} is no list: it is {before!r}",
                        todo="append to lists; `set` replaces what is there",
                    )
                values[change.name] = [*(before or ()), change.value]
    if len(json.dumps(values)) > MAX_METADATA_BYTES:
        raise UsageError(
            f"the run's metadata would be larger than {MAX_METADATA_BYTES // 1000} kB",
            todo="metadata is for what people look at while the run goes on: keep data in variables of a step",
        )
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
