"""Notebooks on their way to a run: what is refused and how it is said, parameters, ids (guarantee 11)."""

from __future__ import annotations

import datetime
import enum
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.client import Client
from nbdurable.errors import BlobDamaged, BlobMissing, NotebookError, ParameterError, StepUsageError
from nbdurable.models import DriverKind, Run, RunStatus
from nbdurable.notebooks import (
    check_output,
    create_headless,
    output_path,
    prepare,
    read_snapshot,
    step_name,
)
from nbdurable.settings import Home


def _cell(source: str, *, tags: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    metadata = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code",
        "source": source,
        "metadata": metadata,
        "outputs": [],
        "execution_count": None,
    } | more


def _notebook(path: Path, *cells: dict[str, Any], kernel: str | None = "python3", **more: Any) -> Path:
    metadata = {} if kernel is None else {"kernelspec": {"name": kernel, "display_name": kernel}}
    path.write_text(
        json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": metadata, "cells": list(cells)} | more)
    )
    return path


PARAMETERS = _cell("topic = 'x'  # what it is about\nn: int = 1\nday = None", tags=("parameters",))


@pytest.mark.parametrize(
    ("content", "message", "todo"),
    [
        (None, "there is no notebook", "check the path"),
        ("", "is not JSON", "restore it"),
        ('{"a": ', "is not JSON", "restore it"),
        ("[1]", "no notebook", ""),
        ('{"a": 1}', "no notebook", ""),
        (
            '{"nbformat": 3, "nbformat_minor": 0, "worksheets": []}',
            "nbformat 3",
            "jupyter nbconvert --to notebook",
        ),
        ('{"nbformat": 5, "cells": []}', "nbformat 5", "upgrade"),
        (
            '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}',
            "not a valid",
            "",
        ),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 3}', "not a valid", ""),
        ('{"nbformat": 4, "nbformat_minor": "x"}', "not a valid", ""),
        ('{"nbformat": 4, "metadata": {}, "cells": [1]}', "cell 1 is damaged", ""),
        ('{"nbformat": 4, "metadata": 1, "cells": []}', "not a valid", ""),
    ],
)
def test_what_is_no_notebook_is_refused(tmp_path: Path, content: str | None, message: str, todo: str) -> None:
    """Guarantee 11: the error says what is wrong with which file, and what to do."""
    path = tmp_path / "a.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NotebookError) as caught:
        prepare(path, {})
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert todo in caught.value.todo


def test_folder_is_refused(tmp_path: Path) -> None:
    """Guarantee 11: a folder is named as one."""
    with pytest.raises(NotebookError, match="is a folder"):
        prepare(tmp_path, {})


def test_unknown_kernel_lists_those_there_are(tmp_path: Path) -> None:
    """Guarantee 11: a kernel that is not there, in the notebook or asked for."""
    with pytest.raises(NotebookError, match=r"no kernel 'julia-1\.9'.*python3"):
        prepare(_notebook(tmp_path / "a.ipynb", kernel="julia-1.9"), {})
    with pytest.raises(NotebookError, match=r"no kernel 'other'.*python3"):
        prepare(_notebook(tmp_path / "a.ipynb"), {}, kernel_name="other")


def test_notebook_without_a_kernel_gets_python(tmp_path: Path) -> None:
    """A notebook that names no kernel runs in python3, and a warning says so."""
    prepared = prepare(_notebook(tmp_path / "a.ipynb", kernel=None), {})
    assert prepared.kernel_name == "python3"
    assert "names no kernel" in prepared.warnings[0]


def test_duplicate_step_names_both_cells(tmp_path: Path) -> None:
    """Guarantee 11: a step's name is unique in the notebook."""
    cells = [_cell("%%step load\n1"), _cell("x"), _cell("\n%%step load --force\n2", id="zz")]
    with pytest.raises(StepUsageError, match=r"'load': cell 1 \(id cell-1\) and cell 3 \(id zz\)"):
        prepare(_notebook(tmp_path / "a.ipynb", *cells), {})


def test_step_names() -> None:
    """The name is read as the kernel reads it; what it would refuse has none."""
    assert step_name("%%step load --force\nx") == "load"
    assert step_name("\n\n%%step --force load\nx") == "load"
    assert [step_name(s) for s in ("%%step", "%%step --force", "%%stepper a", "x = '%%step a'", "")] == [
        None
    ] * 5


