"""What the engine does: send a notebook's cells to a kernel, and keep its output notebook true and whole.

Owns the cell states, the saves and the live log. The kernel decides by itself which steps it restores, and
sends their recorded outputs; so every cell is sent, in order. Whether a step committed is asked of the
coordinator, since neither papermill nor an execute reply knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from threading import Event
from typing import Any, Literal, TextIO

from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.util import ensure_async, run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NotebookExecutionManager

from nbdurable.contract import CELL_MARK
from nbdurable.errors import NotebookError
from nbdurable.models import ErrorInfo, Run, Step, StepStatus
from nbdurable.notebooks import is_executed, step_name
from nbdurable.runner.hooks import Hooks
from nbdurable.runner.kernels import Kernel

EXTENSION = "nbdurable.kernel.extension"
AHEAD = "nbdurable.kernel.ahead"
_DIE_WITH_US = "__import__('ctypes').CDLL(None).prctl(1, 9, 0, 0, 0)"  # PR_SET_PDEATHSIG, SIGKILL
SUSPENDED, SKIPPED, PAUSED = (
    "Suspended",
    "RestSkipped",
    "Paused",
)  # control signals of `errors.py`, as an execute reply names them
AUTOSAVE_S = 5.0
_CLEAN_EXITS = ("", "0", "None")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class KernelNotReady(DeadKernelError):  # type: ignore[misc]
    """The kernel died, or fell silent, before it was ready"""


@dataclass(frozen=True)
class Outcome:
    """How the execution of a notebook ended while its kernel lived.

    `complete`: every cell was executed, or one ended the notebook with `sys.exit()`. `skip`: a cell skipped the
    rest. `pause`: not before somebody says so. `stop`: asked for.
    """

    how: Literal["complete", "skip", "suspend", "pause", "fail", "stop"]
    sentence: str
    error: ErrorInfo | None = None


@dataclass
class Assignment:
    """A run of the coordinator, as the engine needs it.

    `stop`: set to stop before the next cell. `disowned`: set when the output is somebody else's to write.
    `outcome` is set by the engine when it is through.
    """

    run: Run
    kernel: Kernel
    output: Path
    log: TextIO
    steps: Callable[[], Sequence[Step]]
    stop: Event = field(default_factory=Event)
    disowned: Event = field(default_factory=Event)
    hooks: Hooks | None = None
    begins: Literal["start", "resume"] = "start"
    outcome: Outcome | None = None


def execute(
    nb: Any,
    kernel_name: str,
    *,
    output_path: str | None = None,
    input_path: Any = None,
    assignment: Assignment | None = None,
    progress_bar: Any = False,
    log_output: bool = False,
    start_timeout: int = 60,
    execution_timeout: int | None = None,
    autosave_cell_every: float = AUTOSAVE_S,
    stdout_file: Any = None,
    stderr_file: Any = None,
    **_: Any,
) -> Any:
    """Execute a notebook node for papermill, and return it.

    Raises DeadKernelError when the kernel dies, NotebookError when it can't load nbdurable. The kernel of an
    `assignment` is started here and left to its owner.
    """
    if assignment is None:
        here = {"JPY_SESSION_NAME": str(Path(input_path).absolute())} if isinstance(input_path, str) else {}
        kernel, output = Kernel(kernel_name, environment=here), output_path
    else:
        kernel, output = assignment.kernel, str(assignment.output)
    record = Record(
        nb,
        output,
        assignment,
        progress_bar=progress_bar,
        log_output=log_output,
        autosave_every_s=autosave_cell_every,
    )
    record.notebook_start()
    try:
        _CellRunner(
            record,
            kernel,
            assignment,
            log_output=log_output,
            stdout_file=stdout_file,
            stderr_file=stderr_file,
            startup_timeout=start_timeout,
            timeout=execution_timeout,
        ).run()
    finally:
        if assignment is None:
            kernel.end()
        record.notebook_complete()
    return record.nb


class Record(NotebookExecutionManager):  # type: ignore[misc]
    """The output notebook while it is made: papermill's states without its lies, and saves that are whole.

    papermill's own manager saves at each change, in place, and at the end calls cells completed which
    never ran. Here `save` only takes note; `write` replaces the whole file every few seconds and at the end.
    """

    def __init__(
        self,
        nb: Any,
        output: str | None,
        assignment: Assignment | None,
        *,
        progress_bar: Any = False,
        log_output: bool = False,
        autosave_every_s: float = AUTOSAVE_S,
    ) -> None:
        super().__init__(nb, output_path=output, progress_bar=progress_bar, log_output=log_output)
        self._assignment = assignment
        self._every_s = autosave_every_s
        self._changed = False
        self._written_at = time.monotonic()

    def notebook_start(self, **_: Any) -> None:
        """Empty the notebook's outputs and states.

        Nothing is written yet: the output of an earlier attempt is worth more than an empty one.
        """
        super().notebook_start()
        if self._assignment is not None:
            run = self._assignment.run
            self.nb.metadata.papermill["input_path"] = run.notebook
            self.nb.metadata.papermill["output_path"] = self.output_path
            self.nb.metadata.papermill["parameters"] = run.parameters
            self.nb.metadata["nbdurable"] = {"run": run.id}

    def save(self, **_: Any) -> None:
        """Take note that there is something to write."""
        self._changed = True

    def autosave_cell(self, **_: Any) -> None:
        """Write what changed, if the last write was long enough ago.

        Trouble with the disk is left to the last write: until then it may be over.
        """
        if not self._changed or time.monotonic() - self._written_at < self._every_s:
            return
        began = time.monotonic()
        with contextlib.suppress(OSError):
            self.write()
        self._written_at = time.monotonic()
        if self._written_at - began > self._every_s / 4:
            self._every_s *= 2  # a large notebook on a slow disk must not hold up its cells

    def cell_waiting(self, cell: Any) -> None:
        """Take note that a cell waits: neither completed nor failed."""
        cell.metadata.papermill["status"] = self.PENDING
        self.cell_signalled(cell)

    def cell_signalled(self, cell: Any) -> None:
        """Show the control signal that ended a cell as its sentence: a red error would be another lie."""
        for output in cell.outputs:
            if output.output_type == "error" and output.ename in (SUSPENDED, SKIPPED, PAUSED):
                text = "".join(_ANSI.sub("", line) + "\n" for line in output.traceback)
                output.clear()
                output.update(output_type="stream", name="stdout", text=text)

    def notebook_complete(self, **_: Any) -> None:
        """Put the true states in, and write the notebook.

        Raises NotebookError if it can't be written.
        """
        self.end_time = self.now()
        self.nb.metadata.papermill["end_time"] = self.end_time.isoformat()
        self.nb.metadata.papermill["duration"] = (self.end_time - self.start_time).total_seconds()
        for cell in self.nb.cells:
            if cell.metadata.papermill["status"] == self.RUNNING:  # it, or its kernel, was ended
                self.cell_exception(cell)
        if self._assignment is not None:
            self._mark_steps(self._assignment.steps(), self._assignment.run.epoch)
        if self.pbar is not None:
            self.pbar.n = sum(cell.metadata.papermill["status"] == self.COMPLETED for cell in self.nb.cells)
            self.pbar.refresh()
        self.cleanup_pbar()
        try:
            self.write()
        except OSError as error:
            raise NotebookError(
                f"the output notebook {self.output_path} can't be written: {error.strerror or error}",
                todo="make room or mend the path; the steps are kept, `nbdurable resume RUN` writes it again",
            ) from None

    def _mark_steps(self, steps: Sequence[Step], epoch: int) -> None:
        by_name = {step.name: step for step in steps}
        by_cell = {step.cell_id: step for step in steps}
        for cell in self.nb.cells:
            if not is_executed(cell):
                continue
            name = step_name(cell.source)
            step = by_name.get(name) if name else by_cell.get(cell.id)
            if name is None and step is None:
                continue
            reached = cell.metadata.papermill["start_time"] is not None
            status = step_state(step, epoch) if step is not None and reached else "pending"
            cell.metadata["nbdurable"] = {"step": step.name if step is not None else name, "status": status}

    def write(self) -> None:
        """Replace the output notebook as a whole, durably."""
        self._changed = False
        self._written_at = time.monotonic()
        if self.output_path is None or (self._assignment is not None and self._assignment.disowned.is_set()):
            return
        if "://" in self.output_path:  # papermill's S3, GCS, …: whole by themselves
            super().save()
        else:
            write_notebook(self.nb, Path(self.output_path))


def step_state(step: Step, epoch: int) -> str:
    """Return what became of a step that the execution of `epoch` reached, as the output notebook shows it."""
    if step.status in (StepStatus.COMPLETED, StepStatus.REPLAY):
        return "executed" if any(attempt.epoch == epoch for attempt in step.attempts) else "restored"
    return "waiting" if step.status is StepStatus.WAITING else "failed"


def write_notebook(nb: Any, path: Path) -> None:
    """Write a notebook so that a reader, and a crash, find the old one or the new one whole."""
    from nbformat import v4

    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(v4.writes(nb))
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _CellRunner(PapermillNotebookClient):  # type: ignore[misc]
    """Sends cells to the kernel and takes their outputs in."""

    def __init__(self, record: Record, kernel: Kernel, assignment: Assignment | None, **options: Any) -> None:
        super().__init__(
            record,
            km=kernel.manager,
            record_timing=False,  # papermill's metadata has the times
            shell_timeout_interval=1,
            iopub_timeout=60,  # a large output may take its time
            on_cell_execute=self._name_cell,
            on_cell_executed=self._take_reply,
            **{name: value for name, value in options.items() if value is not None},
        )
        self._kernel = kernel
        self._assignment = assignment
        self._reply: dict[str, Any] = {}
        self._line_open = False  # the log's last line has no end yet
        self._kept: frozenset[str] = frozenset()  # ids of cells whose steps may be restored
        self._at = 0  # the cell that comes next
        self._began = 0.0

    def run(self) -> None:
        """Start the kernel and execute the notebook."""
        self.reset_execution_trackers()
        self._kernel.start()
        try:
            self.start_new_kernel_client()
        except RuntimeError as error:
            raise KernelNotReady(f"its kernel did not start: {error}") from None
        client = self.kc
        try:
            info = self.wait_for_reply(client.kernel_info())
            self.nb.metadata["language_info"] = info["content"]["language_info"]
            if self._assignment is not None:
                self._load_extension()
            outcome = self._execute_cells()
            if self._assignment is not None:
                self._assignment.outcome = outcome
                if self._assignment.hooks is not None:
                    run_sync(self._assignment.hooks.look)(client)
            self.set_widgets_metadata()
        finally:
            client.stop_channels()

    def _load_extension(self) -> None:
        self.kc.cell_id = None
        code = f"%load_ext {EXTENSION}" + (f"\n{_DIE_WITH_US}" if sys.platform == "linux" else "")
        reply = self.wait_for_reply(self.kc.execute(code, silent=True, store_history=False))
        content = reply["content"]
        if content["status"] != "ok":
            raise NotebookError(
                f"the kernel {self.kernel_name or self.km.kernel_name!r} can't load nbdurable: "
                f"{content.get('ename')}: {_ANSI.sub('', str(content.get('evalue')))}",
                todo="install nbdurable in the kernel's environment, or choose another kernel (--kernel)",
            )

    def _execute_cells(self) -> Outcome:
        self._kept = self._cells_kept()
        cells = self.nb.cells
        begun = False
        while self._at < len(cells):
            if not begun and self._is_step(cells[self._at]):
                begun = True
                self._tell_beginning()
            if self._assignment is not None and self._assignment.stop.is_set():
                return Outcome("stop", "it was asked to stop")
            index = self._at
            outcome: Outcome | None = self._bring_back(self._leading())
            if outcome is not None:
                return outcome
            if self._at > index:
                continue
            cell = cells[index]
            self._begin_cell(index)
            try:
                self.execute_cell(cell, index)
            except CellExecutionError:
                pass  # the reply tells more
            except BaseException:
                self._give_up_cell(index)
                raise
            if (outcome := self._end_cell(index)) is not None:
                return outcome
        return Outcome("complete", "every cell was executed")

    def _is_step(self, cell: Any) -> bool:
        every = self._assignment is not None and self._assignment.run.steps_mode == "all"
        return is_executed(cell) and (every or step_name(cell.source) is not None)

    def _tell_beginning(self) -> None:
        assignment = self._assignment
        if assignment is not None and assignment.hooks is not None and not assignment.stop.is_set():
            run_sync(assignment.hooks.tell_beginning)(self.kc, assignment.begins)

    def _begin_cell(self, index: int) -> None:
        cell = self.nb.cells[index]
        self._reply = {}
        self.nb_man.cell_start(cell, index)
        self._began = time.monotonic()
        self._log_line(cell, "▶")

    def _end_cell(self, index: int) -> Outcome | None:
        """Settle a cell by its reply; return how it ended the notebook, None where the next one follows."""
        cell = self.nb.cells[index]
        outcome = self._outcome_of(cell)
        sign = self._settle(cell, index, outcome)
        self._log_line(cell, sign, f"{time.monotonic() - self._began:.1f} s")
        self._at = index + 1
        if outcome is None and self._assignment is not None and is_last(cell, self._assignment.run):
            return Outcome("complete", f"it stopped behind step {self._assignment.run.until!r}, as asked")
        return outcome

    def _give_up_cell(self, index: int) -> None:
        cell = self.nb.cells[index]
        self.nb_man.cell_exception(cell, cell_index=index)
        self.nb_man.cell_complete(cell, cell_index=index)
        self._log_line(cell, "✗", "the kernel is gone")

    # Many cells at once -------------------------------------------------------------------------------------

    def _cells_kept(self) -> frozenset[str]:
        """Return the ids of the cells whose steps are kept, so that the kernel may restore them."""
        if self._assignment is None:
            return frozenset()
        kept = {step.name for step in self._assignment.steps() if step.status is StepStatus.COMPLETED}
        every = self._assignment.run.steps_mode == "all"
        return frozenset(
            cell.id
            for cell in (self.nb.cells if kept else ())
            if is_executed(cell) and (step_name(cell.source) or (every and cell.id)) in kept
        )

    def _leading(self) -> list[int]:
        """Return the cells from the next one on that may be restored, up to one that runs anyway; not one alone."""
        found: list[int] = []
        for index in range(self._at, len(self.nb.cells)):
            cell = self.nb.cells[index]
            if not is_executed(cell) and found:
                continue
            if cell.get("id") not in self._kept or self._get_timeout(cell) is not None:
                break
            found.append(index)
            if self._assignment is not None and is_last(cell, self._assignment.run):
                break
        return found if len(found) > 1 else []

    async def _async_bring_back(self, leading: list[int]) -> Outcome | None:
        """Have the kernel restore cells, as far as nothing else is to be done, by one request (`kernel/ahead.py`).

        Where it stops, the notebook goes on cell by cell.
        """
        if not leading:
            return None
        first, cells = self._at, {self.nb.cells[index].id: index for index in leading}
        sources = [(cell_id, self.nb.cells[index].source) for cell_id, index in cells.items()]
        self.kc.cell_id = None
        code = f"__import__({AHEAD!r}, fromlist=['bring_back']).bring_back({sources!r})"
        sent = self.kc.execute(code, silent=True, store_history=False)
        saving = asyncio.ensure_future(self._keep_saving())
        at: int | None = None  # the cell that is restored now
        outcome: Outcome | None = None
        try:
            while (message := await self._next_message(sent)) is not None:
                mark = message["content"].get("data", {}).get(CELL_MARK)
                if mark is None:
                    if at is not None:
                        self.process_message(message, self.nb.cells[at], at)
                    continue
                if at is not None:
                    outcome = self._end_restored(at, mark["ended"])
                    at = None
                if mark["begins"] is not None:
                    for index in range(self._at, cells[mark["begins"]]):  # text, between two cells
                        self._begin_cell(index)
                        self._end_cell(index)
                    at = cells[mark["begins"]]
                    self.clear_before_next_output = False
                    self._begin_cell(at)
            await self.async_wait_for_reply(sent)
        except BaseException:
            if at is not None:
                self._give_up_cell(at)
            raise
        finally:
            saving.cancel()
        if self._at == first:  # it knows better than the coordinator what was edited
            self._kept = frozenset()
        return outcome

    _bring_back = run_sync(_async_bring_back)

    async def _next_message(self, sent: str) -> dict[str, Any] | None:
        """Return the kernel's next message about a request, None when it is through with it."""
        while True:
            try:
                message: dict[str, Any] = await ensure_async(self.kc.iopub_channel.get_msg(timeout=1))
            except Empty:
                await self._async_check_alive()
                continue
            if message["parent_header"].get("msg_id") != sent:
                continue
            if message["msg_type"] != "status":
                return message
            if message["content"]["execution_state"] == "idle":
                return None

    def _end_restored(self, index: int, ended: dict[str, Any]) -> Outcome | None:
        cell = self.nb.cells[index]
        cell["execution_count"] = ended.get("execution_count")
        self.code_cells_executed += 1
        self._reply = ended.get("error", {})
        return self._end_cell(index)

    def _outcome_of(self, cell: Any) -> Outcome | None:
        """Return how a cell ended the notebook; None where the next one follows."""
        name = self._reply.get("ename")
        message = _ANSI.sub("", str(self._reply.get("evalue", "")))
        if name == SUSPENDED:
            return Outcome("suspend", message or "the run waits")
        if name == PAUSED:
            return Outcome("pause", message)
        if name == SKIPPED:
            return Outcome("skip", f"{_title(cell)} {message}")
        if any(item.get("source") == "ask_exit" for item in self._reply.get("payload", ())):
            return Outcome("complete", f"exit() ended it in {_title(cell)}")
        if name is None or "raises-exception" in cell.metadata.get("tags", []):
            return None
        if name == "SystemExit" and message in _CLEAN_EXITS:  # as papermill sees it
            return Outcome("complete", f"sys.exit() ended it in {_title(cell)}")
        trace = _ANSI.sub("", "\n".join(self._reply.get("traceback", [])))
        error = ErrorInfo(name=name, message=message, traceback=trace)
        return Outcome("fail", f"{_title(cell)} raised {name}: {message}", error)

    def _settle(self, cell: Any, index: int, outcome: Outcome | None) -> str:
        """Give a cell its state; return the sign that stands for it."""
        if outcome is not None and outcome.how in ("suspend", "pause"):
            self.nb_man.cell_waiting(cell)
            return "⏸"
        if outcome is not None and outcome.how == "skip":
            self.nb_man.cell_signalled(cell)
        failed = outcome is not None and outcome.how == "fail"
        if failed:
            self.nb_man.cell_exception(cell, cell_index=index)
        self.nb_man.cell_complete(cell, cell_index=index)
        return "✗" if failed else "✓"

    # Hooks of nbclient ------------------------------------------------------------------------------------

    def _name_cell(self, cell: Any, cell_index: int) -> None:
        self.kc.cell_id = cell.get("id")

    def _take_reply(self, cell: Any, cell_index: int, execute_reply: dict[str, Any]) -> None:
        self._reply = execute_reply["content"]

    async def async_execute_cell(self, cell: Any, cell_index: int, **options: Any) -> Any:
        """Execute a cell; meanwhile write its outputs every few seconds, also when it has fallen silent."""
        saving = asyncio.ensure_future(self._keep_saving())
        try:
            return await super().async_execute_cell(cell, cell_index, **options)
        finally:
            saving.cancel()

    execute_cell = run_sync(async_execute_cell)

    async def _keep_saving(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.nb_man.autosave_cell()

    def process_message(self, *arguments: Any, **options: Any) -> Any:
        """Take a message of the kernel in, and copy what it shows to the log."""
        output = super().process_message(*arguments, **options)
        if output is not None:
            self.nb_man.save()
            self._log_output(output)
        return output

    # The live log -----------------------------------------------------------------------------------------

    def _log(self, text: str) -> None:
        if self._assignment is not None and text:
            with contextlib.suppress(OSError, ValueError):  # a full disk must not end the run
                self._assignment.log.write(text)
                self._assignment.log.flush()
            self._line_open = not text.endswith("\n")

    def _log_line(self, cell: Any, sign: str, rest: str = "") -> None:
        if is_executed(cell):
            start = "\n" if self._line_open else ""
            self._log(
                f"{start}{time.strftime('%H:%M:%S')} {sign} {_title(cell)}{'  ' + rest if rest else ''}\n"
            )

    def _log_output(self, output: Any) -> None:
        if output.output_type == "stream":
            self._log("".join(output.text))
        elif output.output_type == "error":
            self._log(_ANSI.sub("", "\n".join(output.traceback)) + "\n")
        elif "text/plain" in output.get("data", {}):
            self._log("".join(output.data["text/plain"]) + "\n")


def is_last(cell: Any, run: Run) -> bool:
    """Tell whether a run executes no cell behind this one (`--until`)."""
    if run.until is None or not is_executed(cell):
        return False
    return run.until == (step_name(cell.source) or (cell.id if run.steps_mode == "all" else None))


def _title(cell: Any) -> str:
    """Return what a person knows a cell by: its step, else its id."""
    name = step_name(cell.source)
    return f"step {name!r}" if name else f"cell {cell.get('id')}"
