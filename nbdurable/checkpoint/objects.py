"""What an object is: its name where it has one, its parts as pickle sees them, and why it can't be saved.

Shared by fingerprints (which must see what pickle sees) and by saving. Reads objects, never changes them.
"""

from __future__ import annotations

import asyncio
import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import gc
import io
import itertools
import logging
import os
import pathlib
import re
import sys
import sysconfig
import types
import typing
import uuid
import weakref
import zoneinfo
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nbdurable.checkpoint.patience import GaveUp, others_code
from nbdurable.checkpoint.unsaved import Unsaved, reason_of
from nbdurable.errors import CheckpointError

Namespace = Mapping[str, Any]
LruCacheWrapper = type(functools.lru_cache(maxsize=1)(lambda: None))
DICT_VIEWS: dict[type, str] = {
    type({}.keys()): "keys",
    type({}.values()): "values",
    type({}.items()): "items",
}
# Told apart by value alone: that two variables hold the same one can't be noticed.
IMMUTABLE_TYPES = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    pathlib.PurePath,
    range,
    slice,
    re.Pattern,
    enum.Enum,
    zoneinfo.ZoneInfo,
    types.GenericAlias,
    types.UnionType,
    logging.Logger,
    type(typing.Any),
    type(typing.Optional),
)
_PATH_LABELS = 16
_CONTAINERS = (list, dict, tuple, set, frozenset, deque, OrderedDict, defaultdict, functools.partial)
_CODE_LIKE = (types.FunctionType, types.MethodType, types.CellType, type, property, classmethod, staticmethod)
_STANDARD_FOLDERS = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})


