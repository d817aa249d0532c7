"""The papermill engine with real kernels: true cell states, cell ids, whole saves."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from nbdurable.errors import NotebookError
from nbdurable.models import Attempt, Step, StepStatus
from nbdurable.notebooks import prepare
from nbdurable.runner import execution


def _notebook(path: Path, *sources: str) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells: list[Any] = [new_markdown_cell("# A notebook", id="text")]
    cells += [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def _run(path: Path, **options: Any) -> Path:
    output = path.with_name("out.ipynb")
    papermill.execute_notebook(
        str(path),
        str(output),
        engine_name="nbdurable",
        progress_bar=False,
        cwd=str(path.parent),
        autosave_cell_every=0.5,
        **options,
    )
    return output


def _cells(path: Path) -> dict[str, Any]:
    nb = nbformat.read(path, as_version=4)
    return {
        cell.id: cell
        for cell in nb.cells
        if "papermill" in cell.metadata and "status" in cell.metadata.papermill
    }


def _states(path: Path) -> dict[str, str]:
    return {cell_id: cell.metadata.papermill.status for cell_id, cell in _cells(path).items()}


def _text(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def _children() -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_cells_arrive_with_their_ids_and_outputs(tmp_path: Path) -> None:
    """The kernel learns the id of each cell, silent ones too; outputs and states are as they were."""
    path = _notebook(
        tmp_path / "a.ipynb",
        "print(get_ipython().get_parent()['metadata']['cellId'])",
        "import os\n"
        "print(get_ipython().get_parent()['metadata']['cellId'], os.environ['JPY_SESSION_NAME'])\n6 * 7",
    )
    before = _children()
    cells = _cells(_run(path))
    assert _text(cells["c0"]) == "c0\n"
    assert _text(cells["c1"]) == f"c1 {path}\n"
    assert cells["c1"].outputs[-1].data["text/plain"] == "42"
    assert [cell.execution_count for cell in cells.values() if cell.cell_type == "code"] == [1, 2]
    assert _states(_run(path)) == {"text": "completed", "c0": "completed", "c1": "completed"}
    assert _children() == before


def test_killed_kernel_leaves_true_states(tmp_path: Path) -> None:
    """Guarantee 6: a cell whose kernel dies is failed, those after it are pending, and no process is left."""
    path = _notebook(
        tmp_path / "a.ipynb", "x = 1", "import os\nprint('dying', flush=True)\nos.kill(os.getpid(), 9)", "x"
    )
    before = _children()
    with pytest.raises(DeadKernelError):
        _run(path)
    output = path.with_name("out.ipynb")
    assert _states(output) == {"text": "completed", "c0": "completed", "c1": "failed", "c2": "pending"}
    assert _children() == before


def test_failed_cell_keeps_the_traceback_and_no_cell_moves(tmp_path: Path) -> None:
    """The user's traceback stands in the failing cell."""
    path = _notebook(tmp_path / "a.ipynb", "def f():\n    return 1 / 0\n", "f()", "f")
    with pytest.raises(PapermillExecutionError):
        _run(path)
    cells = _cells(path.with_name("out.ipynb"))
    assert {name: cell.metadata.papermill.status for name, cell in cells.items()} == {
        "text": "completed",
        "c0": "completed",
        "c1": "failed",
        "c2": "pending",
    }
    [error] = cells["c1"].outputs
    assert (error.ename, error.evalue) == ("ZeroDivisionError", "division by zero")
    assert "in f()" in re.sub(r"\x1b\[[0-9;]*m", "", "".join(error.traceback))


SUSPEND = """
class Suspended(BaseException):
    def _render_traceback_(self):
        return ["waits for approval"]
print("before")
raise Suspended("waits for approval")
"""


def test_suspended_cell_is_pending_and_shows_no_error(tmp_path: Path) -> None:
    """Guarantee 5: a run that waits stops cleanly; neither its cell nor those after it count as completed."""
    path = _notebook(tmp_path / "a.ipynb", "x = 1", SUSPEND, "x")
    output = _run(path)  # papermill finds no error
    cells = _cells(output)
    assert _states(output) == {"text": "completed", "c0": "completed", "c1": "pending", "c2": "pending"}
    assert [o.output_type for o in cells["c1"].outputs] == ["stream", "stream"]
    assert _text(cells["c1"]) == "before\nwaits for approval\n"


def test_suspension_is_not_swallowed_by_the_raises_exception_tag(tmp_path: Path) -> None:
    """Guarantee 5: a cell that may raise still stops the notebook where it waits."""
    path = _notebook(tmp_path / "a.ipynb", SUSPEND, "x = 1")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["tags"] = ["raises-exception"]
    nbformat.write(nb, path)
    assert _states(_run(path)) == {"text": "completed", "c0": "pending", "c1": "pending"}


