"""Three ordinary notebooks that know nothing of nbdurable, run with `--steps all` and killed behind every cell in turn.

Data cleaning on pandas, a study in scikit-learn with plots, the transcript of an agent: guarantee 6 for what people
have. By default one run is killed behind each of its cells; with `--long` each cell has a run of its own as well.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from nbdurable import contract
from nbdurable.checkpoint.manifest import unseal
from nbdurable.client import Client
from nbdurable.models import RunStatus
from nbdurable.notebooks import create_headless
from nbdurable.security import load_key
from nbdurable.settings import Home
from tests.faults.test_random_kills import all_events
from tests.tools import notebooks

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = ("penguins_clean", "digits_study", "support_agent")
DEADLINE_S = 240.0
TIMED = {"search"}  # variables that hold how long something took: no two runs are alike


def drive(home: Home, notebook: Path, output: Path) -> dict[str, Any]:
    """Run a notebook to its end, resuming it where it was killed too often; return what crashes must not change."""
    client = Client(home, timeout_s=60)
    run = create_headless(client, notebook, output=output, steps_mode="all", cwd=output.parent)
    deadline = time.monotonic() + DEADLINE_S
    while True:
        detail = client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))
        assert time.monotonic() < deadline, f"{detail.status}: {detail.reason}"
        if detail.status is RunStatus.FAILED and "given up" in detail.reason:
            client.call(contract.RESUME_RUN, contract.ResumeRun(run_id=run.id))
        elif detail.status.is_final:
            break
        client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id, after=1 << 60, hold_s=0.2))
    assert detail.status is RunStatus.COMPLETED, detail.reason
    key = load_key(home)
    found = client.call(contract.CHECKPOINTS, contract.ByRun(run_id=run.id)).checkpoints
    manifests = {c.step: unseal(c.manifest, key, of=c.step) for c in found}
    begun = Counter(event.step for event in all_events(client, run.id) if event.kind == "step_started")
    return {
        "variables": {
            step: sorted(item for item in m.fingerprints.items() if item[0] not in TIMED)
            for step, m in manifests.items()
        },
        "names": {step: sorted((v.name, v.state) for v in m.variables) for step, m in manifests.items()},
        "result": detail.result,
        "outputs": {cell: _timeless(found) for cell, found in notebooks.outputs(output).items()},
        "begun": {c.step: begun[c.step] for c in found if c.status == "completed"},
    }


def _timeless(found: list[dict[str, Any]]) -> list[str]:
    """Return outputs as text; an object's address differs in each process."""
    return [re.sub(r"0x[0-9a-f]{8,}", "0x·", repr(output)) for output in found]


@pytest.fixture(scope="module", params=NOTEBOOKS)
def notebook(request: pytest.FixtureRequest) -> Path:
    return FOLDER / f"{request.param}.ipynb"


@pytest.fixture(scope="module")
def uninterrupted(
    notebook: Path, tmp_path_factory: pytest.TempPathFactory, started_home: Callable[[], Home]
) -> dict[str, Any]:
    """Return how the notebook ends when nothing crashes."""
    return drive(started_home(), notebook, tmp_path_factory.mktemp("uninterrupted") / "out.ipynb")


@pytest.mark.timeout(900)
def test_a_notebook_killed_behind_each_of_its_cells_ends_as_if_never_killed(
    notebook: Path,
    uninterrupted: dict[str, Any],
    started_home: Callable[[], Home],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guarantees 1 and 6: same variables, outputs and result, and no cell that was kept ran twice."""
    fuses = tmp_path / "fuses"
    fuses.mkdir()
    monkeypatch.setenv("NBDURABLE_FAULT", f"commit-acknowledged:each:{fuses}")
    found = drive(started_home(), notebook, tmp_path / "out.ipynb")
    assert {path.name for path in fuses.iterdir()} == _code_cells(notebook)
    assert found == uninterrupted
    assert set(found["begun"].values()) == {1}


@pytest.mark.timeout(3600)
def test_a_notebook_killed_behind_one_of_its_cells_ends_as_if_never_killed(
    notebook: Path,
    uninterrupted: dict[str, Any],
    started_home: Callable[[], Home],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Guarantee 6, for each cell in a run of its own."""
    if not request.config.getoption("--long"):
        pytest.skip("with --long")
    cells = _code_cells(notebook)
    for cell in sorted(cells):
        folder = tmp_path / cell
        fuses = folder / "fuses"
        fuses.mkdir(parents=True)
        for other in cells - {cell}:
            (fuses / other).touch()
        monkeypatch.setenv("NBDURABLE_FAULT", f"commit-acknowledged:each:{fuses}")
        assert drive(started_home(), notebook, folder / "out.ipynb") == uninterrupted
        assert (fuses / cell).exists()


def _code_cells(notebook: Path) -> set[str]:
    return {cell.id for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"}
