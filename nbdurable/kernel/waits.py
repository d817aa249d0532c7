"""What a notebook waits for: a person's approval, an event, a moment in time, or several of these.

Owns the public functions and what an answer means to the notebook. A verb waits (`approve`, `wait_for`, `sleep`); its
noun describes the same wait for `first_of` and `all_of` (`approval`, `event`, `timer`). How a cell waits is
`gates.py`'s: headless, the run is suspended and gives its kernel back; interactive, the cell waits, and any route may
answer (CLI, page, API).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from nbdurable.checkpoint.fingerprint import Unfingerprintable, fingerprint
from nbdurable.checkpoint.plan import digest
from nbdurable.checkpoint.preview import describe
from nbdurable.contract import WaitSpec
from nbdurable.errors import UsageError
from nbdurable.kernel import display
from nbdurable.kernel.forms import MAX_VALUE_BYTES, Form, as_json
from nbdurable.kernel.gates import Gate, Steps, Unopened, drive, drive_async
from nbdurable.kernel.session import required
from nbdurable.models import Wait, WaitAnswer, WaitDefault, WaitKind
from nbdurable.policies import seconds

When = str | float | timedelta | datetime  # a time from now, or a moment; one without a zone is local time


@dataclass(frozen=True)
class Decision:
    """A person's answer to an approval; true if approved.

    `value` is the proposed value, or the edited one. `by`, `comment`, `at`: who decided, why, and when; `deadline`
    where nobody did in time.
    """

    approved: bool
    value: Any
    by: str
    comment: str
    at: datetime

    def __bool__(self) -> bool:
        return self.approved


@dataclass(frozen=True)
class First:
    """Which of several waits came first: its name, and what it gives."""

    name: str
    result: Any


@dataclass(frozen=True)
class Request:
    """An open approval, as `notify` gets it: enough to ask somebody outside.

    A POST to `url` (JSON: `approved`, and perhaps `value`, `comment`, `by`) answers it, once, without any other
    secret: whoever has the address can decide. The pages (`nbdurable up`) must be running to take it. `page` is for
    people who may open the pages.
    """

    id: str
    title: str
    value: Any
    reviewers: tuple[str, ...]
    url: str
    page: str


# Approvals -----------------------------------------------------------------------------------------------


def approval(
    value: Any = None,
    *,
    title: str = "Approve?",
    form: Any = None,
    timeout: When | None = None,
    default: bool | None = None,
    reviewers: Iterable[str] = (),
    tags: Iterable[str] = (),
    remind_every: str | float | timedelta | None = None,
    notify: Callable[[Request], Any] | None = None,
) -> Unopened:
    """Describe an approval for `first_of` and `all_of`; the arguments and the result are those of `approve`."""
    return _approval("", value, title, Form.of(form), timeout, default, reviewers, tags, remind_every, notify)


def approve(
    value: Any = None,
    *,
    title: str = "Approve?",
    form: Any = None,
    timeout: When | None = None,
    default: bool | None = None,
    reviewers: Iterable[str] = (),
    tags: Iterable[str] = (),
    remind_every: str | float | timedelta | None = None,
    notify: Callable[[Request], Any] | None = None,
) -> Decision:
    """Ask a person to approve a value, and wait for the answer.

    Headless, the run is suspended (status `waiting`) and its kernel is given back; once somebody answers, the run
    goes on at the statement that holds this call. Interactive, the cell waits; interrupted, the approval stays
    open, and the next run of the cell picks the answer up. `value` is shown to the person, and may be edited if it
    is JSON.

    `form`: a pydantic model (or type, or JSON schema) that the answer must fit. `Decision.value` is an instance of it;
    an answer that the schema does not allow is refused, and one that the model's own validators refuse is asked for
    again. `timeout` (`2h`, or a datetime; local time where it has no zone): when it has passed, `default` decides
    (True: approve what is proposed, False: reject; `by` is then `deadline`), or WaitTimeout is raised. `reviewers`:
    names of those who may answer; an agreement among people who share a project, no protection. `remind_every`
    writes a reminder to the history and the pages. `notify` is called with a `Request` before the run is suspended,
    and again if the cell comes back while the approval is open. Raises UsageError outside a notebook with
    `%load_ext nbdurable`.
    """
    return drive(_approve(value, title, form, timeout, default, reviewers, tags, remind_every, notify))


async def approve_async(
    value: Any = None,
    *,
    title: str = "Approve?",
    form: Any = None,
    timeout: When | None = None,
    default: bool | None = None,
    reviewers: Iterable[str] = (),
    tags: Iterable[str] = (),
    remind_every: str | float | timedelta | None = None,
    notify: Callable[[Request], Any] | None = None,
) -> Decision:
    """Ask a person to approve a value; other tasks of the cell go on meanwhile. See `approve`."""
    return await drive_async(
        _approve(value, title, form, timeout, default, reviewers, tags, remind_every, notify)
    )


def _approve(value: Any, title: str, form: Any, *more: Any) -> Steps[Decision]:
    shape, said = Form.of(form), ""
    while True:
        asked = _approval(said, value, title, shape, *more)
        (wait,) = yield Gate([asked])
        try:
            decision: Decision = asked.outcome(wait)
            return decision
        except _Unfit as error:
            said = str(error)  # the same gate would have the same answer for ever: another one asks again


class _Unfit(UsageError):
    """An answer was given that the notebook's own model refuses"""


