"""Saving: the bytes of the variables that a step wrote.

Owns which variables must be pickled together, what a pickle holds by value and what by name, and which
values are refused. Nothing here changes a value. The caller makes the blobs durable (`blobs.sync()`) and
commits the manifest.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import functools
import io
import pickle
import random as standard_random
import sys
import types
import typing
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import cloudpickle

from nbdurable.checkpoint import rebuild
from nbdurable.checkpoint.analysis import globals_read, source_of_code
from nbdurable.checkpoint.blobs import BlobStore
from nbdurable.checkpoint.fingerprint import (
    ATOMS,
    Unfingerprintable,
    Walk,
    fingerprint,
    immutable,
    memory_owner,
    plain_tensor,
    plain_walk,
    reach,
)
from nbdurable.checkpoint.manifest import Blob, Group, put_blob, put_blobs
from nbdurable.checkpoint.objects import (
    DICT_VIEWS,
    LruCacheWrapper,
    Problem,
    decorated,
    importable,
    is_notebook_function,
    live_name,
    reduce_value,
    reduces_itself,
    underlying,
    unsaveable,
)
from nbdurable.checkpoint.patience import others_code, patient
from nbdurable.checkpoint.preview import describe, printable
from nbdurable.checkpoint.recipes import in_use, made_by, recipe_of, said
from nbdurable.checkpoint.restore import load, placed
from nbdurable.checkpoint.threads import others_run
from nbdurable.checkpoint.track import is_user_name
from nbdurable.errors import CheckpointError
from nbdurable.models import Variable

OUT_OF_BAND_BYTES = 256 << 10  # smaller buffers stay in the stream: a file of their own would cost an fsync
VERIFIED_STREAM_BYTES = 1 << 20  # pickles up to this size are loaded back at once and compared
VERIFIED_BUFFER_BYTES = 64 << 20
_PLAIN = "create it in a plain cell"
_RETURN = "return plain data"
_NO_SOURCES = pickle.dumps({}, protocol=5)


@dataclass(frozen=True)
class Saved:
    """What `save` wrote: parts of a manifest, not yet durable.

    `fingerprints` are those of the saved names, `modules` those that their types and functions come from.
    """

    groups: tuple[Group, ...]
    later: tuple[Group, ...]  # recipes, and what refers to them
    variables: tuple[Variable, ...]
    random: Blob | None
    fingerprints: dict[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()


@patient()
def save(
    namespace: dict[str, Any],
    names: Collection[str],
    blobs: BlobStore,
    *,
    fingerprints: Mapping[str, str] | None = None,
    walks: Mapping[str, Walk] | None = None,
    step: str = "",
    random: bool = False,
    verify: bool = True,
) -> Saved:
    """Write variables to blobs, and say what became of each.

    `names`: the variables that were written. Another variable that shares a mutable object with one of them is saved
    along, so that the sharing survives. `fingerprints` and `walks`: those of all user variables, as `Tracker.changes`
    gave them; what it has just looked at is not looked at again. `step`: what recipes made in it is saved as the
    function that makes it. `random`: whether the state of the random generators is saved. `verify`: load small pickles
    back and compare. What can't be saved, or another thread changes meanwhile, is a Variable of state "unsaved" with
    its reason; it takes no unrelated variable down. Raises StoreFull, CheckpointError if blobs can't be written.
    """
    with warnings.catch_warnings():  # pickling objects may touch what they deprecate
        warnings.simplefilter("ignore")
        job = _Job(namespace, names, fingerprints or {}, walks or {}, verify, step)
        pieces = {piece: digest for walk in (walks or {}).values() for piece, digest in walk.pieces.items()}
        while True:
            packs = job.packs()
            streams_of = [pack.stream for pack in packs]
            kept = put_blobs(streams_of, [buffer for pack in packs for buffer in pack.buffers], blobs, pieces)
            if not (others_run() and job.refuse_changed(packs)):
                break
    streams, data = iter(kept[: len(packs)]), iter(kept[len(packs) :])
    groups: list[Group] = []
    later: list[Group] = []
    variables, digests = list(job.refused.values()), {}
    for pack in packs:
        stream, buffers = next(streams), tuple(islice(data, len(pack.buffers)))
        group = Group(names=pack.names, stream=stream, buffers=buffers, code=pack.code, recipe=pack.recipe)
        (later if pack.recipe or pack.needs or later else groups).append(group)
        for name in pack.names:
            kind, shape, preview = describe(namespace[name])
            state: Literal["saved", "recipe"] = "recipe" if pack.recipe else "saved"
            reason = f"by recipe `{said(job.made[name].make)}`" if pack.recipe else ""
            variables.append(
                Variable(
                    name=name,
                    type=kind,
                    bytes=pack.sizes[name],
                    state=state,
                    shape=shape,
                    preview=preview,
                    reason=reason,
                )
            )
            digests[name] = job.digest(name)
    return Saved(
        groups=tuple(groups),
        later=tuple(later),
        variables=tuple(sorted(variables, key=lambda variable: variable.name)),
        random=save_random(blobs) if random else None,
        fingerprints=digests,
        modules=frozenset(module for pack in packs for module in pack.modules),
    )


def save_random(blobs: BlobStore) -> Blob:
    """Write the state of the random generators."""
    return put_blob(pickle.dumps(random_state(), protocol=5), blobs)


def random_state() -> dict[str, Any]:
    """Return the state of the random generators that are loaded; `restore.set_random` puts it back."""
    state: dict[str, Any] = {"random": standard_random.getstate()}
    if (numpy := sys.modules.get("numpy.random")) is not None:
        state["numpy"] = numpy.get_state()
    if (torch := sys.modules.get("torch.random")) is not None:
        state["torch"] = torch.get_rng_state().numpy()
    return state


@dataclass(frozen=True)
class _Pack:
    names: tuple[str, ...]
    stream: memoryview
    buffers: list[memoryview]
    sizes: dict[str, int]
    modules: frozenset[str]
    code: bool
    needs: frozenset[str]  # names of variables by recipe to which it refers
    recipe: str = ""


class NotSaveable(CheckpointError):
    """This value can't be saved"""