class Unfingerprintable(CheckpointError):
    """A value that can't be fingerprinted, because a part of it can't be looked into"""

    def __init__(self, path: str, reason: str, problem: Problem | None = None) -> None:
        self.path, self.reason, self.problem = path, reason, problem
        super().__init__(f"{path or 'the value'}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Unfingerprintable, (self.path, self.reason))


class Unsaveable(Exception):
    """Why an object can't be saved: what it is, and what to do instead."""

    def __init__(self, what: str, todo: str, *, stream: bool = False) -> None:
        super().__init__(what)
        self.what, self.todo, self.stream = what, todo, stream


@dataclass(frozen=True)
class Problem:
    """A part of a value that can't be saved.

    `path` leads from the variable to the outermost object of a package that holds it, whose type is
    `holder`; "" and "" where the value itself is the trouble. `stream`: reading it uses it up (a generator,
    an open file).
    """

    path: str
    holder: str
    what: str
    todo: str
    stream: bool
    unit: int  # id of the object at `path`

    def sentence(self, name: str) -> str:
        """Say why variable `name` was not saved, and what to do."""
        where = f"`{name}{self.path}`: " if self.path else ""
        holds = f"{self.holder} holds {self.what}" if self.holder else self.what
        return "; ".join(filter(None, (where + holds, self.todo)))


def importable(value: Any) -> str | None:
    """Return `module:name` if a module other than the notebook holds this very object under its name.

    Its qualified name, or the name in a function's code: `dataclasses` renames a function of its own after each
    class that it gives it to.
    """
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or module == "__main__":
        return None
    names = [qualname, value.__code__.co_name] if isinstance(value, types.FunctionType) else [qualname]
    for name in names:
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            try:
                found = getattr(found, part)
            except Exception:
                break
        else:
            if found is value:
                return f"{module}:{name}"
    return None


def live_name(value: Any, namespace: Namespace | None) -> str | None:
    """Return the name under which the notebook itself holds this function or class, e.g. `Agent.Tool`."""
    if namespace is None:
        return None
    qualname = getattr(value, "__qualname__", None)
    if not isinstance(qualname, str) or getattr(value, "__module__", None) != namespace.get(
        "__name__", "__main__"
    ):
        return None
    head, *rest = qualname.split(".")
    found = namespace.get(head)
    for part in rest:
        try:
            found = getattr(found, part)
        except Exception:
            return None
    return qualname if found is value else None


def is_notebook_function(value: Any, namespace: Namespace) -> bool:
    """Tell whether a function reads its globals in this namespace."""
    return isinstance(value, types.FunctionType) and value.__globals__ is namespace


def decorated(value: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Return (maker, arguments) of a function that a decorator of nbdurable's own made, None for others.

    Its maker and what it decorates are what it is: its own code says nothing.
    """
    made = value.__dict__.get("__made_by__") if type(value) is types.FunctionType else None
    # `functools.wraps` copies attributes to functions that were made otherwise
    return made if made is not None and value.__globals__ is made[0].__globals__ else None


def undecorated(value: Any) -> Any:
    """Return the function below decorators of nbdurable's own."""
    while (made := decorated(value)) is not None:
        value = made[1][0]
    return value


def reduce_value(value: Any) -> Any:
    """Return what pickle would make of an object, leaving no trace in its class.

    Raises whatever the object's own `__reduce_ex__` raises, and Unsaveable for what pickle would get wrong.
    """
    kind = type(value)
    if kind in _GIVEN_UP:
        raise Unsaveable(f"what can't be looked into: {_GIVEN_UP[kind]}", _PLAIN_CELL)
    if kind not in _SAVEABLE:
        if (trouble := unsaveable(value)) is not None:
            raise trouble
        _SAVEABLE.add(kind)
    special = copyreg.dispatch_table.get(kind)
    had_slotnames = "__slotnames__" in kind.__dict__
    try:
        with others_code:
            reduced = special(value) if special is not None else value.__reduce_ex__(4)
        return _by_value(value, reduced)
    except GaveUp as error:
        raise _give_up(kind, str(error)) from error
    finally:
        if not had_slotnames and "__slotnames__" in kind.__dict__:
            with suppress(Exception):  # `copyreg` caches it in the class, which would count as a change
                type.__delattr__(kind, "__slotnames__")


def reduces_itself(kind: type) -> bool:
    """Tell whether a class has a reduction of its own."""
    plain: Any = object
    return kind.__reduce_ex__ is not plain.__reduce_ex__ or kind.__reduce__ is not plain.__reduce__


def _by_value(value: Any, reduced: Any) -> Any:
    """Return a reduction to a name of the notebook as one to what the object is made of.

    A new process may not have the name by then: a step that makes the object is restored before it binds it.
    """
    if not isinstance(reduced, str | tuple):
        raise TypeError(f"its __reduce__ returns a {type(reduced).__name__}")
    if isinstance(reduced, tuple) or getattr(value, "__module__", None) != "__main__":
        return reduced
    if type(value) is typing.NewType:
        return typing.NewType, (value.__name__, value.__supertype__), dict(vars(value))
    with others_code:
        return copyreg.__newobj__, (type(value),), value.__getstate__()  # type: ignore[attr-defined]


def given(value: Any, items: Any) -> Iterator[Any]:
    """Return an iterator over the items of a reduction, which an object's own code may give without end."""
    iterator: Iterator[Any] = iter(items)
    if type(iterator) in _PLAIN_ITERATORS:
        return iterator
    bases: tuple[Any, ...] = (list, dict)
    size = next((base.__len__(value) for base in bases if isinstance(value, base)), 0)
    return _bounded(type(value), iterator, max(size, MAX_GIVEN))


def _bounded(kind: type, iterator: Iterator[Any], limit: int) -> Iterator[Any]:
    for _ in range(limit):
        try:
            with others_code:
                item = next(iterator)
        except StopIteration:
            return
        except GaveUp as error:
            raise _give_up(kind, str(error)) from error
        yield item
    raise _give_up(kind, f"its own code gives more than {limit:,} items")


def _give_up(kind: type, why: str) -> Unsaveable:
    """Return why objects of a type can't be saved, and ask none of them again."""
    _GIVEN_UP[kind] = why
    return Unsaveable(f"what can't be looked into: {why}", _PLAIN_CELL)


def underlying(view: Any) -> Any:
    """Return the dict behind a dict view or a mapping proxy."""
    return gc.get_referents(view)[0]


_PLAIN_CELL = "create it in a plain cell"
_WEAK = (weakref.ReferenceType, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_LOCKS = ("lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Event")


_SAVEABLE: weakref.WeakSet[type] = weakref.WeakSet()  # types of which `unsaveable` knows nothing bad
_GIVEN_UP: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()  # type → why: asked only once
_PLAIN_ITERATORS = frozenset(
    map(type, (iter([]), iter({}.items()), iter(OrderedDict().items()), iter(deque())))
)
MAX_GIVEN = 1 << 22  # items that an object's own code may give


def unsaveable(value: Any) -> Unsaveable | None:
    """Say why a single object (not its parts) can't be saved, where that is known; None: pickle decides.

    Whether there is an answer depends on the object's type alone.
    """
    kind = type(value)
    if isinstance(value, io.IOBase) and not isinstance(value, io.BytesIO | io.StringIO):
        name = getattr(value, "name", None)
        named = f"an open file ({name})" if isinstance(name, str) else "an open file"
        return Unsaveable(
            named, "keep its path, and open it where it is used or in a plain cell", stream=True
        )
    if isinstance(value, types.GeneratorType | types.AsyncGeneratorType):
        return Unsaveable(
            "a generator, which can't be saved halfway", f"make a list of it, or {_PLAIN_CELL}", stream=True
        )
    if isinstance(value, types.CoroutineType | asyncio.Future):
        return Unsaveable("an unfinished coroutine or task", "await it in the step", stream=True)
    if kind.__module__.partition(".")[0] == "asyncio" and not issubclass(kind, BaseException | enum.Enum):
        return Unsaveable("a part of the event loop", _PLAIN_CELL)
    if kind.__module__ == "itertools" and kind is not itertools.count:
        return Unsaveable("an iterator", f"make a list of it, or {_PLAIN_CELL}", stream=True)
    if isinstance(value, _WEAK):
        return Unsaveable("a weak reference", f"hold the object itself, or {_PLAIN_CELL}")
    bases = {(base.__module__, base.__name__) for base in kind.__mro__}
    if ("ipywidgets.widgets.widget", "Widget") in bases:
        return Unsaveable("a widget, which lives in its page and in this kernel", _PLAIN_CELL)
    if ("traitlets.config.configurable", "Configurable") in bases:
        # each of them holds the kernel, and so every variable: all would seem to be shared with it
        return Unsaveable("a part of Jupyter itself", "ask `get_ipython()` for it where it is used")
    if isinstance(value, types.FrameType | types.TracebackType):
        return Unsaveable(f"a {kind.__name__}", "keep its text instead")
    if kind is Unsaved:
        return Unsaveable(reason_of(value), "run the step that makes it again")
    return None


def explain_failure(value: Any, error: Exception) -> Unsaveable:
    """Say why pickle refused an object."""
    if isinstance(error, Unsaveable):
        return error
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    if package in ("_thread", "threading") and kind.__name__ in _LOCKS:
        return Unsaveable("a lock", _PLAIN_CELL)
    if package in (
        "_socket",
        "socket",
        "ssl",
        "_ssl",
        "select",
        "sqlite3",
        "duckdb",
        "_duckdb",
        "psycopg",
        "psycopg2",
    ):
        return Unsaveable("a connection", _PLAIN_CELL)
    if isinstance(error, RecursionError):
        return Unsaveable("too deep a nesting", "flatten it")
    message = str(error).strip().splitlines()
    return Unsaveable(
        f"what pickle refuses ({message[0][:200] if message else type(error).__name__})", _PLAIN_CELL
    )


@functools.lru_cache(maxsize=4096)
def _from_package(module: str) -> bool:
    """Tell whether a module belongs to Python or an installed package, not to the notebook's project."""
    if module == "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if not isinstance(file, str):
        return True
    return "site-packages" in file or "dist-packages" in file or file.startswith(_STANDARD_FOLDERS)


def is_package_object(value: Any) -> bool:
    """Tell whether an object is of a package's class, other than a container or a piece of code."""
    kind = type(value)
    if kind in _CONTAINERS or isinstance(value, _CODE_LIKE):
        return False
    return _from_package(kind.__module__)


def describe_problem(trail: list[tuple[str, Any]], error: Exception) -> Problem:
    """Say what is wrong with the last object of a trail that starts at a variable's value."""
    culprit = trail[-1][1]
    trouble = explain_failure(culprit, error)
    packaged = (number for number, (_, value) in enumerate(trail) if is_package_object(value))
    position = next(packaged, len(trail) - 1)
    unit = trail[position][1]
    return Problem(
        path=_path([label for label, _ in trail[: position + 1]]),
        holder="" if unit is culprit else type(unit).__name__,
        what=trouble.what,
        todo=trouble.todo,
        stream=trouble.stream and unit is culprit,
        unit=id(unit),
    )


def _path(labels: list[str]) -> str:
    """Join the labels of a path; one that is long loses its middle."""
    if len(labels) > _PATH_LABELS:
        labels = [*labels[: _PATH_LABELS // 2], "[…]", *labels[-_PATH_LABELS // 2 :]]
    return "".join(labels)


def stream_position(value: Any) -> str:
    """Return text that changes when a generator or file is read on, as far as that can be seen from outside."""
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        simple = (
            {} if frame is None else {k: v for k, v in frame.f_locals.items() if type(v) in (int, float, str)}
        )
        return "ended" if frame is None else f"{frame.f_lasti}{simple!r}"
    try:
        if isinstance(value, io.IOBase):
            return str(value.tell())
        return repr(value) if type(value).__module__ == "itertools" else ""
    except Exception:
        return ""
