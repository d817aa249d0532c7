"""The API over HTTP with the real store: every legal and illegal move, fencing, idempotency, waits, names."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nbdurable import __version__, contract, processes
from nbdurable.client import Client
from nbdurable.errors import (
    AlreadyAnswered,
    Conflict,
    DurableError,
    Fenced,
    IllegalMove,
    LeaseHeld,
    NotFound,
    Unauthorized,
    UsageError,
    WrongVersion,
    from_wire,
)
from nbdurable.lifecycle import MOVES, Happening
from nbdurable.models import (
    Driver,
    DriverKind,
    ErrorInfo,
    Run,
    RunDetail,
    RunStatus,
    SignedManifest,
    StepStatus,
    Variable,
    Wait,
    WaitKind,
    WaitStatus,
)
from nbdurable.security import load_token
from nbdurable.settings import Home
from tests.tools.processes import until

ME = processes.identity("kernel")
KERNEL = Driver(kind=DriverKind.INTERACTIVE, process=ME, label="kernel A")
OTHER = Driver(kind=DriverKind.INTERACTIVE, process=processes.identity("kernel", 1), label="kernel B")
WORKER = Driver(kind=DriverKind.HEADLESS, process=processes.identity("worker"), label="worker W")


@pytest.fixture(scope="module")
def client(started_home: Callable[[], Home]) -> Iterator[Client]:
    """A client of one coordinator that starts no workers: the tests lease what they queue."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NBDURABLE_WORKER_SLOTS", "0")
        with Client(started_home()) as found:
            found.call(contract.HEALTH, contract.Nothing())
            yield found


def headless(client: Client, **more: Any) -> Run:
    fields: dict[str, Any] = {
        "notebook": "/n.ipynb",
        "kind": DriverKind.HEADLESS,
        "snapshot": "0" * 64,
        **more,
    }
    return client.call(contract.CREATE_RUN, contract.CreateRun(**fields))


def interactive(client: Client, **more: Any) -> Run:
    fields: dict[str, Any] = {
        "notebook": "/n.ipynb",
        "kind": DriverKind.INTERACTIVE,
        "driver": KERNEL,
        **more,
    }
    return client.call(contract.CREATE_RUN, contract.CreateRun(**fields))


def lease(client: Client, wanted: Run) -> Run:
    """Lease queued runs, as a worker, until it is the wanted one's turn; the others are given back."""
    others = []
    while True:
        (run,) = client.call(contract.LEASE_WORK, contract.LeaseWork(driver=WORKER, slots=1)).runs
        if run.id == wanted.id:
            break
        others.append(run)
    for other in others:
        end(client, other, "release")
    return run


def end(client: Client, run: Run, how: Any, **more: Any) -> Run:
    asked = contract.EndLease(run_id=run.id, epoch=run.epoch, how=how, reason=f"{how} in a test", **more)
    return client.call(contract.END_LEASE, asked)


def show(client: Client, run: Run) -> RunDetail:
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))


def by(run: Run) -> contract.ByRun:
    return contract.ByRun(run_id=run.id)


def open_wait(client: Client, run: Run, key: str = "gate", **more: Any) -> Wait:
    fields: dict[str, Any] = {"kind": WaitKind.APPROVAL, "title": "Publish?", "value": "draft", **more}
    return client.call(
        contract.OPEN_WAIT, contract.OpenWait(run_id=run.id, epoch=run.epoch, key=key, **fields)
    )


def answer(client: Client, wait: Wait, nonce: str = "n", **more: Any) -> Wait:
    fields: dict[str, Any] = {"approved": True, "by": "Ann", **more}
    return client.call(contract.ANSWER_WAIT, contract.AnswerWait(wait_id=wait.id, nonce=nonce, **fields))


def begin(
    client: Client, run: Run, step: str = "s", reason: str = "new", action: Any = "execute"
) -> contract.Begun:
    asked = contract.BeginStep(
        run_id=run.id, epoch=run.epoch, step=step, action=action, reason=reason, cell_id="c"
    )
    return client.call(contract.BEGIN_STEP, asked)


def commit(client: Client, run: Run, attempt: int, step: str = "s", **more: Any) -> int:
    fields: dict[str, Any] = {
        "status": "completed",
        "manifest": SignedManifest(text="{}", signature="0"),
        **more,
    }
    asked = contract.CommitStep(run_id=run.id, epoch=run.epoch, step=step, attempt=attempt, **fields)
    return client.call(contract.COMMIT_STEP, asked).seq