def _approval(
    said: str,
    value: Any,
    title: str,
    form: Form | None,
    timeout: When | None,
    default: bool | None,
    reviewers: Iterable[str],
    tags: Iterable[str],
    remind_every: str | float | timedelta | None,
    notify: Callable[[Request], Any] | None,
) -> Unopened:
    session = required()
    try:
        proposal = fingerprint(value, session.values)
    except Unfingerprintable:
        proposal = ""
    if default is not None and timeout is None:
        raise UsageError(
            f"{title!r} has a default and no timeout", todo="say when the default counts: timeout='2h'"
        )
    every_s = None if remind_every is None else seconds(remind_every)
    if every_s is not None and every_s < 1:
        raise UsageError(
            f"remind_every={remind_every!r} is too often", todo="remind once in a second at most"
        )
    kind, shape, preview = describe(value)
    shown = "" if value is None else value if isinstance(value, str) else preview or shape or kind
    if said:
        shown = f"The last answer did not fit: {said}\n{shown}"
    if len(shown) > MAX_VALUE_BYTES:
        shown = shown[:MAX_VALUE_BYTES] + "\n… (cut)"
    spec = WaitSpec(
        kind=WaitKind.APPROVAL,
        title=title,
        value=as_json(value),
        preview=shown,
        form=form.schema if form else None,
        tags=_names(tags, "tags"),
        reviewers=_names(reviewers, "reviewers"),
        default=None if default is None else WaitDefault(approved=default),
        remind_every_s=every_s,
        callback="" if notify is not None else None,
        **deadline(timeout, title),
    )
    opened = None if notify is None else partial(_notify, notify, value)
    ask = f"approval:{title}:{proposal}" + (f":{digest(said)}" if said else "")
    return Unopened(spec, ask, partial(_decision, value, form), opened)


def _decision(value: Any, form: Form | None, answer: WaitAnswer) -> Decision:
    decided = answer.value if answer.edited else value
    if form is not None and answer.approved and (answer.edited or not _is_made(form, value)):
        try:
            decided = form.made(answer.value)
        except ValueError as error:
            raise _Unfit(str(error)) from None
    at = datetime.fromtimestamp(answer.at).astimezone()
    return Decision(answer.approved, decided, answer.by, answer.comment, at)


def _is_made(form: Form, value: Any) -> bool:
    """Tell whether the proposed value is an instance of the form already."""
    if form.adapter is None:
        return True
    try:
        form.adapter.validate_python(value, strict=True)
    except ValueError:
        return False
    return not isinstance(value, dict)


def _notify(notify: Callable[[Request], Any], value: Any, wait: Wait, secret: str) -> None:
    session = required()
    base = display.pages(session.home, session.settings)
    url, page = f"{base}/v1/callbacks/{secret}", f"{base}/ui/approvals/{wait.id}"
    notify(Request(wait.id, wait.title, value, wait.reviewers, url, page))


# Time ----------------------------------------------------------------------------------------------------