class _Refused(Exception):
    """One variable of a group can't be saved."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.name, self.reason = name, reason


class _Job:
    """One call of `save`: which variables belong together, and which are refused."""

    def __init__(
        self,
        namespace: dict[str, Any],
        names: Collection[str],
        fingerprints: Mapping[str, str],
        walks: Mapping[str, Walk],
        verify: bool,
        step: str,
    ) -> None:
        self.namespace = namespace
        self.verify = verify
        self.refused: dict[str, Variable] = {}
        self._digests = dict(fingerprints)
        made = made_by(step, namespace) if step else []
        self.made = {one.name: one for one in made if one.make is not None and one.name in names}
        self._written = {name for name in names if name in namespace} - self.made.keys()
        others = fingerprints or filter(is_user_name, list(namespace))
        self._walks: dict[str, Walk] = {}
        self._problems: dict[str, list[Problem]] = {}
        for name in sorted(self._written | {name for name in others if name in namespace}):
            value = namespace[name]
            if name in self._written or not (immutable(value) or isinstance(value, types.ModuleType)):
                walk = walks.get(name)
                if walk is not None and walk.root is value and walk.own in ("", name):
                    self._walks[name], self._problems[name] = walk, []
                else:
                    self._walks[name], self._problems[name] = reach(value, namespace, name)

    def digest(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = fingerprint(self.namespace[name], self.namespace)
        return self._digests[name]

    def refuse_changed(self, packs: Iterable[_Pack]) -> bool:
        """Refuse what is not any more what it was when it was looked at; tell whether anything is."""
        changed = [
            name
            for pack in packs
            for name in pack.names
            if not pack.recipe and _now(self.namespace[name], self.namespace) != self.digest(name)
        ]
        for name in changed:
            self._refuse(
                name,
                "another thread changed it while it was saved; let the step wait until the thread is done",
            )
        return bool(changed)

    def packs(self) -> list[_Pack]:
        """Pickle every group; a variable that can't be saved is refused, and its group tried again without it.

        Groups that refer to nothing that a recipe makes come first, then those that refer to what other cells made,
        then the recipes, each followed by the groups for which nothing is missing any more.
        """
        recipes = {}
        for name in list(self.made):
            try:
                recipes[name] = self._pack_recipe(name)
            except _Refused as refused:
                self._refuse(name, refused.reason)
        while True:
            groups = self._packs()
            ordered, trouble = self._in_order(groups, recipes)
            if trouble is None:
                return ordered
            del recipes[trouble.name]
            self._refuse(trouble.name, trouble.reason)

    def _in_order(
        self, groups: list[_Pack], recipes: dict[str, _Pack]
    ) -> tuple[list[_Pack], _Refused | None]:
        """Return packs in the order of loading, or the first recipe that what it needs can't come before."""
        left = [pack for pack in groups if pack.needs & recipes.keys()]
        ordered = sorted(
            (pack for pack in groups if not pack.needs & recipes.keys()), key=lambda pack: bool(pack.needs)
        )
        waiting = {*recipes, *(name for pack in left for name in pack.names)}
        done: set[str] = set()
        for name, recipe in recipes.items():
            make = self.made[name].make
            for needed in sorted((_reads(make, self.namespace) | recipe.needs) - {name}):
                if needed in self.refused:
                    reason = (
                        f"its recipe needs `{needed}`, which can't be saved ({self.refused[needed].reason})"
                    )
                    return [], _Refused(name, reason)
                if needed in waiting:
                    reason = f"its recipe reads `{needed}`, which can't be there before `{name}` is; {_PLAIN}"
                    return [], _Refused(name, reason)
            ordered.append(recipe)
            done.add(name)
            waiting.discard(name)
            for pack in [one for one in left if one.needs & recipes.keys() <= done]:
                left.remove(pack)
                ordered.append(pack)
                waiting -= set(pack.names)
        return ordered, None

    def _pack_recipe(self, name: str) -> _Pack:
        """Pickle the function that makes a variable, in place of its value."""
        recipe = self.made[name]
        walk, problems = reach(recipe.make, self.namespace, "")
        if problems:
            raise _Refused(name, f"its recipe `{said(recipe.make)}`: {problems[0].sentence('')}")
        pack = self._pack((name,), {name: recipe.make})
        if self.verify:
            self._verify(pack, {name: recipe.make})
        live = frozenset(walk.live)
        return dataclasses.replace(pack, recipe=recipe.digest, needs=live)

    def _packs(self) -> list[_Pack]:
        for name in sorted(self._written):
            if self._problems[name]:
                self._refuse(name, self._problems[name][0].sentence(name))
        done: dict[tuple[str, ...], _Pack] = {}
        while True:
            groups = self._groups()
            try:
                for group in groups:
                    if group not in done:
                        done[group] = self._pack(group, self.namespace)
                        if self._is_verified(done[group]):
                            self._verify(done[group], self.namespace)
            except _Refused as refused:
                if refused.name in self._written:
                    self._refuse(refused.name, refused.reason)
                else:  # joined for its sharing's sake only; those that share with it find out next
                    self._problems[refused.name] = [Problem("", "", refused.reason, "", False, 0)]
                continue
            return [done[group] for group in groups]

    def _refuse(self, name: str, reason: str) -> None:
        kind, shape, preview = describe(self.namespace[name])
        self.refused[name] = Variable(
            name=name, type=kind, state="unsaved", shape=shape, preview=preview, reason=printable(reason)
        )

    def _groups(self) -> list[tuple[str, ...]]:
        """Return the variables to save, those together that share mutable objects or refer to each other by name."""
        while True:
            self._refuse_dependents()
            saved = self._written - self.refused.keys()
            keys = {
                name: {*walk.seen, *walk.memory}
                for name, walk in self._walks.items()
                if name not in self.refused
            }
            while True:  # sharing spreads: a joined variable brings in those that share with it
                components = _components(keys, {name: self._walks[name].live & saved for name in keys})
                joined = {name for part in components if part & saved for name in part}
                if joined <= saved:
                    break
                saved |= joined
            spoilt = next((name for name in sorted(saved - self._written) if self._problems[name]), None)
            if spoilt is None:
                return sorted(tuple(sorted(part)) for part in components if part & saved)
            self._refuse_sharing_with(spoilt, keys)

    def _refuse_dependents(self) -> None:
        """Refuse what refers by name to a function or class that was refused."""
        for name in sorted(self._written - self.refused.keys()):
            if needed := sorted(self._walks[name].live & self.refused.keys() - {name}):
                self._refuse(
                    name, f"it needs `{needed[0]}`, which can't be saved ({self.refused[needed[0]].reason})"
                )
                return self._refuse_dependents()
        return None

    def _refuse_sharing_with(self, spoilt: str, keys: dict[str, set[int]]) -> None:
        """Refuse the written variables that share with a variable that can't be saved, or stop asking for it."""
        why = self._problems[spoilt][0].sentence(spoilt)
        sharing = [name for name in self._written - self.refused.keys() if keys[name] & keys[spoilt]]
        for name in sharing:
            self._refuse(name, f"it shares an object with `{spoilt}`, which can't be saved ({why})")
        if not sharing:
            del self._walks[spoilt]  # it came in by way of others, which can do without it

    def _pack(self, names: tuple[str, ...], values: Mapping[str, Any]) -> _Pack:
        walks = [self._walks[name] for name in names if name in self._walks]
        return _pickled(names, values, walks, self.namespace)

    def _is_verified(self, pack: _Pack) -> bool:
        return self.verify and _is_small(pack)

    def _verify(self, pack: _Pack, live: Mapping[str, Any]) -> None:
        """Load a pickle back, beside the live namespace, and compare."""
        scratch = dict(self.namespace)
        current = pack.names[0]
        try:
            with rebuild.into(scratch), others_code:
                values = load(pack.names, pack.stream, pack.buffers)
            if live is self.namespace:
                scratch.update(values)
            for current in pack.names:
                expected = (
                    self.digest(current)
                    if live is self.namespace
                    else fingerprint(live[current], self.namespace)
                )
                if fingerprint(values[current], scratch) != expected:
                    raise _Refused(current, f"a copy of it does not come back equal; {_PLAIN}")
            if len(pack.names) > 1:
                before = [self.namespace[name] for name in pack.names]
                after = [values[name] for name in pack.names]
                if fingerprint(before, self.namespace) != fingerprint(after, scratch):
                    raise _Refused(
                        current, f"what it shares with other variables does not come back; {_PLAIN}"
                    )
        except _Refused:
            raise
        except Unfingerprintable as error:
            raise _Refused(current, f"a copy of it does not come back whole ({error.reason})") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise _Refused(
                getattr(error, "variable", current), f"a copy of it can't be loaded ({reason}); {_PLAIN}"
            ) from error


