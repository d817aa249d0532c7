"""Forks, repairs and hand-overs over the real store: what is shared, what is refused, and what history tells."""

from __future__ import annotations

from typing import Any

import pytest

from nbdurable import contract
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.manifest import CodeFacts, Manifest, seal
from nbdurable.contract import Clean
from nbdurable.coordinator.engine import Engine
from nbdurable.errors import Conflict, Fenced, IllegalMove, LeaseHeld, NotRestorable
from nbdurable.models import Driver, DriverKind, HandSet, Run, RunStatus, StepStatus
from nbdurable.processes import identity
from nbdurable.settings import Home
from tests.unit.coordinator.test_engine_and_time import World
from tests.unit.coordinator.test_space import KEY, age, commit, content, end, new_run

WORKER = Driver(kind=DriverKind.HEADLESS, process=identity("worker"))
OTHER = Driver(kind=DriverKind.INTERACTIVE, process=identity("kernel"))


@pytest.fixture
def world(home: Home) -> World:
    return World(home)


@pytest.fixture
def blobs(home: Home) -> LocalBlobs:
    return LocalBlobs(home.blobs)


async def show(engine: Engine, run: Run) -> Any:
    return await engine.answer(contract.GET_RUN, contract.ByRun(run_id=run.id))


async def fork(engine: Engine, source: Run, snapshot: str, *share: str, key: str | None = None) -> Run:
    question = contract.ForkRun(
        source=source.id,
        forked_at="c",
        share=share,
        notebook=source.notebook,
        kind=DriverKind.HEADLESS,
        snapshot=snapshot,
        idempotency_key=key,
    )
    return await engine.answer(contract.FORK_RUN, question)


async def state(engine: Engine, run: Run) -> list[tuple[str, str]]:
    found = await engine.answer(contract.STATE, contract.ReadState(run_id=run.id))
    return [(one.step, one.manifest.signature) for one in found.checkpoints]


def repair(run: Run, **more: Any) -> contract.RepairRun:
    version = contract.Version(notebook=run.notebook, snapshot=more.pop("snapshot", "2" * 64))
    epoch = more.pop("expected_epoch", run.epoch)
    return contract.RepairRun(
        run_id=run.id, by="ann", nonce="n1", expected_epoch=epoch, version=version, **more
    )


@pytest.mark.parametrize("goes", ["source", "fork"])
def test_a_fork_and_its_source_outlive_each_other(world: World, blobs: LocalBlobs, goes: str) -> None:
    """Guarantees 8, 10: the fork has the very manifests, as signed; a clean-up of either takes nothing of the other."""

    async def story(engine: Engine) -> None:
        snapshot = blobs.put(b"{}")
        source = await new_run(engine)
        await commit(engine, source, "a", blobs, x=content("a"))
        await commit(engine, source, "b", blobs, y=content("b"))
        forked = await fork(engine, source, snapshot, "a", "b", key="k")  # of a run that is still driven
        assert (
            await fork(engine, source, snapshot, "a", "b", key="k") == forked
        )  # asked again after a lost answer
        assert (forked.forked_from, forked.forked_at, forked.status) == (source.id, "c", RunStatus.QUEUED)
        assert await state(engine, forked) == await state(engine, source)
        steps = {step.name: step for step in (await show(engine, forked)).steps}
        assert [(step.status, step.executions) for step in steps.values()] == [("completed", 0)] * 2
        assert steps["a"].reason == f"shared with run {source.short}"
        with pytest.raises(Conflict, match=r"`c` of run .* is not committed"):
            await fork(engine, source, snapshot, "a", "c")

        gone, stays = (source, forked) if goes == "source" else (forked, source)
        if goes == "source":
            await end(engine, source)
        else:
            await engine.answer(contract.CANCEL_RUN, contract.ByRun(run_id=forked.id))
        before = await state(engine, stays)
        age(blobs, world)
        await engine.answer(contract.CLEAN, Clean(keep_last=0, dry_run=False))
        assert await state(engine, stays) == before
        found = await engine.answer(contract.STATE, contract.ReadState(run_id=stays.id))
        needed = {
            file
            for one in found.checkpoints
            for file in Manifest.model_validate_json(one.manifest.text).files()
        }
        assert len(needed) == 2
        assert all(blobs.has(file) for file in needed)
        with pytest.raises(NotRestorable, match=r"checkpoints of a, b were removed"):
            await fork(engine, gone, snapshot, "a", "b")
        table = await engine.answer(
            contract.SQL, contract.Query(sql=f"select name, status from steps where run_id = '{forked.id}'")
        )
        assert sorted(table.rows) == [("a", "completed"), ("b", "completed")]

    world.play(story)