def timer(when: When) -> Unopened:
    """Describe a wait for time, for `first_of` and `all_of`: `2h`, seconds, a timedelta, or a datetime."""
    if isinstance(when, datetime):
        title = f"sleep until {when:%Y-%m-%d %H:%M}"
        spec = WaitSpec(kind=WaitKind.TIMER, title=title, due_at=when.timestamp())
        return Unopened(spec, "sleep until", _nothing)  # `datetime.now() + …` is another moment each time
    due_in_s = seconds(when)
    text = str(when) if isinstance(when, str | timedelta) else f"{due_in_s:g} s"
    spec = WaitSpec(kind=WaitKind.TIMER, title=f"sleep {text}", due_in_s=due_in_s)
    return Unopened(spec, f"sleep:{due_in_s}", _nothing)


def _nothing(answer: WaitAnswer) -> None:
    return None


def sleep(duration: str | float | timedelta) -> None:
    """Wait for a time that survives crashes and restarts: seconds, a timedelta, or `30s`, `10m`, `2h`, `3d`.

    Headless, a sleep of two seconds or more gives the kernel back.
    """
    drive(_one(_sleep(duration)))


async def sleep_async(duration: str | float | timedelta) -> None:
    """Wait for a time that survives crashes and restarts; other tasks of the cell go on meanwhile. See `sleep`."""
    await drive_async(_one(_sleep(duration)))


def _sleep(duration: str | float | timedelta) -> Unopened:
    if isinstance(duration, datetime):
        raise UsageError(f"{duration!r} is no duration", todo="`sleep_until` waits for a moment")
    return timer(duration)


def sleep_until(moment: datetime) -> None:
    """Wait until a moment: a datetime, in local time where it has no zone. One that has passed is over at once."""
    drive(_one(_sleep_until(moment)))


async def sleep_until_async(moment: datetime) -> None:
    """Wait until a moment; other tasks of the cell go on meanwhile. See `sleep_until`."""
    await drive_async(_one(_sleep_until(moment)))


def _sleep_until(moment: datetime) -> Unopened:
    if not isinstance(moment, datetime):
        raise UsageError(
            f"{moment!r} is no moment", todo="give a datetime; `sleep` waits for a duration such as '2h'"
        )
    return timer(moment)


# Events --------------------------------------------------------------------------------------------------


_NONE: Any = object()


def event(
    name: str,
    *,
    match: Mapping[str, Any] | None = None,
    timeout: When | None = None,
    schema: Any = None,
    default: Any = _NONE,
) -> Unopened:
    """Describe a wait for an event, for `first_of` and `all_of`; arguments and result are those of `wait_for`."""
    if not name or len(name) > 200:
        raise UsageError(f"{name[:200]!r} can't name an event", todo="a name has 1 to 200 characters")
    wanted = dict(match or {})
    if as_json(wanted) is None or not all(isinstance(path, str) for path in wanted):
        raise UsageError(
            f"match={match!r} can't be matched", todo="it maps paths such as 'order.id' to JSON values"
        )
    if default is not _NONE and timeout is None:
        raise UsageError(
            f"the wait for {name!r} has a default and no timeout", todo="say when the default counts"
        )
    if default is not _NONE and default is not None and as_json(default) is None:
        raise UsageError(
            f"default={default!r} is not JSON", todo="an event's payload is JSON, its default as well"
        )
    form = Form.of(schema)
    spec = WaitSpec(
        kind=WaitKind.EVENT,
        title=f"event {name}",
        event=name,
        match=wanted,
        preview=", ".join(f"{path} = {json.dumps(value)}" for path, value in wanted.items()),
        form=form.schema if form else None,
        default=None if default is _NONE else WaitDefault(value=as_json(default), edited=True),
        **deadline(timeout, name),
    )
    return Unopened(spec, f"event:{name}:{json.dumps(wanted, sort_keys=True)}", partial(_payload, name, form))


def _payload(name: str, form: Form | None, answer: WaitAnswer) -> Any:
    if form is None:
        return answer.value
    try:
        return form.made(answer.value)
    except ValueError as error:
        raise UsageError(
            f"the event {name!r} came with a payload that its model refuses: {error}",
            todo="the schema allowed it, the model's own validators do not: let the schema say it too",
        ) from None