def _now(value: Any, namespace: dict[str, Any]) -> str:
    try:
        return fingerprint(value, namespace)
    except (Unfingerprintable, RuntimeError):  # a dict that grows while it is looked into
        return ""


def _pickled(
    names: tuple[str, ...],
    values: Mapping[str, Any],
    walks: Iterable[Walk],
    namespace: dict[str, Any],
    given: Mapping[int, int] | None = None,
) -> _Pack:
    """Pickle values with one memo; `walks` have walked over them. Raises _Refused."""
    file = io.BytesIO()
    buffers: list[memoryview] = []
    sizes: dict[str, int] = {}

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        buffers.append(raw)
        return False

    arrays = _shared_memory(walks)
    kind = _Pickler if given is None else _Referring
    pickler = kind(file, namespace, frozenset(names), arrays, keep)
    pickler.given = given or {}
    for name in names:
        start, first = file.tell(), len(buffers)
        # nothing in it could be referred to twice, so that nothing need be remembered, which takes most of the time
        pickler.fast = given is None and len(names) == 1 and _is_flat(values[name])
        try:
            pickler.dump(values[name])
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            raise _Refused(name, f"pickle refuses it ({reason[:300]}); {_PLAIN}") from error
        sizes[name] = file.tell() - start + sum(buffer.nbytes for buffer in buffers[first:])
    pickler.fast = False
    pickler.dump(pickler.sources)
    modules = frozenset(pickler.modules)
    needs = frozenset(pickler.made)
    return _Pack(names, file.getbuffer(), buffers, sizes, modules, pickler.by_value, needs)


