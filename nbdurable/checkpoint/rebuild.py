"""The functions that checkpoints name: pickles call them when they are loaded.

Owns how functions of the notebook, views and shared memory are put together again. A name or signature here
is part of the checkpoint format: add new ones, never change these.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import MappingProxyType
from typing import Any, TypeVar

from nbdurable.checkpoint.recipes import recipe_of
from nbdurable.errors import NotRestorable

_namespace: ContextVar[dict[str, Any]] = ContextVar("nbdurable_live_namespace")


@contextmanager
def into(namespace: dict[str, Any]) -> Iterator[None]:
    """Make functions that are loaded meanwhile read their globals in this namespace."""
    token = _namespace.set(namespace)
    try:
        yield
    finally:
        _namespace.reset(token)


def live(qualname: str) -> Any:
    """Return the function or class that the notebook itself holds under a name."""
    head, *rest = qualname.split(".")
    try:
        found = _namespace.get()[head]
        for part in rest:
            found = getattr(found, part)
    except (KeyError, AttributeError):
        raise NotRestorable(
            f"a saved value needs `{qualname}`, which the notebook has not defined by now",
            todo=f"define `{head}` in a cell above the step",
        ) from None
    return found


def made(name: str) -> Any:
    """Return the object that the recipe of a variable has made."""
    found = _namespace.get().get(name)
    if recipe_of(found, _namespace.get()) is None:
        raise NotRestorable(
            f"a saved value needs `{name}`, as its recipe makes it",
            todo=f"run the cell that makes `{name}` first",
        )
    return found


def imported(module: str, name: str) -> Any:
    """Return what a module holds under a name that is not the object's own."""
    return getattr(import_module(module), name)


def code(arguments: tuple[Any, ...], file: str) -> types.CodeType:
    """Make compiled code that says which cell it comes from."""
    return types.CodeType(*arguments).replace(co_filename=file)


def function(
    code: types.CodeType, name: str, closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    """Make a function that reads its globals in the live namespace."""
    return types.FunctionType(code, _namespace.get(), name, None, closure)


def fill_function(
    made: types.FunctionType, state: tuple[list[tuple[types.CellType, Any]], dict[str, Any]]
) -> None:
    """Give a function its closure values and attributes, once it can be referred to."""
    cells, attributes = state
    for cell, content in cells:
        cell.cell_contents = content
    made.__dict__.update(attributes.pop("__dict__"))
    for name, value in attributes.items():
        setattr(made, name, value)


def empty_cell() -> types.CellType:
    """Make a closure cell without content."""
    return types.CellType()


def fill_cell(cell: types.CellType, state: tuple[Any]) -> None:
    """Give a closure cell its content."""
    cell.cell_contents = state[0]


def lru_cache(wrapped: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    """Make a caching function again; its cache starts empty."""
    return functools.lru_cache(maxsize=maxsize, typed=typed)(wrapped)


def own_attributes(cached: Any) -> dict[str, Any]:
    """Return the attributes of a caching function that `functools` does not give it when it is made."""
    wrapped = cached.__wrapped__
    given: dict[str, Any] = {name: getattr(wrapped, name, None) for name in functools.WRAPPER_ASSIGNMENTS}
    given |= {**vars(wrapped), "__wrapped__": wrapped, "cache_parameters": cached.cache_parameters}
    return {name: item for name, item in vars(cached).items() if name not in given or given[name] is not item}


def cached_property(func: Callable[..., Any], name: str | None) -> functools.cached_property[Any]:
    """Make a cached property again, with a lock of its own."""
    made = functools.cached_property(func)
    made.attrname = name
    return made


def view(data: Any, format: str, shape: tuple[int, ...]) -> memoryview:
    """Make a memoryview."""
    flat = memoryview(data).cast("B")
    return flat if format == "B" and len(shape) == 1 else flat.cast(format, list(shape))  # type: ignore[call-overload]


def dict_view(kind: str, mapping: dict[Any, Any]) -> Any:
    """Make a view on a dict: its keys, values or items."""
    return getattr(dict, kind)(mapping)


def array_view(
    memory: Any, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, writeable: bool
) -> Any:
    """Make an array over the memory of another one."""
    import numpy

    if dtype.hasobject:
        start = memory[offset // dtype.itemsize :]
        size = numpy.prod(shape, dtype=int)
        made = start[:size].reshape(shape)  # its base is `memory`, so it can be locked and unlocked
        if made.strides != strides:
            made = numpy.lib.stride_tricks.as_strided(start, shape, strides)
    else:
        made = numpy.ndarray(shape, dtype, buffer=memory, offset=offset, strides=strides)
    if not writeable:
        made.flags.writeable = False
    return made


def read_only(array: Any) -> Any:
    """Make an array read-only."""
    array.flags.writeable = False
    return array


def texts(rows: list[tuple[Any, Any]], shape: tuple[int, ...], in_rows: bool, missing: Any) -> Any:
    """Make an array of texts: for each row its characters, and their number per text (-1: None, -2: `missing`)."""
    import numpy

    made = numpy.empty(shape, "O", "C" if in_rows else "F")
    flat = (made if in_rows else made.T).reshape(len(rows), -1)
    for target, (joined, lengths) in zip(flat, rows, strict=True):
        text = str(joined, "utf-8", "surrogatepass")
        ends = numpy.cumsum(numpy.maximum(lengths, 0), dtype="i8").tolist()
        items: list[Any] = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        for place in numpy.flatnonzero(lengths < 0).tolist():
            items[place] = None if lengths[place] == -1 else missing
        target[:] = items
    return made


def type_variable(
    name: str, constraints: tuple[Any, ...], bound: Any, covariant: bool, contravariant: bool, module: str
) -> Any:
    """Make a variable of types, of the module that made it first."""
    made = TypeVar(name, *constraints, bound=bound, covariant=covariant, contravariant=contravariant)  # type: ignore[misc]
    made.__module__ = module
    return made


def torch_storage(memory: Any) -> Any:
    """Make a PyTorch storage over the memory of an array."""
    import torch

    return torch.from_numpy(memory).untyped_storage()


def torch_tensor(
    storage: Any,
    dtype: Any,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    is_parameter: bool = False,
) -> Any:
    """Make a tensor that looks at a storage."""
    import torch

    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def fill_tensor(tensor: Any, state: tuple[bool, Any, dict[str, Any]]) -> None:
    """Give a tensor its gradient and attributes."""
    requires_grad, grad, attributes = state
    tensor.requires_grad_(requires_grad)
    tensor.grad = grad
    vars(tensor).update(attributes)


def polars_frame(table: Any, ordered: Mapping[str, bool] = MappingProxyType({})) -> Any:
    """Make a polars frame over the memory of an Arrow table; `ordered`: columns sorted, and if they descend."""
    import polars

    made = polars.from_arrow(table, rechunk=False)
    return made.with_columns(polars.col(name).set_sorted(descending=down) for name, down in ordered.items())


def polars_series(table: Any, ordered: Mapping[str, bool] = MappingProxyType({})) -> Any:
    """Make a polars series over the memory of an Arrow table of one column."""
    return polars_frame(table, ordered).to_series(0)
