"""The recorded calls of one attempt at a step: which are known, what each was given and left, and their commits.

Owns `Calls`, one for each attempt, and `Call`. A call is known by its function, by what it was given (or its key) and
by how many equal ones came before it; whether its recorded result counts is decided by the code that its function
stands on. Knows nothing of decorators and cells (`calls.py`).
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

from nbdurable import contract
from nbdurable.checkpoint.analysis import CellNames, uses_of
from nbdurable.checkpoint.fingerprint import (
    Unfingerprintable,
    Walk,
    fingerprint,
    immutable,
    partial_fingerprint,
)
from nbdurable.checkpoint.manifest import CallManifest, put_blob, read_blob, seal, unseal_call
from nbdurable.checkpoint.objects import Problem
from nbdurable.checkpoint.plan import digest
from nbdurable.checkpoint.preview import printable
from nbdurable.checkpoint.reasons import place
from nbdurable.checkpoint.restore import load_random, load_value
from nbdurable.checkpoint.save import NotSaveable, save_random, save_value
from nbdurable.errors import NotRestorable, UsageError
from nbdurable.kernel import display
from nbdurable.kernel.outputs import Recorder, replay
from nbdurable.kernel.session import Session
from nbdurable.models import ModelUse, SignedManifest
from nbdurable.telemetry import fault_point

_SAID = 60  # characters of a call's arguments that people see
_SAID_OF_ONE = 40


@dataclass
class Function:
    """A function whose calls are recorded."""

    fn: Callable[..., Any]
    key: str | Callable[..., Any] | None = None
    label: str = ""

    @cached_property
    def name(self) -> str:
        """Return its name, by which its calls are told from those of others."""
        return self.label or str(getattr(self.fn, "__qualname__", type(self.fn).__qualname__)).replace(
            ".<locals>", ""
        )

    @cached_property
    def signature(self) -> inspect.Signature | None:
        """Return its signature; None for one of C that does not tell."""
        try:
            return inspect.signature(self.fn)
        except (TypeError, ValueError):
            return None

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return arguments by name, however they were passed; raises TypeError where they don't fit."""
        if self.signature is None:
            return {**{str(number): value for number, value in enumerate(args)}, **kwargs}
        return dict(self.signature.bind(*args, **kwargs).arguments)


@dataclass(frozen=True)
class _Facts:
    """What a function stands on: the digest of all of it, its parts by name, and the variables that it reads."""

    digest: str
    parts: dict[str, str]
    places: dict[str, str]  # of a part, for people: " (cell 2, line 4)"
    variables: tuple[str, ...]


@dataclass
class _Equals:
    """Calls that are given the same: the numbers taken by those that were made, and those that were given back."""

    next: int = 0
    free: list[int] = field(default_factory=list)


@dataclass
class _Ready:
    """A call that has returned, on its way to the coordinator."""

    call: Call
    new: contract.NewCall
    files: set[str]
    done: Future[None] = field(default_factory=Future)
    lead: Callable[[], object] = lambda: None


_inside: ContextVar[tuple[Call, ...]] = ContextVar("nbdurable_calls", default=())


def note_tries(count: int, error: BaseException) -> None:
    """Note that the call which runs now is made for the `count`-th time, after an error."""
    if inside := _inside.get():
        said = f"{type(error).__name__}: {error}"[:200]
        inside[-1].tries = f"try {count}, after {printable(said)}"


def scope(calls: Calls | None) -> str:
    """Return the key of the recorded call that runs here; "" outside of them."""
    return next((call.key for call in reversed(_inside.get()) if call.calls is calls), "")


