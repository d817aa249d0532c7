"""Clean-up and statistics over the real store and real blobs: what goes, what stays, and what is said of it."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.manifest import CodeFacts, Group, Manifest, put_blob, seal
from nbdurable.contract import Clean
from nbdurable.coordinator.engine import Engine
from nbdurable.coordinator.space import GRACE_S
from nbdurable.errors import BlobMissing, NotRestorable
from nbdurable.models import Driver, DriverKind, Run, Variable
from nbdurable.processes import identity
from nbdurable.security import sign
from nbdurable.settings import Home
from tests.tools.world import World

KEY = b"0" * 32
DAY = 86_400.0
ME = Driver(kind=DriverKind.INTERACTIVE, process=identity("kernel"))


@pytest.fixture
def world(home: Home) -> World:
    return World(home)


@pytest.fixture
def blobs(home: Home) -> LocalBlobs:
    return LocalBlobs(home.blobs)


def age(blobs: LocalBlobs, world: World, seconds: float = 2 * GRACE_S) -> None:
    """Let all blobs have been written so long ago."""
    for file in blobs.files():
        os.utime(file.path, (world.clock.at - seconds,) * 2)


def content(name: str, size: int = 100_000) -> bytes:
    return (name.encode() * size)[:size]


async def new_run(engine: Engine, notebook: str = "/n.ipynb", **more: Any) -> Run:
    question = contract.CreateRun(notebook=notebook, kind=DriverKind.INTERACTIVE, driver=ME, **more)
    return await engine.answer(contract.CREATE_RUN, question)


async def commit(engine: Engine, run: Run, step: str, blobs: LocalBlobs, **variables: bytes) -> int:
    groups = tuple(Group(names=(name,), stream=put_blob(data, blobs)) for name, data in variables.items())
    found = tuple(Variable(name=name, type="bytes", bytes=len(data)) for name, data in variables.items())
    begun = await engine.answer(
        contract.BEGIN_STEP,
        contract.BeginStep(run_id=run.id, epoch=run.epoch, step=step, action="execute", reason="asked"),
    )
    manifest = Manifest(
        run_id=run.id,
        step=step,
        created_at=float(begun.seq),
        duration_s=0.0,
        code=CodeFacts(source="", digest=""),
        variables=found,
        groups=groups,
    )
    question = contract.CommitStep(
        run_id=run.id,
        epoch=run.epoch,
        step=step,
        attempt=begun.attempt,
        status="completed",
        manifest=seal(manifest, KEY),
        variables=found,
    )
    return (await engine.answer(contract.COMMIT_STEP, question)).seq


async def end(engine: Engine, run: Run) -> None:
    question = contract.EndLease(run_id=run.id, epoch=run.epoch, how="fail", reason="an error")
    await engine.answer(contract.END_LEASE, question)


def fates(cleaned: contract.Cleaned) -> list[tuple[str, str, int]]:
    return [(fate.kind, fate.action, fate.bytes) for fate in cleaned.fates]


def test_a_clean_up_shows_first_then_removes_what_no_kept_run_needs(world: World, blobs: LocalBlobs) -> None:
    """Guarantee 10: a dry run changes nothing; then the removed run's own blobs go, and what a kept run shares stays.

    The removed run's history says so, and its restore is refused by name, with the reason.
    """

    async def story(engine: Engine) -> None:
        old, new = await new_run(engine), await new_run(engine)
        await commit(engine, old, "load", blobs, own=content("own"), common=content("common"))
        await commit(engine, new, "load", blobs, common=content("common"), other=content("other"))
        await end(engine, old)
        world.clock.at += 40 * DAY
        age(blobs, world)
        rules = Clean(keep_for_s=30 * DAY)

        shown = await engine.answer(contract.CLEAN, rules)
        assert fates(shown) == [("run", "remove", 100_000), ("run", "keep", 200_000)]
        assert all(fate.reason for fate in shown.fates)
        assert (shown.files, shown.bytes, len(list(blobs.files()))) == (1, 100_000, 3)
        state = contract.ReadState(run_id=old.id, step="load")
        assert len((await engine.answer(contract.STATE, state)).checkpoints) == 1

        done = await engine.answer(contract.CLEAN, rules.model_copy(update={"dry_run": False}))
        assert (done.files, done.bytes) == (1, 100_000)
        left = {file.digest for file in blobs.files()}
        kept = (await engine.answer(contract.STATE, contract.ReadState(run_id=new.id))).checkpoints
        assert left == Manifest.model_validate_json(kept[0].manifest.text).files()

        [step] = (await engine.answer(contract.GET_RUN, contract.ByRun(run_id=old.id))).steps
        assert (step.status, step.executions) == ("completed", 1)
        assert "removed by a clean-up: it failed 40 days ago, longer than 30 days" in step.removed
        events = (await engine.answer(contract.READ_EVENTS, contract.ReadEvents(run_id=old.id))).events
        assert events[-1].kind == "checkpoints_removed"
        for question in (state, contract.ReadState(run_id=old.id)):
            with pytest.raises(NotRestorable, match=r"`load`.*removed by a clean-up"):
                await engine.answer(contract.STATE, question)
        assert not (await engine.answer(contract.CHECKPOINTS, contract.ByRun(run_id=old.id))).checkpoints

    world.play(story)


def test_a_run_whose_checkpoints_were_removed_does_not_go_on_as_if_it_had_them(
    world: World, blobs: LocalBlobs
) -> None:
    """Guarantees 1, 10: resuming it would repeat committed steps, so it is refused, also after a restart."""
    made: list[Run] = []

    async def first(engine: Engine) -> None:
        snapshot = blobs.put(b"{}")
        question = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.HEADLESS, snapshot=snapshot)
        await engine.answer(contract.CREATE_RUN, question)
        worker = Driver(kind=DriverKind.HEADLESS, process=identity("worker"))
        work = contract.LeaseWork(driver=worker, slots=1)
        [run] = (await engine.answer(contract.LEASE_WORK, work)).runs
        await commit(engine, run, "load", blobs, own=content("own"))
        await end(engine, run)
        made.append(run)
        age(blobs, world)
        await engine.answer(contract.CLEAN, Clean(keep_last=0, dry_run=False))

    async def second(engine: Engine) -> None:
        with pytest.raises(NotRestorable, match="checkpoints of load were removed"):
            await engine.answer(contract.RESUME_RUN, contract.ResumeRun(run_id=made[0].id))
        assert blobs.has(str(made[0].snapshot)), "the notebook is part of its history"

    world.play(first)
    world.play(second)


def test_earlier_checkpoints_go_unless_a_state_is_made_of_them(world: World, blobs: LocalBlobs) -> None:
    """Guarantee 10: what `checkout` reaches stays: `a` as `b` saw it; `b`'s first go is out of reach."""

    async def story(engine: Engine) -> None:
        run = await new_run(engine)
        await commit(engine, run, "a", blobs, x=content("a1"))
        first_b = await commit(engine, run, "b", blobs, y=content("b1"))
        second_b = await commit(engine, run, "b", blobs, y=content("b2"))
        second_a = await commit(engine, run, "a", blobs, x=content("a2"))
        age(blobs, world)
        done = await engine.answer(contract.CLEAN, Clean(dry_run=False))
        assert fates(done) == [("earlier checkpoints", "remove", 100_000), ("run", "keep", 300_000)]
        state = await engine.answer(contract.STATE, contract.ReadState(run_id=run.id, step="b"))
        assert [(c.step, c.seq) for c in state.checkpoints] == [("a", first_b - 2), ("b", second_b)]
        for checkpoint in state.checkpoints:
            for digest in Manifest.model_validate_json(checkpoint.manifest.text).files():
                assert blobs.read(digest)
        state = await engine.answer(contract.STATE, contract.ReadState(run_id=run.id, step="a"))
        assert [(c.step, c.seq) for c in state.checkpoints] == [("b", second_b), ("a", second_a)]
        again = await engine.answer(contract.CLEAN, Clean())
        assert not [fate for fate in again.fates if fate.action == "remove"]

    world.play(story)