def test_snapshot_has_stable_ids_and_no_outputs(tmp_path: Path) -> None:
    """Guarantee 6: cells have the same ids in each run, so that runs compare; old outputs are left out."""
    output = {"output_type": "stream", "name": "stdout", "text": "old"}
    cells = [
        _cell("1", id="same"),
        _cell("2", id="same"),
        _cell("%%step a\n3", outputs=[output], execution_count=7),
        {"cell_type": "markdown", "source": ["# A\n", "B"], "metadata": {}},
    ]
    path = _notebook(tmp_path / "a.ipynb", *cells)
    prepared = prepare(path, {})
    assert prepared.snapshot == prepare(path, {}).snapshot
    nb = json.loads(prepared.snapshot)
    assert [cell["id"] for cell in nb["cells"]] == ["same", "cell-2", "cell-3", "cell-4"]
    assert (nb["cells"][2]["outputs"], nb["cells"][2]["execution_count"]) == ([], None)
    assert nb["cells"][3]["source"] == "# A\nB"
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    assert prepared.steps_total == 1
    assert prepare(path, {}, steps_mode="all").steps_total == 3


def test_parameters_are_put_below_the_parameters_cell(tmp_path: Path) -> None:
    """As papermill does it, with a cell id that is the same in each run."""
    path = _notebook(tmp_path / "a.ipynb", _cell("0"), PARAMETERS, _cell("topic"))
    prepared = prepare(path, {"topic": 'a "b"', "n": 2})
    cells = json.loads(prepared.snapshot)["cells"]
    assert [cell["id"] for cell in cells] == ["cell-1", "cell-2", "injected-parameters", "cell-3"]
    found: dict[str, Any] = {}
    exec(cells[2]["source"], found)
    assert (found["topic"], found["n"]) == ('a "b"', 2)
    assert "papermill" not in json.loads(prepared.snapshot)["metadata"]


def test_values_that_can_be_passed(tmp_path: Path) -> None:
    """JSON values stay; dates and times become ISO text, tuples and sets lists."""
    path = _notebook(tmp_path / "a.ipynb", PARAMETERS)
    utc = datetime.UTC

    def passed(value: Any) -> Any:
        prepared = prepare(path, {"day": value})
        found: dict[str, Any] = {}
        exec(json.loads(prepared.snapshot)["cells"][1]["source"], found)
        assert found["day"] == prepared.parameters["day"]  # what the run shows is what the notebook gets
        return found["day"]

    for value in (None, True, 1, -2.5, "ä\n'\"\\", [1, [2]], {"a": {"b": None}}):
        assert passed(value) == value
    assert passed(datetime.date(2026, 11, 22)) == "2026-11-22"
    assert passed(datetime.datetime(2026, 11, 22, 1, 2, tzinfo=utc)) == "2026-11-22T01:02:00+00:00"
    assert passed(datetime.time(1, 2)) == "01:02:00"
    assert passed((1, {3, 2})) == [1, [2, 3]]
    assert passed(np.float64(0.5)) == 0.5
    assert passed(enum.IntEnum("Level", "LOW").LOW) == 1  # type: ignore[attr-defined]
    assert passed(Colour.RED) == "red"


class Colour(str, enum.Enum):  # noqa: UP042
    """An enumeration as it was written before StrEnum, whose text is not its value."""

    RED = "red"


@pytest.mark.parametrize("value", [object(), 1j, float("nan"), float("inf"), b"x", {1: 2}, [{"a": object()}]])
def test_values_that_cannot_be_passed(tmp_path: Path, value: Any) -> None:
    """Guarantee 11: never a silently different value."""
    with pytest.raises(ParameterError, match="day"):
        prepare(_notebook(tmp_path / "a.ipynb", PARAMETERS), {"day": value})


def test_unknown_parameter_lists_those_there_are(tmp_path: Path) -> None:
    """Guarantee 11: a misspelt parameter does not run the notebook with its default."""
    with pytest.raises(ParameterError, match="no parameter 'topci'; those there are: topic, n, day"):
        prepare(_notebook(tmp_path / "a.ipynb", PARAMETERS), {"topci": 1})
    with pytest.raises(ParameterError, match="'a-b' can't be the name"):
        prepare(_notebook(tmp_path / "a.ipynb"), {"a-b": 1})


def test_all_ways_to_assign_are_parameters(tmp_path: Path) -> None:
    """A parameter is what the tagged cell assigns, however it is written."""
    cell = _cell("%matplotlib inline\na, (b, *c) = 1, (2, 3)\nd = e = 4\nf: int = 5", tags=("parameters",))
    path = _notebook(tmp_path / "a.ipynb", cell)
    assert prepare(path, dict.fromkeys("abcdef", 0)).parameters == dict.fromkeys("abcdef", 0)