# Moves -----------------------------------------------------------------------------------------------------


def a_run(client: Client, status: RunStatus) -> Run:
    """Bring a new headless run to a status."""
    if status is RunStatus.DELAYED:
        return headless(client, delay_s=3600.0)
    if status is RunStatus.EXPIRED:
        run = headless(client, ttl_s=0.01)
        return until(
            lambda: found if (found := show(client, run)).status is status else None, what="it expires"
        )
    run = headless(client)
    if status is RunStatus.QUEUED:
        return run
    run = lease(client, run)
    match status:
        case RunStatus.WAITING:
            open_wait(client, run)
            return end(client, run, "suspend")
        case RunStatus.PAUSED:
            return end(client, run, "leave")
        case RunStatus.COMPLETED:
            return end(client, run, "complete")
        case RunStatus.FAILED:
            return end(client, run, "fail", error=ErrorInfo(name="ValueError", message="no"))
        case RunStatus.CANCELLED:
            return end(client, run, "cancel")
        case RunStatus.TIMED_OUT:
            return end(client, run, "time_out")
    return run


def _close(client: Client, run: Run) -> Run:
    return client.call(
        contract.CLOSE_RUN, contract.CloseRun(run_id=run.id, epoch=run.epoch, reason="new one")
    )


def _lease(client: Client, run: Run) -> Run:
    return client.call(contract.LEASE_RUN, contract.LeaseRun(run_id=run.id, driver=KERNEL))


def _attach(client: Client, run: Run) -> Run:
    return client.call(contract.LEASE_RUN, contract.LeaseRun(run_id=run.id, driver=KERNEL, attach=True))


VERSION = contract.Version(notebook="/work/a.ipynb", snapshot="2" * 64)


def _hand_over(client: Client, run: Run) -> Run:
    taken = _take_over(client, run)
    assert taken.kind is DriverKind.INTERACTIVE
    question = contract.ResumeRun(run_id=run.id, version=VERSION, take_over=True)
    return client.call(contract.RESUME_RUN, question)


def _repair(client: Client, run: Run) -> Run:
    question = contract.RepairRun(
        run_id=run.id, by="ann", nonce="n", expected_epoch=run.epoch, version=VERSION
    )
    return client.call(contract.REPAIR_RUN, question)


def _take_over(client: Client, run: Run) -> Run:
    return client.call(contract.LEASE_RUN, contract.LeaseRun(run_id=run.id, driver=KERNEL, take_over=True))


def _wake(client: Client, run: Run) -> Run:
    for wait in show(client, run).waits:
        answer(client, wait)
    return show(client, run)


WAYS: dict[Happening, Callable[[Client, Run], Run]] = {
    Happening.LEASE: _lease,
    Happening.TAKE_OVER: _take_over,
    Happening.SUSPEND: lambda client, run: (open_wait(client, run), end(client, run, "suspend"))[1],
    Happening.WAKE: _wake,
    Happening.COMPLETE: lambda client, run: end(client, run, "complete"),
    Happening.FAIL: lambda client, run: end(client, run, "fail"),
    Happening.RELEASE: lambda client, run: end(client, run, "release"),
    Happening.LOSE: lambda client, run: end(client, run, "lose"),
    Happening.LEAVE: lambda client, run: end(client, run, "leave"),
    Happening.REQUEST_CANCEL: lambda client, run: client.call(contract.CANCEL_RUN, by(run)),
    Happening.CANCEL: lambda client, run: client.call(contract.CANCEL_RUN, by(run)),
    Happening.RESUME: lambda client, run: client.call(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id)),
    Happening.CLOSE: _close,
    Happening.ATTACH: _attach,
    Happening.HAND_OVER: _hand_over,
    Happening.REPAIR: _repair,
}
DRIVERS_OWN = {"lease", "take over", "suspend", "complete", "fail", "release", "lose", "leave"}
LEGAL = [key for key in MOVES if key[1] in WAYS and key != (RunStatus.RUNNING, Happening.CANCEL)]
ASKED = [
    Happening.LEASE,
    Happening.CANCEL,
    Happening.RESUME,
    Happening.CLOSE,
    Happening.ATTACH,
    Happening.REPAIR,
]
ILLEGAL = [
    (status, happening)
    for status in RunStatus
    for happening in ASKED
    if (status, happening) not in MOVES
    and (status, happening)
    not in {(RunStatus.CANCELLED, Happening.CANCEL), (RunStatus.COMPLETED, Happening.CLOSE)}
    and (status, happening)
    not in {(RunStatus.RUNNING, Happening.LEASE), (RunStatus.RUNNING, Happening.ATTACH)}
    # LeaseHeld, or the same driver again
]


