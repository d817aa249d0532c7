"""Recorded calls: commits of those that are ready together, and which ones may be used again.

Owns that each call is one event, and that a repeated commit gets the first answer; never looks into a manifest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nbdurable import contract, spending
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Core
from nbdurable.coordinator.fold import Kind
from nbdurable.models import Call
from nbdurable.policies import span
from nbdurable.store.port import NewEvent, StoredCall

_SAID = ("key", "name", "given", "type", "bytes", "duration_s", "reason", "attempt")  # of an event's data


class Calls:
    """What drivers say about calls."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {contract.COMMIT_CALLS: self.commit, contract.READ_CALLS: self.read}

    async def commit(self, wanted: contract.CommitCalls) -> contract.CallsCommitted:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            state = (await self._core.fold(live)).get(wanted.step)
            known = {} if state is None else state.committed
            new = [call for call in wanted.calls if call.manifest.signature not in known]
            events = [self._event(live.run, wanted, call) for call in new]
            numbered = iter(await self._core.commit(live, events) if events else ())
            seqs = [known.get(call.manifest.signature) or next(numbered) for call in wanted.calls]
            return contract.CallsCommitted(seqs=tuple(seqs))

    def _event(self, run: Any, wanted: contract.CommitCalls, call: contract.NewCall) -> NewEvent:
        data = {name: getattr(call, name) for name in _SAID if name != "attempt"}
        data |= {"attempt": wanted.attempt, "signature": call.manifest.signature}
        took, why = span(call.duration_s), f"; {call.reason}" if call.reason else ""
        if call.model is not None:
            data["model"] = call.model.model_dump(mode="json")
            took = f"{took}, {spending.say_use(call.model)}"
        sentence = f"{wanted.step}: called {call.name}({call.given}), {took}{why}"
        return self._core.step_event(
            run, Kind.CALL_COMPLETED, wanted.step, sentence, data, manifest=call.manifest
        )

    async def read(self, wanted: contract.ReadCalls) -> contract.Calls:
        run = await self._core.current(wanted.run_id)
        live = self._core.runs.get(run.id)
        fold = live.fold if live is not None and live.fold is not None else await self._core.read_fold(run.id)
        found = []
        asked = wanted.model_copy(update={"run_id": run.id})
        for stored in await self._core.read(self._core.store.calls, asked):
            step = stored.event.step or ""
            state = fold.get(step)
            if state is not None and stored.event.seq > state.fresh_since:
                call = _call(stored, replayed=stored.event.seq in state.replayed)
                found.append(contract.RecordedCall(call=call, manifest=stored.manifest))
        return contract.Calls(calls=tuple(found))


def _call(stored: StoredCall, *, replayed: bool) -> Call:
    event = stored.event
    said = {name: event.data[name] for name in _SAID}
    said["model"] = event.data.get("model")
    return Call(step=event.step or "", at=event.at, seq=event.seq, replayed=replayed, **said)
