"""State: the variables of a run as of a step, a fold of its checkpoints in order of commitment.

Owns which checkpoint holds each variable, and bringing some or all of them into a namespace. Takes manifests whose
signature was verified; knows nothing of runs' lives, clients and kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from nbdurable.checkpoint.blobs import BlobStore
from nbdurable.checkpoint.manifest import Manifest
from nbdurable.checkpoint.restore import make_again, restore, values
from nbdurable.errors import CheckpointError, NotFound, NotRestorable
from nbdurable.models import Variable


@dataclass(frozen=True)
class Held:
    """A variable, and the checkpoint that holds it."""

    variable: Variable
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of its value; "" where it was not saved."""
        return self.manifest.fingerprints.get(self.variable.name, "")

    @property
    def is_made(self) -> bool:
        """Tell whether a recipe makes it, or something in it."""
        return any(self.variable.name in group.names for group in self.manifest.later)


@dataclass(frozen=True)
class State:
    """The variables that steps have left: saved ones, and those that could not be saved."""

    manifests: tuple[Manifest, ...]  # in order of commitment
    variables: dict[str, Held]
    deleted: frozenset[str]  # by a step, and not written again

    def __getitem__(self, name: str) -> Held:
        """Return a variable; raises NotFound, naming those there are."""
        try:
            return self.variables[name]
        except KeyError:
            known = ", ".join(sorted(self.variables)) or "none"
            raise NotFound(
                f"no step had written a variable `{name}` by then", todo=f"there are: {known}"
            ) from None


def as_of(manifests: Iterable[Manifest]) -> State:
    """Return the state that checkpoints add up to, each a step's newest, in order of commitment.

    A later one overwrites what an earlier one left, and takes away what it deleted.
    """
    manifests = tuple(manifests)
    variables: dict[str, Held] = {}
    deleted: set[str] = set()
    for manifest in manifests:
        for variable in manifest.variables:
            if variable.state != "deleted":
                variables[variable.name] = Held(variable, manifest)
        for name in manifest.deleted:
            variables.pop(name, None)
        deleted = (deleted | set(manifest.deleted)) - variables.keys()
    return State(manifests, variables, frozenset(deleted))


def checkout(
    state: State, namespace: dict[str, Any], blobs: BlobStore, names: Collection[str] | None = None
) -> dict[str, Held]:
    """Bind a state's variables in a namespace, all of them or none, and return them.

    `names`: only these; else all, what was deleted is deleted, and the random generators get their state back.
    Raises NotFound for an unknown name, NotRestorable for one that was asked for and not saved, BlobMissing,
    BlobDamaged.
    """
    wanted = dict(state.variables) if names is None else {name: state[name] for name in names}
    for held in wanted.values() if names is not None else ():
        _check_saved(held)
    touched = wanted.keys() | (state.deleted if names is None else set())
    before = {name: namespace[name] for name in touched if name in namespace}
    try:
        owned = [
            (one, {name for name, held in wanted.items() if held.manifest is one}) for one in state.manifests
        ]
        for manifest, own in owned:
            if own:
                restore(manifest, namespace, blobs, own, random=False, make=False)
        for manifest, own in owned:
            make_again(manifest, namespace, blobs, own)
        if names is None:
            for manifest in [one for one in state.manifests if one.random is not None][-1:]:
                restore(manifest, namespace, blobs, ())
            for name in state.deleted:
                namespace.pop(name, None)
    except BaseException:
        for name in touched:
            namespace.pop(name, None)
        namespace.update(before)
        raise
    return wanted


def value_of(state: State, name: str, namespace: dict[str, Any], blobs: BlobStore) -> Any:
    """Return the value of one variable; nothing is bound.

    What it refers to by name (a class, a function) is looked up in `namespace`, else in the state itself. One by
    recipe is made: the recipes of the state run.
    """
    held = state[name]
    _check_saved(held)
    scratch = dict(namespace)
    saved = {one for one, held in state.variables.items() if held.variable.state == "saved"}
    if held.is_made:
        made = {one for one, other in state.variables.items() if other.variable.state == "recipe"}
        checkout(state, scratch, blobs, saved | made)
        return scratch[name]
    saved = {one for one in saved if not state.variables[one].is_made}
    try:
        return values(held.manifest, namespace, blobs, {name})[name]
    except NotRestorable as error:
        try:
            checkout(state, scratch, blobs, saved)
        except CheckpointError:
            raise error from None
        return scratch[name]


def _check_saved(held: Held) -> None:
    if held.variable.state not in ("saved", "recipe"):
        raise NotRestorable(
            f"variable `{held.variable.name}` of step `{held.manifest.step}` was not saved: {held.variable.reason}",
            todo=f"run the step again: `%durable rerun {held.manifest.step}`",
        )
