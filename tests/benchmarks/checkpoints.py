"""How long it takes to save a variable, to save it again, and to have it back; beside five others.

Run: `python -m tests.benchmarks.checkpoints [--size MB] [--only NAME …] [--no-peers]` (`pip install -e .[bench]`).
The others are pickle 5, joblib and dill, and in an environment of their own that is made once (`peers.py`), marimo's
persistent cache and Kishu. All times are durable, with fsync, but marimo's. Everything is restored in a process of its
own, whose memory is counted. Ours and the peers take turns on the same data, so that a noisy machine is noisy for all.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.manifest import CodeFacts, Manifest, seal, unseal
from nbdurable.checkpoint.restore import restore
from nbdurable.checkpoint.save import save
from nbdurable.checkpoint.track import Changes, Snapshot, Tracker
from nbdurable.models import SignedManifest
from tests.benchmarks import peers as apart
from tests.benchmarks.table import Row, show

COLUMNS = 20
KEY = b"0" * 32
PEERS = ("pickle", "joblib", "dill")


@dataclass(frozen=True)
class Data:
    """One kind of data: made for a size in bytes; `change` writes one part of it; `use` touches all of it."""

    make: Callable[[int], Any]
    change: Callable[[Any], Any]
    use: Callable[[Any], Any]
    imports: tuple[str, ...] = ()
    lazy: bool = False  # whether the targets for arrays and columns apply
    changed_share: float = 0.0  # of the bytes, in what `change` writes


def _texts(size: int) -> Any:
    """Make an Arrow table of strings of 25 bytes in 20 columns."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = size // COLUMNS // 33
    columns = {}
    for number in range(COLUMNS):
        digits = pa.array(np.arange(rows) + 10**15 + number).cast(pa.large_string())
        columns[f"c{number}"] = pc.binary_join_element_wise(
            pa.scalar("text of ", pa.large_string()), digits, pa.scalar("", pa.large_string())
        )
    return pa.table(columns)


def _pandas(size: int) -> Any:
    import pandas as pd

    table = _texts(size)
    dtype = pd.StringDtype("pyarrow", na_value=np.nan)
    return pd.DataFrame({name: pd.array(table[name], dtype=dtype) for name in table.column_names})


