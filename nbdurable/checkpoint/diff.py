"""Differences: what changed between two values, as data that can be printed or sent as JSON.

Owns how frames, series, arrays and nested structures are compared: schema, rows, values, statistics, paths. A library:
it loads nothing, and knows neither runs nor checkpoints. What it returns is bounded, whatever the size of the values.
"""

from __future__ import annotations

import math
import reprlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

EXAMPLES = 5  # cells of a frame or array that are shown
PATHS = 20  # places of a structure that are shown
DEPTH = 12
_ITEMS = 100_000  # places of a structure that are looked at

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlevel = 3

Difference = dict[str, Any]


def compare(before: Any, after: Any) -> Difference:
    """Return what differs between two values, as JSON: `kind` is frame, array, structure, or type.

    An empty `differences`, `columns` or `changed` means that no difference was found at the depth that is looked at.
    """
    pandas, polars, numpy = (sys.modules.get(name) for name in ("pandas", "polars", "numpy"))
    if pandas is not None:
        if isinstance(before, pandas.Series) and isinstance(after, pandas.Series):
            before, after = (one.to_frame(name="value") for one in (before, after))
        if isinstance(before, pandas.DataFrame) and isinstance(after, pandas.DataFrame):
            return _pandas(before, after)
    if polars is not None:
        if isinstance(before, polars.Series) and isinstance(after, polars.Series):
            before, after = (one.alias("value").to_frame() for one in (before, after))
        if isinstance(before, polars.DataFrame) and isinstance(after, polars.DataFrame):
            return _polars(before, after)
    if numpy is not None and isinstance(before, numpy.ndarray) and isinstance(after, numpy.ndarray):
        return _arrays(before, after)
    if not _alike(before, after):
        return {"kind": "type", "differences": [_differ("", before, after)]}
    found: list[Difference] = []
    looked = 0
    for one in _walk("", before, after, DEPTH, set()):
        looked += 1
        if one is not None:
            found.append(one)
        if len(found) > PATHS or looked > _ITEMS:
            break
    return {"kind": "structure", "differences": found[:PATHS], "more": len(found) > PATHS or looked > _ITEMS}


def sentences(difference: Difference) -> list[str]:
    """Return a difference for people, one short line each."""
    match difference["kind"]:
        case "frame":
            return _frame_sentences(difference)
        case "array":
            return _array_sentences(difference)
        case _:
            lines = [
                f"{one['path'] or 'it'}: {one['before']} → {one['after']}"
                for one in difference["differences"]
            ]
            return [*lines, "and more"] if difference.get("more") else lines


# Frames ----------------------------------------------------------------------------------------------------


def _pandas(before: Any, after: Any) -> Difference:
    result = _schema(
        {str(name): str(kind) for name, kind in before.dtypes.items()},
        {str(name): str(kind) for name, kind in after.dtypes.items()},
    )
    result["rows"] = [len(before), len(after)]
    if not (before.columns.is_unique and after.columns.is_unique):
        return result
    by_label = before.index.is_unique and after.index.is_unique and before.index.dtype == after.index.dtype
    if by_label:
        result["rows_added"] = len(after.index.difference(before.index, sort=False))
        result["rows_removed"] = len(before.index.difference(after.index, sort=False))
        if not before.index.equals(after.index):
            common = before.index.intersection(after.index, sort=False)
            before, after = before.loc[common], after.loc[common]
        labels: Any = before.index
    else:  # by position
        rows = min(len(before), len(after))
        result["rows_added"] = max(0, len(after) - rows)
        result["rows_removed"] = max(0, len(before) - rows)
        before, after, labels = before.iloc[:rows], after.iloc[:rows], range(rows)
    for name in before.columns.intersection(after.columns, sort=False):
        try:
            places = _unequal(before[name], after[name])
        except Exception as error:  # a column type of somebody's own
            result["columns"][str(name)] = {"changed": None, "why": f"{type(error).__name__}: {error}"}
            continue
        if len(places):
            old, new = before[name].iloc, after[name].iloc
            result["columns"][str(name)] = {
                "changed": len(places),
                "examples": [
                    [_short(labels[place]), _short(old[place]), _short(new[place])]
                    for place in places[:EXAMPLES].tolist()
                ],
            }
    return result


def _unequal(before: Any, after: Any) -> Any:
    """Return the positions at which two columns of one length differ; missing values are equal to each other."""
    missing = before.isna().to_numpy() & after.isna().to_numpy()
    old, new = (
        (one.astype(object) if one.dtype != other.dtype or str(one.dtype) == "category" else one).reset_index(
            drop=True
        )
        for one, other in ((before, after), (after, before))
    )
    differ = old.ne(new).astype("boolean").fillna(True).to_numpy(dtype=bool)
    return (differ & ~missing).nonzero()[0]