def test_output_is_written_whole_while_a_cell_runs(tmp_path: Path) -> None:
    """While a silent cell runs, the output notebook appears with what was printed, and can be read."""
    path = _notebook(
        tmp_path / "a.ipynb",
        "print('early')",
        """
import json, pathlib, time
output, deadline = pathlib.Path("out.ipynb"), time.monotonic() + 20
while time.monotonic() < deadline:
    if output.exists():
        seen = json.loads(output.read_text())  # a torn file is no JSON
        if seen["cells"][1]["outputs"]:
            print("seen", seen["cells"][2]["metadata"]["papermill"]["status"])
            break
    time.sleep(0.01)
""",
    )
    assert _text(_cells(_run(path))["c1"]) == "seen running\n"
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_failed_write_leaves_the_old_output(tmp_path: Path) -> None:
    """Guarantee 11: where the new output can't be written, the old one stays whole."""
    target = tmp_path / "out.ipynb"
    target.write_text("old")
    with pytest.raises(TypeError):
        execution.write_notebook(new_notebook(metadata={"bad": {1, 2}}), target)
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]
    assert target.read_text() == "old"


def test_unwritable_output_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Guarantee 11: an output that can't be written any more is named."""
    nb = new_notebook(cells=[])
    nb.metadata["papermill"] = {}
    record = execution.Record(nb, str(tmp_path / "gone" / "out.ipynb"), None)
    record.notebook_start()
    with pytest.raises(NotebookError, match=r"gone/out\.ipynb can't be written"):
        record.notebook_complete()


def test_parameters_reach_the_kernel(tmp_path: Path) -> None:
    """Parameters are values of the kernel, in a cell whose id is the same in each run."""
    path = _notebook(tmp_path / "a.ipynb", "day = None\nn = 1", "print(day, n, tags)")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["tags"] = ["parameters"]
    nb.cells[1].source += "\ntags = ()"
    nbformat.write(nb, path)
    import datetime

    prepared = prepare(path, {"day": datetime.date(2026, 11, 22), "tags": ("a", "b")})
    path.write_bytes(prepared.snapshot)
    cells = _cells(_run(path))
    assert _text(cells["c1"]) == "2026-11-22 1 ['a', 'b']\n"
    assert list(cells) == ["text", "c0", "injected-parameters", "c1"]


def test_kernel_is_private_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A headless kernel listens on sockets that only its user can reach, and they are gone at the end."""
    import tempfile

    short = Path(tempfile.mkdtemp(prefix="nbd", dir="/tmp" if os.name == "posix" else None))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    path = _notebook(
        tmp_path / "a.ipynb",
        "import json, os, stat, pathlib, ipykernel\n"
        "info = json.loads(pathlib.Path(ipykernel.get_connection_file()).read_text())\n"
        "print(info['transport'], oct(stat.S_IMODE(os.stat(os.path.dirname(info['ip'])).st_mode))[-2:])",
    )
    try:
        assert _text(_cells(_run(path))["c0"]) == "ipc 00\n"
        assert list(short.iterdir()) == []
    finally:
        for left in short.iterdir():
            left.rmdir()
        short.rmdir()


def test_step_states_come_from_the_coordinator() -> None:
    """A step is shown as executed or restored by its attempts, not by what its cell replied."""

    def step(status: StepStatus, epoch: int) -> Step:
        attempt = Attempt(number=1, status="completed", epoch=epoch, started_at=0.0)
        return Step(name="a", status=status, reason="", attempts=(attempt,))

    states = [execution.step_state(step(StepStatus.COMPLETED, epoch), epoch=2) for epoch in (1, 2)]
    assert states == ["restored", "executed"]
    assert execution.step_state(step(StepStatus.REPLAY, 2), epoch=2) == "executed"
    assert execution.step_state(step(StepStatus.WAITING, 2), epoch=2) == "waiting"
    assert execution.step_state(step(StepStatus.RUNNING, 2), epoch=2) == "failed"


def test_engine_is_found_by_papermill(tmp_path: Path) -> None:
    """`papermill --engine nbdurable` finds the engine, whichever module was imported first."""
    import subprocess
    import sys

    find = "from papermill.engines import papermill_engines; papermill_engines.get_engine('nbdurable')"
    for module in ("engine", "execution"):
        command = [sys.executable, "-c", f"import nbdurable.runner.{module}; {find}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
