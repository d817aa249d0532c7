"""How a benchmark tells its figures: a table for people, JSON for the record."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    what: str
    figure: str
    ratio: str = ""
    target: str = ""
    holds: bool | None = None


def show(title: str, rows: list[Row], raw: dict[str, object]) -> None:
    """Print the table, and write it with the raw figures to `benchmarks/<title>.json` below the temporary folder."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    print(f"\n{title}   ({os.cpu_count()} cores, load {load[0]:.1f}, Python {sys.version.split()[0]})")
    widths = [
        max(len(getattr(row, field)) for row in rows) for field in ("what", "figure", "ratio", "target")
    ]
    for row in rows:
        mark = {None: "", True: "holds", False: "FALLS SHORT"}[row.holds]
        cells = (row.what, row.figure, row.ratio, row.target)
        print(
            "  "
            + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            + f"  {mark}"
        )
    folder = Path(os.environ.get("NBDURABLE_BENCHMARKS", Path.cwd() / ".benchmarks"))
    folder.mkdir(parents=True, exist_ok=True)
    record = {"title": title, "load": load, "rows": [asdict(row) for row in rows], "raw": raw}
    (folder / f"{title.replace(' ', '-')}.json").write_text(json.dumps(record, indent=1))