@pytest.mark.parametrize(("status", "happening"), LEGAL, ids=lambda one: one.replace(" ", "-"))
def test_every_legal_move(client: Client, status: RunStatus, happening: Happening) -> None:
    """Each move of the table can be made over the API, and tells its story in one event with one sentence."""
    run = a_run(client, status)
    before = client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id)).events
    moved = WAYS[happening](client, run)
    assert moved.status is MOVES[status, happening].to
    assert show(client, run).status is moved.status
    new = client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id, after=before[-1].seq)).events
    assert new[-1].kind.startswith("run_")
    assert new[-1].sentence == moved.reason
    assert (moved.ended_at is not None) == moved.status.is_final
    assert (moved.driver is not None) == (moved.status is RunStatus.RUNNING)


@pytest.mark.parametrize(("status", "happening"), ILLEGAL, ids=lambda one: one.replace(" ", "-"))
def test_every_illegal_move(client: Client, status: RunStatus, happening: Happening) -> None:
    """Guarantee 11: what the table does not have is refused by name, and changes nothing."""
    run = a_run(client, status)
    before = show(client, run)
    with pytest.raises(IllegalMove, match=f"run {run.short} is {status}: it can't {happening}"):
        WAYS[happening](client, run)
    assert show(client, run) == before


def test_moves_of_a_driver_are_refused_to_others(client: Client) -> None:
    """Guarantee 4: of a run that is not running nobody can report an end."""
    for status in RunStatus:
        run = a_run(client, status)
        if status is RunStatus.RUNNING:
            run = run.model_copy(update={"epoch": run.epoch - 1})
        for how in ("complete", "fail", "suspend", "release", "lose", "leave"):
            if show(client, run).reason != f"{how} in a test":
                with pytest.raises(Fenced):
                    end(client, run, how)


def test_an_interactive_run_is_cancelled_at_once(client: Client) -> None:
    """Its kernel learns it at its next call, and the waits are cancelled with it."""
    run = interactive(client)
    wait = open_wait(client, run)
    assert client.call(contract.CANCEL_RUN, by(run)).status is RunStatus.CANCELLED
    with pytest.raises(Fenced, match="is cancelled and not driven from here any more: cancelled by hand"):
        begin(client, run)
    assert show(client, run).waits[0].status is WaitStatus.CANCELLED
    with pytest.raises(Conflict, match="is cancelled"):
        answer(client, wait)


