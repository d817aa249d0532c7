"""Space: what takes how much of it, and clean-up that removes what no kept run needs.

Owns which blobs are in use. That is found conservatively: any digest that a manifest's text names is in use,
whatever the manifest's format; nothing is unpickled, or even believed. A clean-up writes into the history what it
removes, and why, before a file goes. Blobs that were written, found or committed lately are spared, since a
kernel may be about to commit them (`LocalBlobs.renew`).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from nbdurable import contract
from nbdurable.checkpoint.blobs import BlobFile, LocalBlobs
from nbdurable.checkpoint.manifest import Blob, CallManifest, Manifest
from nbdurable.contract import Endpoint, Fate
from nbdurable.coordinator.core import Core
from nbdurable.coordinator.fold import Kind
from nbdurable.coordinator.retention import Judgement, judge, out_of_reach
from nbdurable.models import Run
from nbdurable.policies import span

GRACE_S = 3600.0  # an unused blob is left alone for so long: whoever wrote it may be about to commit it
_ALL = 1_000_000_000
_COMMITTED_AGAIN = "their steps were committed again, and no state of the run is made of them"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint, or a recorded call, and the files that it needs."""

    run_id: str
    step: str
    seq: int
    files: frozenset[str]
    is_call: bool


@dataclass(frozen=True)
class _GivenUp:
    """Checkpoints of a run that are to be removed: all of them, or those that no state of it is made of."""

    run: Run
    is_whole: bool
    reason: str
    checkpoints: list[_Checkpoint]


@dataclass
class _Plan:
    """What a clean-up found: checkpoints to give up, and files that nothing kept needs."""

    fates: list[Fate] = field(default_factory=list)
    given_up: list[_GivenUp] = field(default_factory=list)
    files: list[BlobFile] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


