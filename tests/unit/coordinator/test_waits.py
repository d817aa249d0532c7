"""Waits under a clock of the test's own: events, groups, deadlines, reminders, forms, secrets (guarantees 3, 5, 11)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.coordinator.engine import Engine
from nbdurable.coordinator.fits import matches, misfit
from nbdurable.coordinator.mailbox import data_of
from nbdurable.errors import AlreadyAnswered, Conflict, DurableError, NotFound, UsageError
from nbdurable.models import Run, RunStatus, Sent, Wait, WaitDefault, WaitKind, WaitStatus
from nbdurable.security import digest_of
from nbdurable.settings import Home
from nbdurable.store.duckdb_store import DuckDBStore
from nbdurable.store.port import Changes, NewEvent
from tests.tools.world import World, driver, headless, lease, show

FORM = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}


@pytest.fixture
def world(home: Home) -> World:
    return World(home)


def approval(key: str = "a", **more: Any) -> contract.WaitSpec:
    return contract.WaitSpec(key=key, kind=WaitKind.APPROVAL, title=f"Publish {key}?", **more)


def paid(key: str = "e", **more: Any) -> contract.WaitSpec:
    return contract.WaitSpec(key=key, kind=WaitKind.EVENT, title="event paid", event="paid", **more)


def timer(due_in_s: float, key: str = "t") -> contract.WaitSpec:
    return contract.WaitSpec(key=key, kind=WaitKind.TIMER, title="sleep", due_in_s=due_in_s)


async def leased(engine: Engine) -> Run:
    await headless(engine)
    return await lease(engine, driver())


async def gate(engine: Engine, run: Run, *waits: contract.WaitSpec, first: bool = False) -> tuple[Wait, ...]:
    asked = contract.OpenGate(run_id=run.id, epoch=run.epoch, waits=waits, first=first)
    return (await engine.answer(contract.OPEN_GATE, asked)).waits


async def suspend(engine: Engine, run: Run) -> Run:
    ending = contract.EndLease(run_id=run.id, epoch=run.epoch, how="suspend", reason="waits")
    return await engine.answer(contract.END_LEASE, ending)


async def answer(engine: Engine, wait: Wait, nonce: str = "n", by: str = "ann", **more: Any) -> Wait:
    asked = contract.AnswerWait(wait_id=wait.id, by=by, nonce=nonce, **{"approved": True, **more})
    return await engine.answer(contract.ANSWER_WAIT, asked)


async def send(engine: Engine, payload: Any = None, key: str | None = None, **more: Any) -> Sent:
    asked = contract.SendEvent(event="paid", payload=payload, idempotency_key=key, **more)
    return await engine.answer(contract.SEND_EVENT, asked)


async def read(engine: Engine, wait: Wait) -> Wait:
    return await engine.answer(contract.GET_WAIT, contract.ReadWait(wait_id=wait.id))


async def sentences(engine: Engine, run: Run) -> list[str]:
    history = await engine.answer(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id))
    return [event.sentence for event in history.events]


# Events ----------------------------------------------------------------------------------------------------


def test_an_event_reaches_every_run_that_waits_for_it_and_fits(world: World) -> None:
    """An event goes to each waiting run whose match fits; a run that waits for another one sleeps on."""

    async def story(engine: Engine) -> None:
        runs = [await leased(engine) for _ in range(3)]
        orders = (7, 7, 8)
        waits = [
            (await gate(engine, run, paid(match={"order.id": order})))[0]
            for run, order in zip(runs, orders, strict=True)
        ]
        for run in runs:
            assert (await suspend(engine, run)).status is RunStatus.WAITING
        sent = await send(engine, {"order": {"id": 7, "total": 3}})
        assert set(sent.runs) == {runs[0].id, runs[1].id}
        found = [await read(engine, wait) for wait in waits]
        assert [wait.answer.value if wait.answer else None for wait in found] == [
            {"order": {"id": 7, "total": 3}},
            {"order": {"id": 7, "total": 3}},
            None,
        ]
        assert [(await show(engine, run)).status for run in runs] == ["queued", "queued", "waiting"]
        with pytest.raises(Conflict, match="a wait for an event"):
            await answer(engine, waits[2])

    world.play(story)


def test_an_event_sent_before_is_taken_by_the_first_wait_of_each_run_within_its_life(world: World) -> None:
    """Guarantee 3: it is kept over restarts of the coordinator; a run gets it once, oldest first; then it expires."""

    async def before(engine: Engine) -> None:
        await send(engine, 1, ttl_s=100)
        await send(engine, 2, ttl_s=200)
        await send(engine, "now or never", ttl_s=0)

    async def after(engine: Engine) -> Run:
        run = await leased(engine)
        one, two, three = await gate(engine, run, paid("1"), paid("2"), paid("3"))
        assert [wait.answer and wait.answer.value for wait in (one, two, three)] == [1, 2, None]
        return run

    async def later(engine: Engine) -> None:
        (fourth,) = await gate(engine, run, paid("4"))
        assert fourth.status is WaitStatus.OPEN  # who took them is known after a restart, too
        world.clock.at += 150
        other = await leased(engine)
        first, second = await gate(engine, other, paid("1"), paid("2"))
        assert (first.answer and first.answer.value, second.answer) == (2, None)

    world.play(before)
    run = world.play(after)
    world.play(later)


def test_an_event_that_was_durable_when_the_coordinator_died_is_delivered(world: World) -> None:
    """Guarantee 5: between the sending and the waking the coordinator dies; the next one wakes the run."""

    async def opened(engine: Engine) -> Run:
        run = await leased(engine)
        await gate(engine, run, paid())
        return await suspend(engine, run)

    async def after(engine: Engine) -> None:
        assert (await show(engine, run)).status is RunStatus.WAITING
        await engine.tick()
        woken = await show(engine, run)
        assert woken.status is RunStatus.QUEUED
        assert woken.waits[0].answer.value == "late"
        await engine.tick()
        assert len([s for s in await sentences(engine, run) if s == "event paid came"]) == 1

    run = world.play(opened)
    store = DuckDBStore.open(world.home, clock=world.clock.now)  # all that it did before it died
    data = data_of("paid", "late", None, "digest", world.clock.at + 60, "ann")
    store.submit(Changes((NewEvent(world.clock.at, "", 0, "event_sent", "sent", data=data),)))
    store.close()
    world.play(after)


def test_a_key_sends_once_and_refuses_another_payload(world: World) -> None:
    async def first(engine: Engine) -> Sent:
        sent = await send(engine, {"a": 1, "b": 2}, "k")
        assert await send(engine, {"b": 2, "a": 1}, "k") == sent
        return sent

    async def again(engine: Engine) -> None:
        assert await send(engine, {"a": 1, "b": 2}, "k") == sent
        with pytest.raises(Conflict, match="was used with another payload"):
            await send(engine, {"a": 2}, "k")
        world.clock.at += contract.EVENT_LIFE_S + 1
        assert (await send(engine, {"a": 2}, "k")).seq > sent.seq

    sent = world.play(first)
    world.play(again)


def test_a_payload_that_nobody_can_use_is_refused_or_kept_out(world: World) -> None:
    """Guarantee 11: the sender is told while somebody waits; a wait that opens later says so in its run's history."""

    async def story(engine: Engine) -> None:
        run = await leased(engine)
        (wait,) = await gate(engine, run, paid(form=FORM))
        with pytest.raises(UsageError, match="0 is less than the minimum of 1"):
            await send(engine, {"n": 0})
        with pytest.raises(UsageError, match="at most 1"):
            await send(engine, "x" * 10_000_000)
        (other,) = await gate(engine, await leased(engine), paid())
        await send(engine, {"n": 0})  # the other run can use it
        assert (await read(engine, other)).answer.value == {"n": 0}  # type: ignore[union-attr]
        assert (await read(engine, wait)).answer is None
        kept_out = [s for s in await sentences(engine, run) if "kept out" in s]
        assert kept_out == [
            "event paid: an event was kept out, its payload is not what is waited for: "
            "n: 0 is less than the minimum of 1"
        ]
        await send(engine, {"n": 3})
        assert (await read(engine, wait)).answer.value == {"n": 3}  # type: ignore[union-attr]

    world.play(story)


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        ({}, True),
        ({"order": {"id": 7}}, True),
        ({"order.id": 7, "items.1.sku": "B"}, True),
        ({"a.b": 1}, True),
        ({"order.id": 7.0}, True),
        ({"order.id": "7"}, False),
        ({"order.id": 7, "order.nothing": 1}, False),
        ({"order.nothing": None}, False),
        ({"flag": 1}, False),
        ({"flag": True}, True),
        ({"items": [{"sku": "A"}, {"sku": "B"}]}, True),
        ({"items": [{"sku": "A"}]}, False),
        ({"items.2": {}}, False),
    ],
)
def test_a_match_asks_for_values_at_paths(match: dict[str, Any], fits: bool) -> None:
    payload = {
        "order": {"id": 7, "who": "ann"},
        "items": [{"sku": "A", "n": 1}, {"sku": "B"}],
        "a.b": 1,
        "flag": True,
    }
    assert matches(payload, match) is fits
    assert matches([payload], {}) is True
    assert matches("text", {"order": 1}) is False