def _is_small(pack: _Pack) -> bool:
    """Tell whether loading a pickle back, to compare, costs little."""
    buffers = sum(buffer.nbytes for buffer in pack.buffers)
    return len(pack.stream) <= VERIFIED_STREAM_BYTES and buffers <= VERIFIED_BUFFER_BYTES


def save_value(
    value: Any, namespace: dict[str, Any], blobs: BlobStore, given: Sequence[Walk] = ()
) -> tuple[Group, bool]:
    """Write one value to blobs, apart from all variables: a group of the one name "".

    `given`: walks over what it may share objects with. Where it does, it refers to them by their place in those
    walks, and the answer says so: `restore.load_value` needs the same objects. Raises NotSaveable, saying why.
    """
    plain = plain_walk(value)
    if plain is not None and all(plain.seen.keys().isdisjoint(other.seen) for other in given):
        stream = put_blob(pickle.dumps(value, protocol=5) + _NO_SOURCES, blobs)
        return Group(names=("",), stream=stream), False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        walk, problems = reach(value, namespace, "")
        if problems:
            raise NotSaveable(problems[0].sentence(""))
        for other in given:
            if not walk.memory.keys().isdisjoint(other.memory):
                raise NotSaveable("it looks at the memory of what the call was given; return a copy")
        places = {
            ident: other.position(ident) for other in given for ident in walk.seen.keys() & other.seen.keys()
        }
        try:
            pack = _pickled(("",), {"": value}, [walk], namespace, places or None)
            if _is_small(pack):
                _compare(pack, value, namespace, given, bool(places))
        except _Refused as refused:
            raise NotSaveable(refused.reason) from refused
    stream, *buffers = put_blobs([pack.stream], pack.buffers, blobs)
    return Group(names=("",), stream=stream, buffers=tuple(buffers), code=pack.code), bool(places)


def _compare(pack: _Pack, value: Any, namespace: dict[str, Any], given: Sequence[Walk], refers: bool) -> None:
    """Load a value's pickle back, and compare; raises _Refused."""
    scratch = dict(namespace)
    try:
        with rebuild.into(scratch):
            copy = load(pack.names, pack.stream, pack.buffers, placed(given) if refers else None)[""]
        if fingerprint(copy, scratch) != fingerprint(value, namespace):
            raise _Refused("", f"a copy of it does not come back equal; {_RETURN}")
    except _Refused:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise _Refused("", f"a copy of it can't be loaded ({reason}); {_RETURN}") from error


def _reads(make: Any, namespace: Mapping[str, Any]) -> set[str]:
    """Return the names of the namespace that a function reads, itself or through functions that it calls."""
    found: set[str] = set()
    queue = [make]
    while queue:
        function = queue.pop()
        if is_notebook_function(function, namespace):
            names = globals_read(function.__code__) & namespace.keys() - found
            found |= names
            queue += [namespace[name] for name in names]
    return found


def _components(keys: dict[str, set[int]], references: dict[str, set[str]]) -> list[set[str]]:
    """Return the connected components of variables: by a common object, or by reference to a variable's name."""
    leader = {name: name for name in keys}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    common = _common(list(keys.values()))
    owner: dict[int, str] = {}
    for name, objects in keys.items():
        for ident in objects & common:
            leader[find(name)] = find(owner.setdefault(ident, name))
        for other in references[name]:
            if other in leader:
                leader[find(name)] = find(other)
    parts: dict[str, set[str]] = {}
    for name in keys:
        parts.setdefault(find(name), set()).add(name)
    return list(parts.values())


