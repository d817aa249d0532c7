"""Runs that runs start: once each, waited for, cancelled with those above them (guarantees 4, 5, 11)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdurable import contract
from nbdurable.coordinator.creation import MAX_DEPTH
from nbdurable.coordinator.engine import Engine
from nbdurable.errors import Conflict, Fenced, UsageError
from nbdurable.models import DriverKind, ErrorInfo, Run, RunStatus, Wait, WaitKind, WaitStatus
from nbdurable.settings import Home
from nbdurable.store.duckdb_store import DuckDBStore
from nbdurable.store.port import Changes
from tests.tools.world import World, beat, driver, headless, lease, show


@pytest.fixture
def world(home: Home) -> World:
    return World(home)


def child(call: str | None = "c", notebook: str = "/child.ipynb", **more: Any) -> contract.CreateRun:
    more = {"snapshot": "1" * 64, **more}
    return contract.CreateRun(notebook=notebook, kind=DriverKind.HEADLESS, call=call, **more)


def waiting_for(call: str = "c", key: str | None = None, **more: Any) -> contract.WaitSpec:
    start = None if "child" in more else child(call)
    return contract.WaitSpec(
        key=key or call, kind=WaitKind.CHILD, title="child.ipynb", step="s", start=start, **more
    )


async def leased(engine: Engine) -> Run:
    await headless(engine)
    return await lease(engine, driver())


async def start(engine: Engine, parent: Run, *children: contract.CreateRun) -> tuple[Run, ...]:
    asked = contract.StartChildren(run_id=parent.id, epoch=parent.epoch, step="s", children=children)
    return (await engine.answer(contract.START_CHILDREN, asked)).runs


async def gate(engine: Engine, run: Run, *waits: contract.WaitSpec, first: bool = False) -> tuple[Wait, ...]:
    asked = contract.OpenGate(run_id=run.id, epoch=run.epoch, waits=waits, first=first)
    return (await engine.answer(contract.OPEN_GATE, asked)).waits


async def end(engine: Engine, run: Run, how: Any = "complete", **more: Any) -> Run:
    ending = contract.EndLease(run_id=run.id, epoch=run.epoch, how=how, reason=how, **more)
    return await engine.answer(contract.END_LEASE, ending)


async def cancel(engine: Engine, run: Run) -> Run:
    return await engine.answer(contract.CANCEL_RUN, contract.ByRun(run_id=run.id))


async def resume(engine: Engine, run: Run) -> Run:
    return await engine.answer(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))


async def all_runs(engine: Engine) -> list[Run]:
    return list((await engine.answer(contract.LIST_RUNS, contract.ListRuns(limit=5000))).runs)


# Starting --------------------------------------------------------------------------------------------------


def test_a_call_starts_its_child_once_over_repetitions_and_restarts(world: World) -> None:
    """A repeated call gets the first child, also one that failed; an edit after a failure starts it again."""

    async def first(engine: Engine) -> tuple[Run, Run]:
        parent = await leased(engine)
        (one,) = await start(engine, parent, child())
        assert (one.parent_id, one.root_id, one.trace_id, one.depth) == (
            parent.id,
            parent.id,
            parent.trace_id,
            1,
        )
        assert parent.trace_id == parent.id
        again, other = await start(engine, parent, child(), child("d"))
        assert (again.id, other.id != one.id) == (one.id, True)
        await cancel(engine, other)
        return parent, one

    async def later(engine: Engine) -> None:
        (again,) = await start(engine, parent, child())
        assert again.id == one.id
        failed = await end(engine, await lease(engine, driver()), "fail")
        assert failed.id == one.id
        assert [run.id for run in await start(engine, parent, child(), child(snapshot="1" * 64))] == [
            one.id
        ] * 2
        world.clock.at += 1
        (edited,) = await start(engine, parent, child(snapshot="2" * 64))
        assert edited.id != one.id
        assert [run.id for run in await start(engine, parent, child(snapshot="2" * 64))] == [edited.id]
        begun = contract.BeginStep(
            run_id=parent.id, epoch=parent.epoch, step="s", action="execute", reason="rerun", fresh=True
        )
        await engine.answer(contract.BEGIN_STEP, begun)
        (fresh,) = await start(engine, parent, child())
        assert fresh.id not in (one.id, edited.id)
        with pytest.raises(Fenced):
            await start(engine, parent.model_copy(update={"epoch": parent.epoch + 1}), child("x"))

    parent, one = world.play(first)
    world.play(later)


def test_keys_count_in_one_run_or_everywhere_for_their_life_and_until_a_failure(world: World) -> None:
    async def story(engine: Engine) -> None:
        parents = [await leased(engine), await leased(engine)]
        mine = child(None, idempotency_key="k", key_scope="run")
        ours = child(None, idempotency_key="k", key_ttl_s=100)
        (a,), (b,) = [await start(engine, parent, mine) for parent in parents]
        assert a.id != b.id
        (c,), (d,) = [await start(engine, parent, ours) for parent in parents]
        assert (c.id, d.id in (a.id, b.id)) == (d.id, False)
        world.clock.at += 99
        assert (await start(engine, parents[0], ours))[0].id == c.id
        world.clock.at += 2
        (e,) = await start(engine, parents[0], ours)
        assert e.id != c.id
        for status in ("fail", "cancel"):
            (before,) = await start(engine, parents[0], mine)
            if status == "fail":
                await end(engine, await lease(engine, driver()), "fail")
            else:
                await cancel(engine, before)
            assert (await start(engine, parents[0], mine))[0].id != before.id
        for key, scope in (("call:x", "global"), ("run:x", "run")):
            with pytest.raises(UsageError, match="can't begin with"):
                await start(engine, parents[0], child(None, idempotency_key=key, key_scope=scope))

    world.play(story)


def test_a_batch_is_one_transaction_and_bounded(world: World) -> None:
    """Guarantee 11: what can't be started is refused before anything is."""

    async def story(engine: Engine) -> None:
        parent = await leased(engine)
        runs = await start(engine, parent, *(child(str(n)) for n in range(1000)))
        assert len({run.id for run in runs}) == 1000
        with pytest.raises(UsageError, match="needs the snapshot"):
            await start(engine, parent, child("good"), child("bad", snapshot=None))
        assert len(await all_runs(engine)) == 1001
        with pytest.raises(ValueError, match="at most 1000"):
            contract.StartChildren(run_id=parent.id, epoch=1, children=[child(str(n)) for n in range(1001)])

    world.play(story)


