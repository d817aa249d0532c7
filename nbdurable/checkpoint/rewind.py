"""Rewinding: a namespace as it was before a cell that failed, so that the cell can be tried again.

Owns `Rewind`. A name that was bound or deleted is bound again to the object that it held; an object that was changed is
loaded anew from the checkpoint that holds it as it was. What no checkpoint holds can't be put back, and is named. Knows
nothing of attempts and kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from nbdurable.checkpoint.blobs import BlobStore
from nbdurable.checkpoint.manifest import Manifest
from nbdurable.checkpoint.restore import set_random
from nbdurable.checkpoint.save import random_state
from nbdurable.checkpoint.state import State, checkout
from nbdurable.checkpoint.track import Snapshot, Tracker
from nbdurable.errors import CheckpointError


class Rewind:
    """A namespace at one moment, which is now: it keeps every object alive that the namespace holds."""

    def __init__(self, namespace: dict[str, Any], tracker: Tracker, before: Snapshot) -> None:
        self._namespace = namespace
        self._tracker = tracker
        self._before = before
        self._held = {name: namespace[name] for name in before.variables if name in namespace}
        self._random = random_state()

    def back(self, state: State, blobs: BlobStore, mentioned: Collection[str] = ()) -> frozenset[str]:
        """Put everything back; return the names of variables that are not what they were.

        `state`: what checkpoints hold. `mentioned`: names that the cell's code reads: what reading uses up (a
        generator, an open file) can't be put back.
        """
        namespace, held = self._namespace, self._held
        for name in [name for name in namespace if self._tracker.is_users(name) and name not in held]:
            del namespace[name]
        namespace.update({name: value for name, value in held.items() if namespace.get(name) is not value})
        set_random(self._random)
        changed = self._tracker.differences(self._before, mentioned)
        if not changed:
            return frozenset()
        wanted = {name for name in self._together(changed, state) if self._is_held(name, state)}
        if wanted:
            try:
                checkout(state, namespace, blobs, sorted(wanted))
            except CheckpointError:
                return changed
        return self._tracker.differences(self._before, mentioned)

    def _is_held(self, name: str, state: State) -> bool:
        """Tell whether a checkpoint holds a variable as it was."""
        held, seen = state.variables.get(name), self._before.variables.get(name)
        return (
            held is not None
            and seen is not None
            and held.variable.state in ("saved", "recipe")
            and held.fingerprint == seen.digest
        )

    def _together(self, names: Collection[str], state: State) -> set[str]:
        """Return these names, and those that share objects with them in the checkpoints that hold them."""
        found = set(names)
        for name in names:
            held = state.variables.get(name)
            if held is not None:
                found |= {
                    other
                    for other in _group(held.manifest, name)
                    if (one := state.variables.get(other)) is not None and one.manifest is held.manifest
                }
        return found


def _group(manifest: Manifest, name: str) -> Iterator[str]:
    for group in manifest.groups + manifest.later:
        if name in group.names:
            yield from group.names