class Calls:
    """The recorded calls of one attempt at a step. Thread-safe.

    `known`: how many calls earlier attempts have recorded. `names`: those of the step's cell. `before`: how many
    equal calls the body made above the statement from which it goes on, as `numbers` gave them there.
    """

    def __init__(
        self,
        session: Session,
        step: str,
        attempt: int,
        known: int,
        names: CellNames,
        before: Mapping[str, int] | None = None,
    ) -> None:
        self.session, self.step, self.attempt = session, step, attempt
        self.made = 0
        self.reasons: dict[str, None] = {}  # why calls ran again, each once, in order
        self.replayed: list[int] = []
        self.running = 0  # calls that run now
        self.crowded = 0  # counts on whenever a call begins beside another
        self._own = names.stores | names.touches
        self._unread = known
        self._known: dict[str, list[tuple[int, SignedManifest]]] = {}
        self._facts: dict[int, tuple[Any, _Facts]] = {}
        self._equals = {identity: _Equals(number) for identity, number in (before or {}).items()}
        self._keys: dict[str, tuple[dict[str, str], str]] = {}  # identity of a call by key → its arguments
        self.opaque: set[str] = set()  # variables that can't be looked into
        self._notices: dict[str, None] = {}
        self._guard = threading.Lock()
        self._pending: list[_Ready] = []
        self._is_sending = False

    # One call ------------------------------------------------------------------------------------------------

    def open(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Begin a call: one that is known, or that is to run; None for one that can't be recorded.

        Raises UsageError for a key that can't be used.
        """
        try:
            arguments = function.bound(args, kwargs)
        except TypeError:
            return None  # its own error says it better
        facts = self._facts_of(function)
        outer = scope(self)
        given = _look(arguments, self.session.values)
        if function.key is not None:
            said, identity = self._by_key(function, outer, given, arguments, args, kwargs)
        elif given.problems:
            name, problem = next(iter(given.problems.items()))
            self.note(
                function,
                f"its argument `{name}` can't be compared ({problem.sentence(name)}); say by `key=` what tells its "
                "calls apart, or make the object with `durable.recipe`",
            )
            return None
        else:
            said = _said_all(arguments)
            identity = digest(outer, function.name, *_pairs(given.digests), "", *self._by_value(facts))
        return self._begin(function, identity, said, facts, arguments, given)

    def open_known_by(self, function: Function, said: str, *texts: str) -> Call:
        """Begin a call that is known by texts alone, whatever code asks for it: its function is none of the notebook's.

        It is ended by `keep` or `end`, without `running`.
        """
        identity = digest(scope(self), function.name, "texts", *texts)
        return self._begin(function, identity, said, _Facts("", {}, {}, ()), {}, _Looked({}, [], {}))

    def _begin(
        self,
        function: Function,
        identity: str,
        said: str,
        facts: _Facts,
        arguments: dict[str, Any],
        given: _Looked,
    ) -> Call:
        with self._guard:
            equals = self._equals.setdefault(identity, _Equals())
            if equals.free:
                number = heapq.heappop(equals.free)
            else:
                number = equals.next = equals.next + 1
            self.made += 1
            self._read()
        key = digest(identity, str(number))
        call = Call(self, function, key, identity, number, said, facts, arguments, given)
        try:
            self._decide(call)
        except BaseException:
            self.give_back(call)
            raise
        return call

    def _by_key(
        self,
        function: Function,
        outer: str,
        given: _Looked,
        arguments: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[str, str]:
        """Return a call's key as text, and what tells the call from others."""
        key = function.key
        found = key if isinstance(key, str) else key(*args, **kwargs)  # type: ignore[misc]
        try:
            identity = digest(outer, function.name, "key", fingerprint(found, self.session.values))
        except Unfingerprintable as error:
            raise UsageError(
                f"the key of call `{function.name}` can't be compared: {error}",
                todo="make it a text or a number",
            ) from None
        said = found if isinstance(found, str) else brief(found)
        with self._guard:
            before = self._keys.setdefault(identity, (given.digests, _said_all(arguments)))
        if before[0] != given.digests:
            raise UsageError(
                f"two calls of `{function.name}` have the key {said!r}, and different arguments: "
                f"({before[1]}) and ({_said_all(arguments)})",
                todo="let the key depend on what differs, e.g. `key=lambda query, **_: query`; without a key, calls "
                "are told apart by their arguments",
            )
        return said[:_SAID], identity

    def _by_value(self, facts: _Facts) -> Iterator[str]:
        """Yield what the variables hold that a function reads and that the step's own cell writes."""
        for name in facts.variables:
            if name in self._own and name in self.session.values:
                yield f"{name}={partial_fingerprint(self.session.values[name], self.session.values)[0]}"

    def _facts_of(self, function: Function) -> _Facts:
        """Find out what a function stands on, once for each attempt."""
        if (known := self._facts.get(id(function.fn))) is not None:
            return known[1]
        session = self.session
        with self._guard:
            found = uses_of(function.fn, session.values, session.modules, label=session.cell_of)
        parts = {
            f"`{name}`": digest(fact.ast, *_pairs(fact.state or {})) for name, fact in found.helpers.items()
        }
        places = {f"`{name}`": place(fact.label, fact.line or None) for name, fact in found.helpers.items()}
        parts |= {f"`{name}`": meaning for name, meaning in found.imports.items()}
        parts |= {f"module `{fact.file}`": fact.digest for fact in found.modules.values()}
        variables = []
        for name in sorted(found.inputs):
            if name not in session.values or not session.tracker.is_users(name):
                continue
            if not isinstance(session.values[name], ModuleType):
                variables.append(name)
            if name not in self._own:
                origin = session.origins[name]
                value = origin.digest or partial_fingerprint(session.values[name], session.values)[0]
                parts[f"variable `{name}`"] = value
                places[f"variable `{name}`"] = place(origin.cell, origin.line or None)
        if not found.helpers and not isinstance(function.fn, ModuleType):
            parts["the function"] = partial_fingerprint(function.fn, session.values)[0]
        facts = _Facts(digest(*_pairs(parts)), parts, places, tuple(variables))
        self._facts[id(function.fn)] = (function.fn, facts)
        return facts

    def _read(self) -> None:
        """Read what earlier attempts have recorded, once."""
        if not self._unread:
            return
        self._unread = 0
        question = contract.ReadCalls(run_id=self.session.run_id, step=self.step, results=True)
        for recorded in self.session.client.call(contract.READ_CALLS, question).calls:
            if recorded.manifest is not None:
                self._known.setdefault(recorded.call.key, []).append((recorded.call.seq, recorded.manifest))

    def _decide(self, call: Call) -> None:
        """Take the recorded result of a call whose code is the same, or say why it runs."""
        found = self._known.get(call.key)
        if not found:
            return
        newest: CallManifest | None = None
        for seq, signed in reversed(found):
            manifest = unseal_call(signed, self.session.key, of=call.label)
            if manifest.key != call.key:
                raise NotRestorable(f"{call.label} is recorded under another one's key", todo=call.todo)
            if manifest.code == call.facts.digest:
                call.known = manifest
                self.replayed.append(seq)
                return
            newest = newest or manifest
        assert newest is not None
        call.reason = _difference(newest.parts, call.facts)
        self.reasons[call.reason] = None

    def give_back(self, call: Call) -> None:
        """Let the next equal call take the place of one that left nothing."""
        with self._guard:
            heapq.heappush(self._equals[call.identity].free, call.number)
            self.made -= 1

    def numbers(self) -> dict[str, int]:
        """Return how many equal calls were made so far, by what they are known by."""
        with self._guard:
            return {identity: equals.next for identity, equals in self._equals.items()}

    # Telling -------------------------------------------------------------------------------------------------

    def note(self, function: Function, why: str) -> None:
        """Note why a call is not recorded, to be said once."""
        self.tell(f"call `{function.name}` is not recorded: {why}")

    def tell(self, sentence: str) -> None:
        """Note a sentence about calls, to be said once when the cell ends."""
        self._notices[sentence] = None

    def say(self) -> None:
        """Say which calls were not recorded, and why."""
        if self._notices:
            display.say(self.session.shell, "\n".join(self._notices))
            self._notices.clear()

    def summary(self) -> str:
        """Sum up the calls for the step's line: "3 calls, 2 of them kept; `ask` changed (cell 2, line 4)"."""
        if not self.made:
            return ""
        parts = []
        if self.replayed:
            parts.append("all kept" if len(self.replayed) == self.made else f"{len(self.replayed)} kept")
        if self.made > len(self.replayed) and (self.replayed or self.reasons):
            why = f" ({display.few(list(self.reasons))})" if self.reasons else ""
            parts.append(f"{self.made - len(self.replayed)} ran{why}")
        calls = "1 call" if self.made == 1 else f"{self.made} calls"
        return f"{calls}: {', '.join(parts)}" if parts else calls

    # Commits -------------------------------------------------------------------------------------------------

    def commit(self, ready: _Ready) -> None:
        """Commit a call, and with it all that are ready; returns when it is on disk."""
        turn = threading.Event()
        ready.done.add_done_callback(lambda _: turn.set())
        if not self._put(ready, turn.set):
            turn.wait()
        if not ready.done.done():
            self._lead()
        ready.done.result()

    async def commit_async(self, ready: _Ready) -> None:
        """Commit a call as `commit` does; other tasks go on meanwhile."""
        loop = asyncio.get_running_loop()

        def lead() -> None:
            loop.run_in_executor(None, self._lead)

        if self._put(ready, lambda: loop.call_soon_threadsafe(lead)):
            lead()
        await asyncio.wrap_future(ready.done)

    def _put(self, ready: _Ready, lead: Callable[[], object]) -> bool:
        """Let a call be committed next, and tell whether it is its turn to see to that; else `lead` may be called."""
        ready.done.set_running_or_notify_cancel()
        ready.lead = lead
        with self._guard:
            self._pending.append(ready)
            first, self._is_sending = not self._is_sending, True
        return first

    def _lead(self) -> None:
        """Send what is ready, and let one of those that became ready meanwhile send the next ones."""
        self._send()
        with self._guard:
            following = self._pending[0] if self._pending else None
            self._is_sending = following is not None
        if following is not None:
            following.lead()

    def _send(self) -> None:
        with self._guard:
            batch, self._pending = self._pending, []
        if not batch:
            return
        session = self.session
        try:
            session.blobs.renew({digest for ready in batch for digest in ready.files})
            session.blobs.sync()
            question = contract.CommitCalls(
                run_id=session.run_id,
                epoch=session.epoch,
                step=self.step,
                attempt=self.attempt,
                calls=tuple(ready.new for ready in batch),
            )
            session.client.call(contract.COMMIT_CALLS, question)
            for ready in batch:
                fault_point("call-committed", ready.call.key)
        except BaseException as error:
            for ready in batch:
                ready.done.set_exception(error)
        else:
            for ready in batch:
                ready.done.set_result(None)


class Call:
    """One call: known, or running. `with call.running():` stands around what it runs."""

    def __init__(
        self,
        calls: Calls,
        function: Function,
        key: str,
        identity: str,
        number: int,
        said: str,
        facts: _Facts,
        arguments: dict[str, Any],
        given: _Looked,
    ) -> None:
        self.calls, self.function, self.key, self.identity, self.number = (
            calls,
            function,
            key,
            identity,
            number,
        )
        self.said, self.facts, self.arguments, self.given = said, facts, arguments, given
        self.known: CallManifest | None = None
        self.reason = ""
        self.tries = ""  # which one this is, and what the one before raised
        self.model: ModelUse | None = None  # what a call of a model took
        self._recorder = Recorder()
        self._began = time.perf_counter()
        self._before: _Before | None = None

    @property
    def label(self) -> str:
        return f"the recorded call `{self.function.name}({self.said})` of step `{self.calls.step}`"

    @property
    def todo(self) -> str:
        return f"`%durable rerun {self.calls.step}` runs the step and all its calls again"

    def value(self) -> Any:
        """Return the recorded result; what the call displayed is displayed again, random state is put back.

        Raises BlobMissing, BlobDamaged, NotRestorable.
        """
        manifest, session = self.known, self.calls.session
        assert manifest is not None
        given = [*self.given.walks, *self._variables().walks] if manifest.shares else None
        try:
            value = load_value(manifest.value, session.values, session.blobs, self.label, given)
        except NotRestorable as error:
            error.todo = error.todo or self.todo
            raise
        if manifest.outputs is not None:
            replay(session.shell, json.loads(bytes(read_blob(manifest.outputs, session.blobs))))
        if manifest.random is not None:
            load_random(manifest.random, session.blobs)
        return value

    @contextmanager
    def running(self, ends: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
        """Let what runs in the block be part of this call; where it raises, nothing is recorded.

        Entered again for each item of a generator, which `ends` with an exception of that type.
        """
        calls = self.calls
        inside = _inside.get()
        if self._before is None:
            variables = self._variables()
            with calls._guard:
                depth = sum(call.calls is calls for call in inside)
                alone = calls.running == depth
                calls.crowded += not alone
                calls.running += 1
            self._before = _Before(variables, calls.crowded, _random_state() if alone else None)
        token = _inside.set((*inside, self))
        try:
            with self._recorder.listening():
                yield
        except ends:
            raise
        except BaseException:
            self.end(recorded=False)
            raise
        finally:
            _inside.reset(token)

    def end(self, *, recorded: bool) -> None:
        """Note that the call runs no more."""
        if self._before is not None:
            with self.calls._guard:
                self.calls.running -= 1
        if not recorded:
            self.calls.give_back(self)

    def _variables(self) -> _Looked:
        """Look at the variables that the function reads and may change."""
        if not self.facts.variables:
            return _NOTHING
        values, opaque = self.calls.session.values, self.calls.opaque
        names = (name for name in self.facts.variables if name in values and name not in opaque)
        changing = {name: values[name] for name in names if not immutable(values[name])}
        looked = _look(changing, values, self.given.walks[-1] if self.given.walks else None)
        self.calls.opaque |= looked.problems.keys()
        return looked

    def keep(self, value: Any) -> _Ready | None:
        """Save what the call left, to be committed; None where that can't be recorded, which is noted."""
        try:
            ready = self._ready(value, self._before)
        except NotSaveable as error:
            self.calls.note(self.function, error.message)
            self.end(recorded=False)
            return None
        except BaseException:
            self.end(recorded=False)
            raise
        self.end(recorded=True)
        return ready

    def refuse(self, why: str) -> None:
        """End a call that can't be recorded, and note why."""
        self.calls.note(self.function, why)
        self.end(recorded=False)

    def _ready(self, value: Any, before: _Before | None) -> _Ready:
        session = self.calls.session
        duration_s = time.perf_counter() - self._began
        walks = self.given.walks
        if before is not None:
            self._check_unchanged(before)
            walks = [*walks, *before.variables.walks]
        group, shares = save_value(value, session.values, session.blobs, walks)
        alone = before is not None and before.random is not None and self.calls.crowded == before.crowded
        moved = before is not None and alone and _random_state() != before.random
        outputs = self._recorder.finished()
        manifest = CallManifest(
            run_id=session.run_id,
            step=self.calls.step,
            key=self.key,
            name=self.function.name,
            created_at=time.time(),
            duration_s=duration_s,
            code=self.facts.digest,
            parts=self.facts.parts,
            value=group,
            shares=shares,
            random=save_random(session.blobs) if moved else None,
            outputs=put_blob(json.dumps(outputs).encode(), session.blobs) if outputs else None,
        )
        new = contract.NewCall(
            key=self.key,
            name=self.function.name,
            given=self.said,
            type=type(value).__qualname__,
            bytes=group.stream.size + sum(blob.size for blob in group.buffers),
            duration_s=duration_s,
            reason="; ".join(filter(None, (self.reason, self.tries))),
            model=self.model,
            manifest=seal(manifest, session.key),
        )
        return _Ready(self, new, manifest.files())

    def _check_unchanged(self, before: _Before) -> None:
        """Raise NotSaveable where the call changed what it was given: its result alone would not bring that back."""
        if self.given.walks:
            changed = _changed(self.given, _look(self.arguments, self.calls.session.values))
            if changed is not None:
                raise NotSaveable(f"it changes its argument `{changed}`{_CHANGES}")
        if before.variables.walks:
            changed = _changed(before.variables, self._variables())
            if changed is not None:
                raise NotSaveable(f"it changes the variable `{changed}`{_CHANGES}")


@dataclass(frozen=True)
class _Looked:
    """What values were at one moment: fingerprints, walks over those that may change, what can't be looked into."""

    digests: dict[str, str]
    walks: list[Walk]
    problems: dict[str, Problem]


@dataclass(frozen=True)
class _Before:
    """What was there when a call began to run."""

    variables: _Looked
    crowded: int
    random: tuple[Any, ...] | None  # None where other calls ran beside it: whose move it was can't be told


_NOTHING = _Looked({}, [], {})
_CHANGES = ", which its result alone would not bring back; let it return what it makes"


def _look(values: dict[str, Any], namespace: dict[str, Any], outer: Walk | None = None) -> _Looked:
    """Look at values in turn; what they share is part of their fingerprints."""
    fixed = {name: value for name, value in values.items() if immutable(value)}
    digests = {"": Walk(namespace).run(fixed)} if fixed else {}
    walks: list[Walk] = []
    problems: dict[str, Problem] = {}
    for name, value in values.items():
        if name in fixed:
            continue
        found: list[Problem] = []
        walk = Walk(namespace, problems=found, outer=walks[-1] if walks else outer)
        digests[name] = walk.run(value)
        if found:
            problems[name] = found[0]
        walks.append(walk)
    return _Looked(digests, walks, problems)


def _changed(before: _Looked, after: _Looked) -> str | None:
    """Name a value that is another one now; one that can't be looked into whole is passed over."""
    names = before.digests.keys() - before.problems.keys() - {""}
    return next((name for name in sorted(names) if before.digests[name] != after.digests.get(name)), None)


def _difference(before: dict[str, str], now: _Facts) -> str:
    """Say which part of what a function stands on is another one than when its call was recorded."""
    for name, found in now.parts.items():
        if name in before and before[name] != found:
            return f"{name} changed{now.places.get(name, '')}"
    for name in now.parts:
        if name not in before:
            return f"it now uses {name}{now.places.get(name, '')}"
    gone = next((name for name in before if name not in now.parts), "something")
    return f"it uses {gone} no more"


def _pairs(parts: dict[str, str]) -> Iterator[str]:
    return (text for name in sorted(parts) for text in (name, parts[name]))


def _random_state() -> tuple[Any, ...]:
    """Return the state of the random generators, to be compared."""
    states: tuple[Any, ...] = (random.getstate(),)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        kind, keys, *rest = numpy.get_state()
        states += (kind, keys.tobytes(), *rest)
    if (torch := sys.modules.get("torch.random")) is not None:
        states += (torch.get_rng_state().numpy().tobytes(),)
    return states


def brief(value: Any) -> str:
    """Return a value as a few characters; runs no code of the user's."""
    kind = type(value)
    if kind in (int, float, complex, bool, type(None)):
        text = repr(value) if kind is not int or value.bit_length() < 200 else "int"
    elif kind in (str, bytes):
        text = repr(value[:_SAID_OF_ONE])
    elif kind in (list, tuple, dict, set, frozenset):
        return f"{kind.__name__}[{len(value)}]"
    else:
        return kind.__qualname__
    return printable(text if len(text) <= _SAID_OF_ONE else f"{text[: _SAID_OF_ONE - 1]}…")


def _said_all(arguments: dict[str, Any]) -> str:
    text = ", ".join(brief(value) for value in arguments.values())
    return text if len(text) <= _SAID else f"{text[: _SAID - 1]}…"