def test_what_a_running_step_has_just_written_stays(world: World, blobs: LocalBlobs) -> None:
    """Guarantees 3, 10: a blob that nothing refers to yet is left alone for an hour; so is an old one found again."""
    fresh, found_again = blobs.put(content("fresh")), blobs.put(content("again"))
    leftover = blobs.put(content("leftover"))
    draft = blobs.path(leftover).with_name(f".{leftover[:16]}.123.0011aabb")
    draft.write_bytes(b"half")
    stranger = blobs.root / "notes.txt"
    stranger.write_text("mine")
    age(blobs, world)
    world.clock.at = max(world.clock.at, time.time())
    age(blobs, world)
    LocalBlobs(blobs.root).put(content("again"))
    blobs.renew([fresh])

    async def story(engine: Engine) -> None:
        done = await engine.answer(contract.CLEAN, Clean(dry_run=False))
        assert [(f.action, f.count, f.bytes) for f in done.fates] == [
            ("remove", 2, 100_004),
            ("keep", 2, 200_000),
        ]

    world.play(story)
    assert [blobs.has(one) for one in (fresh, found_again, leftover)] == [True, True, False]
    assert not draft.exists()
    assert stranger.exists()


def test_a_manifest_of_another_format_keeps_its_blobs(world: World, blobs: LocalBlobs) -> None:
    """Guarantee 10: what can't be read is believed to need every digest that it names."""
    digest = blobs.put(content("of a newer format"))

    async def story(engine: Engine) -> None:
        run = await new_run(engine)
        begun = contract.BeginStep(run_id=run.id, epoch=run.epoch, step="s", action="execute", reason="asked")
        attempt = (await engine.answer(contract.BEGIN_STEP, begun)).attempt
        signed = sign(json.dumps({"format": 2, "parts": [["x", digest]]}), KEY)
        question = contract.CommitStep(
            run_id=run.id, epoch=run.epoch, step="s", attempt=attempt, status="completed", manifest=signed
        )
        await engine.answer(contract.COMMIT_STEP, question)
        age(blobs, world)
        await engine.answer(contract.CLEAN, Clean(keep_last=0, dry_run=False))
        assert blobs.has(digest)

    world.play(story)


