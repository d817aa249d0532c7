"""What a cell changed in a namespace.

Owns the comparison of a namespace before and after a cell, by identity and by fingerprint, so that a change
through an alias, a closure, a method or a function is found like a plain assignment. Knows no code: names
that a cell merely binds again to the very same object are in `analysis.analyse(...).stores`.
"""

from __future__ import annotations

import gc
import random
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from nbdurable.checkpoint.fingerprint import Shared, Walk, fingerprint, immutable, partial_fingerprint, shared
from nbdurable.checkpoint.objects import Problem
from nbdurable.checkpoint.patience import patient

# `_`, `__`, `_i`, `_3`, `_i3`, `_oh` …, dunders, and what IPython itself puts there
_KEPT_BY_IPYTHON = re.compile(r"_+|_i{1,3}|_i?\d+|_(ih|oh|dh|exit_code)|__\w+__|In|Out|exit|quit|get_ipython")


def is_user_name(name: str) -> bool:
    """Tell whether a name of the namespace is the user's, not one that Python or IPython keeps there."""
    return _KEPT_BY_IPYTHON.fullmatch(name) is None


@dataclass(frozen=True)
class Seen:
    """A variable at one moment; `value` gives the object, or a fresh one where it is gone."""

    value: Callable[[], Any]
    digest: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """A namespace at one moment."""

    variables: dict[str, Seen]
    random: dict[str, str]
    shared: tuple[Shared, ...] = ()  # what several places of the variables reach


@dataclass(frozen=True)
class Changes:
    """What a cell changed.

    `bound`: names that are new or hold another object. `mutated`: names whose object changed.
    `fingerprints`: of every variable, after the cell; one that can't be looked into whole begins with
    `partly:` or `opaque:` and holds type names in place of what can't. `random`: whether `random` or
    NumPy's global generator moved. `walks`: of the variables that were looked into whole, after the cell; they keep
    alive what they saw.
    """

    bound: frozenset[str]
    mutated: frozenset[str]
    deleted: frozenset[str]
    fingerprints: dict[str, str] = field(default_factory=dict)
    random: bool = False
    walks: dict[str, Walk] = field(default_factory=dict)

    @property
    def written(self) -> frozenset[str]:
        """Return the names whose value a checkpoint must hold."""
        return self.bound | self.mutated


