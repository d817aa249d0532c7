"""The tries of a step whose line asks for retries or a time limit: what its rewritten cell calls around its body.

Owns `Attempts`: what follows a failure, the way back to the state before the try, the wait in between, and what the
cell shows of it. The rules are `policies.Retry`'s; how a cell becomes a loop is `rewrite.py`'s.
"""

from __future__ import annotations

import asyncio
import builtins
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdurable import contract
from nbdurable.checkpoint import recipes
from nbdurable.checkpoint.restore import restore
from nbdurable.checkpoint.rewind import Rewind
from nbdurable.checkpoint.state import as_of
from nbdurable.errors import StepUsageError, Suspended, TimedOut, UsageError
from nbdurable.kernel import display
from nbdurable.kernel.interrupts import describe_error, shown_as, uninterrupted
from nbdurable.kernel.limits import Limit
from nbdurable.kernel.outputs import Output, outputs_of, replay
from nbdurable.models import Attempt, ErrorInfo
from nbdurable.policies import Next, Retry, RetryOn, check_retry_on, span
from nbdurable.stepline import StepOptions
from nbdurable.telemetry import fault_point

if TYPE_CHECKING:
    from nbdurable.kernel.execution import Execution

IN_PLACE_S = 2.0  # a shorter wait costs less than another kernel
_TICK_S = 0.2  # an interrupt is seen within it
_dice = random.Random()  # the notebook's own generator is not ours to move