def test_an_interactive_run_without_a_snapshot_is_not_resumed_headless(client: Client) -> None:
    run = interactive(client)
    end(client, run, "leave")
    with pytest.raises(Conflict, match="no snapshot"):
        client.call(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
    run = interactive(client, snapshot="1" * 64)
    end(client, run, "leave")
    with pytest.raises(Conflict, match="as it is now"):
        client.call(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
    question = contract.ResumeRun(run_id=run.id, version=VERSION)
    resumed = client.call(contract.RESUME_RUN, question)
    assert resumed.status is RunStatus.QUEUED
    assert (resumed.snapshot, resumed.earlier_snapshots) == ("2" * 64, ("1" * 64,))
    assert client.call(contract.RESUME_RUN, question) == resumed  # asked again after a lost answer
    assert lease(client, run).driver == WORKER


# Driving ---------------------------------------------------------------------------------------------------


def test_a_second_kernel_is_told_who_drives(client: Client) -> None:
    """Guarantee 4: one driver at a time; taking over is a wish, and refuses the former driver from then on."""
    run = interactive(client)
    ask = contract.LeaseRun(run_id=run.id, driver=OTHER)
    with pytest.raises(LeaseHeld, match="kernel A"):
        client.call(contract.LEASE_RUN, ask)
    taken = client.call(contract.LEASE_RUN, ask.model_copy(update={"take_over": True}))
    assert (taken.epoch, taken.driver) == (run.epoch + 1, OTHER)
    calls: list[Callable[[], Any]] = [
        lambda: begin(client, run),
        lambda: commit(client, run, 1),
        lambda: open_wait(client, run),
        lambda: end(client, run, "complete"),
        lambda: client.call(contract.HEARTBEAT, contract.Heartbeat(run_id=run.id, epoch=run.epoch)),
        lambda: client.call(
            contract.SET_RESULT, contract.SetResult(run_id=run.id, epoch=run.epoch, result=1)
        ),
        lambda: client.call(
            contract.CLOSE_RUN, contract.CloseRun(run_id=run.id, epoch=run.epoch, reason="x")
        ),
        lambda: client.call(
            contract.FAIL_STEP,
            contract.FailStep(
                run_id=run.id, epoch=run.epoch, step="s", attempt=1, error=ErrorInfo(name="E", message="")
            ),
        ),
    ]
    before = show(client, run)
    for call in calls:
        with pytest.raises(Fenced, match="kernel B"):
            call()
    assert show(client, run) == before


def test_the_same_kernel_may_lease_again(client: Client) -> None:
    run = interactive(client)
    again = client.call(contract.LEASE_RUN, contract.LeaseRun(run_id=run.id, driver=KERNEL))
    assert (again.status, again.epoch) == (RunStatus.RUNNING, run.epoch + 1)


def test_an_end_that_is_told_twice(client: Client) -> None:
    """A repeated end gets the run as it is, also when somebody drives it by then; another end is refused."""
    run = lease(client, headless(client))
    assert end(client, run, "release") == end(client, run, "release")
    later = lease(client, run)
    assert end(client, run, "release").epoch == later.epoch
    with pytest.raises(Fenced, match="worker W"):
        end(client, run, "complete")


def test_queued_runs_are_leased_in_order_up_to_the_slots(client: Client) -> None:
    while client.call(contract.LEASE_WORK, contract.LeaseWork(driver=WORKER, slots=100)).runs:
        pass
    runs = [headless(client) for _ in range(3)]
    ask = contract.LeaseWork(driver=WORKER, slots=2)
    assert [r.id for r in client.call(contract.LEASE_WORK, ask).runs] == [r.id for r in runs[:2]]
    assert [r.id for r in client.call(contract.LEASE_WORK, ask).runs] == [runs[2].id]
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.call, contract.LEASE_WORK, ask.model_copy(update={"hold_s": 20.0}))
        late = headless(client)
        assert [r.id for r in held.result(10).runs] == [late.id]


def test_repeated_wishes_make_one_run(client: Client) -> None:
    first = headless(client, idempotency_key="nightly")
    assert headless(client, idempotency_key="nightly", parameters={"n": 2}) == first
    failed = lease(client, first)
    end(client, failed, "fail")
    assert headless(client, idempotency_key="nightly").id != first.id  # a failure clears the key


# Steps -----------------------------------------------------------------------------------------------------


def test_a_step_from_beginning_to_end(client: Client) -> None:
    """Guarantees 2 and 9: reason before, and variables with the checkpoint as a whole after."""
    run = interactive(client)
    begun = begin(client, run, reason="no checkpoint")
    assert begun.attempt == 1
    assert client.call(contract.CHECKPOINTS, by(run)).checkpoints == ()
    manifest = SignedManifest(text='{"x": 1}', signature="ab")
    x = Variable(name="x", type="int", bytes=28, preview="1")
    seq = commit(client, run, 1, manifest=manifest, variables=(x,), sentence="0.1 s · x int")
    (step,) = show(client, run).steps
    assert (step.status, step.reason, step.checkpoint_seq) == (StepStatus.COMPLETED, "no checkpoint", seq)
    assert (step.variables, step.cell_id, step.executions) == ((x,), "c", 1)
    (checkpoint,) = client.call(contract.CHECKPOINTS, by(run)).checkpoints
    assert (checkpoint.manifest, checkpoint.seq, checkpoint.status) == (manifest, seq, StepStatus.COMPLETED)
    detail = client.call(contract.GET_STEP, contract.ReadStep(run_id=run.id, step="s"))
    assert (detail.step, detail.checkpoint) == (step, checkpoint)
    with pytest.raises(NotFound, match="no step 'tea'") as told:
        client.call(contract.GET_STEP, contract.ReadStep(run_id=run.id, step="tea"))
    assert "its steps: s" in told.value.todo


def test_a_commit_sent_twice_is_one_checkpoint(client: Client) -> None:
    """Guarantee 3: after a lost answer the kernel sends its commit again and gets the first answer."""
    run = interactive(client)
    begin(client, run)
    waiting = commit(client, run, 1, status="waiting", line=4)
    assert commit(client, run, 1, status="waiting", line=4) == waiting
    second_gate = SignedManifest(text='{"gate": 2}', signature="02")
    assert commit(client, run, 1, status="waiting", line=5, manifest=second_gate) > waiting
    whole = SignedManifest(text='{"whole": 1}', signature="03")
    done = commit(client, run, 1, manifest=whole)
    assert commit(client, run, 1, manifest=whole) == done
    kinds = [e.kind for e in client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id)).events]
    assert kinds == ["run_created", "step_started", "step_waiting", "step_waiting", "step_completed"]