def test_a_schema_fetches_nothing() -> None:
    assert "does not stand in it" in misfit({}, {"$ref": "http://127.0.0.1:9/schema.json"})


# Groups ----------------------------------------------------------------------------------------------------


def test_the_first_of_a_group_cancels_the_others_at_once(world: World) -> None:
    """Guarantee 5: one answer, and what it cancels and wakes, in one transaction; opened again, the same."""

    async def story(engine: Engine) -> None:
        run = await leased(engine)
        waits = await gate(engine, run, approval(), paid(), timer(60), first=True)
        assert [wait.status for wait in waits] == ["open"] * 3
        await suspend(engine, run)
        await send(engine, "money")
        detail = await show(engine, run)
        assert detail.status is RunStatus.QUEUED
        assert {wait.key: wait.status for wait in detail.waits} == {
            "a": "cancelled",
            "e": "answered",
            "t": "cancelled",
        }
        told = await sentences(engine, run)
        assert "Publish a? is not waited for any more: event paid came first" in told
        with pytest.raises(Conflict, match="another wait came first"):
            await answer(engine, waits[0])
        world.clock.at += 61
        await engine.tick()
        again = await lease(engine, driver())
        same = await gate(engine, again, approval(), paid(), timer(60), first=True)
        assert {wait.id: wait.status for wait in same} == {wait.id: wait.status for wait in detail.waits}

    world.play(story)