def _objects(size: int) -> Any:
    import pandas as pd

    frame = _texts(size // 3)
    return pd.DataFrame(
        {name: pd.Series(frame[name].to_pylist(), dtype=object) for name in frame.column_names}
    )


def _polars(size: int) -> Any:
    import polars

    return polars.from_arrow(_texts(size))


def _forest(size: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    x = np.random.default_rng(0).random((max(200, size >> 18), 10))
    y = (x.sum(axis=1) * 3).astype(int) % 4
    return RandomForestClassifier(100, random_state=0, n_jobs=1).fit(x, y)


def _chat(size: int) -> Any:
    words = [f"{i:x}" for i in range(4096)]
    source = random.Random(0)
    return [
        {
            "role": "user",
            "content": " ".join(source.choices(words, k=400)),
            "tokens": i,
            "tools": [i, "search"],
        }
        for i in range(10_000 * size >> 30)
    ]


def _set(value: Any, name: str, item: Any) -> Any:
    setattr(value, name, item)
    return value


def _item(value: Any, key: Any, item: Any) -> Any:
    value[key] = item
    return value


def _upper(frame: Any) -> Any:
    frame["c3"] = frame["c3"].str.upper()
    return frame


def _contains_polars(frame: Any) -> Any:
    import polars as pl

    return frame.select(pl.all().str.contains("zz", literal=True).sum())


SHARE = 1 / COLUMNS
KINDS = {
    "NumPy": Data(
        lambda size: np.random.default_rng(0).random((COLUMNS, size // COLUMNS // 8)),
        lambda x: _item(x, 3, x[3] + 1),
        lambda x: float(x.sum()),
        ("numpy",),
        True,
        SHARE,
    ),
    "pandas, Arrow strings": Data(
        _pandas,
        _upper,
        lambda x: sum(int(x[c].str.contains("zz", regex=False).sum()) for c in x.columns),
        ("pandas", "pyarrow"),
        True,
        SHARE,
    ),
    "pandas, object strings": Data(
        _objects, _upper, lambda x: sum(len(text) for c in x.columns for text in x[c]), ("pandas",)
    ),
    "polars": Data(
        _polars,
        lambda x: x.with_columns(x["c3"].str.to_uppercase()),
        _contains_polars,
        ("polars", "pyarrow"),
        True,
        SHARE,
    ),
    "dict of 1e6 entries": Data(
        lambda size: {f"key {i}": i * 1.5 for i in range(1_000_000 * size >> 30)},
        lambda x: _item(x, "one more", 1.0),
        lambda x: sum(x.values()),
    ),
    "RandomForest": Data(_forest, lambda x: _set(x, "verbose", 0), lambda x: x.n_features_in_, ("sklearn.ensemble",)),
    "10k chat messages": Data(
        _chat,
        lambda x: (x.append({"role": "user", "content": "one more", "tokens": 1, "tools": []}), x)[1],
        lambda x: sum(len(message["content"]) for message in x),
    ),
}  # fmt: skip


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began, result


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _fsynced(path: Path, write: Callable[[Any], Any]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


# Ours --------------------------------------------------------------------------------------------------------


NOTHING = Snapshot({}, {})


def look(tracker: Tracker) -> Changes:
    """Look at all variables, as the kernel does behind a cell."""
    return tracker.changes(NOTHING)


def checkpoint(namespace: dict[str, Any], blobs: LocalBlobs, looked: Changes) -> SignedManifest:
    saved = save(namespace, {"x"}, blobs, fingerprints=looked.fingerprints, walks=looked.walks)
    blobs.sync()
    code = CodeFacts(source="", digest="")
    manifest = Manifest(
        run_id="r",
        step="s",
        created_at=0,
        duration_s=0,
        code=code,
        variables=saved.variables,
        groups=saved.groups,
    )
    return seal(manifest, KEY)


def ours(kind: Data, size: int, folder: Path) -> dict[str, float]:
    namespace: dict[str, Any] = {"__name__": "__main__", "x": kind.make(size)}
    blobs = LocalBlobs(folder / "blobs")
    tracker = Tracker(namespace)
    found: dict[str, float] = {}
    found["look"], looked = timed(lambda: look(tracker))
    found["first"], signed = timed(lambda: checkpoint(namespace, blobs, looked))
    found["bytes"] = bytes_in(blobs.root)
    # looking and saving: what has been looked at is not hashed twice
    found["unchanged"], signed = timed(lambda: checkpoint(namespace, blobs, look(tracker)))
    del looked
    (folder / "manifest").write_text(signed.model_dump_json())
    found |= restored("ours", kind, folder)
    namespace["x"] = kind.change(namespace["x"])
    looked = look(tracker)
    standing = bytes_in(blobs.root)
    found["changed"], _ = timed(lambda: checkpoint(namespace, blobs, looked))
    found["changed_bytes"] = bytes_in(blobs.root) - standing
    return found


# Peers -------------------------------------------------------------------------------------------------------


def peer(name: str, kind: Data, size: int, folder: Path) -> dict[str, float]:
    value = kind.make(size)
    path = folder / name
    module = importlib.import_module(name)

    def dump() -> float:
        return timed(lambda: _fsynced(path, lambda file: module.dump(value, file, protocol=5)))[0]

    found = {"first": dump(), "bytes": float(path.stat().st_size)}
    found |= restored(name, kind, folder)
    found |= {"unchanged": dump(), "unchanged_bytes": float(path.stat().st_size)}
    value = kind.change(value)
    found |= {"changed": dump(), "changed_bytes": float(path.stat().st_size)}
    path.unlink()
    return found


def name_of(kind: Data) -> str:
    return next(name for name, item in KINDS.items() if item is kind)


def restored(tool: str, kind: Data, folder: Path) -> dict[str, float]:
    command = [
        sys.executable, "-m", "tests.benchmarks.checkpoints", "--restore", tool, name_of(kind), str(folder)
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout))


def restore_here(tool: str, kind: Data, folder: Path) -> dict[str, float]:
    """Restore in this fresh process; count its memory, pass over the value twice and over a copy in memory."""
    for module in kind.imports:
        importlib.import_module(module)
    small = kind.make(1 << 20)  # what the libraries load when they are first used is no cost of restoring
    pickle.loads(pickle.dumps(small))
    kind.use(small)
    if tool == "ours":
        warm: dict[str, Any] = {"__name__": "__main__", "x": small}
        warm_blobs = LocalBlobs(folder / "warm")
        restore(
            unseal(checkpoint(warm, warm_blobs, look(Tracker(warm))), KEY, of="x"),
            {},
            LocalBlobs(folder / "warm"),
        )
        shutil.rmtree(folder / "warm", ignore_errors=True)
        signed = SignedManifest.model_validate_json((folder / "manifest").read_text())
        blobs = LocalBlobs(folder / "blobs")
        namespace: dict[str, Any] = {"__name__": "__main__"}
        before = resident()
        seconds, _ = timed(lambda: restore(unseal(signed, KEY, of="x"), namespace, blobs))
        value = namespace["x"]
    else:
        module = importlib.import_module(tool)
        before = resident()
        with (folder / tool).open("rb") as file:
            seconds, value = timed(lambda: module.load(file))
    found = {"restore": seconds, "resident": float(resident() - before)}
    if tool == "ours":
        found["verify"], _ = timed(blobs.sync)
        found["look_restored"], _ = timed(Tracker(namespace).snapshot)
        found["resident_looked"] = float(resident() - before)
    found["pass"], _ = timed(lambda: kind.use(value))
    if kind.lazy:
        whole = copy.deepcopy(value) if hasattr(value, "iloc") or isinstance(value, np.ndarray) else value
        found["pass_memory"], _ = timed(lambda: kind.use(whole))
    return found


# The table ---------------------------------------------------------------------------------------------------


def limits(size: int, folder: Path) -> dict[str, float]:
    """Measure what the machine can do: write + fsync, and one BLAKE3 pass."""
    data = np.random.default_rng(0).bytes(size)
    write, _ = timed(lambda: _fsynced(folder / "plain", lambda file: file.write(data)))
    (folder / "plain").unlink()
    hasher = blake3(max_threads=blake3.AUTO)
    return {"write": write, "hash": timed(lambda: hasher.update(data))[0]}


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def rows_of(name: str, kind: Data, found: dict[str, Any]) -> list[Row]:
    mine, write, digest = found["ours"], found["limits"]["write"], found["limits"]["hash"]
    file = found.get("pickle")
    others = "others: first / unchanged / changed / restore; written by the first three"
    rows = [Row(f"{name} ({_mb(mine['bytes'])} kept)", f"looked at in {_seconds(mine['look'])}", others)]
    big = kind.lazy
    per = mine["bytes"] / found["limits"]["bytes"]
    rows.append(
        Row(
            "  first checkpoint",
            _seconds(mine["first"]),
            f"{mine['first'] / (write * per):.2f} × write + fsync" if big else "",
            "≤ 1.2 ×" if big else "",
            mine["first"] <= 1.2 * write * per if big else None,
        )
    )
    rows.append(
        Row(
            "  looked at and saved again, unchanged",
            _seconds(mine["unchanged"]),
            f"{mine['unchanged'] / (digest * per):.2f} × BLAKE3" if big else "",
            "≤ 1.2 ×" if big else "",
            mine["unchanged"] <= 1.2 * digest * per if big else None,
        )
    )
    allowed = kind.changed_share * mine["bytes"] + (16 << 20)
    rows.append(
        Row(
            "  one change",
            f"{_seconds(mine['changed'])}, {_mb(mine['changed_bytes'])}",
            "",
            f"≤ {_mb(allowed)}" if big else "≤ 0.6 MB" if "chat" in name or "dict" in name else "",
            mine["changed_bytes"] <= (allowed if big else 0.6e6)
            if big or "chat" in name or "dict" in name
            else None,
        )
    )
    target = [f"≤ 10 ms, ≥ 50 × pickle's {_seconds(file['restore'])}" if file else "≤ 10 ms"] if big else [""]
    holds = (
        mine["restore"] <= 0.01 and (file is None or file["restore"] >= 50 * mine["restore"]) if big else None
    )
    ratio = f"{file['restore'] / mine['restore']:.0f} × faster than pickle" if file else ""
    rows.append(Row("  restore", _seconds(mine["restore"]), ratio, target[0], holds))
    rows.append(
        Row(
            "  memory after it",
            _mb(mine["resident"]),
            f"verified {_seconds(mine['verify'])} later",
            "≤ 5 MB" if big else "",
            mine["resident"] <= 5e6 if big else None,
        )
    )
    rows.append(
        Row("  looked at after it", _seconds(mine["look_restored"]), f"memory {_mb(mine['resident_looked'])}")
    )
    if "pass_memory" in mine:
        share = mine["pass"] / mine["pass_memory"]
        rows.append(
            Row("  full pass", _seconds(mine["pass"]), f"{share:.2f} × memory", "≤ 1.3 ×", share <= 1.3)
        )
    for tool in (*PEERS, *apart.TOOLS):
        if tool in found:
            other = found[tool]
            phases = " / ".join(
                _seconds(other[phase]) for phase in ("first", "unchanged", "changed", "restore")
            )
            written = " / ".join(_mb(other[what]) for what in ("bytes", "unchanged_bytes", "changed_bytes"))
            rows.append(Row(f"  {tool}", phases, f"{written}, memory {_mb(other['resident'])}"))
        elif f"no {tool}" in found:
            rows.append(Row(f"  {tool}", found[f"no {tool}"]))
    return rows


def measure(kind: Data, size: int, peers: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nbdurable-bench-") as root:
        folder = Path(root)
        found["limits"] = limits(size, folder) | {"bytes": size}
        for tool in peers:
            try:
                if tool in PEERS:
                    found[tool] = peer(tool, kind, size, folder)
                else:
                    found[tool] = apart.measure(tool, name_of(kind), size, folder)
            except Exception as error:
                found[f"no {tool}"] = f"{type(error).__name__}: {str(error)[:60]}"
        found["ours"] = ours(kind, size, folder)
        again = limits(size, folder)  # a disk that others use is not the same a minute later
        found["limits"] |= {name: (found["limits"][name] + seconds) / 2 for name, seconds in again.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size", type=int, default=1024, help="MB; what is counted in entries scales with it"
    )
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--restore", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.restore:
        tool, name, folder = options.restore
        print(json.dumps(restore_here(tool, KINDS[name], Path(folder))))
        return
    raw: dict[str, object] = {}
    rows: list[Row] = []
    for name in options.only:
        raw[name] = found = measure(
            KINDS[name], options.size << 20, () if options.no_peers else (*PEERS, *apart.TOOLS)
        )
        rows += rows_of(name, KINDS[name], found)
    show(f"checkpoints {options.size} MB", rows, raw)


if __name__ == "__main__":
    main()