class Attempts:
    """The tries of one step in this kernel. `failed`: those that came before, in this kernel or another."""

    def __init__(
        self, execution: Execution, failed: tuple[Attempt, ...], retry_on: RetryOn | None = None
    ) -> None:
        options = execution.options
        self.unfinished = True
        self.verdict: Next | None = None  # on the newest failure
        self.exhausted = False
        self.policy = options.retry or Retry()
        self.limit: Limit | None = None
        self._execution, self._session = execution, execution.session
        self._failed = list(failed)
        self._retry_on = retry_on
        self._start = (execution.kept.resume_at or 0) if execution.kept else 0
        self._rewind: Rewind | None = None
        self._shown: list[Output] = []
        self._last: Any = None

    @property
    def failures(self) -> int:
        return len(self._failed)

    # Called by the rewritten cell -------------------------------------------------------------------------------

    def __enter__(self) -> None:
        self._begin(awaits=False)

    async def __aenter__(self) -> None:
        self._begin(awaits=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """After a failure, tell once its wait is over whether the body is tried again; else the error goes on."""
        __tracebackhide__ = True
        wait_s = self._end(error)
        if wait_s is None:
            return False
        try:
            time.sleep(wait_s)
        except KeyboardInterrupt as interrupt:
            raise shown_as(interrupt, f"KeyboardInterrupt: {self._left()}")  # noqa: B904  the same one
        self._begin_next()
        return True

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Do as `__exit__` does; other tasks go on meanwhile."""
        __tracebackhide__ = True
        wait_s = self._end(error)
        if wait_s is None:
            return False
        try:
            await asyncio.sleep(wait_s)
        except (KeyboardInterrupt, asyncio.CancelledError) as interrupt:
            raise shown_as(interrupt, f"{type(interrupt).__name__}: {self._left()}")  # noqa: B904  the same one
        self._begin_next()
        return True

    def due(self, statement: int) -> bool:
        """Tell whether a piece of the cell, which begins with this statement, is part of this try."""
        return statement >= self._start

    def keep(self, value: Any) -> None:
        """Keep the last expression's value, to be displayed once the step has ended."""
        self._last = value

    def show(self, value: Any) -> None:
        """Display an expression's value now."""
        sys.displayhook(value)

    def last(self) -> Any:
        """Return the last expression's value."""
        value, self._last = self._last, None
        return value

    # What follows a failure --------------------------------------------------------------------------------------

    def _begin(self, *, awaits: bool) -> None:
        if self._rewind is None:
            for number, attempt in enumerate(self._failed, 1):
                self._say_failed(number, attempt)
            session = self._session
            self._rewind = Rewind(session.values, session.tracker, self._execution.before)
            self._shown = self._execution.recorder.finished()
        timeout_s = self._execution.options.timeout_s
        if timeout_s is not None:
            what = f"step `{self._execution.name}`"
            self.limit = Limit(what, timeout_s, kill=self._last_words(TimedOut(what, timeout_s)))
            self.limit.start(awaits=awaits)

    def _last_words(self, error: TimedOut) -> tuple[float, Path] | None:
        """Leave what is to be said of this try if its code can't be interrupted and the kernel has to end itself.

        Only headless: in front of a person the kernel, and what it holds, is worth more than the time.
        """
        execution, session = self._execution, self._session
        if not session.headless:
            return None
        tries = len(self._failed) + 1
        verdict = self._next(error)
        exhausted = tries > self.policy.retries > 0
        question = contract.FailStep(
            run_id=session.run_id,
            epoch=session.epoch,
            step=execution.name,
            attempt=execution.attempt,
            error=ErrorInfo(name="TimedOut", message=f"{error}; its code runs in C, so its kernel was ended"),
            again_in_s=verdict.wait_s,
            gives_back=verdict.wait_s is not None,
            pauses=exhausted and self.policy.on_exhausted == "pause",
            sentence=f"attempt {tries} of {self.policy.attempts}, {verdict.reason}",
        )
        words, stacks = session.home.last_words(session.run_id, session.epoch)
        words.write_text(question.model_dump_json(), encoding="utf-8")
        return session.settings.cancel_grace_s, stacks

    def _next(self, error: BaseException) -> Next:
        return self.policy.next(
            error, len(self._failed) + 1, draw=_dice.random(), now=time.time(), retry_on=self._retry_on
        )

    def _end(self, error: BaseException | None) -> float | None:
        """End a try; return how long to wait for the next one, None where none follows.

        Its failure is recorded, and the state before it is put back. Raises Suspended where the wait, or the way back,
        asks for another kernel.
        """
        __tracebackhide__ = True
        if self.limit is not None:
            self.limit.stop()
        if error is None:
            self.unfinished = False
            return None
        timed_out = None if self.limit is None else self.limit.behind(error)
        error = timed_out or error
        tries = len(self._failed) + 1
        self.verdict = self._next(error)
        wait_s = self.verdict.wait_s
        if wait_s is None:
            self.exhausted = tries > self.policy.retries > 0
            if timed_out is not None:
                raise timed_out
            return None
        try:
            with uninterrupted():
                lost = self._go_back()
                gives_back = self._session.headless and (wait_s >= IN_PLACE_S or bool(lost))
                self._record(error, wait_s, gives_back)
        except KeyboardInterrupt as interrupt:
            raise shown_as(interrupt, f"KeyboardInterrupt: {self._left()}")  # noqa: B904  the same one
        if gives_back:
            self._give_back(wait_s)
        if lost:
            names = display.few([f"`{name}`" for name in sorted(lost)])
            said = f"  {names} changed meanwhile, and no checkpoint holds what it was"
            display.say(self._session.shell, said)
        return wait_s

    def _go_back(self) -> frozenset[str]:
        """Put variables and gates back to what they were before the try; return what could not be put back.

        Where the try passed a gate, the next one goes on behind what was checkpointed before that gate.
        """
        execution, session = self._execution, self._session
        assert self._rewind is not None
        recipes.forget_step(execution.name)
        gate = execution.gated
        known = sorted(session.checkpoints.values(), key=lambda checkpoint: checkpoint.seq)
        manifests = [
            session.manifest(one.step) for one in known if gate is None or one.step != execution.name
        ]
        earlier = [one for one in (*manifests, execution.kept) if one is not None]
        lost = self._rewind.back(as_of(earlier), session.blobs, execution.mentioned)
        if gate is not None and gate.resume_at:
            restore(gate, session.values, session.blobs)
            self._start = gate.resume_at
            self._shown = outputs_of(gate, session.blobs)
            lost -= {one.name for one in gate.variables}
        execution.rewind(self._start)
        return lost

    def _record(self, error: BaseException, wait_s: float, gives_back: bool) -> None:
        execution, session = self._execution, self._session
        assert self.verdict is not None
        told = describe_error(error)
        tries = len(self._failed) + 1
        session.client.call(
            contract.FAIL_STEP,
            contract.FailStep(
                run_id=session.run_id,
                epoch=session.epoch,
                step=execution.name,
                attempt=execution.attempt,
                error=told,
                replayed=tuple(execution.calls.replayed) if execution.calls else (),
                again_in_s=wait_s,
                gives_back=gives_back,
                sentence=f"attempt {tries} of {self.policy.attempts}, {self.verdict.reason}",
            ),
        )
        fault_point("attempt-failed", execution.name)
        at = time.time()
        attempt = Attempt(
            number=execution.attempt,
            status="failed",
            epoch=session.epoch,
            started_at=at,
            ended_at=at,
            error=told,
            again_in_s=wait_s,
        )
        self._failed.append(attempt)
        if session.headless:  # the output notebook is to be the same, whether this kernel or another goes on
            session.shell.display_pub.clear_output()
            replay(session.shell, self._shown)
        execution.recorder.back_to(self._shown)
        self._say_failed(tries, attempt)
        self._shown = execution.recorder.finished()

    def _say_failed(self, number: int, attempt: Attempt) -> None:
        error = attempt.error or ErrorInfo(name="", message="")
        said = display.one_line(f"{error.name}: {error.message}" if error.message else error.name)
        line = (
            f"↻ {self._execution.name}  attempt {number} of {self.policy.attempts} failed ({said})"
            f" · again in {span(attempt.again_in_s or 0.0)}"
        )
        display.say(self._session.shell, line)

    def _give_back(self, wait_s: float) -> None:
        __tracebackhide__ = True
        signal = Suspended(f"⏸ {self._execution.name} {next_try(wait_s)}")
        self._execution.signal = signal
        raise signal

    def _left(self) -> str:
        return (
            f"attempt {len(self._failed)} of {self._execution.name} has failed, and no other one was begun; "
            "run the cell again"
        )

    def _begin_next(self) -> None:
        execution, session = self._execution, self._session
        begun = session.client.call(
            contract.BEGIN_STEP,
            contract.BeginStep(
                run_id=session.run_id,
                epoch=session.epoch,
                step=execution.name,
                action="continue" if self._start else "execute",
                reason=f"attempt {len(self._failed) + 1} of {self.policy.attempts}",
                goes_on=True,
            ),
        )
        execution.begin_again(begun.attempt, begun.calls)


def next_try(wait_s: float) -> str:
    """Say when a step is tried again."""
    return f"is tried again at {display.clock(time.time() + wait_s)}"


def find_retry_on(options: StepOptions, namespace: Mapping[str, Any]) -> RetryOn | None:
    """Return the errors, or the function, that `--retry-on` names; raises StepUsageError where there are none."""
    found: list[Any] = []
    for name in options.retry_on:
        head, *rest = name.split(".")
        try:
            value = namespace[head] if head in namespace else getattr(builtins, head)
            for part in rest:
                value = getattr(value, part)
        except AttributeError:
            raise StepUsageError(
                f"`%%step {options.name}`: --retry-on: there is no {name}",
                todo="import or define it in a cell above",
            ) from None
        found.append(value)
    if not found:
        return None
    wanted = found[0] if len(found) == 1 else tuple(found)
    try:
        check_retry_on(wanted)
    except UsageError as error:
        raise StepUsageError(
            f"`%%step {options.name}`: --retry-on: {error.message}", todo=error.todo
        ) from None
    checked: RetryOn = wanted
    return checked