def test_a_repair_is_one_change_and_history_only_grows(world: World, blobs: LocalBlobs) -> None:
    """Guarantees 2, 10: set aside, marked and set by hand together; both versions kept; asked twice, done once."""

    async def story(engine: Engine) -> None:
        first, second = blobs.put(b"{}"), blobs.put(b"{ }")
        run = await new_run(engine, snapshot=first)
        await commit(engine, run, "a", blobs, x=content("a"))
        last = await commit(engine, run, "b", blobs, y=content("b"))
        with pytest.raises(IllegalMove, match=r"is running: it can't repair"):
            await engine.answer(contract.REPAIR_RUN, repair(run))
        await end(engine, run)
        with pytest.raises(Conflict, match="went on since"):
            await engine.answer(contract.REPAIR_RUN, repair(run, expected_epoch=7))
        before = (await engine.answer(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id))).events
        manifest = Manifest(
            run_id=run.id,
            step="c",
            created_at=0,
            duration_s=0,
            code=CodeFacts(source="", digest=""),
            by_hand="marked done by ann",
        )
        given = HandSet(step="b", name="k", value=[1], by="ann", at=1.0)
        question = repair(
            run,
            snapshot=second,
            set_aside=("b",),
            hand_set=(given,),
            marks=(contract.Mark(step="c", reason="marked done by ann", manifest=seal(manifest, KEY)),),
        )
        repaired = await engine.answer(contract.REPAIR_RUN, question)
        assert await engine.answer(contract.REPAIR_RUN, question) == repaired  # after a lost answer
        assert (repaired.snapshot, repaired.earlier_snapshots) == (second, (first,))
        assert repaired.hand_set == (given,)
        assert repaired.reason.startswith("repaired by ann: its notebook is another version")
        events = (await engine.answer(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id))).events
        assert events[: len(before)] == before
        assert [event.kind for event in events[len(before) :]] == [
            "step_set_aside",
            "step_marked",
            "run_repaired",
        ]
        assert {"before": first, "after": second}.items() <= events[-1].data.items()
        steps = {step.name: step for step in (await show(engine, run)).steps}
        assert [steps[name].status for name in "abc"] == ["completed", StepStatus.PENDING, "completed"]
        assert [step for step, _ in await state(engine, run)] == ["a", "c"]
        age(blobs, world)
        await engine.answer(contract.CLEAN, Clean(dry_run=False))
        assert blobs.has(first), "the version that it began with is part of its history"

        [leased] = (await engine.answer(contract.LEASE_WORK, contract.LeaseWork(driver=WORKER, slots=1))).runs
        assert await commit(engine, leased, "b", blobs, y=content("b2")) > last
        assert [step for step, _ in await state(engine, run)] == ["a", "c", "b"]

    world.play(story)


def test_attaching_fences_a_worker_and_handing_over_fences_a_kernel(world: World, blobs: LocalBlobs) -> None:
    """Guarantee 4: whoever drove the run before is asked for first, and changes nothing afterwards."""

    async def story(engine: Engine) -> None:
        snapshot = blobs.put(b"{}")
        question = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.HEADLESS, snapshot=snapshot)
        await engine.answer(contract.CREATE_RUN, question)
        [run] = (await engine.answer(contract.LEASE_WORK, contract.LeaseWork(driver=WORKER, slots=1))).runs
        attach = contract.LeaseRun(run_id=run.id, driver=OTHER, attach=True)
        with pytest.raises(LeaseHeld, match="is driven by"):
            await engine.answer(contract.LEASE_RUN, attach)
        taken = await engine.answer(contract.LEASE_RUN, attach.model_copy(update={"take_over": True}))
        assert (taken.kind, taken.epoch) == (DriverKind.INTERACTIVE, run.epoch + 1)
        with pytest.raises(Fenced):
            await commit(engine, run, "a", blobs, x=content("a"))
        await commit(engine, taken, "a", blobs, x=content("a"))

        resume = contract.ResumeRun(
            run_id=run.id, version=contract.Version(notebook="/n.ipynb", snapshot="3" * 64)
        )
        with pytest.raises(LeaseHeld, match="is driven by"):
            await engine.answer(contract.RESUME_RUN, resume)
        handed = await engine.answer(contract.RESUME_RUN, resume.model_copy(update={"take_over": True}))
        assert (handed.status, handed.kind) == (RunStatus.QUEUED, DriverKind.HEADLESS)
        with pytest.raises(Fenced):
            await commit(engine, taken, "b", blobs, x=content("a"))
        assert [step for step, _ in await state(engine, run)] == ["a"]

    world.play(story)