def test_children_of_children_end_somewhere(world: World) -> None:
    """Guarantee 11: a notebook that starts itself is stopped, and told why."""

    async def story(engine: Engine) -> None:
        run = await leased(engine)
        for depth in range(1, MAX_DEPTH + 1):
            (made,) = await start(engine, run, child())
            assert made.depth == depth
            run = await lease(engine, driver())
        with pytest.raises(UsageError, match="has 32 runs above it"):
            await start(engine, run, child())

    world.play(story)


# Waiting ---------------------------------------------------------------------------------------------------


def test_a_child_s_end_answers_its_parent_in_the_same_transaction(world: World) -> None:
    """Guarantee 5: the parent holds nothing while it waits, and is woken by the very commit that ends its child."""

    async def first(engine: Engine) -> tuple[Run, Wait]:
        parent = await leased(engine)
        wait, other = await gate(engine, parent, waiting_for("c"), waiting_for("d"))
        assert [found.id for found in await gate(engine, parent, waiting_for("c"), waiting_for("d"))] == [
            wait.id,
            other.id,
        ]
        assert (await end(engine, parent, "suspend")).driver is None
        run = await lease(engine, driver())
        assert run.id == wait.child
        result = contract.SetResult(run_id=run.id, epoch=run.epoch, result={"n": 1})
        await engine.answer(contract.SET_RESULT, result)
        await end(engine, run)
        return parent, other

    async def later(engine: Engine) -> None:
        found = await show(engine, parent)
        (answered,) = [one for one in found.waits if one.id != other.id]
        assert (found.status, answered.answer.value) == ("waiting", {"n": 1})
        run = await lease(engine, driver())
        assert run.id == other.child
        await end(engine, run, "fail", error=ErrorInfo(name="ValueError", message="no"))
        woken = await show(engine, parent)
        assert woken.status is RunStatus.QUEUED
        (answer,) = [one.answer for one in woken.waits if one.id == other.id]
        assert (answer.approved, answer.value["error"]) == (False, {"name": "ValueError", "message": "no"})

    parent, other = world.play(first)
    world.play(later)


