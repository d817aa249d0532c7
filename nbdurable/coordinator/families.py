"""What the end of a run means to those below it and above it in its tree.

Owns cancelling, which goes down the tree, and what a child's end answers. A child hears of its parent's end after it;
what a crash left undone of that is done at the next start. Its own end and the answer to whoever waits for it are one
transaction (`waits.py`).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from nbdurable import lifecycle
from nbdurable.coordinator.core import Core
from nbdurable.coordinator.fold import Kind
from nbdurable.errors import IllegalMove
from nbdurable.lifecycle import Happening
from nbdurable.models import Run, RunStatus, Wait


class Families:
    """Cancels runs, and their children with them."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def cancel(self, run_id: str, reason: str) -> Run:
        """Cancel a run, or ask its worker to; one that was cancelled before is left as it is."""
        async with self._core.locked(run_id) as live:
            run = live.run
            if run.status is RunStatus.CANCELLED or (
                run.status is RunStatus.RUNNING and run.cancel_requested
            ):
                return run  # asked for before
            happening = lifecycle.cancellation(run.status, run.driver.kind if run.driver else run.kind)
            if happening is Happening.REQUEST_CANCEL:
                asked = "asked to cancel; its worker stops it"
                run = await self._core.move(live, happening, Kind.RUN_CANCEL_REQUESTED, asked)
                if live.lease is not None:
                    live.lease.cancel_by = self._core.cancel_deadline()
                return run
            return await self._core.move(live, happening, Kind.RUN_CANCELLED, reason)

    async def see_to(self) -> None:
        """Cancel the children of runs that were cancelled, or ended otherwise, as far as they go with them."""
        while self._core.fallen:
            parent_id = next(iter(self._core.fallen))
            for run_id in sorted(self._core.children.get(parent_id, ())):
                parent = await self._core.current(parent_id)
                live = self._core.runs.get(run_id)
                if live is not None and lifecycle.falls(live.run, parent):
                    reason = f"cancelled with run {parent.short}, which started it and {_became(parent)}"
                    with suppress(IllegalMove):  # it ended meanwhile
                        await self.cancel(run_id, reason)
            self._core.fallen.pop(parent_id, None)
        for run_id in list(self._core.held):
            live = self._core.runs.get(run_id)
            if live is not None and live.run.singleton == "cancel":
                for other in self._core.ahead_of(live.run):
                    if not other.cancel_requested:
                        with suppress(IllegalMove):  # it ended meanwhile
                            await self.cancel(other.id, f"cancelled: run {live.run.short} takes its place")


def started(child: Run) -> tuple[str, dict[str, Any]]:
    """Say in a parent's history that it started a child."""
    return f"started run {child.short} of {child.notebook}", {"run_id": child.id}


def stands(wait: Wait, child: Run) -> bool:
    """Tell whether the answer to a wait is still what its child came to: a failed one may have been resumed."""
    if wait.answer is None or wait.answer.approved or not isinstance(wait.answer.value, dict):
        return True
    told = wait.answer.value
    return (told.get("status"), told.get("epoch")) == (child.status.value, child.epoch)


def _became(run: Run) -> str:
    return f"is {run.status.value}" if run.status.is_final else "is to be cancelled"