def _polars(before: Any, after: Any) -> Difference:
    result = _schema(
        {name: str(kind) for name, kind in before.schema.items()},
        {name: str(kind) for name, kind in after.schema.items()},
    )
    rows = min(len(before), len(after))
    result |= {
        "rows": [len(before), len(after)],
        "rows_added": len(after) - rows,
        "rows_removed": len(before) - rows,
    }
    for name in before.columns:
        if name not in after.columns:
            continue
        old, new = before[name].head(rows), after[name].head(rows)
        if old.dtype != new.dtype:
            places = [place for place in range(rows) if not _equal(old[place], new[place])]
        else:
            places = old.ne_missing(new).arg_true().to_list()
        if places:
            result["columns"][name] = {
                "changed": len(places),
                "examples": [
                    [str(place), _short(old[place]), _short(new[place])] for place in places[:EXAMPLES]
                ],
            }
    return result


def _schema(before: dict[str, str], after: dict[str, str]) -> Difference:
    return {
        "kind": "frame",
        "columns_added": [name for name in after if name not in before],
        "columns_removed": [name for name in before if name not in after],
        "types": {
            name: [kind, after[name]] for name, kind in before.items() if after.get(name, kind) != kind
        },
        "columns": {},
    }


def _frame_sentences(found: Difference) -> list[str]:
    lines = []
    for key, word in (("columns_added", "new"), ("columns_removed", "gone")):
        if found[key]:
            lines.append(f"columns {word}: {', '.join(found[key])}")
    lines += [f"column {name}: {old} → {new}" for name, (old, new) in found["types"].items()]
    if found.get("rows_added") or found.get("rows_removed"):
        counts = f"{found['rows_added']} new, {found['rows_removed']} gone"
        lines.append(f"rows: {found['rows'][0]} → {found['rows'][1]} ({counts})")
    elif found["rows"][0] != found["rows"][1]:
        lines.append(f"rows: {found['rows'][0]} → {found['rows'][1]}")
    for name, change in found["columns"].items():
        if change["changed"] is None:
            lines.append(f"column {name} can't be compared ({change['why']})")
            continue
        shown = "; ".join(f"[{label}] {old} → {new}" for label, old, new in change["examples"])
        lines.append(f"column {name}: {change['changed']} values differ: {shown}")
    return lines


# Arrays ----------------------------------------------------------------------------------------------------


def _arrays(before: Any, after: Any) -> Difference:
    import numpy

    result: Difference = {
        "kind": "array",
        "shape": [list(before.shape), list(after.shape)],
        "dtype": [str(before.dtype), str(after.dtype)],
        "statistics": [_statistics(before), _statistics(after)],
        "changed": None,
    }
    if before.shape == after.shape:
        if before.dtype.hasobject or after.dtype.hasobject:
            pairs = zip(before.ravel().tolist(), after.ravel().tolist(), strict=True)
            differ = [not _equal(old, new) for old, new in pairs]
            unequal = numpy.array(differ, dtype=bool).reshape(before.shape)
        else:
            unequal = numpy.broadcast_to(numpy.asarray(before != after), before.shape).copy()
        numeric = before.dtype.kind in "biufc" and after.dtype.kind in "biufc"
        if numeric:
            unequal &= ~(numpy.isnan(before) & numpy.isnan(after))
        places = numpy.argwhere(unequal)
        result["changed"] = len(places)
        result["examples"] = [
            [str([int(one) for one in place]), _short(before[tuple(place)]), _short(after[tuple(place)])]
            for place in places[:EXAMPLES]
        ]
        if numeric and len(places) and "c" not in before.dtype.kind + after.dtype.kind:
            with numpy.errstate(all="ignore"):
                gap = numpy.abs(after[unequal].astype(float) - before[unequal].astype(float))
            gap = gap[numpy.isfinite(gap)]
            result["largest_change"] = float(gap.max()) if gap.size else None
    return result


def _statistics(array: Any) -> Difference:
    """Return minimum, mean, maximum and the number of NaNs of numbers; nothing of other arrays."""
    import numpy

    if array.dtype.kind not in "biuf" or not array.size:
        return {}
    missing = int(numpy.isnan(array).sum()) if array.dtype.kind == "f" else 0
    if missing == array.size:
        return {"nan": missing}
    with numpy.errstate(all="ignore"):
        found = {
            "min": numpy.nanmin(array),
            "mean": numpy.nanmean(array, dtype=float),
            "max": numpy.nanmax(array),
        }
    return {name: float(value) for name, value in found.items()} | {"nan": missing}