def test_a_beginning_sent_twice_is_one_attempt(client: Client) -> None:
    run = interactive(client)
    assert begin(client, run) == begin(client, run)
    failure = contract.FailStep(
        run_id=run.id, epoch=run.epoch, step="s", attempt=1, error=ErrorInfo(name="ValueError", message="no")
    )
    client.call(contract.FAIL_STEP, failure)
    client.call(contract.FAIL_STEP, failure)
    assert begin(client, run, reason="second attempt").attempt == 2
    commit(client, run, 2)
    restored = begin(client, run, action="restore", reason="same code and inputs")
    assert restored.attempt == 2
    (step,) = show(client, run).steps
    assert [(a.number, a.status) for a in step.attempts] == [(1, "failed"), (2, "completed")]
    assert (step.executions, step.restores, step.reason) == (2, 1, "same code and inputs")


# Waits -----------------------------------------------------------------------------------------------------


def test_an_approval_wakes_its_run_once(client: Client) -> None:
    """Guarantee 5: one of twenty simultaneous answers counts; the others are told by whom and with what."""
    run = lease(client, headless(client))
    wait = open_wait(client, run)
    assert open_wait(client, run) == wait
    assert end(client, run, "suspend").status is RunStatus.WAITING

    gate = threading.Barrier(20)

    def one(number: int) -> Wait | AlreadyAnswered:
        gate.wait()
        try:
            return answer(client, wait, nonce=f"n{number}", by=f"person {number}", approved=bool(number % 2))
        except AlreadyAnswered as error:
            return error

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(one, range(20)))
    (won,) = [one for one in found if isinstance(one, Wait)]
    assert won.answer is not None
    for refused in found:
        assert refused is won or won.answer.by in str(refused)
    number = int(won.answer.by.removeprefix("person "))
    assert answer(client, wait, nonce=f"n{number}") == won  # repeated after a lost answer
    assert show(client, run).status is RunStatus.QUEUED
    kinds = [e.kind for e in client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id)).events]
    assert (kinds.count("wait_answered"), kinds.count("run_woken")) == (1, 1)


def test_a_run_wakes_when_its_last_wait_is_answered(client: Client) -> None:
    run = lease(client, headless(client))
    first, second = open_wait(client, run, "a"), open_wait(client, run, "b")
    end(client, run, "suspend")
    answer(client, first)
    assert show(client, run).status is RunStatus.WAITING
    answer(client, second)
    assert show(client, run).status is RunStatus.QUEUED


def test_an_answer_that_comes_before_the_suspension(client: Client) -> None:
    run = lease(client, headless(client))
    answer(client, open_wait(client, run))
    assert end(client, run, "suspend").status is RunStatus.QUEUED


def test_what_an_answer_returns(client: Client) -> None:
    """The proposed value unless it was edited; any JSON may take its place."""
    run = interactive(client)
    plain = answer(client, open_wait(client, run, "a", value={"n": 1})).answer
    assert plain is not None
    assert (plain.value, plain.edited, plain.approved, plain.by) == ({"n": 1}, False, True, "Ann")
    edited = answer(
        client, open_wait(client, run, "b", value=1), value=[None, "x"], edited=True, comment="so"
    ).answer
    assert edited is not None
    assert (edited.value, edited.edited, edited.comment) == ([None, "x"], True, "so")
    rejected = answer(client, open_wait(client, run, "c"), approved=False).answer
    assert rejected is not None
    assert not rejected.approved
    again = open_wait(client, run, "b", value=1)
    assert again.answer == edited


