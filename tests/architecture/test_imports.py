"""The house's rules (design §8): import directions, one door per outside package, cheap imports, public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nbdurable

PACKAGE = Path(nbdurable.__file__).parent

WORDS = {"models", "errors", "settings"}
RULES = {"lifecycle", "policies", "stepline", "spending"}
BASE = WORDS | RULES | {"contract", "security", "trust", "telemetry", "processes"}
MAY_IMPORT = {
    "store": BASE | {"store"},
    "checkpoint": BASE | {"checkpoint"},
    "client": BASE | {"client"},
    "notebooks": BASE | {"checkpoint", "client", "notebooks"},
    "coordinator": BASE | {"store", "checkpoint", "client", "coordinator"},
    "kernel": BASE | {"checkpoint", "client", "notebooks", "kernel"},
    "runner": BASE | {"checkpoint", "client", "notebooks", "runner"},
    "dashboard": BASE | {"checkpoint", "client", "dashboard"},
    "cli": BASE
    | {"store", "checkpoint", "client", "notebooks", "coordinator", "kernel", "runner", "dashboard", "cli"},
    "__main__": {"cli"},
}
DOORS = {
    "duckdb": {"store"},
    "IPython": {"kernel"},
    "ipykernel": {"kernel"},
    "papermill": {"runner"},
    "nbclient": {"runner"},
    "jupyter_client": {"notebooks", "runner"},
    "panel": {"dashboard"},
    "bokeh": {"dashboard"},
    "bokeh_fastapi": {"dashboard"},
    "typer": {"cli"},
    "rich": {"cli"},
    "cloudpickle": {"checkpoint"},
    "pickle": {"checkpoint"},
    "psutil": {"processes"},
    "jsonschema": {"coordinator"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            if node.module == "nbdurable":
                found |= {f"nbdurable.{alias.name}" for alias in node.names}
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_and_through_their_doors(path: Path) -> None:
    """Words ← rules ← store, checkpoint, client ← coordinator, kernel, runner, dashboard ← cli."""
    part = part_of(path)
    names = imports(path)
    if part in MAY_IMPORT:
        ours = {n.split(".")[1] for n in names if n.startswith("nbdurable.")} - {"__version__"}
        assert ours <= MAY_IMPORT[part]
    elif part in WORDS | RULES:
        ours = {n.split(".")[1] for n in names if n.startswith("nbdurable.")} - {"__version__"}
        assert ours <= WORDS | RULES
    for package, parts in DOORS.items():
        if package in {n.split(".")[0] for n in names}:
            assert part in parts, f"{package} is imported only in {parts}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_file_says_what_it_owns(path: Path) -> None:
    """A newcomer learns from a file's first docstring what belongs there."""
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


HEAVY = {
    "pandas",
    "numpy",
    "polars",
    "pyarrow",
    "panel",
    "bokeh",
    "duckdb",
    "papermill",
    "fastapi",
    "sklearn",
    "rich",
}


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import nbdurable", set()),
        ("import nbdurable.kernel.extension", set()),
        ("import nbdurable.client", set()),
        ("import nbdurable.cli", {"rich"}),  # typer brings it along
    ],
)
def test_importing_is_cheap(statement: str, allowed: set[str]) -> None:
    """Heavy packages are imported where they are used, never by an import of ours."""
    assert loaded_by(statement) & HEAVY <= allowed


def test_the_kernel_reaches_neither_store_nor_coordinator() -> None:
    """Guarantee 8 rests on it: a kernel talks to the coordinator's API only."""
    code = "import sys, nbdurable.kernel.extension, nbdurable.kernel.waits; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [m for m in done.stdout.split() if m.startswith(("nbdurable.store", "nbdurable.coordinator"))]


def test_public_names() -> None:
    """The public names are these, and each can be had."""
    assert nbdurable.__all__ == [
        "Abort",
        "ChildFailed",
        "Client",
        "Decision",
        "DurableError",
        "Failed",
        "RetryAfter",
        "RunHandle",
        "WaitTimeout",
        "all_of",
        "all_of_async",
        "approval",
        "approve",
        "approve_async",
        "child",
        "current_run",
        "event",
        "first_of",
        "first_of_async",
        "ledger",
        "load",
        "map",
        "map_async",
        "on",
        "recipe",
        "result",
        "skip_rest",
        "sleep",
        "sleep_async",
        "sleep_until",
        "sleep_until_async",
        "step",
        "timer",
        "trigger",
        "trigger_and_wait",
        "trigger_and_wait_async",
        "trigger_async",
        "trigger_batch",
        "trigger_batch_and_wait",
        "trigger_batch_and_wait_async",
        "trigger_batch_async",
        "wait_for",
        "wait_for_async",
    ]
    for name in nbdurable.__all__:
        assert getattr(nbdurable, name) is not None
