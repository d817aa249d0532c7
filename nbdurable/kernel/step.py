"""One cell at a time: what a step cell needs is found out, decided, carried out and committed here.

Owns `Steps`, the hooks that IPython calls around a cell. The rules are in `checkpoint/plan.py`; what IPython runs is
made in `rewrite.py`; a body that runs is `execution.py`'s.

    pre_run_cell → syntax tree → decide → the body | a call of `restore` → post_run_cell → commit
"""

from __future__ import annotations

import ast
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from IPython.utils.capture import capture_output

from nbdurable import contract
from nbdurable.checkpoint import analysis, recipes
from nbdurable.checkpoint.fingerprint import partial_fingerprint
from nbdurable.checkpoint.manifest import (
    CodeFacts,
    InputFact,
    Manifest,
)
from nbdurable.checkpoint.packages import versions
from nbdurable.checkpoint.plan import Verdict, decide, digest
from nbdurable.checkpoint.restore import restore
from nbdurable.checkpoint.sources import code_digest
from nbdurable.checkpoint.watched import missing
from nbdurable.errors import (
    CheckpointError,
    ControlSignal,
    DurableError,
    NotRestorable,
    Paused,
    RestSkipped,
    StepUsageError,
    Suspended,
)
from nbdurable.kernel import display
from nbdurable.kernel.attempts import Attempts, find_retry_on, next_try
from nbdurable.kernel.execution import Execution, note_origins
from nbdurable.kernel.foresight import read_cells
from nbdurable.kernel.interrupts import describe_error, uninterrupted
from nbdurable.kernel.interrupts import shown_as as shown_as
from nbdurable.kernel.outputs import outputs_of, replay
from nbdurable.kernel.rewrite import (
    GATE_CALL,
    HOOK,
    QUESTION_CALL,
    call,
    in_attempts,
    may_wait,
    take_marker,
    unmark,
    why_again,
)
from nbdurable.kernel.session import Session
from nbdurable.models import StepStatus, Variable
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
    restoring: Restoring | None = None
    gates: dict[str, int] = field(default_factory=dict)  # of a plain cell: how often each was reached


@dataclass(frozen=True)
class Restoring:
    """A step that is to be restored; `begun` returns once that decision is on disk, or raises what forbids it."""

    name: str
    manifest: Manifest
    verdict: Verdict
    begun: Callable[[], object]


@dataclass(frozen=True)
class Considered:
    """What is decided about a step's cell, and what it was decided by."""

    options: StepOptions
    tree: ast.Module
    names: analysis.CellNames
    code: CodeFacts
    used: analysis.Uses
    known: Manifest | None
    verdict: Verdict
    again: str | None
    inputs: Callable[[], dict[str, InputFact]]

    @property
    def brings_back(self) -> bool:
        """Tell whether nothing but a restore follows: no code of the notebook runs, and the notebook goes on."""
        known = self.known
        return (
            self.verdict.action == "restore"
            and known is not None
            and not known.later
            and not known.skips_rest
        )