def wait_for(
    name: str,
    *,
    match: Mapping[str, Any] | None = None,
    timeout: When | None = None,
    schema: Any = None,
    default: Any = _NONE,
) -> Any:
    """Wait for an event that somebody sends (`Client.send`, `nbdurable send EVENT [JSON]`); return its payload.

    An event goes to every run that waits for it and whose `match` fits. It is kept for its time to live (7 days unless
    the sender says otherwise): sent before anyone waits, it is taken by the first wait of a run that opens within that
    time. Each run gets an event once, the oldest first. `match`: paths into the payload and the values they must have,
    `{"order.id": 7, "items.0": {"sku": "A"}}`; an object asks for its own fields only. `schema`: a pydantic model (the
    payload comes as an instance), another type, or a JSON schema; what does not fit is refused when it is sent, or
    kept out of this wait, which its history tells. After `timeout` the `default` is returned, or WaitTimeout raised.
    """
    return drive(_one(event(name, match=match, timeout=timeout, schema=schema, default=default)))


async def wait_for_async(
    name: str,
    *,
    match: Mapping[str, Any] | None = None,
    timeout: When | None = None,
    schema: Any = None,
    default: Any = _NONE,
) -> Any:
    """Wait for an event; other tasks of the cell go on meanwhile. See `wait_for`."""
    asked = event(name, match=match, timeout=timeout, schema=schema, default=default)
    return await drive_async(_one(asked))


# Several -------------------------------------------------------------------------------------------------


def first_of(**waits: Unopened) -> First:
    """Wait until the first of several waits is over, and cancel the others; return its name and what it gives.

        first = durable.first_of(decision=durable.approval(draft), late=durable.timer("2d"))
        if first.name == "decision" and first.result: ...

    Exactly one counts, also over crashes; of those that are over already, the one that is named first. A wait whose
    `timeout` passes without a default counts as well, and raises WaitTimeout.
    """
    return drive(_first_of(waits))


async def first_of_async(**waits: Unopened) -> First:
    """Wait until the first of several waits is over; other tasks of the cell go on meanwhile. See `first_of`."""
    return await drive_async(_first_of(waits))


def _first_of(waits: Mapping[str, Unopened]) -> Steps[First]:
    answered = yield Gate(_several(waits, "first_of"), first=True)
    for (name, asked), wait in zip(waits.items(), answered, strict=True):
        if wait.answer is not None:
            return First(name, asked.outcome(wait))
    first = next(iter(waits.values()))
    return First("", first.outcome(answered[0]))  # raises: all were cancelled


def all_of(**waits: Unopened) -> dict[str, Any]:
    """Wait until several waits are over, opened together; return what each gives, by its name.

    found = durable.all_of(legal=durable.approval(text, title="Legal?"), paid=durable.event("paid"))
    """
    return drive(_all_of(waits))


async def all_of_async(**waits: Unopened) -> dict[str, Any]:
    """Wait until several waits are over; other tasks of the cell go on meanwhile. See `all_of`."""
    return await drive_async(_all_of(waits))


def _all_of(waits: Mapping[str, Unopened]) -> Steps[dict[str, Any]]:
    answered = yield Gate(_several(waits, "all_of"))
    pairs = zip(waits.items(), answered, strict=True)
    return {name: asked.outcome(wait) for (name, asked), wait in pairs}


def _several(waits: Mapping[str, Unopened], what: str) -> list[Unopened]:
    wrong = [name for name, asked in waits.items() if not isinstance(asked, Unopened)]
    if wrong or not waits:
        raise UsageError(
            f"{what}: {', '.join(wrong)} can't be waited for" if wrong else f"{what} of nothing",
            todo=f"durable.{what}(decision=durable.approval(draft), late=durable.timer('2d'))",
        )
    return list(waits.values())


def _one(asked: Unopened) -> Steps[Any]:
    (wait,) = yield Gate([asked])
    return asked.outcome(wait)


# Words ---------------------------------------------------------------------------------------------------


def deadline(when: When | None, title: str) -> dict[str, Any]:
    """Return a timeout as the fields of a wait have it."""
    if when is None:
        return {}
    if isinstance(when, datetime):
        return {"deadline_at": when.timestamp()}
    if not (in_s := seconds(when)):
        raise UsageError(
            f"the timeout of {title!r} is zero", todo="give it a time such as '2h', or leave it out"
        )
    return {"deadline_in_s": in_s}


def _names(names: Iterable[str], what: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise UsageError(f"{what}={names!r} is one text", todo=f"give a list: {what}=[{names!r}]")
    return tuple(names)
