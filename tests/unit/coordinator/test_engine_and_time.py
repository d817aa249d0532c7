"""What the coordinator does when time passes: real store, real processes, a clock that the test sets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nbdurable import contract, processes
from nbdurable.contract import KEY_LIFE_S
from nbdurable.coordinator.engine import Engine
from nbdurable.errors import Fenced, Untrusted
from nbdurable.lifecycle import MAX_RECOVERIES
from nbdurable.models import (
    Run,
    RunStatus,
    WaitKind,
    WaitStatus,
)
from nbdurable.settings import Home
from tests.tools.processes import until
from tests.tools.world import SETTINGS, World, beat, begin, commit, driver, headless, interactive, lease, show

T = TypeVar("T")
SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def world(home: Home) -> World:
    return World(home)


@contextmanager
def process() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(SLEEPER)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_a_silent_worker_loses_its_run_and_is_fenced(world: World) -> None:
    """Guarantee 4: after `lease_s` in silence the run goes on elsewhere; the former driver is refused."""

    async def story(engine: Engine) -> None:
        run = await headless(engine)
        first = await lease(engine, driver())
        attempt = await begin(engine, first)
        world.clock.at += 15
        await beat(engine, first)
        world.clock.at += 15
        await engine.tick()
        assert (await show(engine, run)).status is RunStatus.RUNNING
        world.clock.at += 21
        await engine.tick()
        lost = await show(engine, run)
        assert (lost.status, lost.recoveries, lost.driver) == (RunStatus.QUEUED, 1, None)
        assert "was not heard of" in lost.reason
        assert "recovered for the 1st time" in lost.reason
        assert [a.status for a in lost.steps[0].attempts] == ["lost"]
        second = await lease(engine, driver())
        assert second.epoch == first.epoch + 1
        for refused in (beat(engine, first), commit(engine, first, attempt), begin(engine, first)):
            with pytest.raises(Fenced, match=r"is driven by worker \d+ now"):
                await refused
        assert (await show(engine, run)).steps[0].checkpoint_seq is None
        assert await begin(engine, second) == attempt + 1

    world.play(story)


def test_a_kernel_of_this_host_is_watched_by_its_process(world: World) -> None:
    """A kernel that computes for long without a sign keeps its run; one that can't be watched does not."""

    async def story(engine: Engine) -> None:
        near = await interactive(engine, driver("interactive"))
        far = await interactive(engine, driver("interactive", host="elsewhere"))
        world.clock.at += 1000
        await engine.tick()
        assert (await show(engine, near)).status is RunStatus.RUNNING
        paused = await show(engine, far)
        assert (paused.status, paused.recoveries) == (RunStatus.PAUSED, 0)
        assert "open the notebook again" in paused.reason

    world.play(story)


def test_the_death_of_a_worker_ends_what_it_left_behind(world: World) -> None:
    """Guarantee 4: the kernel of a dead worker is ended before its run is queued again."""
    with process() as worker, process() as kernel:

        async def story(engine: Engine) -> None:
            await headless(engine)
            run = await lease(engine, driver(pid=worker.pid))
            orphan = processes.identity("kernel", kernel.pid)
            await beat(engine, run, orphan)
            await engine.tick()
            assert processes.is_alive(orphan)
            worker.kill()
            worker.wait()
            await engine.tick()
            assert not processes.is_alive(orphan)
            lost = await show(engine, run)
            assert lost.status is RunStatus.QUEUED
            assert lost.reason == f"its worker {worker.pid} died; recovered for the 1st time"

        world.play(story)


def test_the_death_of_a_kernel_pauses_its_run(world: World) -> None:
    with process() as kernel:

        async def story(engine: Engine) -> None:
            run = await interactive(engine, driver("interactive", kernel.pid))
            await begin(engine, run)
            kernel.kill()
            kernel.wait()
            await engine.tick()
            paused = await show(engine, run)
            assert (paused.status, paused.driver) == (RunStatus.PAUSED, None)
            assert [a.status for a in paused.steps[0].attempts] == ["lost"]
            asked = contract.LeaseRun(run_id=run.id, driver=driver("interactive"))
            again = await engine.answer(contract.LEASE_RUN, asked)
            assert (again.status, again.epoch) == (RunStatus.RUNNING, 2)

        world.play(story)