def test_a_wait_for_a_run_that_has_ended_is_answered_at_once_and_a_missed_end_at_the_next_start(
    world: World,
) -> None:
    """Guarantee 5: whatever came between the end and the wait, the parent hears of it."""

    async def first(engine: Engine) -> tuple[Run, Run]:
        parent = await leased(engine)
        (one, two) = await start(engine, parent, child("1"), child("2"))
        await cancel(engine, one)
        (wait,) = await gate(engine, parent, waiting_for("w1", child=one.id))
        assert wait.answer is not None
        assert wait.answer.value["status"] == "cancelled"
        await gate(engine, parent, waiting_for("w2", child=two.id))
        await end(engine, parent, "suspend")
        return parent, two

    async def later(engine: Engine) -> None:
        await engine.tick()
        assert (await show(engine, parent)).status is RunStatus.QUEUED

    parent, two = world.play(first)
    store = DuckDBStore.open(world.home, clock=world.clock.now)
    store.submit(Changes(runs=[two.model_copy(update={"status": RunStatus.COMPLETED})]))
    store.close()
    world.play(later)


def test_a_failed_child_that_was_resumed_is_waited_for_again(world: World) -> None:
    """A wait's answer stands as long as its child's end does; a parent that comes back then waits for the new one."""

    async def story(engine: Engine) -> None:
        parent = await leased(engine)
        (wait,) = await gate(engine, parent, waiting_for())
        await end(engine, await lease(engine, driver()), "fail")
        (same,) = await gate(engine, parent, waiting_for())
        assert (same.id, same.status) == (wait.id, WaitStatus.ANSWERED)
        await resume(engine, Run.model_construct(id=wait.child))
        (again,) = await gate(engine, parent, waiting_for())
        assert (again.id != wait.id, again.status, again.child) == (True, WaitStatus.OPEN, wait.child)
        await end(engine, await lease(engine, driver()))
        (done,) = await gate(engine, parent, waiting_for())
        assert done.answer is not None
        assert done.answer.approved

    world.play(story)


def test_the_first_of_a_child_and_a_timer_counts_and_the_child_goes_on(world: World) -> None:
    async def story(engine: Engine) -> None:
        parent = await leased(engine)
        timer = contract.WaitSpec(key="t", kind=WaitKind.TIMER, title="sleep", due_in_s=10)
        wait, _ = await gate(engine, parent, waiting_for(), timer, first=True)
        await end(engine, parent, "suspend")
        world.clock.at += 11
        await engine.tick()
        found = await show(engine, parent)
        assert {one.kind: one.status for one in found.waits} == {"child": "cancelled", "timer": "answered"}
        assert (await show(engine, Run.model_construct(id=wait.child))).status is RunStatus.QUEUED

    world.play(story)


def test_runs_that_would_wait_for_each_other_are_refused(world: World) -> None:
    """Guarantee 11: a circle of waits, of whatever length, is an error of the one that would close it."""

    async def story(engine: Engine) -> None:
        parent = await leased(engine)
        await gate(engine, parent, waiting_for())
        middle = await lease(engine, driver())
        await gate(engine, middle, waiting_for())
        last = await lease(engine, driver())
        for run in (last, middle, parent):
            with pytest.raises(Conflict, match="waits for it"):
                await gate(engine, last, waiting_for("w", child=run.id))
        assert not (await show(engine, last)).waits

    world.play(story)


# Cancelling ------------------------------------------------------------------------------------------------


