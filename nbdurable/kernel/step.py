"""One cell at a time: what a step cell needs is found out, decided, carried out and committed here.

Owns `Steps` (the hooks that IPython calls around a cell) and `Execution` (a step's body while it runs, up to its
commit). The rules are in `checkpoint/plan.py`; what IPython runs is made in `rewrite.py`.

    pre_run_cell → syntax tree → decide → the body | a call of `restore` → post_run_cell → commit
"""

from __future__ import annotations

import ast
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nbdurable import contract
from nbdurable.checkpoint import analysis
from nbdurable.checkpoint.manifest import (
    Blob,
    CodeFacts,
    Group,
    InputFact,
    Manifest,
    put_blob,
    read_blob,
    seal,
)
from nbdurable.checkpoint.plan import Verdict, decide, digest
from nbdurable.checkpoint.restore import restore
from nbdurable.checkpoint.save import save
from nbdurable.errors import DurableError, NotRestorable, StepUsageError, Suspended
from nbdurable.kernel import display
from nbdurable.kernel.foresight import label_of, read_cells
from nbdurable.kernel.outputs import Output, Recorder, recording, replay
from nbdurable.kernel.rewrite import GATE_CALL, HOOK, call, is_setup, may_wait, take_marker, unmark
from nbdurable.kernel.session import Session
from nbdurable.models import Checkpoint, ErrorInfo, StepStatus, Variable
from nbdurable.policies import span
from nbdurable.stepline import StepOptions, parse_step_line
from nbdurable.telemetry import fault_point

FRESH = "it has no checkpoint yet"  # as `checkpoint/plan.py` says it


@dataclass
class Cell:
    """The cell that IPython runs now."""

    source: str
    id: str | None
    names: analysis.CellNames | None = None  # of a plain cell, whose writes are noted when it ends
    digest: str = ""
    execution: Execution | None = None
    pending: BaseException | None = None  # to be raised by the rewritten cell
    to_restore: tuple[StepOptions, Manifest, Verdict] | None = None
    gates: dict[str, int] = field(default_factory=dict)  # of a plain cell: how often each was reached


