"""The functions that `durable.on` registers, called without a kernel or a run."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbdurable as durable
from nbdurable.errors import UsageError
from nbdurable.kernel import hooks
from nbdurable.models import Occasion, RunStatus
from nbdurable.settings import Home, Settings


@pytest.fixture(autouse=True)
def none_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_registered", {})


def told(kind: Any) -> str:
    """Return what a hook is told, as it travels."""
    found = Occasion(
        kind=kind, key=kind, id="1", notebook="n.ipynb", parameters={}, status=RunStatus.FAILED, reason="why"
    )
    return found.model_dump_json()


def test_a_hook_leaves_the_dice_as_they_are() -> None:
    """Guarantee 6: a resumed run tells other hooks than the first attempt did, and draws the same numbers."""
    heard = []

    @durable.on("start")
    async def rolls(run: Occasion) -> None:
        heard.append((run.reason, random.random(), np.random.rand()))

    assert json.loads(hooks.registered()) == {"start": {rolls.__qualname__: True}}
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).rand()
    asyncio.run(hooks.tell_async(rolls.__qualname__, told("start")))
    assert heard == [("why", *expected)]
    assert (random.random(), np.random.rand()) == expected
    assert json.loads(hooks.report()) is None


def test_the_error_of_a_hook_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it raises: nothing of it goes on."""

    @durable.on("failure")
    def leaves(run: Occasion) -> None:
        raise SystemExit("gone")

    hooks.tell(leaves.__qualname__, told("failure"))
    assert json.loads(hooks.report()) == ["SystemExit", "gone"]
    assert "SystemExit: gone" in capsys.readouterr().err


def test_settings_that_name_no_hook(tmp_path: Path) -> None:
    """Guarantee 11: a kind that does not exist, and a hook of nothing, are refused by name with an example."""
    home = Home(tmp_path)
    path = tmp_path / "settings.toml"
    for line, name in (
        ('failur = "a:b"', "hooks.failur"),
        ("failure = []", "hooks.failure"),
        ("wait = 3", "hooks.wait"),
    ):
        path.write_text(f"[hooks]\n{line}\n")
        with pytest.raises(UsageError, match=f"the setting '{name}' can't be used") as refused:
            Settings.load(home)
        assert "module:function" in str(refused.value)
    path.write_text('[hooks]\nfailure = "alerts:tell"\nwait = ["notify", "--now"]\n')
    assert Settings.load(home).hooks == {"failure": "alerts:tell", "wait": ("notify", "--now")}