class Space:
    """What is asked about space."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._blobs = LocalBlobs(core.home.blobs)
        self._cleaning = asyncio.Lock()

    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]:
        """Return who answers which endpoint."""
        return {contract.SPACE: self.space, contract.CLEAN: self.clean}

    # Clean-up ----------------------------------------------------------------------------------------------

    async def clean(self, wanted: contract.Clean) -> contract.Cleaned:
        async with self._cleaning:
            plan = await self._core.read(self._plan, wanted)
            if wanted.dry_run:
                return contract.Cleaned(
                    dry_run=True, fates=tuple(plan.fates), files=len(plan.files), bytes=plan.bytes
                )
            for one in plan.given_up:
                await self._give_up(one)
            removed = await self._core.read(self._sweep)
            return contract.Cleaned(
                dry_run=False,
                fates=tuple(plan.fates),
                files=len(removed),
                bytes=sum(file.size for file in removed),
            )

    async def _give_up(self, one: _GivenUp) -> None:
        """Write into a run's history that checkpoints of it are removed, unless it went on since it was judged."""
        async with self._core.locked(one.run.id) as live:
            if one.is_whole and live.run.updated_at != one.run.updated_at:
                return
            count = _count(one.checkpoints)
            sentence = f"{count} checkpoint{'s' if count > 1 else ''} removed by a clean-up: {one.reason}"
            seqs = [checkpoint.seq for checkpoint in one.checkpoints]
            event = self._core.event(live.run, Kind.CHECKPOINTS_REMOVED, sentence, seqs=seqs)
            await self._core.commit(live, [event])

    def _sweep(self) -> list[BlobFile]:
        """Remove the files that nothing in the store refers to. They are listed before the references are read."""
        on_disk = list(self._blobs.files())
        used = _snapshots(self._core.store.runs(contract.ListRuns(limit=_ALL)))
        for stored in self._core.store.all_checkpoints():
            used.update(_DIGEST.findall(stored.text))
        since = self._core.clock.now() - GRACE_S
        unused = [file for file in on_disk if file.digest not in used]
        return [file for file in unused if self._blobs.remove(file, unless_renewed_since=since)]

    def _plan(self, rules: contract.Clean) -> _Plan:
        """Look at everything, and say what becomes of it."""
        plan, now = _Plan(), self._core.clock.now()
        on_disk = list(self._blobs.files())
        sizes = {file.digest: file.size for file in on_disk if file.digest}
        by_run: dict[str, list[_Checkpoint]] = {}
        for stored in self._core.store.all_checkpoints():
            files = frozenset(digest for digest in _DIGEST.findall(stored.text) if digest in sizes)
            one = _Checkpoint(stored.run_id, stored.step, stored.seq, files, stored.is_call)
            by_run.setdefault(stored.run_id, []).append(one)
        runs = self._core.store.runs(
            contract.ListRuns(limit=_ALL)
        )  # after its checkpoints, so that none is strange
        used = _snapshots(runs)
        kept: list[tuple[Judgement, list[_Checkpoint]]] = []
        for verdict in judge(runs, rules, now):
            found = sorted(by_run.get(verdict.run.id, ()), key=lambda one: one.seq)
            if found and not verdict.keep:
                plan.given_up.append(_GivenUp(verdict.run, True, verdict.reason, found))
            elif found:
                gone = out_of_reach([(one.seq, one.step) for one in found if not one.is_call])
                staying = [one for one in found if one.seq not in gone]
                kept.append((verdict, staying))
                used |= _files(staying)
                if gone:
                    earlier = [one for one in found if one.seq in gone]
                    plan.given_up.append(_GivenUp(verdict.run, False, _COMMITTED_AGAIN, earlier))
        told = set(used)
        for one_ in plan.given_up:
            going = _files(one_.checkpoints) - told
            told |= going
            kind = "run" if one_.is_whole else "earlier checkpoints"
            count = _count(one_.checkpoints)
            plan.fates.append(_fate(kind, one_.run, "remove", one_.reason, count, going, sizes))
        for verdict, staying in kept:
            files_ = _files(staying)
            plan.fates.append(
                _fate("run", verdict.run, "keep", verdict.reason, _count(staying), files_, sizes)
            )
        self._tell_files(plan, on_disk, used, told - used, now)
        return plan

    def _tell_files(
        self, plan: _Plan, on_disk: list[BlobFile], used: set[str], given_up: set[str], now: float
    ) -> None:
        old: list[BlobFile] = []
        young: list[BlobFile] = []
        for file in on_disk:
            if file.digest in used:
                continue
            (young if file.renewed_at >= now - GRACE_S else old).append(file)
        plan.files = old
        lately = f"written or used less than {span(GRACE_S)} ago: a step may be about to commit them"
        leftovers = [file for file in old if file.digest not in given_up]
        for action, reason, files in (
            ("remove", "no checkpoint and no run refers to them", leftovers),
            ("keep", lately, young),
        ):
            if files:
                size = sum(file.size for file in files)
                plan.fates.append(
                    Fate(kind="blobs", action=action, reason=reason, count=len(files), bytes=size)
                )

    # Statistics --------------------------------------------------------------------------------------------

    async def space(self, wanted: contract.ReadSpace) -> contract.Space:
        run_id = None if wanted.run_id is None else await self._core.resolve(wanted.run_id)
        return await self._core.read(self._space, run_id)

    def _space(self, run_id: str | None) -> contract.Space:
        sizes = {file.digest: file.size for file in self._blobs.files() if file.digest}
        runs = {run.id: run for run in self._core.store.runs(contract.ListRuns(limit=_ALL))}
        tree: dict[str, dict[str, _Step]] = {}
        users = _Users()
        for stored in self._core.store.all_checkpoints():
            step = tree.setdefault(stored.run_id, {}).setdefault(stored.step, _Step())
            if stored.is_call:
                step.take_call(_read_call(stored.text))
            else:
                step.checkpoints += 1
                step.take(_read(stored.text))
            files = {digest for digest in _DIGEST.findall(stored.text) if digest in sizes}
            step.files |= files
            for digest in files:
                users.runs.note(digest, stored.run_id)
                users.steps.note(digest, (stored.run_id, stored.step))
            for name, named in step.variables.items():
                for digest in named:
                    users.variables.note(digest, (stored.run_id, stored.step, name))
        snapshots = _snapshots(runs.values())
        shown = [
            _run_space(runs[one], steps, users, sizes)
            for one, steps in tree.items()
            if one in runs and run_id in (None, one)
        ]
        store, journal = self._core.home.store, self._core.home.journal
        return contract.Space(
            blobs=len(sizes),
            blob_bytes=sum(sizes.values()),
            store_bytes=sum(_size(path) for path in (store, store.with_name(f"{store.name}.wal"), journal)),
            unused_bytes=sum(
                size for one, size in sizes.items() if one not in users.runs.known and one not in snapshots
            ),
            runs=tuple(sorted(shown, key=lambda run: (-run.bytes, run.id))),
        )


