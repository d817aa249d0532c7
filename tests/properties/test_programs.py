"""A notebook that dies and is resumed ends as one that never stopped: over generated notebooks.

Each runs with checkpoints in one process; another, of another hash seed, restores those of its first cells and runs
the rest. Compared are values, types, sharing between variables, random state, and with them what later cells do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.tools.fresh import Trial
from tests.tools.programs import program

BATCHES = 8
SHORT, LONG = 40, 1000  # notebooks of a batch


@pytest.fixture
def trial() -> Iterator[Trial]:
    found = Trial()
    yield found
    found.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_resumed_notebook_ends_as_one_that_never_stopped(
    batch: int, trial: Trial, request: pytest.FixtureRequest
) -> None:
    """Guarantees 6 and 7: for a crash behind any cell."""
    size = LONG if request.config.getoption("--long") else SHORT
    steps = 0
    for seed in range(batch * LONG, batch * LONG + size):
        choose = random.Random(seed)
        notebook = trial.runnable(program(choose))
        if not notebook.cells:
            continue
        kept = choose.randint(1, len(notebook.cells))
        if flaw := trial.flaw(notebook, kept):
            pytest.fail(f"seed {seed}, {trial.smallest(notebook, kept, flaw)}", pytrace=False)
        steps += sum(cell.is_step for cell in notebook.cells[:kept])
    assert steps > size