def _common(sets: list[set[int]]) -> set[int]:
    """Return what stands in more than one of some sets, the largest of which is not copied."""
    common: set[int] = set()
    before: set[int] = set()
    for number, one in enumerate(sorted(sets, key=len), 1):
        common |= before & one
        if number < len(sets):
            before |= one
    return common


def _shared_memory(walks: Iterable[Walk]) -> set[int]:
    """Return ids of the owners of memory that several arrays of a group look at."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(numpy, "ndarray"):
        return set()
    arrays = {
        ident: item for walk in walks for ident, item in walk.seen.items() if type(item) is numpy.ndarray
    }
    owners = [id(memory_owner(array)) for array in arrays.values()]
    return {owner for owner in owners if owners.count(owner) > 1} if len(owners) < 1000 else _repeated(owners)


def _repeated(idents: list[int]) -> set[int]:
    seen: set[int] = set()
    return {ident for ident in idents if ident in seen or seen.add(ident)}  # type: ignore[func-returns-value]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles variables of the notebook.

    Against cloudpickle: functions of the notebook keep no copy of their globals but read the live namespace
    again; functions and classes that the namespace holds under their own name are stored by that name,
    unless they are saved in this group; closure cells, array memory and dict views stay shared; a class
    made anew never stands for, or changes, a living one; files and weak references are refused.
    """

    def __init__(
        self,
        file: io.BytesIO,
        namespace: dict[str, Any],
        names: frozenset[str],
        shared_memory: set[int],
        keep: Any,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=keep)
        self._namespace = namespace
        self._names = names
        self._shared = shared_memory
        self._memories: dict[int, Any] = {}
        self._copies: dict[int, Any] = {}
        self._storages: dict[int, Any] = {}  # of PyTorch, each as the same object
        self._empty: dict[int, types.CellType] = {}  # cells whose content a function carries
        self._numpy: Any = sys.modules.get("numpy")
        self.sources: dict[str, str] = {}  # cells that define the functions and classes saved by value
        self.by_value = False  # whether there are any
        self.modules: set[str] = set()  # top-level ones, of the types and the functions that it met
        self.made: set[str] = set()  # names of the variables by recipe that it referred to
        self.given: Mapping[int, int] = {}  # id → place

    def reducer_override(self, obj: Any) -> Any:
        if in_use and (recipe := recipe_of(obj, self._namespace)) is not None:
            self.made.add(recipe.name)
            return rebuild.made, (recipe.name,)
        kind = type(obj)
        special = _REDUCERS.get(kind)
        if special is not None:
            return special(self, obj)
        if isinstance(obj, type):
            return self._class(obj)
        if kind.__module__ == "dataclasses" and (name := _sentinel(obj)) is not None:
            return name
        package = kind.__module__.partition(".")[0]
        self.modules.add(package)
        if package == "numpy" and kind is self._numpy.ndarray:
            return self._array(obj)
        if package == "pyarrow" and isinstance(obj, sys.modules["pyarrow"].Array):
            return _trimmed(obj)
        if package == "pandas" and type(getattr(obj, "_pa_array", None)).__module__ == "pyarrow.lib":
            return _uncombined(obj)
        if package == "polars" and (reduced := _through_arrow(obj)) is not None:
            return reduced
        if package == "torch" and (reduced := self._tensor(obj, sys.modules["torch"])) is not None:
            return reduced
        if kind is typing.NewType or (kind.__module__ == "__main__" and reduces_itself(kind)):
            reduced = reduce_value(obj)
            return reduced if isinstance(reduced, tuple) else NotImplemented
        return super().reducer_override(obj)

    def _live(self, obj: Any) -> Any:
        """Return the reduction to a name of the live namespace, None where there is none."""
        name = live_name(obj, self._namespace)
        return None if name is None or name.partition(".")[0] in self._names else (rebuild.live, (name,))

    def _function(self, function: types.FunctionType) -> Any:
        if (name := importable(function)) is not None:
            module, _, path = name.partition(":")
            self.modules.add(module.partition(".")[0])
            return NotImplemented if path == function.__qualname__ else (rebuild.imported, (module, path))
        if (reference := self._live(function)) is not None:
            return reference
        if (decoration := decorated(function)) is not None:
            return decoration
        self.by_value = True
        if not is_notebook_function(function, self._namespace):
            return self._foreign_function(function)
        self._note_source(function)
        cells = self._first_seen(function)
        attributes = {
            "__dict__": dict(function.__dict__),
            "__qualname__": function.__qualname__,
            "__module__": function.__module__,
            "__doc__": function.__doc__,
            "__defaults__": function.__defaults__,
            "__kwdefaults__": function.__kwdefaults__,
            "__annotations__": function.__annotations__,
        }
        made = (function.__code__, function.__name__, function.__closure__)
        return rebuild.function, made, (cells, attributes), None, None, rebuild.fill_function

    def _code(self, code: types.CodeType) -> Any:
        """Reduce compiled code as cloudpickle does, but keep the cell that it comes from, which 3.1.3 drops."""
        _, arguments = self.dispatch_table[types.CodeType](code)
        return rebuild.code, (arguments, code.co_filename)

    def _first_seen(self, function: types.FunctionType) -> list[tuple[types.CellType, Any]]:
        """Return the closure cells, with their content, that no function carries yet: this one does."""
        cells = []
        for cell in function.__closure__ or ():
            if id(cell) not in self._empty:
                self._empty[id(cell)] = cell
                with suppress(ValueError):  # an empty cell
                    cells.append((cell, cell.cell_contents))
        return cells

    def _foreign_function(self, function: types.FunctionType) -> Any:
        """Reduce a function of other globals as cloudpickle does, but keep its cells, which others may share."""
        reduced = super().reducer_override(function)
        if not isinstance(reduced, tuple) or function.__closure__ is None:
            return reduced
        make, (*arguments, _), (attributes, slots), *rest = reduced
        carried = {id(cell): types.CellType(content) for cell, content in self._first_seen(function)}
        # cloudpickle copies the content of these into the function's own cells, and passes over empty ones
        slots["__closure__"] = tuple(carried.get(id(cell), types.CellType()) for cell in function.__closure__)
        return (make, (*arguments, function.__closure__), (attributes, slots), *rest)

    def _cell(self, cell: types.CellType) -> Any:
        if id(cell) in self._empty:
            return rebuild.empty_cell, ()
        self._empty[id(cell)] = cell
        try:
            content = cell.cell_contents
        except ValueError:
            return rebuild.empty_cell, ()
        return rebuild.empty_cell, (), (content,), None, None, rebuild.fill_cell

    def _class(self, kind: type) -> Any:
        if importable(kind) is not None:
            self.modules.add(kind.__module__.partition(".")[0])
            return NotImplemented
        if (reference := self._live(kind)) is not None:
            return reference
        self.by_value = True
        if (hook := _runs_when_subclassed(kind)) is not None:
            raise pickle.PicklingError(f"making the class again would run `{hook}` again")
        reduced = super().reducer_override(kind)
        self._note_source(kind)
        if isinstance(reduced, tuple) and len(reduced) == 6:
            # cloudpickle's id would make it hand out, and set the attributes of, the living class of that id
            make, arguments, *rest = reduced
            arguments = (*arguments[:-2], None, arguments[-1])
            slotted = "__slots__" in vars(kind) and isinstance(arguments[3], dict)
            if slotted and typing.NamedTuple not in arguments[2]:  # else slots become plain attributes
                arguments[3]["__slots__"] = vars(kind)["__slots__"]
            if isinstance(arguments[3], dict):
                arguments[3]["__qualname__"] = kind.__qualname__
            if issubclass(kind, enum.Enum):  # cloudpickle knows no second names of a member
                members = {name: member.value for name, member in kind.__members__.items()}
                arguments = (*arguments[:3], members, *arguments[4:])
                for name in members:
                    rest[0][0].pop(name, None)
            rest[0][0].update(_dropped(kind))
            return (make, arguments, *rest)
        return reduced

    def _note_source(self, code: Any) -> None:
        if (found := source_of_code(code)) is not None:
            self.sources[found[0]] = found[1]

    def _lru(self, function: Any) -> Any:
        if importable(function) is not None:
            return NotImplemented
        if (reference := self._live(function)) is not None:
            return reference
        settings = function.cache_parameters()
        made = (function.__wrapped__, settings["maxsize"], settings["typed"])
        return rebuild.lru_cache, made, rebuild.own_attributes(function) or None

    def _cached_property(self, found: functools.cached_property[Any]) -> Any:
        return rebuild.cached_property, (found.func, found.attrname)

    def _view(self, view: memoryview) -> Any:
        whole = (
            type(view.obj) in (bytes, bytearray)
            and view.c_contiguous
            and view.nbytes == memoryview(view.obj).nbytes
        )
        data = view.obj if whole else bytes(view) if view.readonly else bytearray(view)
        return rebuild.view, (data, view.format, view.shape)

    def _dict_view(self, view: Any) -> Any:
        return rebuild.dict_view, (DICT_VIEWS[type(view)], underlying(view))

    def _proxy(self, proxy: Any) -> Any:
        return types.MappingProxyType, (underlying(proxy),)

    def _type_variable(self, variable: Any) -> Any:
        if getattr(sys.modules.get(variable.__module__), variable.__name__, None) is variable:
            return NotImplemented
        covariant, contravariant = variable.__covariant__, variable.__contravariant__
        facts = (variable.__name__, variable.__constraints__, variable.__bound__, covariant, contravariant)
        return rebuild.type_variable, (*facts, variable.__module__)

    def _forbidden(self, obj: Any) -> Any:
        trouble = unsaveable(obj)
        raise pickle.PicklingError(f"{trouble.what}; {trouble.todo}" if trouble else f"{type(obj).__name__}")

    def _array(self, array: Any) -> Any:
        """Reduce an array whose memory others look at to a view on that memory."""
        owner = memory_owner(array)
        if id(owner) not in self._shared and (texts := _texts(array, self._numpy)) is not None:
            return rebuild.texts, texts
        if id(owner) not in self._shared:
            # a large read-only one is mapped read-only; others could be made writable again
            if array.flags.writeable or _is_large(array):
                return NotImplemented
            return rebuild.read_only, (array.copy(order="K"),)
        if any(array is memory for memory in self._memories.values()):
            return NotImplemented
        memory = self._memories.get(id(owner))
        if memory is None:
            memory = self._memories[id(owner)] = self._memory(owner)
        offset = array.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
        return rebuild.array_view, (
            memory if memory.flags.writeable or _is_large(memory) else self._unlocked(memory),
            array.dtype,
            array.shape,
            array.strides,
            offset,
            array.flags.writeable,
        )

    def _tensor(self, value: Any, torch: Any) -> Any:
        """Reduce a PyTorch tensor to a view on its storage, whose bytes are kept like an array's."""
        if isinstance(value, torch.UntypedStorage):
            return rebuild.torch_storage, (torch.empty(0, dtype=torch.uint8).set_(value).numpy(),)
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or not plain_tensor(value, torch):
            return None
        storage = value.untyped_storage()
        storage = self._storages.setdefault(storage._cdata, storage)
        place = (
            value.storage_offset(),
            tuple(value.shape),
            value.stride(),
            type(value) is torch.nn.Parameter,
        )
        state = (value.requires_grad, value.grad, dict(vars(value)))
        return rebuild.torch_tensor, (storage, value.dtype, *place), state, None, None, rebuild.fill_tensor

    def _unlocked(self, memory: Any) -> Any:
        """Return a writable copy of read-only memory, the same one each time: its views may be made writable again."""
        if id(memory) not in self._copies:
            self._copies[id(memory)] = memory.copy()
        return self._copies[id(memory)]

    def _memory(self, owner: Any) -> Any:
        """Return a flat array over all of the memory that an object owns."""
        if not isinstance(owner, self._numpy.ndarray):
            return self._numpy.frombuffer(owner, "u1")
        if not owner.flags.forc:
            raise pickle.PicklingError("its memory is shared in a way that can't be kept")
        flat = owner.reshape(-1, order="A")
        return flat if owner.dtype.hasobject else flat.view("u1")


