"""Guarantee 6 at every fault point: crash there, let the run go on, and its end equals an uninterrupted one's.

The tests are made from `telemetry.FAULT_POINTS` itself, and each checks that its crash took place: a point without
a crash test can't exist. Each process of a run (coordinator, worker, executor, kernel) may be the one that crashes.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

import nbdurable
from nbdurable import contract
from nbdurable.checkpoint.manifest import unseal
from nbdurable.cli.past import fork
from nbdurable.client import Client
from nbdurable.models import RunStatus, WaitKind
from nbdurable.notebooks import create_headless
from nbdurable.security import load_key
from nbdurable.settings import Home
from nbdurable.telemetry import FAULT_POINTS
from tests.tools import notebooks

DEADLINE_S = 90.0

CELLS = [
    ("setup", "%load_ext nbdurable\nimport nbdurable as durable\nimport random\nimport numpy as np\nrandom.seed(7)\n"
              "class Note:\n    def __init__(self, text):\n        self.text = text\n"
              "@durable.on('success')\ndef tell(run):\n    print('told')\n"
              "@durable.step\ndef repeated(letter):\n    print('repeating', letter)\n"
              "    return [Note(letter * 50_000), random.random()]"),
    ("one", "%%step one\nbig = np.arange(20_000)\nnotes = [Note('a')]\nalias = notes\nprint('one', random.random())"),
    ("two", "%%step two\nnotes.append(Note('b'))\ntext = [repeated('x'), repeated('y')]\nbig[0] = 5\n"
            "assert durable.trigger('n.ipynb', delay='1d').status == 'delayed'\nint(big.sum())"),
    ("gate", "%%step gate\ndraft = f'{len(notes)} notes'\nprint('before the gate')\n"
             "first = durable.first_of(decision=durable.approval(draft, title='Publish?'), late=durable.timer('1h'))\n"
             "published = first.result.value"),
    ("nap", "%%step nap\nboth = durable.all_of(nap=durable.timer(2.1), paid=durable.event('paid', match={'n': 1}))"),
    ("try", "%%step try --retries 2 --min-wait 20ms --max-wait 20ms\nprint('try')\nnotes.append(Note('c'))\n"
            "if durable.current_run().failures < 1:\n    raise TimeoutError('busy')\nlen(notes)"),
    ("end", "%%step end\nshared = alias is notes\nlast = [n.text for n in alias]\nprint(random.random())\n"
            "durable.result(shared=shared, last=last, total=int(big.sum()), published=published, both=both)"),
]  # fmt: skip


def drive(home: Home, folder: Path, *, forked: bool = False) -> dict[str, Any]:
    """Run the notebook to its end, answering its approval, and return everything that must not depend on crashes.

    `forked`: the end is that of a fork, which shares all steps but the last.
    """
    folder.mkdir()
    client = Client(home, timeout_s=60)
    notebook = notebooks.write(folder / "n.ipynb", CELLS)
    output = folder / "out.ipynb"
    run = create_headless(client, notebook, output=output, idempotency_key=str(folder))
    client.send("paid", {"n": 1, "by": "ann"}, idempotency_key="paid")
    deadline = time.monotonic() + DEADLINE_S
    while True:
        detail = client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))
        assert time.monotonic() < deadline, f"{detail.status}: {detail.reason}"
        if detail.status.is_final:
            break
        for wait in detail.waits:
            if wait.kind is WaitKind.APPROVAL and wait.answer is None:
                answer = contract.AnswerWait(wait_id=wait.id, approved=True, by="test", nonce="n")
                client.call(contract.ANSWER_WAIT, answer)
        client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id, after=1 << 60, hold_s=0.2))
    assert detail.status is RunStatus.COMPLETED, detail.reason
    runs = client.call(contract.LIST_RUNS, contract.ListRuns()).runs
    assert [one.status for one in runs if one.parent_id == run.id] == ["delayed"]
    assert sorted(wait.title for wait in detail.waits if wait.answer is not None) == [
        "Publish?", "event paid", "sleep 2.1 s"
    ]  # fmt: skip
    assert [wait.title for wait in detail.waits if wait.answer is None] == ["sleep 1h"]
    if forked:
        output, deadline = folder / "forked.ipynb", time.monotonic() + DEADLINE_S
        run = fork(client, run.id, start="end", output=output, by="test").carry_out()
        while not (detail := client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))).status.is_final:
            assert time.monotonic() < deadline, f"{detail.status}: {detail.reason}"
            client.call(contract.READ_EVENTS, contract.ReadEvents(run_id=run.id, after=1 << 60, hold_s=0.2))
        assert sum(step.executions for step in detail.steps) == 1
    key = load_key(home)
    found = client.call(contract.CHECKPOINTS, contract.ByRun(run_id=run.id)).checkpoints
    manifests = {c.step: unseal(c.manifest, key, of=c.step) for c in found}
    return {
        "variables": {
            step: sorted(m.fingerprints.items()) for step, m in manifests.items() if step != "gate"
        },
        "names": {step: sorted(v.name for v in m.variables) for step, m in manifests.items()},
        "result": detail.result,
        "outputs": {cell: _timeless(found) for cell, found in notebooks.outputs(output).items()},
    }


def _timeless(found: list[dict[str, Any]]) -> list[str]:
    """Return outputs as text without what is different in each run: wait ids and times."""
    return [
        re.sub(r"\b[0-9A-HJKMNP-TV-Z]{6}\b|[0-9a-f]{32}|\d\d:\d\d", "·", repr(output)) for output in found
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, started_home: Any) -> dict[str, Any]:
    """Return how the run ends when nothing crashes."""
    return drive(started_home(), tmp_path_factory.mktemp("uninterrupted") / "run")


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_crash_changes_nothing(
    point: str,
    uninterrupted: dict[str, Any],
    started_home: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guarantee 6: the end of a run that crashed at this point equals an uninterrupted one's."""
    fuse = tmp_path / "fuse"
    hit = 2 if point in ("store-committed", "store-before-commit", "blob-written") else 1
    monkeypatch.setenv("NBDURABLE_FAULT", f"{point}:{hit}:{fuse}")
    found = drive(started_home(), tmp_path / "run", forked=point == "past-changed")
    assert fuse.exists(), f"nothing passed the fault point {point}"
    for part, whole in uninterrupted.items():
        assert found[part] == whole, part


def test_each_fault_point_stands_in_the_code() -> None:
    """A point that nothing passes protects nothing."""
    root = Path(nbdurable.__file__).parent
    source = "\n".join(p.read_text(encoding="utf-8") for p in root.rglob("*.py"))
    used = re.findall(r'fault_point\("([a-z-]+)"', source)
    assert set(used) == set(FAULT_POINTS)
