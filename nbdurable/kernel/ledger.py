"""Calls of models inside steps as recorded calls: `durable.ledger`.

Owns which requests are calls of models, what each is known by, what is kept of its answer, and the budget. How requests
of a client come here is `wire.py`'s; what a recorded call is, `recorded.py`'s; tokens and prices, `spending.py`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from nbdurable import contract, spending
from nbdurable.checkpoint.plan import digest
from nbdurable.errors import DurableError, Paused
from nbdurable.kernel import calls, extension, wire
from nbdurable.kernel.recorded import Call, Calls, Function
from nbdurable.kernel.session import Session
from nbdurable.models import Budget, ModelUse
from nbdurable.settings import Settings

PATHS = ("/chat/completions", "/responses", "/messages", "/embeddings", "/completions")
_PROMPT = ("system", "instructions", "messages", "input", "prompt")  # fields of a request that ask
_SECRET = re.compile(
    "key|token|secret|sig|password|auth|cookie", re.IGNORECASE
)  # names of what is never kept
_SHORTEST_SECRET = 16  # characters; a shorter one (`not-needed`) would be found by chance
_KEPT = re.compile(
    "content-type|content-encoding|date|x-request-id|request-id|openai-(model|processing-ms|version)"
    "|(x|anthropic)-ratelimit-.*"
)  # headers of an answer: any other one may tell who asks

_DEPLOYMENT = re.compile("/deployments/([^/]+)/")
_PRICE = """`[prices."{}"]` in settings.toml names one"""
_ASK_TOKENS = "`stream_options={'include_usage': True}` asks for them"

Header = tuple[str, str]

_on = False
_budget: Budget | None = None
_unpriced: set[str] = set()  # models of which it was said that their price is not known


def ledger(*, budget: str | float | None = None, on: bool = True) -> None:
    """Record the calls of models inside steps, whichever library makes them over httpx.

    That is `openai`, `anthropic`, what stands on them (`pydantic-ai`, LangChain), and clients of endpoints like
    OpenAI's; those that exist already as well. Each call is kept with its model, tokens, time and cost; an attempt
    that comes later takes the recorded answer, stream or whole, and makes no request. A call is known by its address
    and its request, whose headers are not kept. Prices stand in `settings.toml`.

    `budget`: what a run's calls may take, as money (`2.5`) or tokens (`"200k tokens"`); the call behind that pauses the
    run. Calls that run at the same time are let finish. One that is given with the run weighs more (`nbdurable run
    --budget`, `resume --budget`). `on`: False ends it. Outside of steps, nothing is recorded. Raises UsageError for
    what is no budget.
    """
    global _on, _budget
    _budget = None if budget is None else spending.budget(budget)
    _on = on
    if on:
        wire.install()
    else:
        wire.remove()


@dataclass(frozen=True)
class Recorded:
    """An answer as it was recorded; `chunks` are its bytes as they came."""

    status: int
    headers: list[Header]
    chunks: list[bytes]
    version: bytes
    duration_s: float


class Exchange:
    """One request to a model, and its answer: known, or to be made and kept.

    Whoever makes it calls `take` with the answer's bytes as they come, then `keep` or `keep_async`; or `drop`.
    """

    def __init__(self, call: Call, asked: dict[str, Any], model: str) -> None:
        self._call, self._asked, self._model = call, asked, model
        self._chunks: list[bytes] = []
        self._open = True

    def recorded(self) -> Recorded | None:
        """Return the recorded answer; None where the request is to be made."""
        if self._call.known is None:
            return None
        status, headers, chunks, version = self._call.value()
        return Recorded(status, headers, chunks, version, self._call.known.duration_s)

    def take(self, chunk: bytes) -> None:
        """Take some bytes of the answer, as they came."""
        self._chunks.append(chunk)

    def drop(self) -> None:
        """End it without an answer to keep: the next equal request takes its place."""
        if self._open:
            self._open = False
            self._call.end(recorded=False)

    def keep(self, answer: wire.Head, *, read_whole: bool = True) -> None:
        """Record the answer, once; it is on disk then. `read_whole`: its end was seen."""
        with _Noted(self._call.calls, self._call.function):
            if (value := self._value(answer, read_whole)) is not None:
                calls.commit(self._call, value)

    async def keep_async(self, answer: wire.Head, *, read_whole: bool = True) -> None:
        """Record the answer as `keep` does; other tasks go on meanwhile."""
        with _Noted(self._call.calls, self._call.function):
            if (value := self._value(answer, read_whole)) is not None:
                await calls.commit_async(self._call, value)

    def _value(self, head: wire.Head, read_whole: bool) -> tuple[Any, ...] | None:
        """Return what is recorded of an answer; None where it can't be."""
        if not self._open:
            return None
        self._open = False
        body = head.decode(self._chunks)
        answer = spending.read_answer(body)
        headers = [(name, value) for name, value in head.headers if _KEPT.fullmatch(name.lower())]
        if answer.failed:
            self._call.end(recorded=False)
            return None
        if not (read_whole or answer.whole):
            self._call.refuse("its stream was not read to its end")
            return None
        if any(secret.encode() in body for secret in _secrets(head)):
            self._call.refuse("its answer holds the key with which it was asked for")
            return None
        self._call.model = self._use(answer)
        return head.status, headers, self._chunks, head.version

    def _use(self, answer: spending.Answer) -> ModelUse:
        counted = self._call.calls
        price = spending.price_of(_settings(counted.session).prices, self._model, answer.model)
        model = self._model
        if price is None and model not in _unpriced:
            _unpriced.add(model)
            counted.tell(f"`{model}` has no price, so its tokens are counted only · {_PRICE.format(model)}")
        if answer.input_tokens is None and self._asked.get("stream"):
            counted.tell(f"a stream of `{model}` does not tell its tokens · {_ASK_TOKENS}")
        return ModelUse(
            model=model,
            prompt=digest(_canonical({name: self._asked[name] for name in _PROMPT if name in self._asked})),
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
            cached_tokens=answer.cached_tokens,
            cost=spending.cost(answer, price),
        )