def test_a_run_that_kills_its_workers_is_given_up(world: World) -> None:
    """A run whose driver died more than MAX_RECOVERIES times is poison; a person may still resume it."""

    async def story(engine: Engine) -> None:
        run = await headless(engine)
        for _ in range(MAX_RECOVERIES + 1):
            leased = await lease(engine, driver())
            ending = contract.EndLease(
                run_id=run.id, epoch=leased.epoch, how="lose", reason="its kernel died"
            )
            ended = await engine.answer(contract.END_LEASE, ending)
        assert ended.status is RunStatus.FAILED
        assert f"given up after {MAX_RECOVERIES} recoveries" in ended.reason
        resumed = await engine.answer(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
        assert (resumed.status, resumed.recoveries, resumed.ended_at) == (RunStatus.QUEUED, 0, None)

    world.play(story)


def test_leases_survive_a_restart_of_the_coordinator(world: World) -> None:
    """A living driver has `lease_s` to be heard of, and its epoch holds; a dead one's run is recovered."""
    with process() as mortal:

        async def before(engine: Engine) -> tuple[Run, Run, int]:
            await headless(engine)
            await headless(engine)
            alive = await lease(engine, driver())
            dead = await lease(engine, driver(pid=mortal.pid))
            attempt = await begin(engine, alive)
            await commit(engine, alive, attempt)
            return alive, dead, await begin(engine, alive, "t")

        alive, dead, attempt = world.play(before)
        mortal.kill()
        mortal.wait()

        async def after(engine: Engine) -> None:
            world.clock.at += 19
            await engine.tick()
            assert (await show(engine, dead)).status is RunStatus.QUEUED
            kept = await show(engine, alive)
            assert (kept.status, kept.epoch) == (RunStatus.RUNNING, alive.epoch)
            await commit(engine, alive, attempt, "t")
            kept = await show(engine, alive)
            assert [(s.name, s.executions, s.status) for s in kept.steps] == [
                ("s", 1, "completed"),
                ("t", 1, "completed"),
            ]

        world.play(after)


def test_a_timer_wakes_its_run_across_restarts(world: World) -> None:
    """Guarantee 5: a sleeping run holds nothing, and goes on when its time has come."""

    async def before(engine: Engine) -> Run:
        await headless(engine)
        run = await lease(engine, driver())
        opened = await engine.answer(
            contract.OPEN_WAIT,
            contract.OpenWait(
                run_id=run.id, epoch=run.epoch, key="nap", kind=WaitKind.TIMER, title="sleep", due_in_s=60
            ),
        )
        assert opened.due_at == world.clock.at + 60
        ending = contract.EndLease(run_id=run.id, epoch=run.epoch, how="suspend", reason="sleeps")
        return await engine.answer(contract.END_LEASE, ending)

    run = world.play(before)
    assert (run.status, run.driver) == (RunStatus.WAITING, None)

    async def after(engine: Engine) -> None:
        world.clock.at += 59
        await engine.tick()
        assert (await show(engine, run)).status is RunStatus.WAITING
        assert not engine.is_idle
        world.clock.at += 1
        await engine.tick()
        woken = await show(engine, run)
        assert woken.status is RunStatus.QUEUED
        (wait,) = woken.waits
        assert (wait.status, wait.answer.by, wait.answer.approved) == (WaitStatus.ANSWERED, "timer", True)
        again = await lease(engine, driver())
        same = await engine.answer(
            contract.OPEN_WAIT,
            contract.OpenWait(
                run_id=run.id, epoch=again.epoch, key="nap", kind=WaitKind.TIMER, title="sleep", due_in_s=60
            ),
        )
        assert same == wait

    world.play(after)


def test_a_worker_that_does_not_obey_is_cancelled_for(world: World) -> None:
    """Cancelling asks the worker first; when it does not stop in time, its processes are ended."""
    with process() as kernel:

        async def story(engine: Engine) -> None:
            await headless(engine)
            run = await lease(engine, driver())
            stubborn = processes.identity("kernel", kernel.pid)
            assert not (await beat(engine, run, stubborn)).cancel
            asked = await engine.answer(contract.CANCEL_RUN, contract.ByRun(run_id=run.id))
            assert (asked.status, asked.cancel_requested) == (RunStatus.RUNNING, True)
            assert await engine.answer(contract.CANCEL_RUN, contract.ByRun(run_id=run.id)) == asked
            assert (await beat(engine, run, stubborn)).cancel
            world.clock.at += SETTINGS.cancel_grace_s + 5
            await engine.tick()
            assert not processes.is_alive(stubborn)
            assert (await show(engine, run)).status is RunStatus.CANCELLED
            with pytest.raises(Fenced, match="is cancelled"):
                await beat(engine, run)

        world.play(story)


def test_a_cancelled_run_is_not_recovered(world: World) -> None:
    """A worker that dies, or gives the run back, after the wish to cancel does not revive the run."""

    async def story(engine: Engine) -> None:
        for how in ("lose", "release", "suspend"):
            await headless(engine)
            run = await lease(engine, driver())
            await engine.answer(contract.CANCEL_RUN, contract.ByRun(run_id=run.id))
            ending: Any = contract.EndLease(run_id=run.id, epoch=run.epoch, how=how, reason="x")
            assert (await engine.answer(contract.END_LEASE, ending)).status is RunStatus.CANCELLED
            assert (
                await engine.answer(contract.END_LEASE, ending)
            ).status is RunStatus.CANCELLED  # its answer was lost

    world.play(story)


def test_a_run_whose_lease_answer_was_lost_is_given_again(world: World) -> None:
    """Guarantee 4: the worker gets it with a new epoch, so that an answer that comes late drives nothing."""

    async def story(engine: Engine) -> None:
        await headless(engine)
        lost = await lease(engine, driver(), holding=())
        again = await lease(engine, driver(), holding=())
        assert (again.id, again.epoch) == (lost.id, lost.epoch + 1)
        work = await engine.answer(
            contract.LEASE_WORK, contract.LeaseWork(driver=driver(), slots=1, holding=(again.id,))
        )
        assert work.runs == ()

    world.play(story)


def test_idempotency_keys_live_thirty_days(world: World) -> None:
    async def story(engine: Engine) -> None:
        first = await headless(engine, "k")
        world.clock.at += KEY_LIFE_S - 1
        assert (await headless(engine, "k")).id == first.id
        world.clock.at += 2
        assert (await headless(engine, "k")).id != first.id

    world.play(story)


def test_an_idle_worker_is_told_to_end(world: World) -> None:
    async def story(engine: Engine) -> None:
        ask = contract.LeaseWork(driver=driver(), slots=1)
        assert not (await engine.answer(contract.LEASE_WORK, ask)).stop
        await headless(engine)
        run = await lease(engine, driver())
        world.clock.at += 59
        await beat(engine, run)
        world.clock.at += 10
        assert not (await engine.answer(contract.LEASE_WORK, ask)).stop  # it has a run
        ending = contract.EndLease(run_id=run.id, epoch=run.epoch, how="complete", reason="done")
        await engine.answer(contract.END_LEASE, ending)
        assert not (await engine.answer(contract.LEASE_WORK, ask)).stop
        world.clock.at += 60
        assert (await engine.answer(contract.LEASE_WORK, ask)).stop

    world.play(story)


def test_a_worker_that_dies_at_once_is_started_with_pauses_and_the_run_says_why(
    world: World, tmp_path: Path
) -> None:
    """Guarantee 9: a queued run tells what keeps it."""
    children: list[subprocess.Popen[bytes]] = []

    def start(home: Home) -> subprocess.Popen[bytes]:
        code = "import sys; print('no such thing'); sys.exit(3)"
        children.append(processes.spawn(["-c", code], log=home.logs / "worker.log", cwd=tmp_path))
        return children[-1]

    world.start = start

    async def story(engine: Engine) -> None:
        run = await headless(engine)
        for count in (1, 2, 3):
            assert len(children) == count
            children[-1].wait(20)
            await engine.tick()  # sees the death; too early for the next one
            assert len(children) == count
            found = await show(engine, run)
            assert found.status is RunStatus.QUEUED
            assert "ended at once with status 3" in found.reason
            assert found.reason.endswith("no such thing")
            world.clock.at += 0.5 * 2**count
            await engine.tick()
        told = await engine.answer(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id))
        assert [e.kind for e in told.events] == ["run_created", "run_delayed"]  # once, not at each try

    world.play(story)