def test_of_two_answers_to_a_group_one_counts(world: World) -> None:
    """Guarantee 5: approval and event race; exactly one is recorded, whichever the loop takes first."""

    async def story(engine: Engine) -> None:
        for turn in range(6):
            run = await leased(engine)
            waits = await gate(engine, run, approval(), paid(match={"turn": turn}), first=True)
            await suspend(engine, run)
            racers = [answer(engine, waits[0]), send(engine, {"turn": turn})]
            done = await asyncio.gather(*(racers if turn % 2 else racers[::-1]), return_exceptions=True)
            assert all(not isinstance(one, BaseException) or isinstance(one, Conflict) for one in done)
            found = [await read(engine, wait) for wait in waits]
            assert sorted(wait.status for wait in found) == ["answered", "cancelled"]
            assert (await show(engine, run)).status is RunStatus.QUEUED
            await lease(engine, driver())

    world.play(story)


def test_what_is_over_already_ends_a_group_as_it_opens(world: World) -> None:
    async def story(engine: Engine) -> None:
        run = await leased(engine)
        await send(engine, "early")
        waits = await gate(engine, run, approval(), timer(0), paid(), first=True)
        assert [wait.status for wait in waits] == ["cancelled", "answered", "cancelled"]
        (left,) = await gate(engine, run, paid("other"))
        assert left.answer is not None  # the event that lost was not used up
        assert left.answer.value == "early"

    world.play(story)