def test_parameters_without_a_parameters_cell_warn(tmp_path: Path) -> None:
    """As papermill: they go to the top, and somebody is told."""
    prepared = prepare(_notebook(tmp_path / "a.ipynb", _cell("x")), {"x": 1})
    assert [cell["id"] for cell in json.loads(prepared.snapshot)["cells"]] == [
        "injected-parameters",
        "cell-1",
    ]
    assert "no cell tagged `parameters`" in prepared.warnings[0]


def test_nothing_is_made_of_what_cannot_be_run(tmp_path: Path) -> None:
    """Guarantee 11: notebook, parameters and output are checked before a run, a blob or a folder exists."""
    client = Client(Home(tmp_path / ".nbdurable"), start=False)
    notebook = _notebook(tmp_path / "a.ipynb", PARAMETERS)
    with pytest.raises(NotebookError):
        create_headless(client, tmp_path / "none.ipynb")
    with pytest.raises(NotebookError, match="no folder"):
        create_headless(client, notebook, output=tmp_path / "no" / "out.ipynb")
    with pytest.raises(NotebookError, match="working directory"):
        create_headless(client, notebook, cwd=tmp_path / "no")
    with pytest.raises(ParameterError):
        create_headless(client, notebook, parameters={"nobody": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.ipynb"]


def test_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Guarantee 11: hours of work must not end at a folder that was never there."""
    notebook = _notebook(tmp_path / "a.ipynb")
    check_output(tmp_path / "new.ipynb", notebook)
    with pytest.raises(NotebookError, match="is a folder"):
        check_output(tmp_path, notebook)
    with pytest.raises(NotebookError, match="no folder"):
        check_output(tmp_path / "no" / "out.ipynb", notebook)
    with pytest.raises(NotebookError, match="overwrite the notebook"):
        check_output(notebook, notebook)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_output_without_permission_is_refused(tmp_path: Path) -> None:
    """Guarantee 11: the same for a folder that can't be written."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(NotebookError, match="permission denied"):
        check_output(locked / "out.ipynb", tmp_path / "a.ipynb")


def test_a_snapshot_that_is_gone_is_named_as_such(tmp_path: Path) -> None:
    """Guarantees 8, 11: the run, the blob and what to do; an altered one is not read either."""
    home = Home(tmp_path).create()
    blobs = LocalBlobs(home.blobs)
    run = Run(
        id="0" * 24 + "0199f3c2",
        notebook="/a.ipynb",
        status=RunStatus.QUEUED,
        reason="",
        kind=DriverKind.HEADLESS,
        snapshot=blobs.put(b'{"cells": []}'),
        created_at=0,
        updated_at=0,
    )
    assert run.snapshot is not None
    assert read_snapshot(home, run) == {"cells": []}
    path = blobs.path(run.snapshot)
    path.unlink()
    with pytest.raises(
        BlobMissing, match=f"the notebook of run 0199f3c2.*blob {run.snapshot} is missing"
    ) as error:
        read_snapshot(home, run)
    assert "put the file back and resume" in error.value.todo
    path.write_bytes(b'{"cells": [1]}')
    with pytest.raises(BlobDamaged, match="the notebook of run 0199f3c2"):
        read_snapshot(home, run)


def test_names_that_are_too_long(tmp_path: Path) -> None:
    """Guarantee 11: an output whose name no disk takes is refused; one that is made of a long name is short enough."""
    notebook = _notebook(tmp_path / "a.ipynb")
    with pytest.raises(NotebookError, match="longer than 230 bytes"):
        check_output(tmp_path / f"{'x' * 240}.ipynb", notebook)
    run = Run(
        id="0" * 24 + "0199f3c2",
        notebook=f"/{'ü' * 120}.ipynb",
        status=RunStatus.QUEUED,
        reason="",
        kind=DriverKind.HEADLESS,
        created_at=0,
        updated_at=0,
    )
    name = output_path(Home(tmp_path), run).name
    assert name.endswith("ü-0199f3c2.ipynb")
    assert len(name.encode()) < 230


def test_output_goes_where_the_run_says_or_to_the_project(tmp_path: Path) -> None:
    """One rule for where the output notebook is."""
    run = Run(
        id="0" * 24 + "0199f3c2",
        notebook="/somewhere/agent.ipynb",
        status=RunStatus.QUEUED,
        reason="",
        kind=DriverKind.HEADLESS,
        created_at=0,
        updated_at=0,
    )
    home = Home(tmp_path)
    assert output_path(home, run) == tmp_path / "outputs" / "agent-0199f3c2.ipynb"
    assert output_path(home, run.model_copy(update={"output": "/x.ipynb"})) == Path("/x.ipynb")