def test_wait_ids_may_be_typed_in_any_case(client: Client) -> None:
    wait = open_wait(client, interactive(client))
    found = client.call(contract.GET_WAIT, contract.ReadWait(wait_id=wait.id.lower()))
    assert found == wait
    with pytest.raises(NotFound, match="no wait 'zzzzzz'"):
        client.call(contract.GET_WAIT, contract.ReadWait(wait_id="zzzzzz"))


def test_a_held_question_is_answered_as_soon_as_there_is_an_answer(client: Client) -> None:
    wait = open_wait(client, interactive(client))
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.call, contract.GET_WAIT, contract.ReadWait(wait_id=wait.id, hold_s=20.0))
        answered = answer(client, wait)
        assert held.result(10) == answered


def test_open_waits_are_listed(client: Client) -> None:
    run = interactive(client)
    wait = open_wait(client, run)
    timer = open_wait(client, run, "nap", kind=WaitKind.TIMER, value=None, due_in_s=1000.0)
    listed = client.call(contract.LIST_WAITS, contract.ListWaits(run_id=run.id)).waits
    assert listed == (wait, timer)
    answer(client, wait)
    assert client.call(contract.LIST_WAITS, contract.ListWaits(run_id=run.id)).waits == (timer,)
    everything = client.call(contract.LIST_WAITS, contract.ListWaits(run_id=run.id, status=None)).waits
    assert [w.id for w in everything] == [wait.id, timer.id]
    with pytest.raises(Conflict, match="is a timer"):
        answer(client, timer)
    with pytest.raises(UsageError, match="a timer, and only a timer"):
        open_wait(client, run, "nap2", kind=WaitKind.TIMER)
    end(client, run, "complete")


# Reading ---------------------------------------------------------------------------------------------------


def test_runs_are_named_by_what_people_type(client: Client) -> None:
    """Guarantee 11: a short id is enough where it is unique; else the error says what to do."""
    run = interactive(client)
    for typed in (run.id, run.short, run.short.upper(), run.id[:-6], f"{run.id[:8]}-{run.id[8:]}"):
        assert client.call(contract.GET_RUN, contract.ByRun(run_id=typed)).id == run.id
    interactive(client)
    with pytest.raises(NotFound, match=rf"names \d+ runs: .*{run.id}"):
        client.call(contract.GET_RUN, contract.ByRun(run_id=run.id[:6]))
    for unknown in ("beef" * 8, "zzzz", "abc"):
        with pytest.raises(NotFound) as told:
            client.call(contract.CANCEL_RUN, contract.ByRun(run_id=unknown))
        assert "nbdurable ls" in told.value.todo


def test_runs_are_listed(client: Client) -> None:
    one, two = interactive(client, tags=("x1",)), interactive(client, tags=("x1", "y"))
    listed = client.call(contract.LIST_RUNS, contract.ListRuns(tag="x1")).runs
    assert [r.id for r in listed] == [two.id, one.id]
    assert client.call(contract.LIST_RUNS, contract.ListRuns(tag="x1", before=two.short)).runs == (one,)
    assert client.call(contract.LIST_RUNS, contract.ListRuns(tag="x1", status=RunStatus.FAILED)).runs == ()


def test_a_run_is_followed_to_its_end(client: Client) -> None:
    run = interactive(client)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lambda: [e.kind for e in client.follow(run.id)])
        begin(client, run)
        commit(client, run, 1)
        client.call(contract.SET_RESULT, contract.SetResult(run_id=run.id, epoch=run.epoch, result={"n": 1}))
        end(client, run, "complete")
        assert following.result(10) == [
            "run_created",
            "step_started",
            "step_completed",
            "result_set",
            "run_completed",
        ]
    assert show(client, run).result == {"n": 1}