def test_cancelling_goes_down_the_tree_also_over_a_crash(world: World) -> None:
    """Waiting, queued and running children are cancelled with their parent; one resumed by hand stays resumed."""

    async def first(engine: Engine) -> tuple[Run, list[Run]]:
        parent = await leased(engine)
        await gate(engine, parent, waiting_for("a"), waiting_for("b"))
        await end(engine, parent, "suspend")
        middle = await lease(engine, driver())
        (wait,) = await gate(engine, middle, waiting_for("c"))
        await end(engine, middle, "suspend")
        running = await lease(engine, driver())
        return parent, [middle, running, Run.model_construct(id=wait.child)]

    async def later(engine: Engine) -> None:
        await engine.tick()
        middle, running, queued = [await show(engine, run) for run in runs]
        assert [middle.status, queued.status] == ["cancelled", "cancelled"]
        assert f"cancelled with run {parent.short}" in middle.reason
        assert (await beat(engine, running)).cancel
        await resume(engine, middle)

    async def much_later(engine: Engine) -> None:
        await engine.tick()
        assert (await show(engine, runs[0])).status is RunStatus.QUEUED
        cancelled = await cancel(engine, parent)
        assert cancelled.status is RunStatus.CANCELLED

    parent, runs = world.play(first)
    store = DuckDBStore.open(world.home, clock=world.clock.now)  # the coordinator died right after this
    found = store.run(parent.id)
    assert found is not None
    store.submit(Changes(runs=[found.model_copy(update={"status": RunStatus.CANCELLED})]))
    store.close()
    world.play(later)
    world.play(much_later)


def test_a_parent_s_failure_ends_only_the_children_that_were_tied_to_it(world: World) -> None:
    async def story(engine: Engine) -> None:
        parent = await leased(engine)
        free, tied = await start(engine, parent, child("1"), child("2", cancel_with_parent=True))
        await end(engine, parent, "fail")
        await engine.tick()
        assert [(await show(engine, run)).status for run in (free, tied)] == ["queued", "cancelled"]
        other = await lease(engine, driver())
        assert other.id == free.id

    world.play(story)


# All of it together ----------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("opresxl"), min_size=8, max_size=30))
def test_each_child_is_started_once_and_answers_once(tmp_path_factory: Any, moves: list[str]) -> None:
    """Guarantee 5, over random orders of opening, waiting, ending, repeating, losing drivers and restarting."""
    world = World(Home(tmp_path_factory.mktemp("world") / ".nbdurable").create())
    calls = ("a", "b", "c")

    async def piece(engine: Engine, part: list[str], parent_id: str | None) -> str:
        if parent_id is None:
            parent_id = (await leased(engine)).id
        for move in part:
            parent = await show(engine, Run.model_construct(id=parent_id))
            driven = parent.status is RunStatus.RUNNING
            if move in "op" and driven:
                names = calls if move == "o" else calls[:2]
                await gate(engine, parent, *(waiting_for(name) for name in names))
            elif move == "r" and driven:
                await start(engine, parent, *(child(name) for name in calls))
            elif move == "s" and driven:
                await end(engine, parent, "suspend")
            elif move == "l" and driven:
                await end(engine, parent, "lose")
            elif move in "ex":
                work = contract.LeaseWork(driver=driver(), slots=1)
                for run in (await engine.answer(contract.LEASE_WORK, work)).runs:
                    if run.id != parent_id:
                        await end(engine, run, "complete" if move == "e" else "fail")
        return parent_id

    parent_id: str | None = None
    for at in range(0, len(moves), 10):
        parent_id = world.play(
            lambda engine, at=at, known=parent_id: piece(engine, moves[at : at + 10], known)
        )

    async def check(engine: Engine) -> None:
        children = [run for run in await all_runs(engine) if run.parent_id == parent_id]
        assert len({run.idempotency_key for run in children}) == len(children)
        ended = {run.id for run in children if run.status.is_final}
        parent = await show(engine, Run.model_construct(id=parent_id))
        for wait in parent.waits:
            assert wait.status is (WaitStatus.ANSWERED if wait.child in ended else WaitStatus.OPEN)
        is_open = any(wait.status is WaitStatus.OPEN for wait in parent.waits)
        assert is_open or parent.status is not RunStatus.WAITING

    world.play(check)
    asyncio.set_event_loop(None)