class _Referring(_Pickler):
    """Pickles a value that refers to objects of what a call was given by their place."""

    def persistent_id(self, obj: Any) -> int | None:
        return self.given.get(id(obj))


_MADE_WITH_CLASS = frozenset(
    {"__module__", "__doc__", "__dict__", "__weakref__", "__slots__", "__slotnames__", "_abc_impl"}
)


def _is_large(array: Any) -> bool:
    return array.nbytes >= OUT_OF_BAND_BYTES and array.flags.forc and not array.dtype.hasobject


def _is_flat(value: Any) -> bool:
    """Tell whether a value is a list or dict of atoms, in which no text or bytes stand twice."""
    if type(value) is dict:
        parts: list[Any] = [value.keys(), value.values()]
    elif type(value) is list:
        parts = [value]
    else:
        return False
    kinds = [set(map(type, part)) for part in parts]
    if not set().union(*kinds) <= ATOMS:
        return False
    if len(parts) == 2 and kinds[1].isdisjoint(_TEXTS):  # keys are different ones
        return True
    return _are_single([item for part in parts for item in part if type(item) in _TEXTS])


_TEXTS = frozenset({str, bytes})  # what a pickle remembers among the atoms


def _are_single(items: list[Any]) -> bool:
    """Tell whether no two of some items are the same object."""
    if len(items) < _FEW or (numpy := sys.modules.get("numpy")) is None:
        return len(set(map(id, items))) == len(items)
    idents = numpy.fromiter(map(id, items), "i8", len(items))
    idents.sort()  # many times as fast as a set
    return bool((idents[1:] != idents[:-1]).all())


