"""Previews: what people see of a value, as text, made in bounded time and space.

Runs no `__repr__` of the user's: an object shows its type and its first attributes. Must never raise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

from nbdurable.checkpoint.objects import IMMUTABLE_TYPES
from nbdurable.checkpoint.patience import others_code
from nbdurable.checkpoint.unsaved import Unsaved, reason_of

MAX_TEXT = 2000  # characters
_MAX_STRING = 80  # of a string inside something
_MAX_ITEMS = 6
_MAX_DEPTH = 3
_MAX_ROWS = 5
_MAX_COLUMNS = 8


def describe(value: Any) -> tuple[str, str, str]:
    """Return (type, shape, preview): e.g. ("list", "list[10]", "[1, 2, …]"), ("DataFrame", "1000 × 3", rows)."""
    kind = type(value)
    if kind is Unsaved:
        return "not restored", "", _cut(reason_of(value))
    name = kind.__qualname__
    try:
        with others_code:
            shape = _shape(value)
    except Exception:
        shape = ""
    try:
        with others_code:
            text = _preview(value)
    except Exception as error:
        text = f"<{name}: no preview, {type(error).__name__}>"
    return name, shape, _cut(text)


def printable(text: str) -> str:
    """Return text that every encoding of Unicode can hold: lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _cut(text: str) -> str:
    text = printable(text[: MAX_TEXT + 1])
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _shape(value: Any) -> str:
    if isinstance(value, list | tuple | dict | set | frozenset):
        return f"{type(value).__name__}[{len(value)}]"
    if _package(value) in ("numpy", "pandas", "polars", "pyarrow", "scipy"):
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return " × ".join(str(size) for size in shape)
        if _package(value) == "pyarrow" and hasattr(value, "__len__"):
            return str(len(value))
    return ""


def _preview(value: Any) -> str:
    if type(value) is str:
        return value[:MAX_TEXT]
    package = _package(value)
    if package == "pandas" and hasattr(value, "iloc"):
        head = value.iloc[:_MAX_ROWS, :_MAX_COLUMNS] if hasattr(value, "columns") else value.iloc[:_MAX_ROWS]
        return str(_short_cells(head).to_string())
    if package == "polars" and hasattr(value, "head") and not hasattr(value, "collect"):
        return str(value.head(_MAX_ROWS))
    if package == "pyarrow" and hasattr(value, "slice"):
        return str(value.slice(0, _MAX_ROWS).to_string())
    return _bounded(value, 0)


def _short_cells(head: Any) -> Any:
    """Shorten the few cells shown before pandas formats them; they may hold anything."""
    pandas = sys.modules["pandas"]

    def column(values: Any) -> Any:
        if values.dtype != object and str(values.dtype) not in ("str", "string"):
            return values
        texts = [
            _bounded(item, _MAX_DEPTH - 1) if not isinstance(item, str) else item[:_MAX_STRING]
            for item in values
        ]
        return pandas.Series(texts, index=values.index, name=values.name, dtype=object)

    if not hasattr(head, "columns"):
        return column(head)
    columns = [column(head.iloc[:, number]) for number in range(head.shape[1])]
    return pandas.concat(columns, axis=1) if columns else head


def _bounded(value: Any, depth: int) -> str:
    kind = type(value)
    if value is None or kind in (bool, float, complex):
        return repr(value)
    if kind is int:
        return repr(value) if value.bit_length() < 1000 else f"<int of {value.bit_length()} bits>"
    if kind in (str, bytes, bytearray):
        text = repr(value[:_MAX_STRING])
        return text if len(value) <= _MAX_STRING else f"{text[:-1]}…{text[-1]}"
    if kind is Unsaved:
        return "<not restored>"
    if isinstance(value, type | FunctionType):
        return f"<{'class' if isinstance(value, type) else 'function'} {value.__qualname__}>"
    if isinstance(value, ModuleType):
        return f"<module {value.__name__}>"
    if isinstance(value, IMMUTABLE_TYPES):
        return repr(value)[:200]
    if depth >= _MAX_DEPTH:
        return f"{kind.__qualname__}(…)"
    if kind is list:
        return f"[{_items(value, depth)}]"
    if kind is tuple:
        return f"({_items(value, depth)}{',' if len(value) == 1 else ''})"
    if kind in (set, frozenset):
        return f"{kind.__name__}({{{_items(value, depth)}}})"
    if isinstance(value, dict):
        body = _pairs(value, depth)
        return f"{{{body}}}" if kind is dict else f"{kind.__qualname__}({{{body}}})"
    if (array := _array(value)) is not None:
        return array
    if _package(value) in ("pandas", "polars", "pyarrow"):
        return f"<{kind.__qualname__} {_shape(value)}>"
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return f"<{kind.__qualname__}>"
    shown = [
        f"{name}={_bounded(item, depth + 1)}" for name, item in islice(list(attributes.items()), _MAX_ITEMS)
    ]
    return f"{kind.__qualname__}({', '.join(shown)}{', …' if len(attributes) > _MAX_ITEMS else ''})"


def _items(values: Iterable[Any], depth: int) -> str:
    shown = [_bounded(item, depth + 1) for item in islice(values, _MAX_ITEMS)]
    return ", ".join(shown) + (", …" if len(values) > _MAX_ITEMS else "")  # type: ignore[arg-type]


def _pairs(values: Mapping[Any, Any], depth: int) -> str:
    shown = [
        f"{_bounded(key, depth + 1)}: {_bounded(item, depth + 1)}"
        for key, item in islice(values.items(), _MAX_ITEMS)
    ]
    return ", ".join(shown) + (", …" if len(values) > _MAX_ITEMS else "")


def _array(value: Any) -> str | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(numpy, "ndarray") or not isinstance(value, numpy.ndarray | numpy.generic):
        return None
    if value.ndim == 0:
        return str(value)[:200] if not value.dtype.hasobject else f"<{type(value).__name__}>"
    corner = value[tuple(slice(0, _MAX_ITEMS) for _ in value.shape[:4])]
    corner = (
        corner[tuple(0 for _ in range(corner.ndim - 2))] if corner.ndim > 2 and all(corner.shape) else corner
    )
    more = "" if corner.shape == value.shape else f"\n… of {_shape(value)}"
    if value.dtype.hasobject:
        return f"[{', '.join(_bounded(item, _MAX_DEPTH - 1) for item in corner.ravel()[:_MAX_ITEMS])}]{more}"
    return f"{corner}  {value.dtype}{more}"
