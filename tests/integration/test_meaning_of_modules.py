# ruff: noqa: E501 -- one edit a line reads as a table
"""What is imported is part of a step's meaning: modules of the project, and versions of packages (guarantees 1, 9)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel

LOAD = "%load_ext nbdurable"
FILES = {
    "helpers.py": "from config import LIMIT\nimport shapes.round\n\n\ndef f():\n    # one\n    return 1 + LIMIT\n",
    "config.py": "LIMIT = 5\n",
    "lazy.py": "def g():\n    import late\n    return late.h()\n",
    "late.py": "def h():\n    return 1\n",
    "shapes/__init__.py": "KIND = 'flat'\n",
    "shapes/round.py": "from . import base\n\n\ndef area():\n    return base.PI\n",
    "shapes/base.py": "PI = 3\n",
    "alone.py": "def f():\n    return 1\n",
}
CELLS = {
    "plain": ["import helpers", "%%step plain\na = helpers.f()"],
    "from": ["from helpers import f", "%%step from\nb = f()"],
    "inside": ["%%step inside\nimport alone\nc = alone.f()"],
    "late": ["import lazy", "def go():\n    return lazy.g()", "%%step late\nd = go()"],
    "package": ["from shapes import round as r", "%%step package\ne = r.area()"],
    "untouched": ["%%step untouched\nx = 1"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "pyproject.toml").write_text("")
    return tmp_path


@pytest.fixture
def start(home: Home, coordinator: Any, folder: Path) -> Iterator[Callable[..., Kernel]]:
    """Starts a kernel of the notebook `n.ipynb`, in place of the one before."""
    cells = [cell for cells in CELLS.values() for cell in cells]
    path = notebooks.write(folder / "n.ipynb", cells)
    running: list[Kernel] = []

    def make(**env: str) -> Kernel:
        while running:
            running.pop().shutdown()
        running.append(Kernel(home.root, path, folder, env={"PYTHONDONTWRITEBYTECODE": "1", **env}))
        assert running[0].run(LOAD).status == "ok"
        return running[0]

    yield make
    while running:
        running.pop().shutdown()


def notes(kernel: Kernel) -> dict[str, str]:
    """Run all cells, and return what was said of each step."""
    said = {}
    for step, cells in CELLS.items():
        for cell in cells:
            reply = kernel.run(cell)
            assert reply.status == "ok", reply.error
        said[step] = reply.notes
    return said


EDITS = [
    ("helpers.py", "# one\n    return 1", "# two\n\n    return 2", {"plain", "from"}, "module `helpers.py` changed, line 8"),
    ("config.py", "5", "6", {"plain", "from"}, "module `config.py` changed, line 1"),
    ("alone.py", "1", "2", {"inside"}, "module `alone.py` changed, line 2"),
    ("late.py", "1", "2", {"late"}, "module `late.py` changed, line 2"),
    ("shapes/base.py", "3", "4", {"plain", "from", "package"}, "module `shapes/base.py` changed, line 1"),
    ("shapes/__init__.py", "flat", "solid", {"plain", "from", "package"}, "module `shapes/__init__.py` changed, line 1"),
    ("lazy.py", "def g():\n", "# late\n\ndef g():\n\n", set(), ""),
]  # fmt: skip


def test_an_edited_module_runs_the_steps_that_import_it(start: Callable[..., Kernel], folder: Path) -> None:
    """Guarantees 1, 9: through any number of imports, also those that a function or the step makes; with the line."""
    assert all(said.startswith("✓") for said in notes(start()).values())
    assert all(said.startswith("↺") for said in notes(start(PYTHONHASHSEED="3")).values())
    for file, old, new, runs, reason in EDITS:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        kernel = start()
        planned = {line.split()[0]: line for line in kernel.run("%durable plan").notes.splitlines()}
        for step, said in notes(kernel).items():
            assert said.startswith("✓" if step in runs else "↺"), (file, step, said)
            assert (reason in said) == (step in runs) or not reason
            assert (f"run       {reason}" in planned[step]) == (step in runs), planned[step]


def test_a_module_counts_as_it_was_loaded(start: Callable[..., Kernel], folder: Path) -> None:
    """Guarantee 7: an edit that this kernel does not run yet is said, and counts once the module is loaded again."""
    kernel = start()
    kernel.run("import alone")
    (folder / "alone.py").write_text("def f():\n    return 2\n")
    step = "%%step a\nx = alone.f()"
    assert "alone.py was edited after it was loaded" in kernel.run(step).notes
    assert kernel.value("x") == "1"
    again = kernel.run(step).notes
    assert again.startswith("↺ a")
    assert "alone.py was edited after it was loaded" in again
    kernel.run("import importlib\nimportlib.reload(alone)")
    said = kernel.run(step).notes
    assert "(module `alone.py` changed, line 2)" in said
    assert "edited after" not in said
    assert kernel.value("x") == "2"
    (folder / "alone.py").write_text("def f():\n    return 3\n")
    kernel = start()
    kernel.run("import alone")
    assert "(module `alone.py` changed, line 2)" in kernel.run(step).notes
    assert kernel.value("x") == "3"


def test_another_version_of_a_package_is_said_and_nothing_runs(
    start: Callable[..., Kernel], folder: Path
) -> None:
    """Guarantee 9: a restored value was made with another version; the person decides. Its code is not looked into."""
    installed = folder / "venv" / "site-packages"

    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))

    def install(version: str) -> None:
        (installed / "boxes").mkdir(parents=True, exist_ok=True)
        (installed / "boxes" / "__init__.py").write_text(
            f"class Box:\n    pass\ndef make():\n    return '{version}'\n"
        )
        for old in installed.glob("*.dist-info"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        info = installed / f"nice_boxes-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nice-boxes\nVersion: {version}\n")
        (info / "RECORD").write_text("boxes/__init__.py,,\n")

    cells = [
        "from boxes import Box\nimport boxes",
        "%%step by_code\nword = boxes.make()",
        "%%step by_value\nbox = [Box()]",
        "%%step inside\nimport boxes as b\nx = 1",
        "%%step neither\ny = 1",
    ]
    install("1.2")
    kernel = start(PYTHONPATH=path)
    for cell in cells:
        assert kernel.run(cell).status == "ok"
    install("2.0")
    kernel = start(PYTHONPATH=path)
    said = [kernel.run(cell).notes for cell in cells][1:]
    assert all(line.startswith("↺") for line in said), said
    warned = "same code and inputs; made with nice-boxes 1.2, this is 2.0"
    assert [warned in line for line in said] == [True, True, True, False]
    assert kernel.value("word") == "'1.2'"
    assert warned in kernel.run("%durable status").notes