def test_one_worker_is_enough(world: World, tmp_path: Path) -> None:
    """A worker that lives is not joined by another, also when another coordinator had started it."""
    children: list[subprocess.Popen[bytes]] = []

    def start(home: Home) -> subprocess.Popen[bytes]:
        children.append(processes.spawn(SLEEPER[1:], log=home.logs / "worker.log", cwd=tmp_path))
        return children[-1]

    world.start = start

    async def story(engine: Engine) -> None:
        await headless(engine)
        await headless(engine)
        await engine.tick()
        assert len(children) == 1

    try:
        world.play(story)
        world.play(story)
        children[0].kill()
        until(lambda: children[0].poll() is not None, what="the worker dies")

        async def another(engine: Engine) -> None:
            await engine.tick()
            assert len(children) == 2

        world.play(another)
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_store_that_is_not_trusted_is_only_looked_at(world: World) -> None:
    """Guarantee 8: a stranger's queued runs are not handed out, nor his timers fired; once trusted, all goes on."""
    started: list[Home] = []

    async def made_by_somebody(engine: Engine) -> tuple[Run, Run]:
        lost = await interactive(engine, driver("interactive", host="elsewhere"))
        await engine.answer(
            contract.OPEN_WAIT,
            contract.OpenWait(
                run_id=lost.id,
                epoch=lost.epoch,
                key="k",
                step="s",
                kind=WaitKind.TIMER,
                title="t",
                due_in_s=60,
            ),
        )
        return await headless(engine), lost

    def start(home: Home) -> subprocess.Popen[bytes]:
        started.append(home)
        raise OSError("no worker is needed here")

    async def looked_at(engine: Engine) -> None:
        world.clock.at += 3600
        await engine.tick()
        assert engine.is_idle, "nothing in it keeps the coordinator"
        assert engine.due_in_s is None
        for endpoint in contract.ENDPOINTS:
            if endpoint not in contract.LOOKING:
                with pytest.raises(Untrusted):
                    await engine.answer(endpoint, contract.Nothing())
        assert await statuses(engine) == [RunStatus.QUEUED, RunStatus.RUNNING]
        (wait,) = (await engine.answer(contract.LIST_WAITS, contract.ListWaits())).waits
        assert wait.status is WaitStatus.OPEN
        assert not started
        world.refusal = None
        await engine.tick()
        assert not engine.is_idle
        assert started == [world.home]
        assert not (await engine.answer(contract.LIST_WAITS, contract.ListWaits())).waits

    async def statuses(engine: Engine) -> list[RunStatus]:
        runs = (await engine.answer(contract.LIST_RUNS, contract.ListRuns())).runs
        return sorted(run.status for run in runs)  # both were created at one moment of this clock

    world.play(made_by_somebody)
    world.start, world.refusal = start, Untrusted("somebody else made it")
    world.play(looked_at)
