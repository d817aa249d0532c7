"""What code in a notebook can ask and say about its run: `current_run`, `result` and `skip_rest`."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from nbdurable import contract
from nbdurable.checkpoint.plan import digest
from nbdurable.errors import RestSkipped, UsageError
from nbdurable.kernel import extension
from nbdurable.kernel.session import required
from nbdurable.models import DriverKind, Progress, Usage

PROGRESS_S = 0.5  # progress is said no more often


class Metadata:
    """What a run's code says about it while it runs: JSON values by name, 256 kB at most, shown live.

    Each change is on disk when its call returns. A step that runs again makes its changes again.
    """

    def __init__(self, run: CurrentRun) -> None:
        self._run = run

    def set(self, name: str, value: Any) -> None:
        """Set a value; raises UsageError where it is not JSON."""
        self._change("set", name, value)

    def increment(self, name: str, by: float = 1) -> None:
        """Add to a number, which begins at 0; raises UsageError where the value is none."""
        self._change("increment", name, by)

    def append(self, name: str, value: Any) -> None:
        """Append to a list, which begins empty; raises UsageError where the value is none."""
        self._change("append", name, value)

    def remove(self, name: str) -> None:
        """Remove a value, if there is one."""
        self._change("remove", name, None)

    def values(self) -> dict[str, Any]:
        """Return all values as they are now."""
        question = contract.ByRun(run_id=self._run.id)
        return required().client.call(contract.GET_RUN, question).metadata

    def _change(self, how: Literal["set", "increment", "append", "remove"], name: str, value: Any) -> None:
        _check_json(f"the metadata {name!r}", value)
        session = required()
        question = contract.ChangeMetadata(
            run_id=session.run_id,
            epoch=session.epoch,
            step=self._run.step,
            changes=(contract.Change(how=how, name=name, value=value),),
            nonce=uuid.uuid4().hex,
        )
        session.client.call(contract.CHANGE_METADATA, question)


@dataclass(frozen=True)
class CurrentRun:
    """The run that this code is part of.

    `attempt`: that of the step which runs now, 0 outside steps. `failures`: how many tries of it have failed before.
    """

    id: str
    notebook: str
    kind: DriverKind
    parameters: dict[str, Any]
    tags: tuple[str, ...]
    recoveries: int
    attempt: int
    failures: int
    step: str | None

    def idempotency_key(self, name: str) -> str:
        """Return a key for a service outside: the same in every attempt of this run, another one in each run."""
        return digest(self.id, name)

    @property
    def metadata(self) -> Metadata:
        """Return what is said about the run, to be changed."""
        return Metadata(self)

    def usage(self) -> Usage:
        """Return what the run's calls of models have taken so far, in steps: calls, tokens, cost, by model."""
        question = contract.ByRun(run_id=self.id)
        return required().client.call(contract.GET_RUN, question).usage

    def log(
        self, message: str, *, level: Literal["debug", "info", "warning", "error"] = "info", **fields: Any
    ) -> None:
        """Add a line with named JSON values to the run's history, under its step: `nbdurable logs RUN --events`.

        Raises UsageError, naming the value, where one is not JSON.
        """
        for name, value in fields.items():
            _check_json(f"the field {name!r} of the log", value)
        session = required()
        question = contract.AddLog(
            run_id=session.run_id,
            epoch=session.epoch,
            step=self.step,
            level=level,
            message=message,
            fields=fields,
            nonce=uuid.uuid4().hex,
        )
        session.client.call(contract.ADD_LOG, question)

    def progress(self, done: float, total: float | None = None, text: str = "") -> None:
        """Say how far the step is, shown live; twice a second at most, and the end always."""
        session, now = required(), time.monotonic()
        if done != total and now - session.progress_said < PROGRESS_S:
            return
        session.progress_said = now
        said = Progress(step=self.step, done=done, total=total, text=text)
        question = contract.SetProgress(run_id=session.run_id, epoch=session.epoch, progress=said)
        session.client.call(contract.SET_PROGRESS, question)


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
        failures=execution.trying.failures if execution and execution.trying else 0,
        step=execution.name if execution else None,
    )


def result(**values: Any) -> None:
    """Record the run's result: JSON values by name, shown by `nbdurable show RUN`; said again, it is replaced.

    Raises UsageError, naming the value, where one is not JSON.
    """
    session = required()
    for name, value in values.items():
        _check_json(f"the result `{name}`", value)
    question = contract.SetResult(run_id=session.run_id, epoch=session.epoch, result=values)
    session.client.call(contract.SET_RESULT, question)


def skip_rest(reason: str) -> NoReturn:
    """End the notebook here, early and clean: the step that calls it is kept, the cells below do not run.

    Headless, the run is completed with this reason. In front of a person the cell ends and a "run all" stops. A
    resumed run ends at the same place. Raises UsageError outside a notebook with `%load_ext nbdurable`.
    """
    required()
    steps = extension.steps()
    signal = RestSkipped(f"⏭ skips the rest: {reason}")
    if steps is not None and steps.execution is not None:
        steps.execution.signal = signal
    raise signal


def _check_json(what: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{what} is not JSON: {error}", todo="give numbers, text, lists, dicts") from None