# Time ------------------------------------------------------------------------------------------------------


def test_a_deadline_answers_by_its_default_or_says_that_nobody_did(world: World) -> None:
    async def before(engine: Engine) -> Run:
        run = await leased(engine)
        await gate(
            engine,
            run,
            approval("yes", value="draft", deadline_in_s=60, default=WaitDefault(approved=True)),
            approval("no", deadline_in_s=60, default=WaitDefault(approved=False)),
            paid("late", deadline_in_s=60),
            paid("other", deadline_at=world.clock.at + 60, default=WaitDefault(value=[], edited=True)),
        )
        return await suspend(engine, run)

    async def after(engine: Engine) -> None:
        world.clock.at += 60
        await engine.tick()
        found = await show(engine, run)
        assert found.status is RunStatus.QUEUED
        assert {
            w.key: (w.answer.approved, w.answer.value, w.answer.by, w.answer.timed_out) for w in found.waits
        } == {
            "yes": (True, "draft", "deadline", False),
            "no": (False, None, "deadline", False),
            "late": (False, None, "deadline", True),
            "other": (True, [], "deadline", False),
        }

    run = world.play(before)
    world.play(after)


def test_an_answer_that_comes_with_the_deadline_is_too_late(world: World) -> None:
    """Guarantee 5: whichever comes first in the coordinator's time counts, not whichever the loop sees first."""

    async def story(engine: Engine) -> None:
        run = await leased(engine)
        early, late = await gate(
            engine,
            run,
            approval("1", deadline_in_s=60, default=WaitDefault(approved=False)),
            approval("2", deadline_in_s=60),
        )
        world.clock.at += 59.9
        assert (await answer(engine, early)).answer.by == "ann"  # type: ignore[union-attr]
        world.clock.at += 0.1  # and no tick has come yet
        with pytest.raises(AlreadyAnswered, match="was not answered in time"):
            await answer(engine, late)
        await engine.tick()
        assert (await read(engine, early)).answer.approved  # type: ignore[union-attr]
        assert (await read(engine, late)).answer.timed_out  # type: ignore[union-attr]

    world.play(story)


def test_reminders_are_told_in_the_history_and_survive_a_restart(world: World) -> None:
    async def before(engine: Engine) -> Run:
        run = await leased(engine)
        await gate(engine, run, approval(remind_every_s=60, reviewers=("ann", "bob")))
        world.clock.at += 61
        await engine.tick()
        await engine.tick()
        return run

    async def after(engine: Engine) -> None:
        world.clock.at += 60
        await engine.tick()
        told = [s for s in await sentences(engine, run) if s.startswith("reminder")]
        assert told == [
            "reminder 1: Publish a? (ann, bob) waits for 1 min",
            "reminder 2: Publish a? (ann, bob) waits for 2 min",
        ]
        (wait,) = (await show(engine, run)).waits
        assert (wait.reminders, wait.status) == (2, WaitStatus.OPEN)
        await answer(engine, wait)
        world.clock.at += 600
        await engine.tick()
        assert len([s for s in await sentences(engine, run) if s.startswith("reminder")]) == 2

    run = world.play(before)
    world.play(after)


# Answers ---------------------------------------------------------------------------------------------------


