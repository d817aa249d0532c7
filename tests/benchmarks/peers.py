"""Kishu and marimo's persistent cache, on the data of `checkpoints.py`, in processes of their own.

Owns how they are driven: Kishu by its hooks around the cells of an IPython shell, marimo by `mo.persistent_cache`
around a function. They bring other versions of what we stand on, so `environment()` makes a virtual environment for
them in `.benchmarks/peers` once, by pip; what they don't bring (polars, scikit-learn, nbdurable) it takes from ours.
Only the time that each spends beyond making the value counts. Kishu's SQLite file is durable with each commit; marimo
does not fsync its files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

WANTED = ("kishu==0.3.4", "marimo==0.25.2")
TOOLS = ("kishu", "marimo")
_spent = [0.0]  # seconds that the value itself took to make


def environment() -> Path:
    """Return the Python of an environment that has the peers; make it where there is none."""
    root = Path.cwd() / ".benchmarks" / "peers"
    python, ready = root / "bin" / "python", root / "ready"
    if not ready.exists():
        venv.create(root, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *WANTED], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        found = root / "lib" / version / "site-packages" / "zz-ours.pth"  # searched last
        found.write_text(sysconfig.get_path("purelib"))
        ready.write_text(" ".join(WANTED))
    return python


def measure(tool: str, kind: str, size: int, folder: Path) -> dict[str, float]:
    """Return seconds and bytes of first, unchanged, changed, and of a restore by another process."""
    folder = folder / tool
    folder.mkdir()
    found: dict[str, float] = {}
    for phase in ("save", "restore"):
        command = [
            str(environment()),
            "-m",
            "tests.benchmarks.peers",
            tool,
            phase,
            kind,
            str(size),
            str(folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "it failed").splitlines()[-1])
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def value_of(kind: str, size: int, change: int) -> Any:
    """Make a value, with `change` of its changes."""
    from tests.benchmarks.checkpoints import KINDS

    began = time.perf_counter()
    value = KINDS[kind].make(size)
    for _ in range(change):
        value = KINDS[kind].change(value)
    _spent[0] += time.perf_counter() - began
    return value


def warm(kind: str) -> None:
    """Load what the libraries load when they are first used."""
    from tests.benchmarks.checkpoints import KINDS

    KINDS[kind].use(KINDS[kind].make(1 << 20))


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    _spent[0] = 0.0
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began - _spent[0], result


def _phases(folder: Path, acts: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Carry out first, unchanged and changed; note what each wrote."""
    from tests.benchmarks.checkpoints import bytes_in

    found: dict[str, float] = {}
    standing = bytes_in(folder)
    for name, act in acts.items():
        found[name] = act()
        found["bytes" if name == "first" else f"{name}_bytes"] = bytes_in(folder) - standing
        standing = bytes_in(folder)
    return found


# marimo --------------------------------------------------------------------------------------------------------


def _cached(folder: Path) -> Callable[[str, int, int], Any]:
    import marimo

    @marimo.persistent_cache(save_path=str(folder))
    def cached(kind: str, size: int, change: int) -> Any:
        from tests.benchmarks.peers import value_of

        return value_of(kind, size, change)

    return cached  # type: ignore[no-any-return]


def marimo_save(kind: str, size: int, folder: Path) -> dict[str, float]:
    cached = _cached(folder)
    return _phases(
        folder,
        {
            "first": lambda: _timed(lambda: cached(kind, size, 0))[0],
            "unchanged": lambda: _timed(lambda: cached(kind, size, 0))[0],
            "changed": lambda: _timed(lambda: cached(kind, size, 1))[0],
        },
    )


def marimo_restore(kind: str, size: int, folder: Path) -> Callable[[], Any]:
    cached = _cached(folder)
    return lambda: cached(kind, size, 0)


# Kishu ---------------------------------------------------------------------------------------------------------


def _kishu(folder: Path) -> tuple[Any, Any]:
    os.environ["KISHU_PATH_ROOT"], os.environ["ENV_KISHU_TEST_MODE"] = (
        str(folder),
        "1",
    )  # no front end to save by
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell
    from kishu.jupyterint import KishuForJupyter
    from kishu.notebook_id import NotebookId

    path = folder / "notebook.ipynb"
    if not path.exists():
        nbformat.write(nbformat.v4.new_notebook(), path)
    shell = InteractiveShell.instance()
    return shell, KishuForJupyter(NotebookId("key", path, "kernel"), ip=shell)


def kishu_save(kind: str, size: int, folder: Path) -> dict[str, float]:
    shell, kishu = _kishu(folder)
    inside = [0.0]

    def counted(hook: Callable[[Any], None]) -> Callable[[Any], None]:
        def called(argument: Any) -> None:
            began = time.perf_counter()
            hook(argument)
            inside[0] += time.perf_counter() - began

        return called

    kishu.pre_run_cell, kishu.post_run_cell = counted(kishu.pre_run_cell), counted(kishu.post_run_cell)
    kishu.install_kishu_hooks()

    def cell(source: str) -> float:
        inside[0] = 0.0
        failed = kishu._last_execution_count + 1
        shell.run_cell(source).raise_error()
        if kishu._kishu_graph.head() != f"0:0:{failed}":
            raise RuntimeError("Kishu did not commit it")
        return inside[0]

    cell("from tests.benchmarks.checkpoints import KINDS; from tests.benchmarks.peers import value_of")
    return _phases(
        folder,
        {
            "first": lambda: cell(f"x = value_of({kind!r}, {size}, 0)"),
            "unchanged": lambda: cell("same = x is not None"),
            "changed": lambda: cell(f"x = KINDS[{kind!r}].change(x)"),
        },
    )


def kishu_restore(kind: str, size: int, folder: Path) -> Callable[[], Any]:
    shell, kishu = _kishu(folder)

    def restored() -> Any:
        kishu.checkout("0:0:2", skip_notebook=True)
        return shell.user_ns["x"]

    return restored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("phase", choices=("save", "restore"))
    parser.add_argument("kind")
    parser.add_argument("size", type=int)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    from tests.benchmarks.checkpoints import resident

    warm(options.kind)
    saving = {"kishu": kishu_save, "marimo": marimo_save}
    restoring = {"kishu": kishu_restore, "marimo": marimo_restore}
    arguments = options.kind, options.size, options.folder
    if options.phase == "save":
        print(json.dumps(saving[options.tool](*arguments)))
        return
    restore = restoring[options.tool](*arguments)
    before = resident()
    seconds, value = _timed(restore)
    if _spent[0] or value is None:
        raise SystemExit("it made the value again")
    print(json.dumps({"restore": seconds, "resident": float(resident() - before)}))


if __name__ == "__main__":
    main()