@dataclass(frozen=True)
class Captured:
    """What a step has written and displayed so far; its values are in blobs."""

    variables: tuple[Variable, ...] = ()
    groups: tuple[Group, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)
    random: Blob | None = None
    deleted: tuple[str, ...] = ()
    outputs: tuple[Output, ...] = ()

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
        self.is_setup = False  # it runs in every attempt, and keeps nothing
        self.suspended: Suspended | None = None
        self._earlier_gates: list[str] = list(kept.wait_keys) if kept else []
        self._gates: list[tuple[int | None, str]] = []  # statement and key of each gate reached
        self._mark: tuple[int, Captured] | None = None
        self._taps = ExitStack()
        self._began = time.perf_counter()

    @property
    def name(self) -> str:
        return self.options.name

    def record(self) -> None:
        """Begin to copy what is displayed."""
        self._taps.enter_context(recording(self.session.shell, self.recorder))

    def begin(self) -> None:
        """Take note of the namespace, right before the body runs."""
        self.before = self.session.tracker.snapshot()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Stop copying what is displayed."""
        self._taps.close()

    def line_of_gate(self) -> tuple[int, int] | None:
        """Find the top-level statement, and its line, from which the caller was called.

        None where the call comes from a task or thread of its own, outside the cell's own stack.
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
            return None
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
        key = f"{proposal}.{digest(self.name, str(self.attempt), str(len(self._gates)))}"
        self._gates.append((statement, key))
        self._commit_waiting(at)
        return key

    def mark(self, statement: int) -> None:
        """Save what was done before a top-level statement that may reach a gate: where the step goes on behind it.

        Not at the gate itself: the statement runs again from its beginning, and what it did before the gate must
        not be there twice.
        """
        self._mark = (statement, self._capture())

    def written(self) -> tuple[set[str], set[str], dict[str, str], bool]:
        """Return what the step wrote and deleted so far, fingerprints, and whether random state moved."""
        values = self.session.values
        changes = self.session.tracker.changes(self.before, self.mentioned)
        named = {name for name in self.names.stores | self.options.save if name in values}
        names = set(changes.written) | {name for name in named if self.session.tracker.is_users(name)}
        deleted = set(changes.deleted)
        if self.kept is not None:
            names |= {v.name for v in self.kept.variables if v.state != "deleted"} - deleted
            deleted |= set(self.kept.deleted) - names
        moved = changes.random or (self.kept is not None and self.kept.random is not None)
        return names, deleted, dict(changes.fingerprints), moved

    def _capture(self) -> Captured:
        """Save what the step wrote so far to blobs."""
        session = self.session
        names, deleted, fingerprints, moved = self.written()
        if self.is_setup:
            names, deleted, moved = set(), set(), False
        left_out = names & self.options.no_save
        saved = save(session.values, names - left_out, session.blobs, fingerprints=fingerprints, random=moved)
        variables = [*saved.variables]
        for name in sorted(left_out):
            kind = type(session.values.get(name)).__name__
            variables.append(Variable(name=name, type=kind, state="unsaved", reason="left out by --no-save"))
        variables += [Variable(name=name, type="", state="deleted") for name in sorted(deleted)]
        kept = {variable.name for variable in variables if variable.state == "saved"}
        return Captured(
            variables=tuple(variables),
            groups=saved.groups,
            fingerprints={name: value for name, value in saved.fingerprints.items() if name in kept},
            random=saved.random,
            deleted=tuple(sorted(deleted)),
            outputs=tuple(self.recorder.finished()),
        )

    def commit(self) -> tuple[Variable, ...]:
        """Save and commit what the finished step wrote and displayed; return its variables.

        Raises DurableError, and nothing is committed.
        """
        captured = self._capture()
        if self.is_setup or (self.session.every_cell and captured.unsaved):
            self._commit("replay", captured)
        else:
            self._commit("completed", captured)
        return captured.variables

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
        manifest = Manifest(
            run_id=session.run_id,
            step=self.name,
            created_at=time.time(),
            duration_s=time.perf_counter() - self._began + (self.kept.duration_s if self.kept else 0.0),
            code=self.code,
            inputs=self.inputs,
            fingerprints=captured.fingerprints,
            variables=captured.variables,
            groups=captured.groups,
            deleted=captured.deleted,
            random=captured.random,
            outputs=put_blob(outputs, session.blobs) if captured.outputs else None,
            resume_at=resume_at,
            wait_keys=wait_keys,
        )
        session.blobs.sync()
        fault_point("checkpoint-saved")
        signed = seal(manifest, session.key)
        kept = display.summary(captured.variables)
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
            ),
        )
        fault_point("commit-acknowledged")
        checkpoint = Checkpoint(
            run_id=session.run_id,
            step=self.name,
            status=StepStatus(status),
            seq=done.seq,
            at=manifest.created_at,
            manifest=signed,
        )
        session.note(checkpoint, manifest)
        if self.is_setup:
            session.origins.plain_cell(self.names, self.code.digest, label_of(self.code.source))
        elif status != "waiting":
            session.visited.add(self.name)
            note_origins(session, manifest)

    def _needed_from(self, statement: int) -> set[str]:
        rest = ast.Module(self.body[statement:], type_ignores=[])
        names = analysis.analyse(rest, "")
        return analysis.uses(names.loads, self.session.values, self.session.project).inputs | set(names.loads)


def note_origins(session: Session, manifest: Manifest) -> None:
    """Note that a step wrote its variables; one that wasn't saved has no value to tell it from another."""
    names = {variable.name for variable in manifest.variables if variable.state != "deleted"}
    written = {name: manifest.fingerprints.get(name, "") for name in names}
    session.origins.step(manifest.step, written, manifest.deleted)


