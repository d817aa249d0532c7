"""What code in a notebook can ask and say about its run: `current_run` and `result`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nbdurable import contract
from nbdurable.checkpoint.plan import digest
from nbdurable.errors import UsageError
from nbdurable.kernel import extension
from nbdurable.kernel.session import required
from nbdurable.models import DriverKind


@dataclass(frozen=True)
class CurrentRun:
    """The run that this code is part of. `attempt`: that of the step which runs now, 0 outside steps."""

    id: str
    notebook: str
    kind: DriverKind
    parameters: dict[str, Any]
    tags: tuple[str, ...]
    recoveries: int
    attempt: int
    step: str | None

    def idempotency_key(self, name: str) -> str:
        """Return a key for a service outside: the same in every attempt of this run, another one in each run."""
        return digest(self.id, name)


def current_run() -> CurrentRun:
    """Return the run that this code is part of; raises UsageError where there is none."""
    session = required()
    session.run_id  # noqa: B018  creates the run where there is none yet
    run = session.run
    assert run is not None
    steps = extension.steps()
    execution = steps.execution if steps else None
    return CurrentRun(
        id=run.id,
        notebook=run.notebook,
        kind=run.kind,
        parameters=dict(run.parameters),
        tags=run.tags,
        recoveries=run.recoveries,
        attempt=execution.attempt if execution else 0,
        step=execution.name if execution else None,
    )


def result(**values: Any) -> None:
    """Record the run's result: JSON values by name, shown by `nbdurable show RUN`; said again, it is replaced.

    Raises UsageError, naming the value, where one is not JSON.
    """
    session = required()
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the result `{name}` is not JSON: {error}", todo="give numbers, text, lists, dicts"
            ) from None
    question = contract.SetResult(run_id=session.run_id, epoch=session.epoch, result=values)
    session.client.call(contract.SET_RESULT, question)
