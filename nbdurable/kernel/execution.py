"""A step's body while it runs: what was there before, what it displays, its gates, and its commit.

Owns `Execution`; decides nothing (`step.py`) and knows nothing of IPython's hooks. What a step wrote is found by
`checkpoint/track.py` and saved by `checkpoint/save.py`; it is committed when the coordinator says that it is.
"""

from __future__ import annotations

import ast
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from nbdurable import contract
from nbdurable.checkpoint import analysis
from nbdurable.checkpoint.manifest import Blob, CodeFacts, Group, InputFact, Manifest, put_blob, seal
from nbdurable.checkpoint.packages import versions
from nbdurable.checkpoint.plan import Verdict, digest
from nbdurable.checkpoint.recipes import misnamed
from nbdurable.checkpoint.save import save
from nbdurable.checkpoint.track import Changes
from nbdurable.errors import ControlSignal, RestSkipped, StepUsageError
from nbdurable.kernel import display
from nbdurable.kernel.attempts import Attempts
from nbdurable.kernel.outputs import Output, Recorder, recording
from nbdurable.kernel.recorded import Calls
from nbdurable.kernel.session import Session
from nbdurable.models import Checkpoint, StepStatus, Variable
from nbdurable.policies import span
from nbdurable.stepline import StepOptions
from nbdurable.telemetry import fault_point

TICK_S = 0.2  # an interrupt is seen within it
MAX_VARIABLES = 50_000  # of a step: each has facts of its own in the manifest


@dataclass(frozen=True)
class Captured:
    """What a step has written and displayed so far; its values are in blobs."""

    variables: tuple[Variable, ...] = ()
    groups: tuple[Group, ...] = ()
    later: tuple[Group, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)
    random: Blob | None = None
    deleted: tuple[str, ...] = ()
    outputs: tuple[Output, ...] = ()
    modules: frozenset[str] = frozenset()  # that the values' types come from
    starts: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def unsaved(self) -> set[str]:
        return {variable.name for variable in self.variables if variable.state == "unsaved"}