class Tracker:
    """Compares a namespace before and after a cell. `ignore` says which further names are not the user's.

    Every variable is looked at before and after, since any code may reach any object: through a callback that
    a library holds, a thread, `globals()`. What is not looked at again is what can't have changed: an object
    that is immutable all through and still is the same one, and restored memory (`checkpoint/mapped.py`) of
    which the system says that nobody has written to it.
    """

    def __init__(
        self, namespace: Mapping[str, Any], ignore: Callable[[str], bool] = lambda name: False
    ) -> None:
        self._namespace = namespace
        self._ignore = ignore
        self._constant: dict[
            str, Seen
        ] = {}  # variables whose value can't change as long as it is the same object
        self._put_back: dict[str, Seen] | None = None  # None: code of the notebook may run

    def snapshot(self) -> Snapshot:
        """Look at all user variables."""
        return self._snapshot()[0]

    def _snapshot(self) -> tuple[Snapshot, dict[str, Walk]]:
        with patient(), warnings.catch_warnings():  # looking into objects may touch what they deprecate
            warnings.simplefilter("ignore")
            variables = [
                (name, value) for name, value in list(self._namespace.items()) if self.is_users(name)
            ]
            walks: dict[str, Walk] = {}
            seen = {name: self._look(name, value, walks) for name, value in variables}
            sharing = tuple(shared(walks))
        known = self._constant
        self._constant = {
            name: item for name, item in seen.items() if known.get(name) is item or immutable(item.value())
        }
        return Snapshot(seen, _random_states(), sharing), walks

    def changes(self, before: Snapshot, mentioned: Collection[str] = ()) -> Changes:
        """Return what changed since a snapshot.

        `mentioned`: names that the cell's code reads, directly or through functions. Something that reading
        uses up (a generator, an open file) counts as mutated when it is mentioned, since its position can't
        always be seen.
        """
        after, walks = self._snapshot()
        bound, mutated = set(), set()
        for name, now in after.variables.items():
            then = before.variables.get(name)
            if then is None or then.value() is not now.value():
                bound.add(name)
            elif then.digest != now.digest or (name in mentioned and any(p.stream for p in now.problems)):
                mutated.add(name)
        same = before.variables.keys() & after.variables.keys() - bound - mutated
        mutated |= _shared_otherwise(before, after, same)
        return Changes(
            bound=frozenset(bound),
            mutated=frozenset(mutated),
            deleted=frozenset(before.variables.keys() - after.variables.keys()),
            fingerprints={name: item.digest for name, item in after.variables.items()},
            random=before.random != after.random,
            walks={name: walk for name, walk in walks.items() if not after.variables[name].problems},
        )

    def differences(self, before: Snapshot, mentioned: Collection[str] = ()) -> frozenset[str]:
        """Return the names whose value is not what it was at a snapshot, be it another object or not.

        By value, and by what it shares with others of them. `mentioned`: as in `changes`.
        """
        after = self.snapshot()
        both = before.variables.keys() & after.variables.keys()
        found = before.variables.keys() ^ after.variables.keys()
        for name in both:
            then, now = before.variables[name], after.variables[name]
            if then.digest != now.digest or (name in mentioned and any(p.stream for p in now.problems)):
                found.add(name)
        return frozenset(found | _shared_otherwise(before, after, both))

    @contextmanager
    def only_restores(self) -> Iterator[None]:
        """Take what is put back in the block to be what was recorded of it, without looking at it again.

        Whoever opens the block vouches that nothing but restores happens in it: it does not return to an event loop,
        and no thread, signal or hook of the notebook's can come in between (`kernel/ahead.py`). What a restore
        itself may set off ends it: loading an object of a class that is not a known library's (`restore`), and
        dropping one that was not put back in the block. The garbage collector, which drops objects too, waits.
        """
        collects = gc.isenabled()
        gc.disable()
        self._put_back = {}
        try:
            yield
        finally:
            self._put_back = None
            if collects:
                gc.enable()

    def make_room(self, names: Iterable[str]) -> None:
        """Take note that what these names hold is about to be dropped."""
        known = self._put_back
        if known is not None and any(
            name in self._namespace
            and (name not in known or known[name].value() is not self._namespace[name])
            for name in names
        ):
            self._put_back = None

    def put_back(self, names: Iterable[str], fingerprints: Mapping[str, str], plain: Collection[str]) -> None:
        """Note what a restore has bound, and which fingerprints were recorded; `plain` as `restore` returns it."""
        if self._put_back is None:
            return
        for name in names:
            if name not in plain:
                self._put_back = None
                return
            if name in fingerprints:
                self._put_back[name] = Seen(_hold(self._namespace[name]), fingerprints[name])

    def fingerprint(self, name: str) -> str:
        """Return the fingerprint of one variable now; raises KeyError where there is none."""
        known = self._put_back.get(name) if self._put_back else None
        if known is not None and known.value() is self._namespace[name]:
            return known.digest
        return self._look(name, self._namespace[name], {}).digest

    def is_users(self, name: str) -> bool:
        """Tell whether a name is one of the user's variables."""
        return is_user_name(name) and not self._ignore(name)

    def _look(self, name: str, value: Any, walks: dict[str, Walk]) -> Seen:
        if isinstance(value, ModuleType):
            return Seen(lambda: value, fingerprint(value))
        known = self._constant.get(name)
        if known is not None and known.value() is value:
            return known
        digest, problems, walk = partial_fingerprint(value, self._namespace)
        if walk is not None:
            walks[name] = walk
        return Seen(_hold(value), digest, tuple(problems))


def _shared_otherwise(before: Snapshot, after: Snapshot, names: Collection[str]) -> set[str]:
    """Return which of these variables, whose values are the same, share with others of them what they did not before.

    A part may have been replaced by an equal one, which another variable holds.
    """

    def by_name(sharing: tuple[Shared, ...]) -> dict[str, set[Shared]]:
        found: dict[str, set[Shared]] = {}
        for places in sharing:
            kept = frozenset(place for place in places if place[0] in names)
            if len(kept) > 1:
                for name, _ in kept:
                    found.setdefault(name, set()).add(kept)
        return found

    then, now = by_name(before.shared), by_name(after.shared)
    return {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}


def _hold(value: Any) -> Callable[[], Any]:
    """Remember an object's identity, without keeping a large one alive where that can be avoided."""
    if not isinstance(value, type):
        try:
            reference = weakref.ref(value)
        except TypeError:
            pass
        else:
            return lambda: object() if (found := reference()) is None else found
    return lambda: value


def _random_states() -> dict[str, str]:
    states = {"random": fingerprint(random.getstate())}
    if (numpy := sys.modules.get("numpy.random")) is not None:
        states["numpy"] = fingerprint(numpy.get_state())
    if (torch := sys.modules.get("torch.random")) is not None:
        states["torch"] = fingerprint(torch.get_rng_state())
    return states
