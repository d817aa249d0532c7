"""Restoring: a checkpoint's variables, put back into a namespace.

Owns the only unpickling there is. It takes a manifest whose signature was verified (`manifest.unseal`), and
pickles whose digests are verified here. Large buffers of data (arrays, columns) are mapped, not read: they are
verified in size here, and in content behind the notebook's back (`blobs.LocalBlobs`). All values are loaded
before the first name is bound.
"""

from __future__ import annotations

import gc
import io
import pickle
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nbdurable.checkpoint import rebuild
from nbdurable.checkpoint.analysis import remember_sources
from nbdurable.checkpoint.blobs import BlobStore
from nbdurable.checkpoint.fingerprint import Walk
from nbdurable.checkpoint.manifest import Blob, Group, Manifest, map_blob, read_blob
from nbdurable.checkpoint.recipes import Recipe, may_be_made, note, said
from nbdurable.checkpoint.unsaved import Unsaved
from nbdurable.errors import BlobDamaged, BlobMissing, CheckpointError, NotRestorable

__all__ = ["Unsaved", "load", "make_again", "restore", "values"]


# Whose objects run nothing of the notebook's, neither when they are loaded nor when they are dropped
_LIBRARIES = frozenset(
    {"numpy", "pandas", "pyarrow", "polars", "datetime", "decimal", "fractions", "collections", "uuid"}
)
_PLAIN = {
    "builtins": {
        "bytearray",
        "complex",
        "frozenset",
        "list",
        "dict",
        "tuple",
        "object",
        "range",
        "set",
        "slice",
    },
    "copyreg": {"_reconstructor", "__newobj__"},
    rebuild.__name__: {"view", "dict_view", "array_view", "read_only", "polars_frame", "polars_series"},
}


class _Unpickler(pickle.Unpickler):
    """Takes note whether a value is made of plain data and of known libraries' objects alone."""

    plain = True

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in _LIBRARIES and name not in _PLAIN.get(module, ()):
            self.plain = False
        return super().find_class(module, name)


class _Referring(_Unpickler):
    """Loads a value that refers to objects of what a call was given by their place."""

    given: Mapping[int, Any]

    def persistent_load(self, place: int) -> Any:
        return self.given[place]


def placed(walks: Iterable[Walk]) -> dict[int, Any]:
    """Return the objects of walks by their place, as a value that shares them refers to them."""
    return {walk.position(ident): value for walk in walks for ident, value in walk.seen.items()}


def load(
    names: Sequence[str],
    stream: bytes | memoryview,
    buffers: Iterable[Any],
    given: Mapping[int, Any] | None = None,
    plain: set[str] | None = None,
) -> dict[str, Any]:
    """Unpickle a group; only for bytes that were verified, inside `rebuild.into`. `given`: as `placed` makes it.

    An exception of the user's code is given an attribute `variable`, the name at which it happened. The names of a
    group of plain data and known libraries' objects are added to `plain`.
    """
    unpickler: Any = (_Unpickler if given is None else _Referring)(io.BytesIO(stream), buffers=buffers)
    if given is not None:
        unpickler.given = given
    values = {}
    for name in names:
        try:
            values[name] = unpickler.load()
        except Exception as error:
            error.variable = name  # type: ignore[attr-defined]
            raise
    remember_sources(unpickler.load())
    if plain is not None and unpickler.plain:
        plain.update(names)
    return values


def restore(
    manifest: Manifest,
    namespace: dict[str, Any],
    blobs: BlobStore,
    names: Collection[str] | None = None,
    *,
    random: bool = True,
    make: bool = True,
    ready: Callable[[], object] = lambda: None,
) -> set[str]:
    """Bind the variables of a verified manifest in a namespace: all of them, or none.

    Returns the names whose values are plain data and known libraries' objects: loading them ran nothing else.

    Variables that were not saved become `Unsaved` placeholders; those that the step deleted are deleted;
    the random generators get their state back, if `random`. `names`: bind only these, and delete nothing. What
    recipes make is made last, and what refers to it, unless `make` is false (`make_again` does it). Raises
    BlobMissing, BlobDamaged and NotRestorable, naming variable and step. `ready` is called once all is loaded, before
    anything is bound; what it raises keeps the namespace as it is.
    """
    plain: set[str] = set()
    found = values(manifest, namespace, blobs, names, plain)
    states = None
    if random and manifest.random is not None:
        states = pickle.loads(_read(manifest.random, "random", manifest.step, blobs))
    ready()
    for variable in manifest.variables:
        if variable.state == "unsaved" and (names is None or variable.name in names):
            found[variable.name] = Unsaved(variable.name, manifest.step, variable.reason)
    touched = {*found, *(name for group in manifest.later for name in group.names)}
    before = {name: namespace[name] for name in touched if name in namespace}
    namespace.update(found)
    try:
        if make:
            make_again(manifest, namespace, blobs, names)
    except BaseException:
        for name in touched:
            namespace.pop(name, None)
        namespace.update(before)
        raise
    for name in manifest.deleted if names is None else ():
        namespace.pop(name, None)
    if states is not None:
        set_random(states)
    return plain


