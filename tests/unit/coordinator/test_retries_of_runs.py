"""Runs that begin later, again, or never, and those that have had their time: a clock and dice that the test sets."""

from __future__ import annotations

from typing import Any

import pytest

from nbdurable import contract
from nbdurable.coordinator.engine import Engine
from nbdurable.errors import Conflict, Fenced
from nbdurable.models import DriverKind, ErrorInfo, Run, RunStatus
from nbdurable.settings import Home
from tests.tools.world import World, beat, begin, driver, lease, show

BUSY = ErrorInfo(name="ValueError", message="busy")


@pytest.fixture
def world(home: Home) -> World:
    return World(home)


async def create(engine: Engine, **more: Any) -> Run:
    asked = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.HEADLESS, snapshot="0" * 64, **more)
    return await engine.answer(contract.CREATE_RUN, asked)


async def end(engine: Engine, run: Run, how: str, error: ErrorInfo | None = BUSY) -> Run:
    asked = contract.EndLease.model_validate(
        {"run_id": run.id, "epoch": run.epoch, "how": how, "reason": "step a raised", "error": error}
    )
    return await engine.answer(contract.END_LEASE, asked)


async def nothing_to_do(engine: Engine) -> bool:
    asked = contract.LeaseWork(driver=driver(), slots=1, hold_s=0)
    return not (await engine.answer(contract.LEASE_WORK, asked)).runs


def test_a_delayed_run_begins_when_it_is_due_across_restarts(world: World) -> None:
    """And until then the coordinator stays, and hands it to nobody."""

    async def before(engine: Engine) -> Run:
        run = await create(engine, delay_s=60)
        assert run.status is RunStatus.DELAYED
        assert await nothing_to_do(engine)
        return run

    run = world.play(before)

    async def after(engine: Engine) -> None:
        assert not engine.is_idle
        assert engine.due_in_s == 60
        world.clock.at += 59
        await engine.tick()
        assert await nothing_to_do(engine)
        world.clock.at += 1
        await engine.tick()
        assert (await lease(engine, driver())).id == run.id

    world.play(after)


def test_a_delayed_run_can_begin_now_or_never(world: World) -> None:
    async def story(engine: Engine) -> None:
        first, second = await create(engine, delay_s=60), await create(engine, delay_s=60)
        resumed = await engine.answer(contract.RESUME_RUN, contract.ResumeRun(run_id=first.id))
        assert (resumed.status, resumed.begins_at) == (RunStatus.QUEUED, None)
        cancelled = await engine.answer(contract.CANCEL_RUN, contract.ByRun(run_id=second.id))
        assert cancelled.status is RunStatus.CANCELLED
        world.clock.at += 60
        await engine.tick()
        assert (await lease(engine, driver())).id == first.id
        assert await nothing_to_do(engine)

    world.play(story)


