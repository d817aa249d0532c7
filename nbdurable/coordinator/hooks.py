"""Hooks of runs: what a hook is told, and that it runs once on each occasion.

Owns what an occasion is, by the run's history; runs no hook, that is its driver's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nbdurable import contract, lifecycle
from nbdurable.contract import Endpoint
from nbdurable.coordinator.core import Core
from nbdurable.coordinator.driving import Driving
from nbdurable.coordinator.fold import Kind
from nbdurable.coordinator.state import Live
from nbdurable.coordinator.steps import RETRY
from nbdurable.lifecycle import Happening
from nbdurable.models import DriverKind, Event, HookKind, Occasion, RunStatus, Wait


class Hooks:
    """Who is told what, once."""

    def __init__(self, core: Core, driving: Driving) -> None:
        self._core = core
        self._driving = driving

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {contract.BEGIN_HOOK: self.begin_hook, contract.END_HOOK: self.end_hook}

    async def begin_hook(self, wanted: contract.BeginHook) -> contract.HookBegun:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            kind, status, reason = await self._what(live, wanted)
            if kind != wanted.kind:
                return contract.HookBegun()
            run, waits = live.run, self._waits(live) if wanted.how == "suspend" else []
            told, era = await self._told(live)
            key = key_of(kind, run.epoch, era, waits)
            if wanted.how == "suspend" and not waits:
                return contract.HookBegun()
            before = told.get((key, wanted.name))
            if before is not None and before.kind != Kind.HOOK_BEGUN:
                return contract.HookBegun()
            if before is None or before.epoch != run.epoch:
                sentence = f"hook {wanted.name!r} ({kind}) begins"
                event = self._core.event(run, Kind.HOOK_BEGUN, sentence, key=key, name=wanted.name)
                await self._core.commit(live, [event])
            if live.lease is not None and live.lease.cancel_by is not None:
                by = self._core.cancel_deadline() + self._core.settings.hook_timeout_s
                live.lease.cancel_by = max(live.lease.cancel_by, by)
            url = self._core.settings.pages_url.rstrip("/") or self._core.home.served()
            return contract.HookBegun(
                occasion=Occasion(
                    kind=kind,
                    key=key,
                    id=run.id,
                    notebook=run.notebook,
                    parameters=run.parameters,
                    tags=run.tags,
                    status=status,
                    reason=reason,
                    error=wanted.error,
                    result=run.result,
                    waits=tuple(wait.title for wait in waits),
                    url=f"{url}/ui/runs/{run.id}" if url else None,
                )
            )

    async def end_hook(self, wanted: contract.EndHook) -> contract.Nothing:
        async with self._core.driven(wanted.run_id, wanted.epoch) as live:
            told, _ = await self._told(live)
            before = told.get((wanted.key, wanted.name))
            if before is None or before.kind == Kind.HOOK_BEGUN:
                what, error, data = f"hook {wanted.name!r} ({wanted.kind})", wanted.error, {"key": wanted.key}
                if error is None:
                    event = self._core.event(live.run, Kind.HOOK_RAN, f"{what} ran", name=wanted.name, **data)
                else:
                    sentence = f"{what} failed: {error.name}: {error.message}"
                    event = self._core.event(
                        live.run,
                        Kind.HOOK_FAILED,
                        sentence,
                        name=wanted.name,
                        error=error.model_dump(),
                        **data,
                    )
                await self._core.commit(live, [event])
        return contract.Nothing()

    async def _what(self, live: Live, wanted: contract.BeginHook) -> tuple[HookKind | None, RunStatus, str]:
        """Say what becomes of a run whose driver says `how`, as `Driving.end_lease` decides it next."""
        run, how = live.run, wanted.how
        timed_out = live.lease is not None and live.lease.timed_out
        if how in ("start", "resume"):
            return wanted.kind, run.status, run.reason
        if how == "cancel" or (run.cancel_requested and how in ("suspend", "pause", "lose")):
            return "cancel", RunStatus.CANCELLED, "cancelled"
        if how == "time_out" or (timed_out and how != "complete"):
            return "failure", RunStatus.TIMED_OUT, wanted.reason
        if how == "complete":
            return "success", RunStatus.COMPLETED, wanted.reason
        if how in ("suspend", "pause"):
            return "wait", RunStatus.WAITING if how == "suspend" else RunStatus.PAUSED, wanted.reason
        reason = wanted.reason
        if how == "lose":
            happening = lifecycle.loss(DriverKind.HEADLESS, run.recoveries)
        else:
            happening, _, reason, _ = await self._driving.after_failure(live, reason, wanted.error)
        if happening not in (Happening.FAIL, Happening.PAUSE, Happening.POISON):
            return None, run.status, reason
        return "failure", lifecycle.move(run.status, happening).to, reason

    def _waits(self, live: Live) -> list[Wait]:
        """Return what a run waits for, but for the next try of a step."""
        return [wait for wait in self._core.open_waits(live.run.id) if not wait.key.startswith(RETRY)]

    async def _told(self, live: Live) -> tuple[dict[tuple[str, str], Event], int]:
        """Return what the run's history says of hooks, by occasion and name, and how often the run was resumed."""
        told: dict[tuple[str, str], Event] = {}
        era = 0
        async for event in self._core.history(live.run.id):
            if event.kind in (Kind.HOOK_BEGUN, Kind.HOOK_RAN, Kind.HOOK_FAILED):
                told[event.data["key"], event.data["name"]] = event
            era += event.kind in (Kind.RUN_RESUMED, Kind.RUN_REPAIRED)
        return told, era


def key_of(kind: HookKind, epoch: int, era: int, waits: list[Wait]) -> str:
    """Return what is the same for one occasion, whichever attempt tells it.

    A run starts once, and ends once until somebody resumes or repairs it (`era`); each gate is one occasion, and so is
    each attempt that goes on.
    """
    match kind:
        case "start":
            return kind
        case "success" | "failure" | "cancel":
            return f"{kind}:{era}"
        case "wait" if not waits:  # paused, for a budget that is spent
            return f"wait:{era}"
        case "wait":
            return f"wait:{','.join(sorted(wait.id for wait in waits))}"
        case "resume":
            return f"resume:{epoch}"