class _Noted:
    """Notes why an answer could not be recorded: as an error here, it would make a client ask, and pay, again."""

    def __init__(self, counted: Calls, function: Function) -> None:
        self._counted, self._function = counted, function

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DurableError):
            return False
        self._counted.note(self._function, error.message)
        return True


def exchange(method: str, url: str, read: Callable[[], bytes]) -> Exchange | None:
    """Begin an exchange; None for a request that is no call of a model, or made where nothing is recorded.

    `read` returns the request's body. Raises Paused where the run's budget leaves nothing for it.
    """
    split = urlsplit(url)
    if not _on or method != "POST" or not split.path.endswith(PATHS):
        return None
    counted = calls.recording()
    asked = None if counted is None else _asked(read)
    if counted is None or asked is None:
        return None
    deployed = _DEPLOYMENT.search(split.path)  # Azure's way to name a model
    model = str(asked.get("model") or (deployed[1] if deployed else ""))
    if not model:
        return None
    path = next(path for path in PATHS if split.path.endswith(path))
    call = counted.open_known_by(
        Function(exchange, label=path[1:]), model, method, *_address(url), _canonical(asked)
    )
    if call.known is None:
        try:
            _check_budget(counted.session, model)
        except BaseException:
            call.end(recorded=False)
            raise
    return Exchange(call, asked, model)


def _asked(read: Callable[[], bytes]) -> dict[str, Any] | None:
    """Return a request's body; None where it is no JSON object, or comes as a stream."""
    try:
        found = json.loads(read())
    except Exception:
        return None
    return found if isinstance(found, dict) else None


def _canonical(asked: dict[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True, separators=(",", ":"))


def _address(url: str) -> list[str]:
    """Return the parts of an address that tell one from another; secrets are none."""
    split = urlsplit(url)
    query = [f"{name}={value}" for name, value in parse_qsl(split.query) if not _SECRET.search(name)]
    return [split.scheme, split.hostname or "", str(split.port or ""), split.path, *sorted(query)]


def _secrets(head: wire.Head) -> set[str]:
    """Return what a request proved with who asks."""
    split = urlsplit(head.url)
    named: Sequence[Header] = [*head.asked_with, *parse_qsl(split.query)]
    values = {value.rpartition(" ")[2] for name, value in named if _SECRET.search(name)}
    values |= {split.password or ""}
    return {value for value in values if len(value) >= _SHORTEST_SECRET}


# The budget --------------------------------------------------------------------------------------------------


def _settings(session: Session) -> Settings:
    """Return the project's settings as they are now: prices and a budget may be added meanwhile."""
    try:
        return Settings.load(session.home)
    except DurableError:
        return session.settings


def _check_budget(session: Session, model: str) -> None:
    """Raise Paused where the run's budget is spent, or can't be kept for this model."""
    run, settings = session.run, _settings(session)
    if run is None or not (run.budget or _budget or settings.budget):
        return
    detail = session.client.call(
        contract.GET_RUN, contract.ByRun(run_id=run.id)
    )  # somebody may have raised it
    budget = detail.budget or _budget or settings.budget
    if budget is None:
        return
    if spending.is_spent(budget, detail.usage):
        more = spending.say_budget(budget, 2)
        option = f'--budget "{more}"' if budget.of == "tokens" else f"--budget {more}"
        way = f"`nbdurable resume {run.short} {option}` goes on"
        if not session.headless:
            way = f"`durable.ledger(budget={more!r})`, and the cell again, goes on"
        said = f"the budget of {spending.say_budget(budget)} is spent: {spending.say(detail.usage)}"
        raise _paused(f"⏸ {said} · {way}")
    if budget.of == "money" and spending.price_of(settings.prices, model) is None:
        way = (
            f"`nbdurable resume {run.short}` goes on then" if session.headless else "run the cell again then"
        )
        raise _paused(f"⏸ the budget is money, and `{model}` has no price · {_PRICE.format(model)}; {way}")


def _paused(sentence: str) -> Paused:
    signal = Paused(sentence)
    steps = extension.steps()
    if steps is not None and steps.execution is not None:
        steps.execution.signal = signal
    return signal