def _array_sentences(found: Difference) -> list[str]:
    lines = [
        f"{name}: {old} → {new}" for name in ("dtype", "shape") for old, new in [found[name]] if old != new
    ]
    if found["changed"]:
        shown = "; ".join(f"{place} {old} → {new}" for place, old, new in found["examples"])
        largest = found.get("largest_change")
        by = f", by {largest:.6g} at most" if largest is not None else ""
        lines.append(f"{found['changed']} values differ{by}: {shown}")
    old, new = found["statistics"]
    told = [
        f"{name} {old[name]:.6g} → {new[name]:.6g}" for name in old if name in new and old[name] != new[name]
    ]
    return lines + ([", ".join(told)] if told else [])


# Structures ------------------------------------------------------------------------------------------------


def _walk(
    path: str, before: Any, after: Any, depth: int, seen: set[tuple[int, int]]
) -> Iterator[Difference | None]:
    """Yield each difference, and None for each place without one."""
    yield None
    pair = (id(before), id(after))
    if before is after or pair in seen:
        return
    if not _alike(before, after):
        yield _differ(path, before, after)
        return
    if _is_table(before):
        if lines := sentences(compare(before, after)):
            yield {"path": path, "before": type(before).__qualname__, "after": "; ".join(lines)}
        return
    if depth and isinstance(before, Mapping):
        seen.add(pair)
        for key in [*before, *(key for key in after if key not in before)]:
            place = f"{path}[{_short(key)}]"
            if key not in after:
                yield {"path": place, "before": _short(before[key]), "after": "nothing"}
            elif key not in before:
                yield {"path": place, "before": "nothing", "after": _short(after[key])}
            else:
                yield from _walk(place, before[key], after[key], depth - 1, seen)
    elif depth and isinstance(before, Sequence) and not isinstance(before, str | bytes | bytearray | range):
        seen.add(pair)
        if len(before) != len(after):
            yield {"path": f"len({path or 'it'})", "before": str(len(before)), "after": str(len(after))}
        for index, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from _walk(f"{path}[{index}]", old, new, depth - 1, seen)
    elif isinstance(before, AbstractSet):
        for word, members in (("gone", before - after), ("new", after - before)):
            for member in sorted(members, key=_short):
                sides = ("nothing", _short(member)) if word == "new" else (_short(member), "nothing")
                yield {"path": path, "before": sides[0], "after": sides[1]}
    elif depth and (fields := _fields(before)) is not None and (others := _fields(after)) is not None:
        seen.add(pair)
        for name in sorted(fields.keys() | others.keys()):
            place = f"{path}.{name}"
            if name not in others or name not in fields:
                told = [_short(one[name]) if name in one else "nothing" for one in (fields, others)]
                yield {"path": place, "before": told[0], "after": told[1]}
            else:
                yield from _walk(place, fields[name], others[name], depth - 1, seen)
    elif not _equal(before, after):
        yield _differ(path, before, after)


def _is_table(value: Any) -> bool:
    kinds = {"pandas": ("DataFrame", "Series"), "polars": ("DataFrame", "Series"), "numpy": ("ndarray",)}
    return any(
        isinstance(value, getattr(sys.modules[module], name))
        for module, names in kinds.items()
        if module in sys.modules
        for name in names
    )


def _fields(value: Any) -> dict[str, Any] | None:
    """Return an object's attributes, or what makes out a function; None for what has none."""
    if isinstance(value, type):
        return None
    if isinstance(value, types.FunctionType):
        code = value.__code__
        constants = [one for one in code.co_consts if not isinstance(one, types.CodeType)]
        found = {"code": code.co_code, "names": code.co_names, "constants": constants}
        return found | {"defaults": value.__defaults__}
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        return found | own
    return found or None


def _slots(kind: type) -> Sequence[str]:
    found = kind.__dict__.get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _alike(before: Any, after: Any) -> bool:
    """Tell whether values are of one type, or of numbers' types; each side may have a copy of a notebook's class."""
    if isinstance(before, int | float) and isinstance(after, int | float):
        return True
    return type(before) is type(after) or _name(type(before)) == _name(type(after))


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _equal(before: Any, after: Any) -> bool:
    if isinstance(before, float) and isinstance(after, float) and math.isnan(before) and math.isnan(after):
        return True
    if _is_table(before) or _is_table(after):
        return type(before) is type(after) and not sentences(compare(before, after))
    if isinstance(before, type) and isinstance(after, type):
        return _name(before) == _name(after)
    try:
        return bool(before == after)
    except Exception:
        return False


def _differ(path: str, before: Any, after: Any) -> Difference:
    old, new = _short(before), _short(after)
    if type(before) is not type(after) or old == new:
        old, new = (f"{type(one).__qualname__} {text}" for one, text in ((before, old), (after, new)))
    return {"path": path, "before": old, "after": new}


def _short(value: Any) -> str:
    numpy = sys.modules.get("numpy")
    try:
        if numpy is not None and isinstance(value, numpy.number | numpy.bool_):
            value = value.item()
        return _repr.repr(value)
    except Exception:
        return f"<{type(value).__qualname__}>"
