"""How runs come into being: their keys, their parents, and which were started before.

Owns what a new run's row holds; the caller holds `core.creating`, so that keys are looked up and taken one request
after the other, and commits what it gets. Knows nothing of waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nbdurable import contract
from nbdurable.coordinator.core import Change, Core, label
from nbdurable.coordinator.fold import Fold, Kind
from nbdurable.coordinator.names import new_run_id
from nbdurable.coordinator.state import Live
from nbdurable.errors import UsageError
from nbdurable.models import DriverKind, Run, RunStatus
from nbdurable.policies import span

MAX_DEPTH = 32  # of children of children


@dataclass(frozen=True)
class Parent:
    """The run that starts others, and where: `fresh_since` tells a step that was asked to run afresh from before."""

    run: Run
    step: str | None
    fresh_since: int


@dataclass(frozen=True)
class Made:
    """A run that was asked for: a new one, with what is to be committed, or one that was there before."""

    run: Run
    change: Change | None


class Creation:
    """Makes runs; `core.creating` is held."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def parent(self, live: Live, step: str | None) -> Parent:
        """Return a run that is held as the parent of others."""
        state = None if step is None else (await self._core.fold(live)).get(step)
        return Parent(live.run, step, state.fresh_since if state is not None else 0)

    async def make(self, wanted: Sequence[contract.CreateRun], parent: Parent | None = None) -> list[Made]:
        """Return the runs that are asked for, in order; none is committed yet. Raises UsageError."""
        for one in wanted:
            _check(one, parent)
        keys = [_key(one, parent) for one in wanted]
        known = await self.known(key for key in keys if key is not None)
        made = []
        for one, key in zip(wanted, keys, strict=True):
            found = known.get(key) if key is not None else None
            found = (
                found
                or self._delayed(one, parent.run.id if parent is not None else None)
                or self._single(one)
            )
            if found is None or _is_other(found, one):
                change = self.new(one, key, parent)
                assert change.run is not None
                made.append(Made(change.run, change))
                if key is not None:
                    known[key] = change.run
            else:
                made.append(Made(found, None))
        return made

    async def known(self, keys: Iterable[str]) -> dict[str, Run]:
        """Return the runs that keys stand for, as they are now."""
        if not (keys := list(keys)):
            return {}
        found = await self._core.read(self._core.store.runs_with_keys, keys, self._core.clock.now())
        runs = [live.run if (live := self._core.runs.get(run.id)) is not None else run for run in found]
        return {str(run.idempotency_key): run for run in runs}

    def _delayed(self, wanted: contract.CreateRun, parent_id: str | None) -> Run | None:
        """Return the run that a debounced one is part of: the one with its key that has not begun."""
        if wanted.debounce_s is None:
            return None
        key = _debounce_key(wanted, parent_id)
        runs = (
            live.run for run_id in self._core.delayed if (live := self._core.runs.get(run_id)) is not None
        )
        return next((run for run in runs if run.debounce_key == key and not run.epoch), None)

    def _single(self, wanted: contract.CreateRun) -> Run | None:
        """Return the open run that makes one that is to be skipped needless."""
        if wanted.singleton != "skip":
            return None
        ids = self._core.singletons.get(wanted.singleton_key or wanted.notebook, ())
        return min((self._core.runs[one].run for one in ids), key=lambda run: run.created_at, default=None)

    async def put_off(self, wanted: Iterable[contract.CreateRun], parent_id: str | None = None) -> None:
        """Let runs that are asked for again while they are delayed begin later; no run is held meanwhile."""
        for one in wanted:
            if (found := self._delayed(one, parent_id)) is None:
                continue
            async with self._core.locked(found.id) as live:
                run = live.run
                if run.status is not RunStatus.DELAYED or run.epoch:
                    continue  # it has begun: another one is made
                at = self._core.clock.now()
                begins_at = min(at + (one.debounce_s or 0.0), run.debounce_until or float("inf"))
                reason = f"asked for again; begins in {span(max(0.0, begins_at - at))}"
                changes: dict[str, Any] = {"begins_at": begins_at, "reason": reason, "updated_at": at}
                if one.debounce_mode == "trailing":
                    changes |= {name: getattr(one, name) for name in _NEWEST}
                if run.expires_at is not None and run.begins_at is not None:
                    changes["expires_at"] = run.expires_at + begins_at - run.begins_at
                run = run.model_copy(update=changes)
                await self._core.commit(live, [self._core.event(run, Kind.RUN_PUT_OFF, reason)], run=run)

    def new(self, wanted: contract.CreateRun, key: str | None, parent: Parent | None = None) -> Change:
        """Return a new run, with what is to be committed."""
        at = self._core.clock.now()
        headless = wanted.kind is DriverKind.HEADLESS
        fields = {name: value for name, value in wanted if name not in _OTHERS}
        reason = f"{label(wanted.driver)} drives it" if wanted.driver else "waits for a worker"
        status = RunStatus.QUEUED if headless else RunStatus.RUNNING
        delay_s = wanted.debounce_s or wanted.delay_s
        begins_at = at + delay_s
        if delay_s:
            status, reason = RunStatus.DELAYED, f"begins in {span(delay_s)}"
        run_id = new_run_id(at)
        above = parent.run if parent is not None else None
        run = Run(
            id=run_id,
            status=status,
            reason=reason,
            begins_at=begins_at if delay_s else None,
            debounce_key=_debounce_key(wanted, above.id if above is not None else None),
            debounce_until=at + wanted.debounce_max_s if wanted.debounce_max_s else None,
            singleton_key=(wanted.singleton_key or wanted.notebook) if wanted.singleton else None,
            expires_at=None if wanted.ttl_s is None else begins_at + wanted.ttl_s,
            driven_since=None if headless else at,
            epoch=0 if headless else 1,
            created_at=at,
            started_at=None if headless else at,
            updated_at=at,
            idempotency_key=key,
            key_expires_at=at + wanted.key_ttl_s if key is not None else None,
            parent_id=above.id if above is not None else None,
            parent_step=parent.step if parent is not None else None,
            root_id=(above.root_id or above.id) if above is not None else None,
            trace_id=(above.trace_id or above.id) if above is not None else run_id,
            depth=above.depth + 1 if above is not None else 0,
            **fields,
        )
        live = Live(run, fold=None if headless else Fold())
        if wanted.driver is not None:
            live.lease = self._core.new_lease(wanted.driver)
        said = f"started by run {above.short}" if above is not None else "created"
        return Change(live, (self._core.event(run, Kind.RUN_CREATED, f"{said}; {reason}"),), run)