def test_an_answer_fits_its_form_and_comes_from_who_was_asked(world: World) -> None:
    """Guarantee 11: nothing is answered by what is refused, and the refusal says what to do."""

    async def story(engine: Engine) -> None:
        run = await leased(engine)
        (wait,) = await gate(engine, run, approval(value={"n": 0}, form=FORM, reviewers=("ann", "bob")))
        refused: list[tuple[dict[str, Any], str]] = [
            ({"by": "eve"}, "eve is not asked for 'Publish a\\?': its reviewers are ann, bob"),
            ({}, "n: 0 is less than the minimum of 1"),
            ({"edited": True, "value": {}}, "'n' is a required property"),
            ({"edited": True, "value": {"n": "one"}}, "'one' is not of type 'integer'"),
        ]
        for more, said in refused:
            with pytest.raises(UsageError, match=said):
                await answer(engine, wait, **more)
        assert (await read(engine, wait)).status is WaitStatus.OPEN
        settled = await answer(engine, wait, by="bob (dashboard)", edited=True, value={"n": 2})
        assert settled.answer is not None
        assert settled.answer.value == {"n": 2}

    world.play(story)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (approval(deadline_at=1_000_000_000.0), "the deadline of 'Publish a\\?' was .* ago"),
        (approval(form={"type": "nonsense"}), "is no JSON schema"),
        (
            approval(form=FORM, deadline_in_s=5, default=WaitDefault(approved=True)),
            "what the deadline of .* would answer does not fit",
        ),
        (contract.WaitSpec(key="x", kind=WaitKind.EVENT, title="x"), "names an event"),
        (contract.WaitSpec(key="x", kind=WaitKind.TIMER, title="x"), "a timer, and only a timer"),
    ],
)
def test_a_wait_that_could_not_be_answered_is_not_opened(
    world: World, spec: contract.WaitSpec, said: str
) -> None:
    async def story(engine: Engine) -> None:
        run = await leased(engine)
        with pytest.raises(UsageError, match=said):
            await gate(engine, run, spec)
        assert (await show(engine, run)).waits == ()

    world.play(story)


def test_a_callback_answers_its_one_wait_once(world: World) -> None:
    async def story(engine: Engine) -> None:
        run = await leased(engine)
        mine, other = await gate(
            engine, run, approval("1", callback=digest_of("s3cret")), approval("2", callback=digest_of("x"))
        )
        callback = contract.AnswerCallback(secret="s3cret", comment="fine", by="phone")
        with pytest.raises(NotFound, match="nothing waits"):
            await engine.answer(contract.ANSWER_CALLBACK, contract.AnswerCallback(secret=digest_of("s3cret")))
        await engine.answer(contract.ANSWER_CALLBACK, callback)
        settled = (await read(engine, mine)).answer
        assert settled is not None
        assert (settled.by, settled.comment) == ("phone", "fine")
        assert (await read(engine, other)).status is WaitStatus.OPEN
        with pytest.raises(NotFound, match="any more"):
            await engine.answer(contract.ANSWER_CALLBACK, callback)

    world.play(story)


def test_a_secret_answer_stands_nowhere_and_is_asked_for_again_after_a_restart(world: World) -> None:
    """The kernel alone is told; no file of the project ever holds it."""
    secret = "hunter2-swordfish"
    spec = contract.WaitSpec(
        key="q", kind=WaitKind.QUESTION, title="Password:", is_secret=True, form={"type": "string"}
    )

    async def before(engine: Engine) -> Run:
        run = await leased(engine)
        (wait,) = await gate(engine, run, spec)
        await suspend(engine, run)
        settled = await answer(engine, wait, edited=True, value=secret)
        assert settled.answer is not None
        assert settled.answer.value is None
        again = await lease(engine, driver())
        (told,) = await gate(engine, again, spec)
        assert told.id == wait.id
        assert told.answer is not None
        assert told.answer.value == secret
        assert secret not in (await show(engine, run)).model_dump_json()
        assert secret not in (await read(engine, wait)).model_dump_json()
        return again

    async def after(engine: Engine) -> None:
        (asked,) = await gate(engine, run, spec)
        assert (asked.status, asked.answer) == (WaitStatus.OPEN, None)

    run = world.play(before)
    files = [path for path in world.home.root.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    world.play(after)


def test_errors_about_waits_can_be_caught_as_timeouts() -> None:
    import pickle

    from nbdurable import WaitTimeout

    error = pickle.loads(pickle.dumps(WaitTimeout("nobody answered", todo="ask again")))
    assert isinstance(error, TimeoutError)
    assert isinstance(error, DurableError)
    assert (error.message, error.todo) == ("nobody answered", "ask again")
