"""Time travel: the variables of any step of any run, in the live kernel, and what differs between two of them.

Owns how a state is asked for and verified; what it is made of is `checkpoint/state.py`'s. Also used by the command
line, without a kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from nbdurable import contract, security
from nbdurable.checkpoint import compare
from nbdurable.checkpoint import state as states
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.manifest import unseal
from nbdurable.checkpoint.state import Held, State
from nbdurable.client import Client
from nbdurable.kernel.session import Session, current
from nbdurable.models import Run


def read_state(client: Client, key: bytes, run: str, step: str | None = None) -> tuple[Run, State]:
    """Return a run, and its variables as they were when a step was committed (None: its last one), verified.

    Raises NotFound, BadSignature, and NotRestorable where the step has no checkpoint, or has it no more.
    """
    found = client.call(contract.STATE, contract.ReadState(run_id=run, step=step))
    return found.run, states.as_of(
        unseal(one.manifest, key, of=f"step `{one.step}` of run {found.run.short}")
        for one in found.checkpoints
    )


def checkout(
    session: Session, run: str, step: str, names: Collection[str] | None = None
) -> tuple[Run, dict[str, Held]]:
    """Bind the variables of a run as of a step in the live kernel, or only some of them; all or none.

    The steps of this kernel take note where its variables come from now.
    """
    found, state = read_state(session.client, session.key, run, step)
    bound = states.checkout(state, session.values, session.blobs, names)
    for name, held in bound.items():
        session.origins.step(held.manifest.step, {name: held.fingerprint}, ())
    if names is None:
        session.origins.step(step, {}, state.deleted)
    return found, bound


def load(run: str, step: str, name: str) -> Any:
    """Return the value that a variable had when a step of a run was committed; nothing is bound.

    `run`: a whole id, or a unique beginning or end of it. Works in a notebook and in any program of the project.
    Raises NotFound, and NotRestorable where the value was not saved or its checkpoint was removed.

        before = durable.load("0199f3c2", "clean", "table")
    """
    session = current()
    if session is not None:
        _, state = read_state(session.client, session.key, run, step)
        return states.value_of(state, name, session.values, session.blobs)
    with Client() as client:
        _, state = read_state(client, security.load_key(client.home), run, step)
        return states.value_of(state, name, vars(sys.modules["__main__"]), LocalBlobs(client.home.blobs))


def difference(
    client: Client, key: bytes, before: str, after: str, namespace: dict[str, Any], *, unread: str = ""
) -> compare.RunDifference:
    """Return what differs between two runs, or two steps: each a RUN or RUN:STEP, and its variables as of then.

    `unread`: why no value may be loaded; then those that differ are named, and nothing is unpickled.
    """

    def side(word: str) -> compare.Side:
        run, _, step = word.partition(":")
        return compare.Side(*read_state(client, key, run, step or None), step or None)

    return compare.compare(side(before), side(after), namespace, LocalBlobs(client.home.blobs), unread)