class Steps:
    """The hooks around each cell of a kernel, and what rewritten cells call (`__nbdurable__`)."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.shell = session.shell
        self._cells: list[Cell] = []

    @property
    def cell(self) -> Cell | None:
        """Return the cell that runs now; cells that a cell runs are part of it."""
        return self._cells[0] if self._cells else None

    @property
    def execution(self) -> Execution | None:
        """Return the step's body that runs now, if one does."""
        return self._cells[0].execution if self._cells else None

    # Called by IPython ---------------------------------------------------------------------------------------

    def pre_run_cell(self, info: Any) -> None:
        if _elsewhere():
            return
        cell_id = info.cell_id
        if cell_id is None and hasattr(self.shell, "get_parent"):
            cell_id = (self.shell.get_parent().get("metadata") or {}).get("cellId")
        self._cells.append(Cell(info.raw_cell, cell_id))
        self.session.values[HOOK] = self  # `%reset` may have taken it away

    def visit(self, tree: ast.Module) -> ast.Module:
        """Rewrite a cell's tree, as an IPython AST transformer: it must not raise, or IPython drops it silently."""
        cell = self.cell
        if (
            cell is None
            or _elsewhere()
            or len(self._cells) > 1
            or cell.names is not None
            or cell.execution is not None
        ):
            return tree  # code that runs inside a cell: part of that cell
        try:
            return self._rewrite(cell, tree)
        except BaseException as error:
            cell.pending = error
            return _only(call("fail"))

    def post_run_cell(self, result: Any) -> None:
        if not self._cells or _elsewhere():
            return  # the cell that loaded the extension, or a subshell's
        cell = self._cells.pop()
        if self._cells:
            return
        execution = cell.execution
        if execution is None:
            if cell.names is not None:
                self.session.origins.plain_cell(cell.names, cell.digest, label_of(cell.source))
            return
        execution.stop()
        error = None if result is None else result.error_before_exec or result.error_in_exec
        if result is None:
            error = KeyboardInterrupt("interrupted")
        if error is None and execution.suspended is not None:
            error = execution.suspended  # a bare `except:` in the cell has swallowed it
            self._turn_into_error(result, error)
        if error is not None:
            self._failed(execution, error)
            return
        try:
            with uninterrupted():
                self._say_kept(execution, execution.commit())
        except KeyboardInterrupt as interrupt:  # it is kept; but the cells that follow must not run
            self._turn_into_error(result, interrupt)
        except DurableError as trouble:
            self._turn_into_error(result, trouble)
            self._failed(execution, trouble)
        except Exception as bug:
            self._turn_into_error(result, bug)
            self._failed(execution, bug)

    # Called by rewritten cells ---------------------------------------------------------------------------------

    def fail(self) -> None:
        """Raise what went wrong while the cell was rewritten."""
        assert self.cell is not None
        assert self.cell.pending is not None
        raise self.cell.pending

    def restore(self) -> None:
        """Put a step's checkpoint back: variables, random state and what it displayed."""
        assert self.cell is not None
        assert self.cell.to_restore is not None
        options, manifest, verdict = self.cell.to_restore
        self._put_back(options.name, manifest)
        self.session.visited.add(options.name)
        if not self.session.headless:
            age = span(max(0.0, time.time() - manifest.created_at))
            kept = display.summary(manifest.variables)
            line = f"↺ {options.name}  restored, {age} old, {verdict.reason}" + (f" · {kept}" if kept else "")
            display.say(self.shell, "\n  ".join([line, *display.notices(manifest.variables)]))
        elif noticed := display.notices(manifest.variables):
            display.say(self.shell, "\n".join(noticed))

    def go_on(self) -> None:
        """Put back what a waiting step had done before its gate; the statements from the gate on follow."""
        execution = self.execution
        assert execution is not None
        assert execution.kept is not None
        execution.record()
        self._put_back(execution.name, execution.kept)
        execution.begin()

    def mark(self, statement: int) -> None:
        """Save what the step did before a statement that may wait."""
        assert self.execution is not None
        self.execution.mark(statement)

    def _put_back(self, step: str, manifest: Manifest) -> None:
        session = self.session
        try:
            outputs: list[Output] = (
                json.loads(bytes(read_blob(manifest.outputs, session.blobs))) if manifest.outputs else []
            )
            restore(manifest, session.values, session.blobs)
        except DurableError as error:
            error.todo = (error.todo or "run the step again (`%durable rerun NAME`)").replace("NAME", step)
            raise
        note_origins(session, manifest)
        replay(self.shell, outputs)
        fault_point("restore-done")

    # Deciding ----------------------------------------------------------------------------------------------------

    def _rewrite(self, cell: Cell, tree: ast.Module) -> ast.Module:
        session = self.session
        line = take_marker(tree)
        if line is not None:
            unmark(line)
            options = parse_step_line(line)
            if not tree.body:
                raise StepUsageError(
                    f"step `{options.name}` has no code", todo="write it below the `%%step` line"
                )
        elif session.every_cell and cell.id is not None and tree.body:
            options = StepOptions(cell.id)
        else:
            cell.names = analysis.analyse(tree, cell.source)
            cell.digest = analysis.code_digest(ast.unparse(tree))
            return tree
        self._check_unique(options, cell)
        configures = session.every_cell and line is None and is_setup(tree)
        body = list(tree.body)
        names = analysis.analyse(tree, cell.source)
        code, used = self._facts(cell, tree, names, is_marked=line is not None)
        mentioned = frozenset(names.loads | used.inputs)
        session.run_id  # noqa: B018  raises what keeps steps from running; creates the run where there is none
        known = session.manifest(options.name)
        facts: dict[str, InputFact] = {}

        def inputs() -> dict[str, InputFact]:
            if not facts:
                facts.update(self._inputs(used))
            return facts

        verdict = decide(
            known,
            code,
            inputs,
            step=options.name,
            visited=options.name in session.visited,
            on_drift=options.on_drift or session.settings.on_drift,  # type: ignore[arg-type]
            forced=self._forced(options, configures=configures),
        )
        if verdict.action == "refuse":
            raise NotRestorable(
                f"step `{options.name}` is not restored: {verdict.reason}",
                todo=f"`%durable rerun {options.name}` runs it with the new value",
            )
        begun = session.client.call(
            contract.BEGIN_STEP,
            contract.BeginStep(
                run_id=session.run_id,
                epoch=session.epoch,
                step=options.name,
                action="restore" if verdict.action == "restore" else "execute",
                reason=verdict.reason,
                cell_id=cell.id,
            ),
        )
        session.to_rerun.discard(options.name)
        if verdict.action == "restore":
            assert known is not None
            cell.to_restore = (options, known, verdict)
            return _only(call("restore"))
        if verdict.action == "continue":
            assert known is not None
            assert known.resume_at is not None
            cell.execution = Execution(
                session,
                options,
                known.code,
                known.inputs,
                body,
                names,
                mentioned,
                verdict,
                begun.attempt,
                known,
            )
            tree.body = [call("go_on"), *self._marked(body, used, known.resume_at)]
            return tree
        cell.execution = Execution(
            session, options, code, inputs(), body, names, mentioned, verdict, begun.attempt
        )
        cell.execution.is_setup = configures
        cell.execution.record()
        cell.execution.begin()
        tree.body = self._marked(body, used)
        return tree

    def _marked(self, body: list[ast.stmt], used: analysis.Uses, start: int = 0) -> list[ast.stmt]:
        """Return a step's statements from `start` on, with a mark before each that may reach a gate."""
        waiting = {name for name, fact in used.helpers.items() if GATE_CALL.search(fact.source)}
        marked: list[ast.stmt] = []
        for index, node in enumerate(body[start:], start):
            if may_wait(node, self.session.values, used.helpers.keys() if waiting else ()):
                marked.append(ast.copy_location(call("mark", index), node))
            marked.append(node)
        return marked

    def _forced(self, options: StepOptions, *, configures: bool) -> str | None:
        checkpoint = self.session.checkpoints.get(options.name)
        if configures:
            return "it only imports and configures: it runs in every attempt"
        if checkpoint is not None and checkpoint.status is StepStatus.REPLAY:
            return "what it made can't be saved: it runs in every attempt"
        if options.force:
            return "forced by --force"
        if options.name in self.session.to_rerun:
            return "asked for by %durable rerun"
        return None

    def _check_unique(self, options: StepOptions, cell: Cell) -> None:
        if cell.id is None:
            return
        other = self.session.cells.setdefault(options.name, cell.id)
        if other != cell.id:
            if _stands_in_notebook(self.session, other, options.name):
                raise StepUsageError(
                    f"two cells of this notebook are named `{options.name}`",
                    todo="a step's name is unique in its notebook: give one of them another name",
                )
            self.session.cells[options.name] = cell.id

    def _facts(
        self, cell: Cell, tree: ast.Module, names: analysis.CellNames, *, is_marked: bool
    ) -> tuple[CodeFacts, analysis.Uses]:
        used = analysis.uses(names.loads, self.session.values, self.session.project)
        source = cell.source.lstrip().partition("\n")[2] if is_marked else cell.source
        code = CodeFacts(
            source=source,
            digest=analysis.code_digest(ast.unparse(tree)),
            helpers=used.helpers,
            modules=used.modules,
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )
        return code, used

    def _inputs(self, used: analysis.Uses) -> dict[str, InputFact]:
        session = self.session
        facts = {}
        for name in used.inputs:
            if name in session.values and session.tracker.is_users(name):
                origin = session.origins[name]
                facts[name] = InputFact(
                    value=session.tracker.fingerprint(name), origin=origin.digest, label=origin.label
                )
        return facts

    # Telling -----------------------------------------------------------------------------------------------------

    def _say_kept(self, execution: Execution, variables: tuple[Variable, ...]) -> None:
        noticed = display.notices(variables)
        if self.session.headless:
            if noticed:
                display.say(self.shell, "\n".join(noticed))
            return
        manifest = self.session.manifest(execution.name)
        took = span(manifest.duration_s) if manifest else ""
        kept = display.summary(variables)
        line = f"✓ {execution.name}  {took}{_because(execution.verdict)}" + (f" · {kept}" if kept else "")
        display.say(self.shell, "\n  ".join([line, *noticed]))

    def _failed(self, execution: Execution, error: BaseException) -> None:
        if isinstance(error, Suspended):
            return
        session = self.session
        question = contract.FailStep(
            run_id=session.run_id,
            epoch=session.epoch,
            step=execution.name,
            attempt=execution.attempt,
            error=describe_error(error),
        )
        with suppress(DurableError):  # the user's own error is what must be seen
            session.client.call(contract.FAIL_STEP, question)
        if not session.headless:
            kept = [
                name
                for name, c in session.checkpoints.items()
                if c.status is StepStatus.COMPLETED and name != execution.name
            ]
            what = f"kept: {display.few(kept)}" if kept else "no other step is kept yet"
            if self._waits_open(execution):
                todo = "what stands above its gate is kept, too: run the cell again to go on from there"
            else:
                todo = "fix the cell and run it again"
            why = _because(execution.verdict)
            display.say(self.shell, f"✗ {execution.name} did not finish{why} · {what} · {todo}")

    def _waits_open(self, execution: Execution) -> bool:
        checkpoint = self.session.checkpoints.get(execution.name)
        return checkpoint is not None and checkpoint.status is StepStatus.WAITING

    def _turn_into_error(self, result: Any, error: BaseException) -> None:
        """Make a cell that ran through an error after all, so that the kernel's reply and papermill see it."""
        if result is not None:
            result.error_in_exec = error
        self.shell.showtraceback((type(error), error, error.__traceback__))