def _texts(array: Any, numpy: Any) -> tuple[Any, ...] | None:
    """Return what `rebuild.texts` makes a large array of texts from; None for others.

    A row at a time, so that one changed column of a frame is one changed buffer. None and one NaN may stand among them.
    """
    flags, dtype = array.flags, array.dtype
    if dtype.kind != "O" or dtype.metadata is not None or array.size < _FEW:
        return None
    if not (flags.writeable and flags.forc):
        return None
    flat = array if flags.c_contiguous else array.T
    missing: Any = None
    rows = []
    for row in flat.reshape(-1, flat.shape[-1]) if flat.shape[-1] >= _FEW else flat.reshape(1, -1):
        items = row.tolist()
        kinds = set(map(type, items))
        if not kinds <= {str, float, type(None)}:
            return None
        nans = {id(item): item for item in items if type(item) is float} if float in kinds else {}
        for item in nans.values():
            missing = item if missing is None else missing
            if item is not missing or item == item:
                return None
        texts = items if len(kinds) == 1 and str in kinds else [item for item in items if type(item) is str]
        if not _are_single(texts):  # a pickle keeps each of them once, and so does who loads it
            return None
        sizes = map(len, items) if texts is items else map(_length, items)
        try:
            lengths = numpy.fromiter(sizes, "i4", len(items))
        except OverflowError:
            return None
        rows.append((pickle.PickleBuffer("".join(texts).encode("utf-8", "surrogatepass")), lengths))
    return rows, array.shape, bool(flags.c_contiguous), missing