class Steps:
    """The hooks around each cell of a kernel, and what rewritten cells call (`__nbdurable__`)."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.shell = session.shell
        self._cells: list[Cell] = []
        self.stopped: tuple[str, Verdict, Manifest | None] | None = None  # the step at which that ended
        self._foreseen: Considered | None = None  # of the cell that IPython runs next

    @property
    def cell(self) -> Cell | None:
        """Return the cell that runs now; cells that a cell runs are part of it."""
        return self._cells[0] if self._cells else None

    @property
    def execution(self) -> Execution | None:
        """Return the step's body that runs now, if one does."""
        return self._cells[0].execution if self._cells else None

    @property
    def trying(self) -> Attempts:
        """Return the tries of the step that runs now, for its rewritten cell."""
        assert self.execution is not None
        assert self.execution.trying is not None
        return self.execution.trying

    # Called by IPython ---------------------------------------------------------------------------------------

    def pre_run_cell(self, info: Any) -> None:
        if _elsewhere():
            return
        cell_id = info.cell_id
        if cell_id is None and hasattr(self.shell, "get_parent"):
            cell_id = (self.shell.get_parent().get("metadata") or {}).get("cellId")
        self._cells.append(Cell(info.raw_cell, cell_id))
        if len(self._cells) == 1:
            self.session.made.clear()
            recipes.forget_gone(self.session.values)
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
            if take_marker(tree) is None:
                return tree  # code that runs inside a cell: part of that cell
            return _only(call("misplaced"))
        try:
            return self._rewrite(cell, tree)
        except BaseException as error:
            cell.pending = error
            return _only(call("fail"))

    def post_run_cell(self, result: Any) -> None:
        if not self._cells or _elsewhere():
            return  # the cell that loaded the extension, or a subshell's
        self.session.modules.note()
        cell = self._cells.pop()
        if self._cells:
            return
        execution = cell.execution
        if execution is None:
            if cell.names is not None:
                self.session.note_plain_cell(cell.names, cell.digest, cell.source)
                self.session.give_parameters(cell.id or "")
                try:  # in front of a person what it showed is taken back later, if need be
                    self.session.blobs.settle(wait=self.session.headless)
                except DurableError as trouble:
                    self._turn_into_error(result, trouble)
            return
        if execution.calls is not None:
            execution.calls.say()
        execution.stop()
        error = None if result is None else result.error_before_exec or result.error_in_exec
        if result is None:
            error = KeyboardInterrupt("interrupted")
        if execution.signal is not None and (error is None or _wraps_signal(error)):
            error = (
                execution.signal
            )  # a bare `except:` in the cell has swallowed it, or a task group wrapped it
            self._turn_into_error(result, error)
        if error is not None and not isinstance(error, RestSkipped):
            self._failed(execution, error)
            return
        try:
            with uninterrupted(lambda: execution.sent):
                self._say_kept(execution, execution.commit())
        except KeyboardInterrupt as interrupt:
            self._turn_into_error(result, interrupt)
            if not execution.sent:  # else it is kept; but the cells that follow must not run
                self._failed(execution, interrupt)
        except DurableError as trouble:
            self._turn_into_error(result, trouble)
            self._failed(execution, trouble)
        except Exception as bug:
            self._turn_into_error(result, bug)
            self._failed(execution, bug)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let the cells that are run meanwhile count as cells of their own, not as part of the one that runs them."""
        outer, self._cells, self.session.bringing, self.stopped = self._cells, [], True, None
        try:
            yield
        finally:
            self._cells, self.session.bringing = outer, False

    # Called by `ahead.py` ------------------------------------------------------------------------------------

    def foresee(self, source: str, transformed: str, cell_id: str) -> bool:
        """Tell whether a cell is only restored, and no code of the notebook runs; IPython is to run it next then.

        What keeps it from being decided is told when the cell runs by itself.
        """
        self._foreseen = None
        try:
            tree = self.shell.compile.ast_parse(transformed, filename="<cell>")
            found = self._consider(Cell(source, cell_id), tree)
        except Exception:
            return False
        if found is None or not found.brings_back:
            return False
        self._foreseen = found
        return True

    # Called by rewritten cells ---------------------------------------------------------------------------------

    def fail(self) -> None:
        """Raise what went wrong while the cell was rewritten."""
        assert self.cell is not None
        assert self.cell.pending is not None
        raise self.cell.pending

    def misplaced(self) -> None:
        """Refuse a step that runs where no cell of its own is."""
        raise StepUsageError(
            "`%%step` was run inside another cell, silently, or in a subshell",
            todo="give the step a cell of its own, and run it as people run cells",
        )

    def restore(self) -> None:
        """Put a step's checkpoint back: variables, random state and what it displayed."""
        assert self.cell is not None
        assert self.cell.restoring is not None
        step, manifest = self.cell.restoring.name, self.cell.restoring.manifest
        self._put_back(step, manifest, self.cell.restoring.begun)
        self.session.visited.add(step)
        if not self.session.headless:
            age = span(max(0.0, time.time() - manifest.created_at))
            kept = display.summary(manifest.variables)
            reason = self.cell.restoring.verdict.reason
            line = f"↺ {step}  restored, {age} old, {reason}" + (f" · {kept}" if kept else "")
            display.say(self.shell, "\n  ".join([line, *self._notices(manifest)]))
        elif noticed := self._notices(manifest):
            display.say(self.shell, "\n".join(noticed))
        if manifest.skips_rest is not None:
            raise RestSkipped(manifest.skips_rest)

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

    def passed(self) -> None:
        """Take note that a statement that may wait is over."""
        assert self.execution is not None
        self.execution.passed()

    def note_recipe(self, name: str, value: Any, make: Any) -> None:
        """Note what makes a value again, which the cell that runs now binds to a variable."""
        session, execution = self.session, self.execution
        own = partial_fingerprint(make, session.values)[0]
        if execution is None or execution.again:
            recipe = recipes.Recipe(name, value, make, own)
            session.made.append(recipe)
        else:
            recipe = recipes.Recipe(name, value, make, digest(own, execution.made_by()), execution.name)
        recipes.note(recipe)

    def _put_back(self, step: str, manifest: Manifest, begun: Callable[[], object] = lambda: None) -> None:
        session = self.session
        told = False

        def ready() -> None:
            nonlocal told
            told = True
            begun()
            session.tracker.make_room(written)

        written = [*(variable.name for variable in manifest.variables), *manifest.deleted]
        try:
            try:
                outputs = outputs_of(manifest, session.blobs)
                with (
                    capture_output() if manifest.later else nullcontext()
                ):  # what recipes print was shown before
                    plain = restore(manifest, session.values, session.blobs, ready=ready)
            except DurableError:
                if not told:
                    begun()  # who may not drive the run any more is told that first
                raise
        except CheckpointError as error:
            error.todo = (error.todo or "run the step again (`%durable rerun NAME`)").replace("NAME", step)
            raise
        session.tracker.put_back((n for n in written if n in session.values), manifest.fingerprints, plain)
        note_origins(session, manifest)
        replay(self.shell, outputs)
        fault_point("restore-done")

    # Deciding ----------------------------------------------------------------------------------------------------

    def _consider(self, cell: Cell, tree: ast.Module) -> Considered | None:
        """Decide about a step's cell; of a plain one only its names are noted, since it runs anyway."""
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
            cell.digest = code_digest(ast.unparse(tree))
            return None
        self._check_unique(options, cell)
        return self._weigh(cell, tree, options, is_marked=line is not None)

    def _weigh(self, cell: Cell, tree: ast.Module, options: StepOptions, *, is_marked: bool) -> Considered:
        session = self.session
        session.run_id  # noqa: B018  raises what keeps steps from running; creates the run where there is none
        session.give(options.name)
        again = why_again(options, tree, marked=is_marked, every_cell=session.every_cell)
        names = analysis.analyse(tree, cell.source)
        code, used = self._facts(cell, tree, names, options, is_marked=is_marked)
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
            forced=again or self._forced(options),
        )
        if verdict.action == "refuse":
            raise NotRestorable(
                f"step `{options.name}` is not restored: {verdict.reason}",
                todo=f"`%durable rerun {options.name}` runs it with the new value",
            )
        return Considered(options, tree, names, code, used, known, verdict, again, inputs)

    def _rewrite(self, cell: Cell, tree: ast.Module) -> ast.Module:
        session = self.session
        decided, self._foreseen = self._foreseen, None
        if decided is None:
            decided = self._consider(cell, tree)
        elif (line := take_marker(tree)) is not None:
            unmark(line)
        if decided is None:
            return tree
        options, names, used, verdict = decided.options, decided.names, decided.used, decided.verdict
        known = decided.known
        body = list(decided.tree.body)
        mentioned = frozenset({*names.loads, *used.inputs})
        fresh = verdict.action == "execute" and (options.force or options.name in session.to_rerun)
        retry_on = find_retry_on(options, session.values) if verdict.action != "restore" else None
        if session.bringing and decided.again is None and verdict.action != "restore":
            self.stopped = (options.name, verdict, known)
            return ast.Module([ast.Pass()], type_ignores=[])
        asked = session.client.ask(
            contract.BEGIN_STEP,
            contract.BeginStep(
                run_id=session.run_id,
                epoch=session.epoch,
                step=options.name,
                action=verdict.action,
                reason=verdict.reason,
                cell_id=cell.id,
                fresh=fresh,
                goes_on=session.headless,
            ),
        )

        def begin() -> contract.Begun:
            begun = asked()
            if begun.again_in_s is not None:
                raise Suspended(f"⏸ {options.name} {next_try(begun.again_in_s)}")
            return begun

        if verdict.action == "restore":  # loading its values goes on meanwhile
            assert known is not None
            cell.restoring = Restoring(options.name, known, verdict, begin)
            return _only(call("restore"))
        begun = begin()
        session.to_rerun.discard(options.name)
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
            cell.execution.recorded_calls = begun.calls
            tries = Attempts(cell.execution, begun.failed, retry_on)
            tree.body = [call("go_on"), *self._tried(cell.execution, used, tries, known.resume_at)]
            return tree
        cell.execution = Execution(
            session, options, decided.code, decided.inputs(), body, names, mentioned, verdict, begun.attempt
        )
        cell.execution.again = decided.again
        cell.execution.recorded_calls = begun.calls
        recipes.forget_step(options.name)
        cell.execution.record()
        cell.execution.begin()
        tree.body = self._tried(cell.execution, used, Attempts(cell.execution, begun.failed, retry_on))
        return tree

    def _tried(
        self, execution: Execution, used: analysis.Uses, tries: Attempts, start: int = 0
    ) -> list[ast.stmt]:
        """Return a step's statements from `start` on, marked; in a loop where its line asks for tries or limits."""
        marked = self._marked(execution.body, used, start)
        if execution.options.retry is None and execution.options.timeout_s is None:
            return [node for _, piece in marked for node in piece]
        execution.trying = tries
        return in_attempts(marked, self.shell.ast_node_interactivity)

    def _marked(
        self, body: list[ast.stmt], used: analysis.Uses, start: int = 0
    ) -> list[tuple[int, list[ast.stmt]]]:
        """Return a step's statements from `start` on in pieces, each with the number of its first one.

        A piece, but for the first, begins at a statement that may reach a gate: a mark stands before and behind it.
        """
        asks = self.session.asks
        waiting = {
            name
            for name, fact in used.helpers.items()
            if GATE_CALL.search(fact.source) or (asks and QUESTION_CALL.search(fact.source))
        }
        pieces: list[tuple[int, list[ast.stmt]]] = [(start, [])]
        for index, node in enumerate(body[start:], start):
            if not may_wait(node, self.session.values, used.helpers.keys() if waiting else (), asks=asks):
                pieces[-1][1].append(node)
                continue
            if index > start:
                pieces.append((index, []))
            pieces[-1][1].extend([ast.copy_location(call("mark", index), node), node])
            if node is not body[-1]:  # whose value the cell shows
                pieces[-1][1].append(ast.copy_location(call("passed"), node))
        return pieces

    def _forced(self, options: StepOptions) -> str | None:
        checkpoint = self.session.checkpoints.get(options.name)
        replays = checkpoint is not None and checkpoint.status is StepStatus.REPLAY
        if replays and self.session.every_cell:  # else it was marked --replay, and is no more
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
        self,
        cell: Cell,
        tree: ast.Module,
        names: analysis.CellNames,
        options: StepOptions,
        *,
        is_marked: bool,
    ) -> tuple[CodeFacts, analysis.Uses]:
        session = self.session
        used = analysis.uses(
            names.loads, session.values, session.modules, imports=names.imports, label=session.cell_of
        )
        source = cell.source.lstrip().partition("\n")[2] if is_marked else cell.source
        code = CodeFacts(
            source=source,
            first_line=2 if is_marked else 1,
            digest=code_digest(ast.unparse(tree)),
            helpers=used.helpers,
            imports=used.imports,
            modules=used.modules,
            packages=versions(used.packages),
            watched=session.watcher.look(options.watch),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )
        return code, used

    def _inputs(self, used: analysis.Uses) -> dict[str, InputFact]:
        session = self.session
        facts = {}
        for name, via in used.inputs.items():
            if name in session.values and session.tracker.is_users(name):
                origin = session.origins[name]
                facts[name] = InputFact(
                    value=session.tracker.fingerprint(name),
                    origin=origin.digest,
                    label=origin.label,
                    cell=origin.cell,
                    line=origin.line,
                    via=via,
                )
        return facts

    # Telling -----------------------------------------------------------------------------------------------------

    def _notices(self, manifest: Manifest) -> list[str]:
        """Say what a restored checkpoint lacks, and what about its code is not as one would think."""
        return [*display.notices(manifest.variables), *self._about(manifest.code)]

    def _about(self, code: CodeFacts) -> list[str]:
        """Say which of the things that a step watches are not there, and which modules run as they were before."""
        edited = [code.modules[name].file for name in self.session.modules.edited(code.modules)]
        told = [f"{file} was edited after it was loaded: reload it, or restart the kernel" for file in edited]
        return [*missing(code.watched), *told]

    def _say_kept(self, execution: Execution, variables: tuple[Variable, ...]) -> None:
        manifest = self.session.manifest(execution.name)
        noticed = [*display.notices(variables), *self._about(execution.code)]
        if self.session.headless:
            if noticed:
                display.say(self.shell, "\n".join(noticed))
            return
        took = span(manifest.duration_s) if manifest else ""
        kept = display.summary(variables)
        mark = "↻" if execution.again else "✓"
        calls = execution.calls.summary() if execution.calls else ""
        line = " · ".join(
            filter(None, (f"{mark} {execution.name}  {took}{_because(execution.verdict)}", calls, kept))
        )
        display.say(self.shell, "\n  ".join([line, *noticed]))

    def _failed(self, execution: Execution, error: BaseException) -> None:
        if isinstance(error, Suspended):
            return
        session, tries = self.session, execution.trying
        verdict = tries.verdict.reason if tries is not None and tries.verdict is not None else ""
        question = contract.FailStep(
            run_id=session.run_id,
            epoch=session.epoch,
            step=execution.name,
            attempt=execution.attempt,
            error=describe_error(error),
            replayed=tuple(execution.calls.replayed) if execution.calls else (),
            pauses=tries is not None and tries.exhausted and tries.policy.on_exhausted == "pause",
            sentence=verdict if execution.options.retry is not None else "",
        )
        if not (isinstance(error, KeyboardInterrupt) and self._waits_open(execution)):
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
            if isinstance(error, Paused):
                todo = "run the cell again then"
            if execution.calls is not None and execution.calls.made:
                what += f" · {execution.calls.summary()} recorded"
            why = _because(execution.verdict)
            if tries is not None and tries.exhausted:
                why = f" ({verdict})"
            sign = "⏸" if isinstance(error, Paused) else "✗"
            display.say(self.shell, f"{sign} {execution.name} did not finish{why} · {what} · {todo}")

    def _waits_open(self, execution: Execution) -> bool:
        checkpoint = self.session.checkpoints.get(execution.name)
        return checkpoint is not None and checkpoint.status is StepStatus.WAITING

    def _turn_into_error(self, result: Any, error: BaseException) -> None:
        """Make a cell that ran through an error after all, so that the kernel's reply and papermill see it."""
        if result is not None:
            result.error_in_exec = error
        self.shell.showtraceback((type(error), error, error.__traceback__))


def _wraps_signal(error: BaseException) -> bool:
    """Tell whether an exception is what a task group made of a control signal."""
    return isinstance(error, BaseExceptionGroup) and error.subgroup(ControlSignal) is not None


def _because(verdict: Verdict) -> str:
    """Say why a step ran, where that is not plain."""
    return "" if verdict.reason == FRESH else f" ({verdict.reason})"


def _elsewhere() -> bool:
    """Tell whether this is a subshell's thread, whose cells are not steps."""
    return threading.current_thread() is not threading.main_thread()


def _only(statement: ast.stmt) -> ast.Module:
    return ast.Module([statement], type_ignores=[])


def _stands_in_notebook(session: Session, cell_id: str, step: str) -> bool:
    cells = read_cells(session.notebook)
    if not cells:
        return True
    return any(c.id == cell_id and c.options is not None and c.options.name == step for c in cells)