def _because(verdict: Verdict) -> str:
    """Say why a step ran, where that is not plain."""
    return "" if verdict.reason == FRESH else f" ({verdict.reason})"


def _elsewhere() -> bool:
    """Tell whether this is a subshell's thread, whose cells are not steps."""
    return threading.current_thread() is not threading.main_thread()


def describe_error(error: BaseException) -> ErrorInfo:
    """Return an exception as text."""
    text = "".join(traceback.format_exception(error))
    return ErrorInfo(name=type(error).__name__, message=str(error)[:2000], traceback=text[-20_000:])


def _only(statement: ast.stmt) -> ast.Module:
    return ast.Module([statement], type_ignores=[])


def _stands_in_notebook(session: Session, cell_id: str, step: str) -> bool:
    cells = read_cells(session.notebook)
    if not cells:
        return True
    return any(c.id == cell_id and c.options is not None and c.options.name == step for c in cells)


def shown_as(error: BaseException, sentence: str) -> BaseException:
    """Show an interrupt as one sentence, instead of with a traceback through our own code."""
    error._render_traceback_ = lambda: [sentence]  # type: ignore[attr-defined]
    return error


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back an interrupt while a checkpoint is committed; it is raised afterwards, unless something else is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise shown_as(KeyboardInterrupt(), "KeyboardInterrupt: what the step did until then is kept")


__all__ = ["FRESH", "Cell", "Execution", "Steps", "describe_error", "shown_as", "uninterrupted"]