class _Single:
    """For each blob its one user, or that it has several."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def note(self, digest: str, user: object) -> None:
        if self.known.setdefault(digest, user) != user:
            self.known[digest] = None

    def is_shared(self, digest: str) -> bool:
        return self.known.get(digest) is None


@dataclass
class _Users:
    runs: _Single = field(default_factory=_Single)
    steps: _Single = field(default_factory=_Single)
    variables: _Single = field(default_factory=_Single)


@dataclass
class _Step:
    """What all checkpoints of a step hold: files, those of each variable, and bytes inside the manifests."""

    checkpoints: int = 0
    files: set[str] = field(default_factory=set)
    variables: dict[str, set[str]] = field(default_factory=dict)
    inline: int = 0
    inline_of: dict[str, int] = field(default_factory=dict)

    def take(self, manifest: Manifest | None) -> None:
        if manifest is None:
            return
        self.inline += _inline(manifest.blobs())
        for group in manifest.groups + manifest.later:
            parts = (group.stream, *group.buffers)
            for name in group.names:
                files = {digest for blob in parts for digest in blob.files()}
                self.variables.setdefault(name, set()).update(files)
                self.inline_of[name] = self.inline_of.get(name, 0) + _inline(parts)

    def take_call(self, manifest: CallManifest | None) -> None:
        if manifest is not None:
            self.inline += _inline(manifest.blobs())


def _inline(blobs: Iterable[Blob]) -> int:
    return sum(blob.size for blob in blobs if blob.inline is not None)


def _read(text: str) -> Manifest | None:
    """Return a manifest as data, to be counted only; None for one of another format."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        return None


def _read_call(text: str) -> CallManifest | None:
    try:
        return CallManifest.model_validate_json(text)
    except ValidationError:
        return None


def _run_space(run: Run, steps: dict[str, _Step], users: _Users, sizes: dict[str, int]) -> contract.RunSpace:
    return contract.RunSpace(
        id=run.id,
        notebook=run.notebook,
        status=run.status,
        created_at=run.created_at,
        tags=run.tags,
        inline=sum(step.inline for step in steps.values()),
        steps=tuple(
            contract.StepSpace(
                name=name,
                checkpoints=step.checkpoints,
                inline=step.inline,
                variables=tuple(
                    contract.VariableSpace(
                        name=variable,
                        inline=step.inline_of[variable],
                        **_amounts(files, users.variables, sizes),
                    )
                    for variable, files in sorted(step.variables.items())
                ),
                **_amounts(step.files, users.steps, sizes),
            )
            for name, step in steps.items()
        ),
        **_amounts(set().union(*(step.files for step in steps.values())), users.runs, sizes),
    )


def _amounts(files: set[str], users: _Single, sizes: dict[str, int]) -> dict[str, int]:
    shared = sum(sizes.get(digest, 0) for digest in files if users.is_shared(digest))
    total = sum(sizes.get(digest, 0) for digest in files)
    return {"bytes": total, "unique": total - shared, "shared": shared}


def _snapshots(runs: Iterable[Run]) -> set[str]:
    return {digest for run in runs for digest in (run.snapshot, *run.earlier_snapshots) if digest}


def _files(checkpoints: Iterable[_Checkpoint]) -> set[str]:
    return {digest for one in checkpoints for digest in one.files}


def _count(checkpoints: Iterable[_Checkpoint]) -> int:
    return sum(not one.is_call for one in checkpoints)


def _fate(
    kind: str, run: Run, action: str, reason: str, count: int, files: set[str], sizes: dict[str, int]
) -> Fate:
    return Fate(
        kind=kind,
        id=run.id,
        notebook=run.notebook,
        action=action,
        reason=reason,
        count=count,
        bytes=sum(sizes[digest] for digest in files),
    )


def _size(path: os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