def test_a_run_that_nobody_begins_in_time_expires(world: World) -> None:
    """Its time to live counts from the end of its delay, and ends when it is begun."""

    async def story(engine: Engine) -> None:
        run = await create(engine, delay_s=10, ttl_s=60)
        world.clock.at += 69
        await engine.tick()
        assert (await show(engine, run)).status is RunStatus.QUEUED
        world.clock.at += 1
        await engine.tick()
        expired = await show(engine, run)
        assert (expired.status, expired.ended_at) == (RunStatus.EXPIRED, world.clock.at)
        assert await nothing_to_do(engine)
        assert engine.is_idle
        await engine.answer(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
        world.clock.at += 600
        await engine.tick()
        begun = await lease(engine, driver())
        await end(engine, begun, "release")
        await engine.tick()
        assert (await show(engine, run)).status is RunStatus.QUEUED

    world.play(story)


def test_a_run_that_fails_begins_again_after_growing_waits(world: World) -> None:
    """Guarantee 1: its steps are kept. Each failure, its error and its wait are told; at last it has failed."""

    async def story(engine: Engine) -> None:
        run = await create(engine, retries=2)
        for wait_s in (1.5, 3.0):
            run = await lease(engine, driver())
            delayed = await end(engine, run, "fail")
            assert (delayed.status, delayed.begins_at) == (RunStatus.DELAYED, world.clock.at + wait_s)
            assert f"begins again in {wait_s} s" in delayed.reason
            assert delayed.error == BUSY
            again = await end(engine, run, "fail")
            assert again == delayed  # the answer was lost, and it is told once more
            world.clock.at += wait_s
            await engine.tick()
        run = await lease(engine, driver())
        failed = await end(engine, run, "fail")
        assert (failed.status, failed.failures, failed.recoveries) == (RunStatus.FAILED, 2, 0)
        resumed = await engine.answer(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
        assert resumed.failures == 0

    world.play(story)


@pytest.mark.parametrize(
    ("more", "error", "status"),
    [
        ({"retries": 1, "on_exhausted": "pause"}, BUSY, RunStatus.PAUSED),
        ({"retries": 1}, ErrorInfo(name="Abort", message="no"), RunStatus.FAILED),
        ({"retries": 1}, ErrorInfo(name="StepUsageError", message="no"), RunStatus.FAILED),
        ({"retries": 1, "on_exhausted": "pause"}, ErrorInfo(name="Abort", message="no"), RunStatus.FAILED),
    ],
)
def test_what_becomes_of_a_run_in_the_end(
    world: World, more: dict[str, Any], error: ErrorInfo, status: RunStatus
) -> None:
    """Spent retries fail or pause a run; what trying again can't help fails at once."""

    async def story(engine: Engine) -> None:
        await create(engine, **more)
        ended = await end(engine, await lease(engine, driver()), "fail", error)
        if ended.status is RunStatus.DELAYED:
            world.clock.at += 2
            await engine.tick()
            ended = await end(engine, await lease(engine, driver()), "fail", error)
        assert ended.status is status

    world.play(story)


def test_a_step_may_pause_its_run_whatever_the_run_says(world: World) -> None:
    async def story(engine: Engine) -> None:
        await create(engine, retries=3)
        run = await lease(engine, driver())
        asked = contract.FailStep(
            run_id=run.id,
            epoch=run.epoch,
            step="s",
            attempt=await begin(engine, run),
            error=BUSY,
            pauses=True,
        )
        await engine.answer(contract.FAIL_STEP, asked)
        assert (await end(engine, run, "fail")).status is RunStatus.PAUSED

    world.play(story)


def test_active_time_adds_up_over_drivers_and_waiting_does_not_count(world: World) -> None:
    """At its end the driver is asked to stop, and then made to; also where the coordinator restarts meanwhile."""

    async def before(engine: Engine) -> Run:
        await create(engine, timeout_s=60)
        run = await lease(engine, driver())
        world.clock.at += 40
        await beat(engine, run)
        await end(engine, run, "release", None)
        world.clock.at += 1000
        run = await lease(engine, driver())
        world.clock.at += 19
        assert not (await beat(engine, run)).time_out
        return run

    run = world.play(before)

    async def after(engine: Engine) -> None:
        await engine.tick()
        assert not (await beat(engine, run)).time_out
        world.clock.at += 1
        await engine.tick()
        assert (await beat(engine, run)).time_out
        world.clock.at += 14  # of grace: ten seconds, and five for the word to come
        await beat(engine, run)
        await engine.tick()
        assert (await show(engine, run)).status is RunStatus.RUNNING
        world.clock.at += 1
        await beat(engine, run)
        await engine.tick()
        ended = await show(engine, run)
        assert (ended.status, ended.active_s) == (RunStatus.TIMED_OUT, 75.0)
        with pytest.raises(Fenced):
            await begin(engine, run)

    world.play(after)


@pytest.mark.parametrize("how", ["time_out", "fail", "suspend", "lose"])
def test_however_a_driver_ends_that_is_out_of_time_its_run_has_timed_out(world: World, how: str) -> None:
    async def story(engine: Engine) -> None:
        await create(engine, timeout_s=60, retries=3)
        run = await lease(engine, driver())
        world.clock.at += 61
        await beat(engine, run)
        await engine.tick()
        ended = await end(engine, run, how)
        assert ended.status is RunStatus.TIMED_OUT
        resumed = await engine.answer(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
        assert (resumed.status, resumed.active_s) == (RunStatus.QUEUED, 0.0)

    world.play(story)


def test_a_retry_gives_its_kernel_back_and_is_due_when_the_timer_says(world: World) -> None:
    """The failure and the timer are one transaction: a driver that dies right after it does not begin too early."""

    async def story(engine: Engine) -> None:
        await create(engine)
        run = await lease(engine, driver())
        attempt = await begin(engine, run)
        failing = contract.FailStep(
            run_id=run.id,
            epoch=run.epoch,
            step="s",
            attempt=attempt,
            error=BUSY,
            again_in_s=30,
            gives_back=True,
            sentence="attempt 1 of 4, again in 30 s",
        )
        for _ in range(2):  # the first answer was lost
            await engine.answer(contract.FAIL_STEP, failing)
        assert len((await show(engine, run)).waits) == 1
        await end(engine, run, "lose", None)
        run = await lease(engine, driver())
        world.clock.at += 10
        asked = contract.BeginStep(
            run_id=run.id, epoch=run.epoch, step="s", action="execute", reason="new", goes_on=True
        )
        early = await engine.answer(contract.BEGIN_STEP, asked)
        assert (early.attempt, early.again_in_s) == (0, 20)
        waiting = await end(engine, run, "suspend", None)
        assert waiting.status is RunStatus.WAITING
        world.clock.at += 20
        await engine.tick()
        run = await lease(engine, driver())
        begun = await engine.answer(contract.BEGIN_STEP, asked.model_copy(update={"epoch": run.epoch}))
        assert [one.number for one in begun.failed] == [1]
        assert (begun.attempt, begun.again_in_s) == (2, None)
        [step] = (await show(engine, run)).steps
        assert [(one.status, one.again_in_s) for one in step.attempts] == [("failed", 30), ("running", None)]

    world.play(story)


def test_a_person_who_runs_the_cell_begins_a_new_series_of_tries(world: World) -> None:
    async def story(engine: Engine) -> None:
        await create(engine)
        run = await lease(engine, driver())
        failing = contract.FailStep(
            run_id=run.id,
            epoch=run.epoch,
            step="s",
            attempt=await begin(engine, run),
            error=BUSY,
            again_in_s=1,
        )
        await engine.answer(contract.FAIL_STEP, failing)
        asked = contract.BeginStep(run_id=run.id, epoch=run.epoch, step="s", action="execute", reason="again")
        assert (await engine.answer(contract.BEGIN_STEP, asked)).failed == ()

    world.play(story)


def test_only_headless_runs_are_timed(world: World) -> None:
    """Guarantee 11."""

    async def story(engine: Engine) -> None:
        by = driver("interactive")
        asked = contract.CreateRun(notebook="/n.ipynb", kind=DriverKind.INTERACTIVE, driver=by, timeout_s=5)
        with pytest.raises(Exception, match="only a headless run can be delayed") as caught:
            await engine.answer(contract.CREATE_RUN, asked)
        assert not isinstance(caught.value, Conflict)

    world.play(story)
