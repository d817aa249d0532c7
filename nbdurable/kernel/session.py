"""The run that this kernel drives, and what it knows of the run's steps.

Owns `Session`: run, epoch, client, checkpoints known, origins of variables, the lease's heartbeat. One per kernel
(`current`). Carries out no step (`step.py`) and displays nothing (`display.py`).
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import copy
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbdurable import contract, security
from nbdurable.checkpoint import recipes
from nbdurable.checkpoint.analysis import CellNames, analyse
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.fingerprint import reach
from nbdurable.checkpoint.manifest import Manifest, unseal
from nbdurable.checkpoint.modules import Modules
from nbdurable.checkpoint.plan import Origins, digest
from nbdurable.checkpoint.recipes import Recipe
from nbdurable.checkpoint.sources import code_digest, parameters_source
from nbdurable.checkpoint.track import Tracker
from nbdurable.checkpoint.watched import Watcher
from nbdurable.client import Client
from nbdurable.errors import Conflict, DurableError, Fenced, LeaseHeld, UsageError
from nbdurable.kernel import whereabouts
from nbdurable.kernel.foresight import label_of, read_cells
from nbdurable.models import Checkpoint, Driver, DriverKind, Run, RunDetail, StepStatus
from nbdurable.processes import identity
from nbdurable.settings import Home, Settings, find_home, find_project

HEARTBEAT_S = 5.0
_GOODBYE_S = 2.0
_ATTACHED_AMONG = 20  # newest runs of a notebook looked at for the one that was worked on last
_MOVED_AMONG = 50  # newest runs looked at for one whose notebook was renamed


class Session:
    """One kernel's side of a run.

    Headless, the run and the epoch come from the environment that the runner set. Interactive, `take_up` finds the
    notebook's open run, and the first step creates one where there is none.
    """

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.threads = frozenset(sys._current_frames())  # as long as the notebook has started none
        self.values: dict[str, Any] = shell.user_ns
        run_id = os.environ.get("NBDURABLE_RUN_ID")
        self.headless = run_id is not None
        self.bringing = (
            False  # a run's cells are executed to bring its state here: no step's body runs, nothing waits
        )
        self.every_cell = False  # whether each cell is a step (`--steps all`)
        self.notebook = whereabouts.notebook_path(self.values)
        self.project = find_project(self.notebook)
        self.home: Home = find_home(self.notebook).create()
        self.settings = Settings.load(self.home)
        self.client = Client(self.home)
        self.key = security.load_key(self.home)
        self.blobs = LocalBlobs(self.home.blobs)
        hidden = dict(shell.user_ns_hidden)
        self.tracker = Tracker(self.values, ignore=lambda n: n in hidden and self.values.get(n) is hidden[n])
        self.origins = Origins()
        self.modules = Modules(self.project)
        self.watcher = Watcher(self.notebook.parent, self.key)
        self.run: Run | None = None
        self.checkpoints: dict[str, Checkpoint] = {}
        self.visited: set[str] = set()
        self.to_rerun: set[str] = set()
        self.given: set[str] = set()  # steps before which what a person set by hand was put in
        self.cells: dict[str, str] = {}  # step → id of the cell that it was last seen in
        self.trouble: DurableError | None = None  # why no step can run now
        self.made: list[
            Recipe
        ] = []  # in the plain cell that runs now; what they count by is known at its end
        self.progress_said = 0.0  # when, by `time.monotonic`
        self._manifests: dict[int, Manifest] = {}
        self._stop = threading.Event()
        if run_id is not None:
            self._drive(self.client.call(contract.GET_RUN, contract.ByRun(run_id=run_id)))
            self._epoch = int(os.environ["NBDURABLE_EPOCH"])
        else:
            threading.Thread(target=self._keep_lease, name="nbdurable-heartbeat", daemon=True).start()
            atexit.register(self.close)

    # The run ------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def run_id(self) -> str:
        """Return the id of the run, created now where there is none; raises what keeps steps from running."""
        if self.trouble is not None:
            raise self.trouble
        if self.run is None:
            self.start_new()
        assert self.run is not None
        return self.run.id

    def open_run(self) -> Run | None:
        """Return the notebook's newest run that a kernel can go on with."""
        question = contract.ListRuns(
            notebook=str(self.notebook), kind=DriverKind.INTERACTIVE, limit=_ATTACHED_AMONG
        )
        runs = self.client.call(contract.LIST_RUNS, question).runs
        if not runs and self.notebook.exists():
            return self._run_under_another_name()
        if not runs or runs[0].status.is_final:
            return None
        # one that came into a kernel from the workers may be older than the notebook's own, and is what was worked on
        return max((run for run in runs if not run.status.is_final), key=lambda run: run.updated_at)

    def _run_under_another_name(self) -> Run | None:
        """Return the open run of a notebook that is gone, if it had a cell of this one: it was renamed or moved."""
        cells = {cell.id for cell in read_cells(self.notebook)}
        question = contract.ListRuns(kind=DriverKind.INTERACTIVE, limit=_MOVED_AMONG)
        for run in self.client.call(contract.LIST_RUNS, question).runs:
            if not run.status.is_final and not Path(run.notebook).exists():
                detail = self.client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))
                if cells & {step.cell_id for step in detail.steps}:
                    return run
        return None

    def take_up(self, run: Run, *, take_over: bool = False) -> None:
        """Begin to drive an open run.

        Raises LeaseHeld where another kernel drives it; steps are refused with it, until `take_over` or `start_new`.
        """
        question = contract.LeaseRun(
            run_id=run.id, driver=self._driver(), take_over=take_over, notebook=str(self.notebook)
        )
        try:
            self._drive(self.client.call(contract.LEASE_RUN, question))
            self.give_parameters()
        except LeaseHeld as error:
            self.trouble = LeaseHeld(
                error.message,
                todo="`%durable takeover` drives it from here, `%durable new` starts another run",
            )
            raise self.trouble from None

    def attach(self, run: Run, *, take_over: bool = False) -> None:
        """Begin to drive a run whatever became of it, and leave the one that this kernel drives.

        The run becomes one of this notebook where that has all its steps; else it stays with its own. Raises LeaseHeld
        where somebody drives it, unless `take_over`, and IllegalMove for a completed one.
        """
        known = {step.name for step in self.detail(run.id).steps}
        here = {cell.options.name if cell.options else cell.id for cell in read_cells(self.notebook)}
        question = contract.LeaseRun(
            run_id=run.id,
            driver=self._driver(),
            take_over=take_over,
            notebook=str(self.notebook) if known and known <= here else None,
            attach=True,
        )
        try:
            leased = self.client.call(contract.LEASE_RUN, question)
        except LeaseHeld as error:
            raise LeaseHeld(
                error.message,
                todo=f"`%durable attach {run.short} --take-over` takes it over: what it executes now is not kept",
            ) from None
        if self.run is not None and self.run.id != run.id:
            self._leave(f"its kernel went over to run {run.short}; open the notebook again and it goes on")
        self._drive(leased)
        self.cells.clear()

    def release(self) -> Run:
        """Give the run back: it is paused, and steps are refused here until another one is begun or attached."""
        if self.headless or self.run is None or self.trouble is not None:
            raise UsageError("this kernel drives no run", todo="`%durable runs` lists the notebook's runs")
        run = self.run
        self._leave(f"released by hand; `nbdurable resume {run.short}` lets it go on headless")
        self.trouble = Conflict(
            f"this kernel has released run {run.short}",
            todo=f"`%durable attach {run.short}` takes it up again, `%durable new` begins another one",
        )
        return run

    def detail(self, run_id: str) -> RunDetail:
        """Return a run with its steps."""
        return self.client.call(contract.GET_RUN, contract.ByRun(run_id=run_id))

    def _leave(self, reason: str) -> None:
        if self.run is None or self.trouble is not None:
            return
        question = contract.EndLease(run_id=self.run.id, epoch=self.epoch, how="leave", reason=reason)
        with contextlib.suppress(Fenced):
            self.client.call(contract.END_LEASE, question)

    def start_new(self) -> Run:
        """Create a run for this notebook and drive it; an open one that this kernel drives ends."""
        if self.headless:
            raise UsageError(
                "a headless run can't start another one from here", todo="`nbdurable run NOTEBOOK`"
            )
        if self.run is not None and self.trouble is None:
            reason = "a new run of the notebook was started (`%durable new`)"
            with contextlib.suppress(Fenced):
                question = contract.CloseRun(run_id=self.run.id, epoch=self.epoch, reason=reason)
                self.client.call(contract.CLOSE_RUN, question)
        question_ = contract.CreateRun(
            notebook=str(self.notebook),
            kind=DriverKind.INTERACTIVE,
            driver=self._driver(),
            cwd=str(Path.cwd()),
        )
        self._drive(self.client.call(contract.CREATE_RUN, question_))
        assert self.run is not None
        return self.run

    @property
    def asks(self) -> bool:
        """Tell whether `input()` and `getpass()` become waits: nobody sits in front of a headless run."""
        return self.headless and self.settings.questions

    def new_client(self) -> Client:
        """Return another client, for a thread that waits."""
        return Client(self.home)

    def _driver(self) -> Driver:
        process = identity("kernel")
        return Driver(
            kind=DriverKind.INTERACTIVE, process=process, label=f"kernel {process.pid} on {process.host}"
        )

    def _drive(self, run: Run) -> None:
        self.run, self._epoch, self.trouble = run, run.epoch, None
        self.every_cell = run.steps_mode == "all"
        self.visited.clear()
        self.to_rerun.clear()
        self.given.clear()
        found = self.client.call(contract.CHECKPOINTS, contract.ByRun(run_id=run.id))
        self.checkpoints = {checkpoint.step: checkpoint for checkpoint in found.checkpoints}

    # Cells ----------------------------------------------------------------------------------------------------

    def note_plain_cell(self, names: CellNames, code_digest: str, source: str) -> None:
        """Note where the variables of a plain cell come from, as the cell ends."""
        number = getattr(self.shell, "execution_count", 0)
        self.origins.plain_cell(names, code_digest, label_of(source), f"cell {number}")

        for recipe in self.made:
            behind = self.origins[recipe.name].digest
            recipes.note(replace(recipe, digest=digest(behind, recipe.digest)))
        self.made.clear()

    def note_replayed(self, names: CellNames) -> None:
        """Let what a `--replay` cell made, and can't be saved, count by its cell.

        Not an object of the notebook's own class with a part that can't be saved: a change of its data must be seen.
        """
        for name in sorted(names.stores & self.values.keys()):
            value = self.values[name]
            if recipes.may_be_made(value) and any(
                not problem.path for problem in reach(value, self.values, name)[1]
            ):
                recipes.note(recipes.Recipe(name, value, None, self.origins[name].digest))

    def cell_of(self, file: str) -> str:
        """Name the cell that a file name of compiled code stands for, as tracebacks do; "" for other files."""
        named = self.shell.compile.format_code_name(file)
        number = named[1].removeprefix("In[").removesuffix("]") if named else ""
        return f"cell {number}" if number.isdigit() else ""

    def give_parameters(self, cell_id: str | None = None) -> None:
        """Put the run's parameters in, as its headless executions do: below the cell tagged `parameters`, else first.

        `cell_id`: the plain cell that has just ended; None: the run was taken up.
        """
        if self.headless or self.run is None or not self.run.parameters:
            return
        tagged = [cell.id for cell in read_cells(self.notebook) if "parameters" in cell.tags]
        if (cell_id in tagged) if tagged else cell_id is None:
            source = parameters_source(self.run.parameters)
            tree = ast.parse(source)
            exec(source, self.values)
            self.note_plain_cell(analyse(tree, source), code_digest(ast.unparse(tree)), source)

    def give(self, step: str) -> None:
        """Put in what a person set by hand before a step (`--set`), once: then it is the person's at the kernel."""
        if self.run is None or step in self.given:
            return
        self.given.add(step)
        values = {one.name: copy.deepcopy(one.value) for one in self.run.hand_set if one.step == step}
        self.values.update(values)
        self.origins.by_hand(values)

    # Checkpoints ----------------------------------------------------------------------------------------------

    def manifest(self, step: str) -> Manifest | None:
        """Return the verified manifest of a step's latest checkpoint; raises BadSignature for one that was altered."""
        checkpoint = self.checkpoints.get(step)
        if checkpoint is None or checkpoint.status is StepStatus.REPLAY:
            return None
        found = self._manifests.get(checkpoint.seq)
        if found is None:
            found = unseal(checkpoint.manifest, self.key, of=f"step `{step}` of run {checkpoint.run_id[-8:]}")
            self._manifests[checkpoint.seq] = found
        return found

    def note(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        """Remember a checkpoint that was committed by this kernel."""
        self.checkpoints[checkpoint.step] = checkpoint
        self._manifests[checkpoint.seq] = manifest

    # The lease ------------------------------------------------------------------------------------------------

    def _keep_lease(self) -> None:
        client = Client(self.home, start=False)
        while not self._stop.wait(HEARTBEAT_S):
            run, epoch = self.run, getattr(self, "_epoch", 0)
            if run is None or self.trouble is not None:
                continue
            question = contract.Heartbeat(run_id=run.id, epoch=epoch, processes=(identity("kernel"),))
            try:
                client.call(contract.HEARTBEAT, question)
            except Fenced as error:
                if self.run is run and self.epoch == epoch:
                    self.trouble = error
            except DurableError:
                continue  # the coordinator is away; the next step starts it again

    def close(self) -> None:
        """Say goodbye: the run is paused until somebody opens the notebook again."""
        self._stop.set()
        if self.run is None or self.headless or self.trouble is not None:
            return
        goodbye = contract.EndLease(
            run_id=self.run.id, epoch=self.epoch, how="leave", reason="the notebook's kernel ended"
        )
        with contextlib.suppress(DurableError):
            Client(self.home, start=False, timeout_s=_GOODBYE_S).call(contract.END_LEASE, goodbye)


_current: Session | None = None


def current() -> Session | None:
    """Return this kernel's session, or None where the extension is not loaded."""
    return _current


def set_current(session: Session | None) -> None:
    global _current
    _current = session


def required() -> Session:
    """Return this kernel's session; raises UsageError where there is none."""
    if _current is None:
        raise UsageError("there is no run here", todo="call it in a notebook, after `%load_ext nbdurable`")
    return _current
