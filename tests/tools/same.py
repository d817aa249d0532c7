"""What a namespace holds, told in plain data: values, types, and which parts are one object.

Independent of `checkpoint/`, which it tests: nothing of it is used here.
"""

from __future__ import annotations

import collections
import functools
import random
import types
from typing import Any

import numpy as np
import pandas as pd

_ATOMS = (int, float, complex, str, bytes, bool, type(None), range, type(...))
_DERIVED = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__slotnames__", "__firstlineno__", "__static_attributes__",
    "_abc_impl", "__abstractmethods__", "__annotations__", "__dataclass_fields__", "__match_args__",
}  # fmt: skip


def describe(namespace: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return each variable as nested tuples; an object met before is its number there."""
    telling = _Telling(namespace)
    found = {name: telling.tell(namespace[name]) for name in names}
    found["random state"] = repr(random.getstate())
    found["numpy state"] = repr(np.random.get_state())
    return found


class _Telling:
    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace
        self.numbers: dict[int, int] = {}
        self.blocks: dict[int, tuple[int, int]] = {}
        self.alive: list[Any] = []

    def tell(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return (kind.__name__, repr(value))
        if kind is tuple:
            return ("tuple", *map(self.tell, value))
        if isinstance(value, types.ModuleType):
            return ("module", value.__name__)
        if id(value) in self.numbers:
            return ("again", self.numbers[id(value)])
        if not self._is_notebooks(value) and isinstance(
            value, type | types.FunctionType | types.BuiltinFunctionType
        ):
            owner = getattr(value, "__self__", None)
            if owner is None or isinstance(owner, types.ModuleType | type):
                return ("named", value.__module__, value.__qualname__)
        self.numbers[id(value)] = len(self.numbers)
        self.alive.append(value)
        return (kind.__name__, self.numbers[id(value)], *self._parts(value))

    def _is_notebooks(self, value: Any) -> bool:
        return getattr(value, "__module__", None) == "__main__"

    def _parts(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, pd.DataFrame | pd.Series):
            return _frame(value)
        if isinstance(value, type):
            members = {
                k: v for k, v in vars(value).items() if k not in _DERIVED and not _is_descriptor_of_slot(v)
            }
            if isinstance(members.get("__doc__"), str):
                del members["__doc__"]
            bases = [self.tell(base) for base in value.__bases__]
            if "_member_map_" in members:
                return (
                    value.__qualname__,
                    bases,
                    [(n, self.tell(m.value)) for n, m in members["_member_map_"].items()],
                )
            return (value.__qualname__, bases, [(name, self.tell(v)) for name, v in sorted(members.items())])
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType | types.BuiltinMethodType):
            return (value.__name__, self.tell(value.__self__))
        if isinstance(value, types.CellType):
            try:
                return (self.tell(value.cell_contents),)
            except ValueError:
                return ("empty",)
        if isinstance(value, property):
            return (self.tell(value.fget), self.tell(value.fset))
        if isinstance(value, classmethod | staticmethod):
            return (self.tell(value.__func__),)
        if isinstance(value, functools.partial):
            return (self.tell(value.func), self.tell(value.args), self.tell(value.keywords))
        if isinstance(value, functools._lru_cache_wrapper):
            return (self.tell(value.__wrapped__),)
        if isinstance(value, memoryview):
            return (value.format, value.shape, self.tell(value.obj))
        if isinstance(value, bytearray):
            return (bytes(value),)
        if isinstance(value, set | frozenset):
            return tuple(sorted(map(repr, value)))
        if isinstance(value, collections.deque):
            return (value.maxlen, *map(self.tell, value))
        if isinstance(value, random.Random):
            return (repr(value.getstate()),)
        if isinstance(value, np.random.Generator):
            return (repr(value.bit_generator.state),)
        parts: list[Any] = [self.tell(kind)]
        if isinstance(value, list):
            parts += map(self.tell, value)
        if isinstance(value, dict):
            parts.append(self.tell(getattr(value, "default_factory", None)))
            parts += [(self.tell(key), self.tell(item)) for key, item in value.items()]
        if hasattr(value, "_value_"):
            return (*parts, value._name_)
        parts += [(k, self.tell(v)) for k, v in getattr(value, "__dict__", {}).items()]
        for base in kind.__mro__:
            for slot in vars(base).get("__slots__", ()):
                if hasattr(value, slot):
                    parts.append((slot, self.tell(getattr(value, slot))))
        return tuple(parts)

    def _array(self, value: np.ndarray[Any, Any]) -> Any:
        """Tell an array; `memory` is which block it looks at, and where in it."""
        owner: Any = value
        while getattr(owner, "base", None) is not None:
            owner = owner.base
        owner = owner.obj if isinstance(owner, memoryview) else owner
        start = value.__array_interface__["data"][0]
        block, first = self.blocks.setdefault(id(owner), (len(self.blocks), start))
        self.alive.append(owner)
        items = (
            [self.tell(item) for item in value.ravel().tolist()] if value.dtype.hasobject else value.tolist()
        )
        memory = (block, start - first if value.size else 0)
        return (str(value.dtype), value.shape, memory, value.flags.writeable, items)

    def _function(self, value: types.FunctionType) -> Any:
        return (
            value.__qualname__,
            _code(value.__code__),
            value.__globals__ is self.namespace,
            self.tell(value.__defaults__),
            self.tell(value.__kwdefaults__),
            [self.tell(cell) for cell in value.__closure__ or ()],
            [(name, self.tell(item)) for name, item in vars(value).items()],
        )


def _frame(value: Any) -> Any:
    kinds = list(map(str, value.dtypes)) if isinstance(value, pd.DataFrame) else str(value.dtype)
    columns = list(map(repr, value.columns)) if isinstance(value, pd.DataFrame) else repr(value.name)
    return (columns, kinds, value.index.tolist(), repr(value.to_numpy().tolist()), repr(value.attrs))


def _is_descriptor_of_slot(value: Any) -> bool:
    return isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType)


def _code(code: types.CodeType) -> Any:
    consts = tuple(_code(item) if isinstance(item, types.CodeType) else repr(item) for item in code.co_consts)
    return (code.co_name, code.co_code.hex(), consts, code.co_names, code.co_varnames, code.co_freevars)


def difference(left: Any, right: Any, path: str = "") -> str | None:
    """Return where two descriptions differ first, and how; None where they don't."""
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = (difference(a, b, f"{path}/{n}") for n, (a, b) in enumerate(zip(left, right, strict=True)))
        return next(filter(None, pairs), None)
    return None if left == right else f"at {path}: {str(left)[:300]} became {str(right)[:300]}"