# Debounce and singletons -----------------------------------------------------------------------------------


async def ask(engine: Engine, parameters: dict[str, Any] | None = None, **more: Any) -> Run:
    wanted = child(None, parameters=parameters or {}, **more)
    return (await engine.answer(contract.CREATE_RUNS, contract.CreateRuns(runs=(wanted,)))).runs[0]


@pytest.mark.parametrize(("mode", "counts"), [("leading", 1), ("trailing", 3)])
def test_what_is_asked_for_again_begins_once_when_nobody_asks_any_more(
    world: World, mode: Any, counts: int
) -> None:
    """A debounced run begins a while after it was last asked for, at the latest after its maximum; over restarts."""
    more: dict[str, Any] = {
        "debounce_s": 30,
        "debounce_key": "user-7",
        "debounce_mode": mode,
        "debounce_max_s": 70,
    }

    async def first(engine: Engine) -> Run:
        run = await ask(engine, {"n": 1}, **more)
        assert run.status is RunStatus.DELAYED
        world.clock.at += 20
        assert (await ask(engine, {"n": 2}, **more)).id == run.id
        assert (await ask(engine, {"n": 9}, **{**more, "debounce_key": "user-8"})).id != run.id
        return run

    async def later(engine: Engine) -> None:
        world.clock.at += 20
        await engine.tick()
        assert (await ask(engine, {"n": 3}, **more)).id == run.id
        world.clock.at += 29
        await engine.tick()
        assert (await show(engine, run)).status is RunStatus.DELAYED
        world.clock.at += 1
        await engine.tick()
        begun = await show(engine, run)
        assert (begun.status, begun.parameters) == (RunStatus.QUEUED, {"n": counts})
        assert (await ask(engine, {"n": 4}, **more)).id != run.id

    run = world.play(first)
    world.play(later)


def test_a_debounce_without_a_key_or_with_another_delay_is_refused(world: World) -> None:
    async def story(engine: Engine) -> None:
        for more in ({"debounce_s": 30}, {"debounce_key": "k"}):
            with pytest.raises(UsageError, match="has a time and a key"):
                await ask(engine, **more)
        with pytest.raises(UsageError, match="no other delay"):
            await ask(engine, debounce_s=30, debounce_key="k", delay_s=1)
        assert not await all_runs(engine)

    world.play(story)


def test_singletons_are_skipped_queued_or_take_the_other_s_place(world: World) -> None:
    """Of the runs of one kind at most one is driven, also over restarts and while it waits."""

    async def first(engine: Engine) -> tuple[Run, Run]:
        one = await ask(engine, singleton="queue")
        assert (await ask(engine, singleton="skip")).id == one.id
        two = await ask(engine, singleton="queue")
        one = await lease(engine, driver())
        await gate(engine, one, contract.WaitSpec(key="t", kind=WaitKind.TIMER, title="sleep", due_in_s=10))
        await end(engine, one, "suspend")
        return one, two

    async def later(engine: Engine) -> None:
        work = contract.LeaseWork(driver=driver(), slots=5)
        assert not (await engine.answer(contract.LEASE_WORK, work)).runs
        world.clock.at += 11
        await engine.tick()
        (again,) = (await engine.answer(contract.LEASE_WORK, work)).runs
        assert again.id == one.id
        await end(engine, again)
        (second,) = (await engine.answer(contract.LEASE_WORK, work)).runs
        assert second.id == two.id
        third = await ask(engine, singleton="cancel")
        assert (await beat(engine, second)).cancel
        assert not (await engine.answer(contract.LEASE_WORK, work)).runs
        await end(engine, second, "cancel")
        (last,) = (await engine.answer(contract.LEASE_WORK, work)).runs
        assert last.id == third.id
        other = await ask(engine, singleton="queue", singleton_key="other")
        assert [run.id for run in (await engine.answer(contract.LEASE_WORK, work)).runs] == [other.id]

    one, two = world.play(first)
    world.play(later)