def make_again(
    manifest: Manifest, namespace: dict[str, Any], blobs: BlobStore, names: Collection[str] | None = None
) -> None:
    """Run the recipes of a verified manifest, or only those of `names`, and bind what they make and what refers to it.

    In the order in which they ran in the step; what it left otherwise is bound by then. A recipe that fails raises
    NotRestorable, and leaves the namespace as it is by then.
    """
    wanted = [g for g in manifest.later if names is None or not set(g.names).isdisjoint(names)]
    for group in wanted:  # no recipe sees what the namespace held before
        for name in group.names:
            namespace.pop(name, None)
    for group in wanted:
        with _without_gc(), rebuild.into(namespace):
            found = _load_group(group, manifest.step, blobs)
        for name, value in found.items():
            if names is not None and name not in names:
                continue
            if not group.recipe:
                namespace[name] = value
                continue
            namespace[name] = made = _made(name, value, manifest.step)
            note(Recipe(name, made, value, group.recipe, manifest.step))


def _made(name: str, make: Any, step: str) -> Any:
    about = f"variable `{name}` of step `{step}` can't be made again: its recipe `{said(make)}`"
    todo = f"run the cell again once that is mended, or edit it; `%durable rerun {step}` runs the whole step"
    try:
        made = make()
    except Exception as error:
        raise NotRestorable(f"{about} raised {type(error).__name__}: {error}", todo=todo) from error
    if not may_be_made(made):
        raise NotRestorable(f"{about} returned a {type(made).__name__}", todo=todo)
    return made


def values(
    manifest: Manifest,
    namespace: dict[str, Any],
    blobs: BlobStore,
    names: Collection[str] | None = None,
    plain: set[str] | None = None,
) -> dict[str, Any]:
    """Return the saved values of a verified manifest, or only those of `names`, without binding them.

    What they refer to by name is found in `namespace`. A group of variables that share objects is loaded together.
    `plain`: as in `load`.
    """
    found: dict[str, Any] = {}
    with _without_gc(), rebuild.into(namespace):
        for group in manifest.groups:
            if names is None or not set(group.names).isdisjoint(names):
                found |= _load_group(group, manifest.step, blobs, plain)
    return found if names is None else {name: value for name, value in found.items() if name in names}


@contextmanager
def _without_gc() -> Iterator[None]:
    """Pause the garbage collector, which would walk over the growing values again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_value(
    group: Group, namespace: dict[str, Any], blobs: BlobStore, of: str, given: Iterable[Walk] | None = None
) -> Any:
    """Return a value that `save.save_value` wrote; `of` names it in errors.

    `given`: walks over the objects that it may share, where it does. Raises BlobMissing, BlobDamaged, NotRestorable.
    """
    try:
        stream = read_blob(group.stream, blobs)
        buffers = [map_blob(blob, blobs, f"{of} needs it") for blob in group.buffers]
        with _without_gc(), rebuild.into(namespace):
            return load(group.names, stream, buffers, None if given is None else placed(given))[""]
    except (BlobMissing, BlobDamaged) as error:
        raise type(error)(f"{error.message}; {of} needs it", todo=error.todo) from error
    except Exception as error:
        reason = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise NotRestorable(f"{of} can't be restored: {reason}", todo=getattr(error, "todo", "")) from error


def load_random(blob: Blob, blobs: BlobStore) -> None:
    """Give the random generators the state that a verified blob holds."""
    set_random(pickle.loads(read_blob(blob, blobs)))


def _load_group(group: Group, step: str, blobs: BlobStore, plain: set[str] | None = None) -> dict[str, Any]:
    names = ", ".join(group.names)
    stream = _read(group.stream, names, step, blobs)
    buffers = [_map(blob, names, step, blobs) for blob in group.buffers]
    try:
        return load(group.names, stream, buffers, plain=plain)
    except Exception as error:
        name = getattr(error, "variable", names)
        reason = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise NotRestorable(
            f"variable `{name}` of step `{step}` can't be restored: {reason}",
            todo=getattr(error, "todo", "") or f"run the step again: `%durable rerun {step}`",
        ) from error


def _read(blob: Blob, names: str, step: str, blobs: BlobStore) -> memoryview:
    with _naming(names, step):
        return read_blob(blob, blobs)


def _map(blob: Blob, names: str, step: str, blobs: BlobStore) -> memoryview:
    with _naming(names, step):
        return map_blob(blob, blobs, f"step `{step}` needs it for `{names}`")


@contextmanager
def _naming(names: str, step: str) -> Iterator[None]:
    """Say in errors of blobs which variables need them."""
    try:
        yield
    except (BlobMissing, BlobDamaged) as error:
        raise type(error)(
            f"{error.message}; step `{step}` needs it for `{names}`", todo=error.todo
        ) from error


def set_random(states: dict[str, Any]) -> None:
    """Give the random generators the state that `save.random_state` found."""
    random.setstate(states["random"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
    if "torch" in states:
        import torch

        torch.set_rng_state(torch.from_numpy(states["torch"]))