def test_a_log_is_read_in_whole_characters(client: Client) -> None:
    run = headless(client)
    assert client.call(contract.READ_LOG, contract.ReadLog(run_id=run.id)).text == ""
    client.home.run_log(run.id).write_text("größer\n" * 100, encoding="utf-8")
    text, offset = "", 0
    while True:
        piece = client.call(contract.READ_LOG, contract.ReadLog(run_id=run.short, offset=offset, limit=5))
        if not piece.text:
            break
        text, offset = text + piece.text, piece.next_offset
    assert text == "größer\n" * 100


def test_the_store_can_be_asked(client: Client) -> None:
    table = client.call(contract.SQL, contract.Query(sql="SELECT 1 AS one"))
    assert (table.columns, table.rows) == (("one",), ((1,),))
    with pytest.raises(UsageError):
        client.call(contract.SQL, contract.Query(sql="DROP TABLE runs"))


# HTTP ------------------------------------------------------------------------------------------------------


def ask(
    client: Client, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    """Ask as somebody without our client would."""
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(json.loads(client.home.coordinator.read_text())["url"].removeprefix("unix:"))
    given = {"Authorization": f"Bearer {load_token(client.home)}", **headers}
    try:
        connection.request(method, path, body, given)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def error_of(answered: tuple[int, bytes]) -> tuple[int, DurableError]:
    return answered[0], from_wire(json.loads(answered[1]))


@pytest.mark.parametrize("path", ["/v1/health", "/v1/runs", "/docs", "/openapi.json", "/nothing"])
def test_nobody_gets_in_without_the_token(client: Client, path: str) -> None:
    for wrong in ("", "Bearer ", "Bearer " + "0" * 64, "Basic x"):
        status, error = error_of(ask(client, "GET", path, Authorization=wrong))
        assert (status, type(error)) == (401, Unauthorized)
        assert "token" in error.message


def test_another_version_is_told_both(client: Client) -> None:
    status, error = error_of(ask(client, "GET", "/v1/health", **{"X-NBDurable-Version": "9.9"}))
    assert (status, type(error)) == (426, WrongVersion)
    assert "9.9" in error.message
    assert __version__ in error.message
    assert "nbdurable down" in error.todo


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "words"),
    [
        ("POST", "/v1/runs", b"{", UsageError, "JSON"),
        ("POST", "/v1/runs", b"[]", UsageError, "JSON object"),
        ("POST", "/v1/runs", b"{}", UsageError, "notebook: Field required"),
        ("POST", "/v1/runs", b'{"notebook": "n", "kind": "headless", "x": 1}', UsageError, "x: Extra inputs"),
        ("POST", "/v1/runs", b'{"notebook": "n", "kind": "headless"}', UsageError, "snapshot"),
        ("POST", "/v1/runs", b'{"notebook": "n", "kind": "interactive"}', UsageError, "driver"),
        ("GET", "/v1/runs?limit=many", None, UsageError, "limit"),
        ("GET", "/v1/nothing", None, NotFound, "no GET /v1/nothing"),
        ("DELETE", "/v1/runs", None, NotFound, "no DELETE /v1/runs"),
    ],
)
def test_bad_questions(
    client: Client, method: str, path: str, body: bytes | None, kind: type[DurableError], words: str
) -> None:
    """Guarantee 11: each gets an error that says what is wrong with what."""
    _, error = error_of(ask(client, method, path, body))
    assert type(error) is kind
    assert words in error.message


def test_the_document_tells_every_endpoint(client: Client) -> None:
    status, text = ask(client, "GET", "/openapi.json")
    document = json.loads(text)
    assert status == 200
    told = {(method.upper(), path) for path, one in document["paths"].items() for method in one}
    assert told == {(endpoint.method, endpoint.path) for endpoint in contract.ENDPOINTS}
    schemas = document["components"]["schemas"]
    for endpoint in contract.ENDPOINTS:
        assert endpoint.answer.__name__ in schemas
        operation = document["paths"][endpoint.path][endpoint.method.lower()]
        if endpoint.method == "GET":
            assert {p["name"] for p in operation["parameters"]} == set(endpoint.question.model_fields)
    references = {part.split('"')[0] for part in text.decode().split('"$ref":"#/components/schemas/')[1:]}
    assert references <= set(schemas)
    status, page = ask(client, "GET", "/docs")
    assert status == 200
    assert b"http://" not in page
    assert b"https://" not in page
    assert b"<script" not in page
    for endpoint in contract.ENDPOINTS:
        assert endpoint.path.encode() in page
