"""Notebooks that tests write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nbformat


def write(path: Path, cells: Sequence[str | tuple[str, str]], *, parameters: str | None = None) -> Path:
    """Write a notebook of code cells; a cell is its source, or (id, source). `parameters`: a cell tagged so, first."""
    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    if parameters is not None:
        book.cells.append(
            nbformat.v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]})
        )
    for index, cell in enumerate(cells):
        cell_id, source = cell if isinstance(cell, tuple) else (f"cell-{index}", cell)
        book.cells.append(nbformat.v4.new_code_cell(source, id=cell_id))
    nbformat.write(book, path)
    return path


def outputs(path: Path) -> dict[str, list[dict[str, object]]]:
    """Return the outputs of each code cell by cell id, as one compares them between runs."""
    book = nbformat.read(path, as_version=4)
    return {
        cell.id: [dict(output) for output in cell.outputs] for cell in book.cells if cell.cell_type == "code"
    }