def test_a_blob_that_vanished_before_its_commit_is_noticed(blobs: LocalBlobs) -> None:
    """Guarantees 2, 7: nothing is committed that refers to a blob which is not there."""
    digest = blobs.put(content("x"))
    blobs.path(digest).unlink()
    with pytest.raises(BlobMissing, match="run the step again"):
        blobs.renew([digest])


def test_statistics_tell_own_from_shared_bytes(world: World, blobs: LocalBlobs) -> None:
    """Issue 3, item 8: bytes by run, step and variable; what is used by one alone, and what by several."""
    blobs.put(content("nobody's"))

    async def story(engine: Engine) -> None:
        first, second = await new_run(engine), await new_run(engine)
        await commit(engine, first, "a", blobs, x=content("x", 50_000), small=b"tiny")
        await commit(engine, first, "b", blobs, x=content("x", 50_000), y=content("y", 30_000))
        await commit(engine, second, "a", blobs, y=content("y", 30_000))
        found = await engine.answer(contract.SPACE, contract.ReadSpace())
        assert (found.blobs, found.blob_bytes, found.unused_bytes) == (3, 180_000, 100_000)
        assert found.store_bytes > 0
        assert [(r.id, r.bytes, r.unique, r.shared) for r in found.runs] == [
            (first.id, 80_000, 50_000, 30_000),
            (second.id, 30_000, 0, 30_000),
        ]
        a, b = found.runs[0].steps
        assert (a.bytes, a.unique, a.shared, a.inline) == (50_000, 0, 50_000, 4)
        assert [(v.name, v.bytes, v.inline) for v in a.variables] == [("small", 0, 4), ("x", 50_000, 0)]
        assert [(v.name, v.unique, v.shared) for v in b.variables] == [("x", 0, 50_000), ("y", 0, 30_000)]
        [only] = (await engine.answer(contract.SPACE, contract.ReadSpace(run_id=second.short))).runs
        assert only == found.runs[1]

    world.play(story)