class Execution:
    """A step's body while it runs: what was there before, what it displays, and its commit."""

    def __init__(
        self,
        session: Session,
        options: StepOptions,
        code: CodeFacts,
        inputs: dict[str, InputFact],
        body: list[ast.stmt],
        names: analysis.CellNames,
        mentioned: frozenset[str],
        verdict: Verdict,
        attempt: int,
        kept: Manifest | None = None,
    ) -> None:
        self.session, self.options, self.code, self.inputs = session, options, code, inputs
        self.verdict, self.attempt, self.kept = verdict, attempt, kept
        self.body, self.names, self.mentioned = body, names, mentioned
        self.recorder = Recorder()
        self.again: str | None = None  # why it runs in every attempt, and keeps nothing
        self.signal: ControlSignal | None = None  # with which the cell ends
        self.recorded_calls = 0  # by earlier attempts
        self.calls: Calls | None = None
        self.sent = False  # whether the commit was begun that ends the step
        self.trying: Attempts | None = None  # where the step's line asks for retries or a time limit
        self.gated: Manifest | None = None  # what was committed before the newest gate of this body
        self.starts: dict[str, int] = {}  # how often the body started each run so far
        self._earlier_gates: list[str] = list(kept.wait_keys) if kept else []
        self._gates: list[tuple[int | None, str]] = []  # statement and key of each gate reached
        self._mark: tuple[int, Captured] | None = None
        self._at: int | None = None  # the marked statement that runs now
        self._taps = ExitStack()
        self._began = time.perf_counter()

    @property
    def name(self) -> str:
        return self.options.name

    def record(self) -> None:
        """Begin to copy what is displayed, and to listen for interrupts."""
        self._taps.enter_context(_awake())
        self._taps.enter_context(recording(self.session.shell, self.recorder))

    def begin(self) -> None:
        """Take note of the namespace, right before the body runs."""
        self.before = self.session.tracker.snapshot()
        self._go_on_from(self.kept)
        self._began = time.perf_counter()

    def rewind(self, statement: int) -> None:
        """Begin anew at a top-level statement: its gates, and those below it, keep their keys, and so their answers."""
        reached = [key for where, key in self._gates if where is None or where >= statement]
        self._earlier_gates = reached + self._earlier_gates
        self._gates, self._mark, self._at = [], None, None
        before = self.gated if self.gated is not None and self.gated.resume_at else self.kept
        self.recorded_calls += self.calls.made if self.calls is not None else 0
        self._go_on_from(before)

    def _go_on_from(self, kept: Manifest | None) -> None:
        """Count on the calls, and the runs started, that a checkpoint has counted above the statement that follows."""
        counted = kept.calls if kept is not None else {}
        self.calls = Calls(self.session, self.name, self.attempt, self.recorded_calls, self.names, counted)
        self.starts = dict(kept.starts) if kept is not None else {}

    def begin_again(self, attempt: int, recorded_calls: int) -> None:
        """Begin another attempt, in the state that was there before."""
        self.attempt, self.recorded_calls = attempt, recorded_calls
        self._go_on_from(self.kept)
        self._began = time.perf_counter()

    def made_by(self) -> str:
        """Return the digest of all that the step's code stands on, for what a recipe makes in it."""
        helpers = (
            f"{name}={fact.ast}{sorted((fact.state or {}).items())}"
            for name, fact in sorted(self.code.helpers.items())
        )
        inputs = (f"{name}={fact.origin}" for name, fact in sorted(self.inputs.items()))
        return digest(self.code.digest, *helpers, "", *inputs)

    def stop(self) -> None:
        """Stop copying what is displayed."""
        self._taps.close()

    def line_of_gate(self) -> tuple[int, int] | None:
        """Find the top-level statement, and its line, from which the caller was called.

        A task or thread of the cell's counts as part of the statement that runs meanwhile, if that may wait; else None.
        """
        line: int | None = None
        frame = sys._getframe()
        while frame is not None:
            if frame.f_globals is self.session.values and frame.f_code.co_name.startswith(
                ("<module>", "<cell line")
            ):
                line = frame.f_lineno  # the outermost one is the cell itself
            frame = frame.f_back  # type: ignore[assignment]
        if line is None:
            return None if self._at is None else (self._at, self.body[self._at].lineno)
        for index, node in enumerate(self.body):
            if node.lineno <= line <= (node.end_lineno or node.lineno):
                return index, line
        return None

    def gate(self, proposal: str) -> str:
        """Return the key of the gate that was reached with this proposal.

        A gate that this body had reached before it was suspended keeps its key, and so its answer. A new one gets
        its key once what came before it is checkpointed.
        """
        at = self.line_of_gate()
        statement = at[0] if at else None
        for key in self._earlier_gates:
            if key.startswith(f"{proposal}."):
                self._earlier_gates.remove(key)
                self._gates.append((statement, key))
                return key
        if self.again:
            raise StepUsageError(
                f"step `{self.name}` can't wait: {self.again}, and would ask again each time",
                todo="wait in a step of its own",
            )
        key = f"{proposal}.{digest(self.name, str(self.attempt), str(len(self._gates)))}"
        self._gates.append((statement, key))
        self._commit_waiting(at)
        return key

    @property
    def comes_back(self) -> bool:
        """Tell whether it goes on behind gates that it has not reached again yet."""
        return bool(self._earlier_gates)

    def mark(self, statement: int) -> None:
        """Save what was done before a top-level statement that may reach a gate: where the step goes on behind it.

        Not at the gate itself: the statement runs again from its beginning, and what it did before the gate must
        not be there twice.
        """
        self._at = statement
        self._mark = (statement, self._capture())

    def passed(self) -> None:
        """Take note that the marked statement is over."""
        self._at = None

    def written(self) -> tuple[set[str], set[str], Changes, bool]:
        """Return what the step wrote and deleted so far, what was looked at, and whether random state moved."""
        values = self.session.values
        changes = self.session.tracker.changes(self.before, self.mentioned)
        named = {name for name in self.names.stores | self.options.save if name in values}
        names = set(changes.written) | {name for name in named if self.session.tracker.is_users(name)}
        deleted = set(changes.deleted)
        if self.kept is not None:
            names |= {v.name for v in self.kept.variables if v.state != "deleted"} - deleted
            deleted |= set(self.kept.deleted) - names
        moved = changes.random or (self.kept is not None and self.kept.random is not None)
        return names, deleted, changes, moved

    def _capture(self) -> Captured:
        """Save what the step wrote so far to blobs."""
        session = self.session
        names, deleted, changes, moved = self.written()
        if self.again:
            names, deleted, moved = set(), set(), False
        if len(names) > MAX_VARIABLES:
            raise StepUsageError(
                f"step `{self.name}` wrote {len(names):,} variables; a checkpoint holds {MAX_VARIABLES:,} at most",
                todo="keep them in one dict or list",
            )
        left_out = names & self.options.no_save
        saved = save(
            session.values,
            names - left_out,
            session.blobs,
            fingerprints=changes.fingerprints,
            walks=changes.walks,
            step=self.name,
            random=moved,
        )
        variables = [*saved.variables]
        for name in sorted(left_out):
            kind = type(session.values.get(name)).__name__
            variables.append(Variable(name=name, type=kind, state="unsaved", reason="left out by --no-save"))
        variables += [Variable(name=name, type="", state="deleted") for name in sorted(deleted)]
        kept = {variable.name for variable in variables if variable.state in ("saved", "recipe")}
        return Captured(
            variables=tuple(variables),
            groups=saved.groups,
            later=saved.later,
            fingerprints={name: value for name, value in saved.fingerprints.items() if name in kept},
            random=saved.random,
            deleted=tuple(sorted(deleted)),
            outputs=tuple(self.recorder.finished()),
            modules=saved.modules,
            starts=dict(self.starts),
            calls=self.calls.numbers() if self.calls is not None else {},
        )

    def commit(self) -> tuple[Variable, ...]:
        """Save and commit what the finished step wrote and displayed; return its variables.

        Raises DurableError, and nothing is committed.
        """
        self._check_recipes()
        captured = self._capture()
        if self.again or (self.session.every_cell and captured.unsaved):
            self._commit("replay", captured)
        else:
            self._commit("completed", captured)
        return captured.variables

    def _check_recipes(self) -> None:
        """Refuse a recipe under a name that no variable, or another one, has: it would come back where nobody looks."""
        for name, holders in misnamed(self.name, self.session.values):
            others = [holder for holder in holders if self.session.tracker.is_users(holder)]
            if others:
                raise StepUsageError(
                    f"what the recipe `{name}` made is held by the variable `{others[0]}`, not `{name}`",
                    todo=f"write `{others[0]} = durable.recipe('{others[0]}', …)`",
                )
            if name not in self.session.values and name not in self.names.deletes:
                raise StepUsageError(
                    f"the recipe `{name}` ran, but the cell left no variable `{name}`",
                    todo=f"write `{name} = durable.recipe('{name}', …)` in the cell itself",
                )

    def _commit_waiting(self, at: tuple[int, int] | None) -> None:
        """Commit what was done before the statement `at`, which reached a gate.

        Where a part of that can't be saved and is still needed, or the gate is called from where no mark stands,
        nothing is kept, and the step runs from its top behind the gate.
        """
        resume_at, captured = 0, Captured()
        if at is not None and self._mark is not None and self._mark[0] == at[0]:
            outputs = (o for o in self._mark[1].outputs if display.APPROVAL_MIME not in o.get("data", {}))
            if not self._mark[1].unsaved & self._needed_from(at[0]):
                resume_at, captured = at[0], replace(self._mark[1], outputs=tuple(outputs))
        keys = tuple(key for where, key in self._gates if where == resume_at or not resume_at)
        self._commit("waiting", captured, resume_at=resume_at, wait_keys=keys, line=at[1] if at else None)

    def _commit(
        self,
        status: Literal["completed", "waiting", "replay"],
        captured: Captured,
        *,
        resume_at: int | None = None,
        wait_keys: tuple[str, ...] = (),
        line: int | None = None,
    ) -> None:
        session = self.session
        outputs = json.dumps(captured.outputs).encode()
        packages = self.code.packages | versions(captured.modules | self.names.imports)
        manifest = Manifest(
            run_id=session.run_id,
            step=self.name,
            created_at=time.time(),
            duration_s=time.perf_counter() - self._began + (self.kept.duration_s if self.kept else 0.0),
            code=self.code.model_copy(update={"packages": packages}),
            inputs=self.inputs,
            fingerprints=captured.fingerprints,
            variables=captured.variables,
            groups=captured.groups,
            later=captured.later,
            deleted=captured.deleted,
            random=captured.random,
            outputs=put_blob(outputs, session.blobs) if captured.outputs else None,
            resume_at=resume_at,
            wait_keys=wait_keys,
            starts=captured.starts if status == "waiting" else {},
            calls=captured.calls if status == "waiting" else {},
            skips_rest=self.signal.sentence if isinstance(self.signal, RestSkipped) else None,
        )
        session.blobs.renew(manifest.files())
        session.blobs.sync()
        fault_point("checkpoint-saved")
        signed = seal(manifest, session.key)
        kept = display.summary(captured.variables)
        self.sent = status != "waiting"
        done = session.client.call(
            contract.COMMIT_STEP,
            contract.CommitStep(
                run_id=session.run_id,
                epoch=session.epoch,
                step=self.name,
                attempt=self.attempt,
                status=status,
                manifest=signed,
                variables=manifest.variables,
                sentence=" · ".join(filter(None, (span(manifest.duration_s), kept))),
                line=line,
                calls=self.calls.made if self.calls else 0,
                replayed=tuple(self.calls.replayed) if self.calls else (),
            ),
        )
        fault_point("commit-acknowledged", self.name)
        checkpoint = Checkpoint(
            run_id=session.run_id,
            step=self.name,
            status=StepStatus(status),
            seq=done.seq,
            at=manifest.created_at,
            manifest=signed,
        )
        session.note(checkpoint, manifest)
        self.gated = manifest if status == "waiting" else None
        if self.again:
            session.note_plain_cell(self.names, self.code.digest, self.code.source)
            if self.options.replay:
                session.note_replayed(self.names)
        elif status != "waiting":
            session.visited.add(self.name)
            note_origins(session, manifest)

    def _needed_from(self, statement: int) -> set[str]:
        rest = ast.Module(self.body[statement:], type_ignores=[])
        names = analysis.analyse(rest, "")
        return {*analysis.uses(names.loads, self.session.values, self.session.modules).inputs, *names.loads}


@contextmanager
def _awake() -> Iterator[None]:
    """Wake the event loop now and then: a kernel sees an interrupt of a long `await` no sooner than its loop wakes."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # plain IPython runs a cell without `await` outside a loop
        yield
        return

    timer: asyncio.TimerHandle

    def tick() -> None:
        nonlocal timer
        timer = loop.call_later(TICK_S, tick)

    tick()
    try:
        yield
    finally:
        timer.cancel()


def note_origins(session: Session, manifest: Manifest) -> None:
    """Note that a step wrote its variables; one that wasn't saved has no value to tell it from another."""
    names = {variable.name for variable in manifest.variables if variable.state != "deleted"}
    written = {name: manifest.fingerprints.get(name, "") for name in names}
    session.origins.step(manifest.step, written, manifest.deleted)