def _length(item: str | float | None) -> int:
    return len(item) if isinstance(item, str) else -1 if item is None else -2


_FEW = 1000  # items, below which nothing is gained


_REDUCERS: dict[type, Any] = {
    types.FunctionType: _Pickler._function,
    types.CodeType: _Pickler._code,
    types.CellType: _Pickler._cell,
    LruCacheWrapper: _Pickler._lru,
    functools.cached_property: _Pickler._cached_property,
    memoryview: _Pickler._view,
    types.MappingProxyType: _Pickler._proxy,
    typing.TypeVar: _Pickler._type_variable,
    io.TextIOWrapper: _Pickler._forbidden,  # cloudpickle would make it a StringIO
    weakref.WeakSet: _Pickler._forbidden,
} | dict.fromkeys(DICT_VIEWS, _Pickler._dict_view)


def _dropped(kind: type) -> dict[str, Any]:
    """Return the attributes that cloudpickle leaves out of a class because a base holds the same object."""
    inherited = {name: value for base in reversed(kind.__bases__) for name, value in vars(base).items()}
    own = vars(kind).items()
    same = {name: value for name, value in own if name in inherited and inherited[name] is value}
    return {name: value for name, value in same.items() if name not in _MADE_WITH_CLASS}


def _sentinel(value: Any) -> str | None:
    """Return the name under which `dataclasses` holds this very object: its sentinels are told apart by identity."""
    return next((name for name, item in vars(dataclasses).items() if item is value), None)


def _runs_when_subclassed(kind: type) -> str | None:
    """Return what of the notebook's own code runs whenever this class is made: it would run twice."""
    for base in kind.__mro__[1:]:
        if "__init_subclass__" in vars(base) and importable(base) is None:
            return f"{base.__qualname__}.__init_subclass__"
    for meta in type.mro(type(kind)):
        for hook in ("__prepare__", "__new__", "__init__", "__setattr__"):
            if hook in vars(meta) and importable(meta) is None:
                return f"{meta.__qualname__}.{hook}"
    return None


def _trimmed(array: Any) -> Any:
    """Reduce an Arrow array without the parts of its parent that it does not show."""
    arrow = sys.modules["pyarrow"]
    if array.get_total_buffer_size() <= array.nbytes * 1.1 + 4096 and not array.offset:
        return NotImplemented
    batch = arrow.RecordBatch.from_arrays([array], names=[""])
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    compact = arrow.ipc.open_stream(sink.getvalue()).read_next_batch().column(0)
    return compact.__reduce__()


def _uncombined(array: Any) -> Any:
    """Reduce a pandas column on Arrow as pandas does, without the copy of its memory that it makes for that."""
    getstate = getattr(type(array).__getstate__, "__module__", None)
    if array._pa_array.num_chunks != 1 or getstate != "pandas.core.arrays.arrow.array":
        return NotImplemented
    state = {**array.__dict__, "_pa_array": array._pa_array.chunk(0)}
    if "_cache" in state:
        state["_cache"] = {}
    return copyreg.__newobj__, (type(array),), state  # type: ignore[attr-defined]


_ARROW_HOLDS = frozenset(
    "Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Float32 Float64 Boolean String Binary "  # noqa: SIM905
    "Date Time Datetime Duration".split()
)


def _through_arrow(value: Any) -> Any:
    """Reduce a large polars frame or series to an Arrow table, whose buffers are its own memory.

    None where polars' own pickle, which copies all into one stream, must do: columns that Arrow can't hold
    without a change.
    """
    polars = sys.modules["polars"]
    if type(value) is polars.DataFrame:
        frame, make = value, rebuild.polars_frame
    elif type(value) is polars.Series:
        frame, make = value.to_frame(), rebuild.polars_series
    else:
        return None
    if frame.estimated_size() < OUT_OF_BAND_BYTES:
        return None
    if not {dtype.base_type().__name__ for dtype in frame.dtypes} <= _ARROW_HOLDS:
        return None
    flags = ((column.name, column.flags) for column in frame.get_columns())
    ordered = {name: flag["SORTED_DESC"] for name, flag in flags if flag["SORTED_ASC"] or flag["SORTED_DESC"]}
    return make, (frame.to_arrow(compat_level=polars.CompatLevel.newest()), ordered)
