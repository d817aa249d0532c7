"""What is an occasion for hooks, and that each hook hears of it once: by a store, a set clock, and no kernel."""

from __future__ import annotations

from typing import Any

import pytest

from nbdurable import contract
from nbdurable.coordinator.engine import Engine
from nbdurable.errors import Fenced
from nbdurable.lifecycle import MAX_RECOVERIES
from nbdurable.models import ErrorInfo, Run, WaitKind
from nbdurable.settings import Home
from tests.tools.world import SETTINGS, World, beat, driver, headless, lease, show


@pytest.fixture
def world(home: Home) -> World:
    return World(home)


async def asked(engine: Engine, run: Run, kind: Any, how: Any, name: str = "tell") -> Any:
    """Ask whether a hook is to run, and return what it is told."""
    question = contract.BeginHook(
        run_id=run.id, epoch=run.epoch, kind=kind, name=name, how=how, reason="why", error=None
    )
    return (await engine.answer(contract.BEGIN_HOOK, question)).occasion


async def ended(engine: Engine, run: Run, kind: Any, key: str, error: ErrorInfo | None = None) -> None:
    question = contract.EndHook(run_id=run.id, epoch=run.epoch, kind=kind, name="tell", key=key, error=error)
    await engine.answer(contract.END_HOOK, question)


async def finish(engine: Engine, run: Run, how: Any) -> Run:
    return await engine.answer(
        contract.END_LEASE, contract.EndLease(run_id=run.id, epoch=run.epoch, how=how, reason="why")
    )


def test_a_failure_is_told_once_until_somebody_resumes(world: World) -> None:
    """A hook that began and did not end is told again by the next driver; one that ended is not, failed or not."""

    async def story(engine: Engine) -> tuple[Run, str]:
        await headless(engine)
        run = await lease(engine, driver())
        first = await asked(engine, run, "failure", "fail")
        assert (first.status, first.reason, first.key) == ("failed", "why", "failure:0")
        await finish(engine, run, "lose")
        with pytest.raises(Fenced):
            await asked(engine, run, "failure", "fail")
        run = await lease(engine, driver())
        assert (await asked(engine, run, "failure", "fail")).key == first.key
        for _ in range(2):  # the answer was lost
            await ended(engine, run, "failure", first.key, ErrorInfo(name="E", message="m"))
        return run, first.key

    run, key = world.play(story)

    async def later(engine: Engine) -> None:
        assert await asked(engine, run, "failure", "fail") is None
        assert (await asked(engine, run, "failure", "fail", name="other")).key == key
        await finish(engine, run, "fail")
        await engine.answer(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
        again = await lease(engine, driver())
        assert (await asked(engine, again, "failure", "fail")).key == "failure:1"
        events = (await engine.answer(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id))).events
        assert [
            (e.kind, e.epoch) for e in events if e.kind.startswith("hook") and e.data["name"] == "tell"
        ] == [
            ("hook_begun", 1),
            ("hook_begun", 2),
            ("hook_failed", 2),
            ("hook_begun", 3),
        ]

    world.play(later)


def test_what_is_no_occasion(world: World) -> None:
    """Neither a retry nor a loss is a failure, but a loss too many is; a gate is told once, and no step's next try."""

    async def story(engine: Engine) -> None:
        wanted = contract.CreateRun(notebook="/n.ipynb", kind="headless", snapshot="0" * 64, retries=1)
        await engine.answer(contract.CREATE_RUN, wanted)
        run = await lease(engine, driver())
        assert await asked(engine, run, "failure", "fail") is None
        assert await asked(engine, run, "failure", "lose") is None
        assert await asked(engine, run, "success", "fail") is None
        assert await asked(engine, run, "wait", "suspend") is None
        for key, title in (("retry:s:1", "the next try of s"), ("gate", "Publish?")):
            wait = contract.OpenWait(
                run_id=run.id, epoch=run.epoch, key=key, kind=WaitKind.TIMER, title=title, due_in_s=60
            )
            await engine.answer(contract.OPEN_WAIT, wait)
        told = await asked(engine, run, "wait", "suspend")
        assert (told.status, told.waits) == ("waiting", ("Publish?",))
        await ended(engine, run, "wait", told.key)
        paused = await asked(engine, run, "wait", "pause")
        assert (paused.status, paused.waits) == ("paused", ())
        for _ in range(MAX_RECOVERIES):
            await finish(engine, run, "lose")
            run = await lease(engine, driver())
        assert await asked(engine, run, "wait", "suspend") is None
        assert (await asked(engine, run, "failure", "lose")).status == "failed"

    world.play(story)


def test_a_hook_of_a_cancelled_run_has_its_time(world: World) -> None:
    """A run that is cancelled is not ended by force while its hooks may run."""

    async def story(engine: Engine) -> None:
        await headless(engine)
        run = await lease(engine, driver())
        await engine.answer(contract.CANCEL_RUN, contract.ByRun(run_id=run.id))
        assert (await asked(engine, run, "cancel", "cancel")).status == "cancelled"
        world.clock.at += SETTINGS.cancel_grace_s + SETTINGS.hook_timeout_s
        await beat(engine, run)
        await engine.tick()
        assert (await show(engine, run)).status == "running"
        await ended(engine, run, "cancel", "cancel:0")
        assert (await finish(engine, run, "cancel")).status == "cancelled"

    world.play(story)