def test_paths_of_drafts_and_blobs_are_told_from_everything_else(tmp_path: Path) -> None:
    """Guarantee 10: only what nbdurable wrote is ever removed."""
    (tmp_path / "ab").mkdir()
    for name in ("readme", "ab" * 31, ".hidden", ".git.1.x"):
        (tmp_path / "ab" / name).write_text("mine")
    assert list(LocalBlobs(tmp_path).files()) == []


def test_what_a_clean_up_could_not_finish_the_next_one_does(world: World, blobs: LocalBlobs) -> None:
    """Guarantees 9, 10: the history is written first, so a crash in between leaves blobs that nothing refers to."""

    async def story(engine: Engine) -> None:
        run = await new_run(engine)
        await commit(engine, run, "load", blobs, own=content("own"))
        await end(engine, run)
        age(blobs, world, seconds=0)
        done = await engine.answer(contract.CLEAN, Clean(keep_last=0, dry_run=False))
        assert (done.files, len(list(blobs.files()))) == (0, 1)
        with pytest.raises(NotRestorable):
            await engine.answer(contract.STATE, contract.ReadState(run_id=run.id))
        age(blobs, world)
        done = await engine.answer(contract.CLEAN, Clean(dry_run=False))
        assert fates(done) == [("blobs", "remove", 100_000)]
        assert not list(blobs.files())

    world.play(story)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happened_before_every_kept_run_stays_whole_and_nothing_else_stays(
    world: World, blobs: LocalBlobs, seed: int
) -> None:
    """Guarantee 10, over random histories of runs that share blobs: each state of a kept run can be read in full."""
    chance = random.Random(seed)

    async def readable(engine: Engine, runs: list[Run]) -> set[str]:
        """Return the files of all states of these runs; each is verified."""
        found = set()
        for run in runs:
            detail = await engine.answer(contract.GET_RUN, contract.ByRun(run_id=run.id))
            for step in detail.steps:
                state = await engine.answer(contract.STATE, contract.ReadState(run_id=run.id, step=step.name))
                for checkpoint in state.checkpoints:
                    for digest in Manifest.model_validate_json(checkpoint.manifest.text).files():
                        assert blobs.read(digest)
                        found.add(digest)
        return found

    async def story(engine: Engine) -> None:
        kept: list[Run] = []
        for _ in range(3):
            for _ in range(4):
                tags = ("paper",) if chance.random() < 0.3 else ()
                run = await new_run(engine, f"/n{chance.randrange(2)}.ipynb", tags=tags)
                for _ in range(chance.randrange(6)):
                    values = {
                        f"v{n}": content(chance.choice("abcdefgh"), 20_000)
                        for n in range(chance.randrange(3))
                    }
                    await commit(engine, run, chance.choice("xyz"), blobs, **values)
                if chance.random() < 0.7:
                    await end(engine, run)
                kept.append(run)
                world.clock.at += DAY
            rules = Clean(
                keep_last=chance.choice([None, 1, 3]),
                keep_for_s=chance.choice([None, 2 * DAY]),
                keep_tagged=chance.random() < 0.5,
            )
            age(blobs, world)
            shown = await engine.answer(contract.CLEAN, rules)
            done = await engine.answer(contract.CLEAN, rules.model_copy(update={"dry_run": False}))
            assert (done.files, done.bytes, done.fates) == (shown.files, shown.bytes, shown.fates)
            gone = {fate.id for fate in done.fates if (fate.kind, fate.action) == ("run", "remove")}
            kept = [run for run in kept if run.id not in gone]
            assert await readable(engine, kept) == {file.digest for file in blobs.files()}

    world.play(story)