_NEWEST = ("notebook", "snapshot", "parameters", "tags", "steps_total", "kernel_name", "output", "cwd")
_OTHERS = {
    *("idempotency_key", "key_scope", "key_ttl_s", "call", "delay_s", "ttl_s", "source", "share"),
    *("debounce_s", "debounce_key", "debounce_mode", "debounce_max_s", "singleton_key"),
}
_CALL = "call:"  # how the key of a child begins that was given none
_RUN = "run:"  # and of one whose key counts within its parent only


def _key(wanted: contract.CreateRun, parent: Parent | None) -> str | None:
    """Return the key of a run as the store has it."""
    if wanted.idempotency_key is None:
        if parent is None or wanted.call is None:
            return None
        return f"{_CALL}{parent.run.id}:{parent.step or ''}:{parent.fresh_since}:{wanted.call}"
    if wanted.key_scope == "global":
        return wanted.idempotency_key
    assert parent is not None
    return f"{_RUN}{parent.run.id}:{wanted.idempotency_key}"


def _debounce_key(wanted: contract.CreateRun, parent_id: str | None) -> str | None:
    if wanted.debounce_key is None or wanted.key_scope == "global":
        return wanted.debounce_key
    return f"{_RUN}{parent_id}:{wanted.debounce_key}"


def _is_other(found: Run, wanted: contract.CreateRun) -> bool:
    """Tell whether a child that a call has started is to be started again: it failed, and was edited since."""
    failed = found.status.is_final and found.status is not RunStatus.COMPLETED
    return failed and wanted.idempotency_key is None and found.snapshot != wanted.snapshot


def _check(wanted: contract.CreateRun, parent: Parent | None) -> None:
    """Refuse a run that could never be driven rightly; raises UsageError."""
    headless = wanted.kind is DriverKind.HEADLESS
    if headless and wanted.snapshot is None:
        raise UsageError("a headless run needs the snapshot of its notebook", todo="write it as a blob first")
    if headless != (wanted.driver is None):
        raise UsageError(
            "an interactive run is created by its driver, a headless one without", todo="mend `driver`"
        )
    if wanted.idempotency_key is not None and wanted.idempotency_key.startswith((_CALL, _RUN)):
        raise UsageError(
            f"an idempotency key can't begin with {_CALL!r} or {_RUN!r}",
            todo="keys that begin so are our own",
        )
    if not headless and (wanted.delay_s or wanted.ttl_s or wanted.timeout_s or wanted.retries):
        raise UsageError(
            "only a headless run can be delayed, expire, time out or be retried",
            todo="leave those out, or create it headless",
        )
    if (wanted.debounce_s is None) != (wanted.debounce_key is None):
        raise UsageError(
            "a run that is debounced has a time and a key", todo="give both: debounce='30s', debounce_key='…'"
        )
    if wanted.debounce_s is not None and (wanted.delay_s or not headless):
        raise UsageError("a debounced run is headless, and has no other delay", todo="leave `delay` out")
    if parent is None:
        if wanted.key_scope == "run":
            raise UsageError(
                "an idempotency key with the scope of a run needs a run that starts it",
                todo="use the scope `global`",
            )
        return
    if not headless:
        raise UsageError("a child is a headless run", todo="mend `kind`")
    if parent.run.depth >= MAX_DEPTH:
        raise UsageError(
            f"run {parent.run.short} has {MAX_DEPTH} runs above it: it can't start another one below",
            todo="a notebook that starts itself, or another that starts it, needs an end",
        )
