"""Fingerprints: what a value is, as a digest that every process agrees on.

Owns the walk over a value's objects. Equal values of equal types have equal fingerprints, whatever the
process, the hash seed or the line on which their code stands; a change of value, type or sharing changes
it. The walk sees what pickle sees and changes nothing. It is iterative: nesting is bounded by `MAX_DEPTH`,
not by Python's stack.
"""

from __future__ import annotations

import copyreg
import datetime
import decimal
import dis
import functools
import mmap
import sys
import types
import typing
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from marshal import dumps
from operator import itemgetter
from pickle import PickleBuffer
from typing import Any

from blake3 import blake3

from nbdurable.checkpoint import mapped, rebuild
from nbdurable.checkpoint.blobs import BUFFER_CHUNK, MAP_FROM_BYTES, digest_of
from nbdurable.checkpoint.objects import (
    DICT_VIEWS,
    IMMUTABLE_TYPES,
    LruCacheWrapper,
    Namespace,
    Problem,
    Unfingerprintable,
    Unsaveable,
    decorated,
    describe_problem,
    given,
    importable,
    live_name,
    reduce_value,
    stream_position,
    underlying,
)
from nbdurable.checkpoint.recipes import in_use, recipe_of

__all__ = ["Unfingerprintable", "Walk", "fingerprint", "immutable", "partial_fingerprint", "shared"]

ATOMS = frozenset({int, float, complex, str, bytes, bool, type(None)})
MAX_DEPTH = 10_000  # pickle gives up long before
MAX_OBJECTS = 100_000_000
MAX_OPAQUE = 16  # parts of one value that may be unfingerprintable before the whole value is
_MARSHAL = 2  # the last version without references to earlier objects: bytes depend on content alone
_PLAIN = ATOMS | {list, dict, tuple}
_PLAIN_LEVELS = (
    64  # bounds the work where a deep or cyclic value turns out not to be plain; marshal nests deeper
)
_BATCH = 4096  # items whose bytes are held in memory at a time
_FLUSH_BYTES = 1 << 16
# What Python, `typing`, `abc`, `enum` and pydantic derive from a class's body, or cache in it
_DERIVED = frozenset(
    """
    __dict__ __weakref__ __module__ __slotnames__ __firstlineno__ __static_attributes__
    __abstractmethods__ _abc_impl __annotate__ __annotate_func__ __annotations_cache__ __signature__
    __parameters__ __subclasshook__ __class_vars__ __private_attributes__ __pydantic_fields__
    _member_names_ _member_map_ _value2member_map_ _unhashable_values_ _unhashable_values_map_
    _hashable_values_ _use_args_ _new_member_ _value_repr_ __new_member__ __doc__
    """.split()  # noqa: SIM905 -- a list of 30 lines says no more
)


Part = tuple[str | int | tuple[Any], Any]  # how to get there (".name", index, (key,)), and the object there
Parts = Iterator[Part]
Place = tuple[int, int, tuple[int, ...]]  # of an array in its walk; its address; its strides
Shared = frozenset[tuple[str, int | Place]]


@dataclass(frozen=True)
class _Inner:
    """A part of a package's object that is its own business, never shared with anything.

    An index or column of a frame (pandas copies on write), an array or path in a figure.
    """

    part: Any


class Walk:
    """One walk over a value, which hashes what it sees, or only notes which objects it reaches.

    After `run`, `seen` holds the objects reached that can be shared, by id; `memory` where arrays look at memory,
    by the id of its owner; `live` the names by which the value refers to functions and classes of the notebook;
    `pieces` the digests of the value's own large memory, which `held` keeps alive, so that no address is used twice.
    `own`: the name of the notebook function or class that is itself the value. `opaque`: ids of objects
    that count by type alone. `problems`: where given, parts that can't be looked into are noted there and
    passed over.
    """

    def __init__(
        self,
        namespace: Namespace | None,
        *,
        hashing: bool = True,
        own: str = "",
        opaque: frozenset[int] = frozenset(),
        problems: list[Problem] | None = None,
        outer: Walk | None = None,
    ) -> None:
        self.namespace = namespace
        self.hashing = hashing
        self.own = own
        self.opaque = opaque
        self.problems = problems
        self.outer = outer
        self.seen: dict[int, Any] = {}  # keeps the objects alive too, so that no id is used twice
        self.memory: dict[int, list[Place]] = {}
        self.live: set[str] = set()
        self.root: Any = None
        self.pieces: dict[mapped.Piece, str] = {}
        self.held: list[memoryview] = []
        self._position: dict[int, int] = {}
        self._named: dict[int, tuple[Any, bytes]] = {}  # functions and classes that count by name, kept alive
        self._scalars: dict[type, bool] = {}
        self._next: int = 0 if outer is None else outer._next
        self._objects = 0
        self._hasher = blake3()
        self._pending = bytearray()

    # The driver --------------------------------------------------------------------------------------------

    def run(self, value: Any) -> str:
        """Walk over a value, return its digest; raises Unfingerprintable."""
        self.root = value
        bodies: list[Parts] = [iter([("", value)])]
        trail: list[Part] = []
        while bodies:
            try:
                part = next(bodies[-1], None)
                if part is None:
                    bodies.pop()
                    if trail:
                        trail.pop()
                    continue
                trail.append(part)
                body = self._visit(part[1])
                if body is None:
                    trail.pop()
                else:
                    bodies.append(body)
                    self._check_bounds(len(bodies))
            except Unfingerprintable as error:  # of a member of a set, which was walked apart
                if error.problem is None:
                    raise
                prefix = "".join(_label(how) for how, _ in trail)
                self._note(replace(error.problem, path=prefix + error.problem.path))
                self._leave(bodies, trail)
            except Exception as error:
                problem = describe_problem(
                    [(_label(how), item) for how, item in trail] or [("", value)], error
                )
                self._note(problem)
                self._leave(bodies, trail)
        self._flush()
        return self._hasher.hexdigest(16)

    def _leave(self, bodies: list[Parts], trail: list[Part]) -> None:
        """Give up the object at the end of the trail."""
        if trail:
            if len(bodies) == len(trail) + 1:  # it failed while its parts were listed
                bodies.pop()
            trail.pop()

    def _note(self, problem: Problem) -> None:
        if self.problems is None:
            raise Unfingerprintable(problem.path, problem.sentence(""), problem)
        self.problems.append(problem)

    def _check_bounds(self, depth: int) -> None:
        self._objects += 1
        if depth > MAX_DEPTH or self._objects > MAX_OBJECTS:
            raise RecursionError("nested too deep")

    def _emit(self, tag: bytes, data: Any = b"", *, own: bool = False) -> None:
        """Hash some bytes; `own`: they are the value's own memory, not a copy of it."""
        if not self.hashing:
            return
        size = len(data)
        self._pending += tag
        self._pending += size.to_bytes(8, "little")
        if size < _FLUSH_BYTES:
            self._pending += data
            if len(self._pending) >= _FLUSH_BYTES:
                self._flush()
        else:
            self._flush()
            self._bulk(data, own)

    def _flush(self) -> None:
        if self._pending:
            self._hasher.update(bytes(self._pending))
            self._pending.clear()

    def _bulk(self, data: Any, own: bool) -> None:
        """Hash many bytes, large ones by the digests of the chunks in which blobs keep them.

        So restored memory to which nobody has written need not be read at all.
        """
        if len(data) < MAP_FROM_BYTES:
            self._hasher.update(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), BUFFER_CHUNK):
            chunk = view[start : start + BUFFER_CHUNK]
            digest = mapped.digest_of(chunk, digest_of)
            if own and (piece := mapped.piece_of(chunk)) is not None:
                self.pieces[piece] = digest
            self._hasher.update(digest.encode())
        if own:
            self.held.append(view)

    def _find(self, ident: int) -> int | None:
        walk: Walk | None = self
        while walk is not None:
            if (position := walk._position.get(ident)) is not None:
                return position
            walk = walk.outer
        return None

    def position(self, ident: int) -> int:
        """Return when an object was reached, among the objects that can be shared; -1 where it has no place."""
        return self._position.get(ident, -1)

    def _register(self, value: Any) -> None:
        self.seen[id(value)] = value
        self._position[id(value)] = self._next
        self._next += 1

    # What to do with an object -----------------------------------------------------------------------------

    def _visit(self, value: Any) -> Parts | None:
        """Hash an object, or return the parts that remain to be walked."""
        kind = type(value)
        if kind in ATOMS:
            self._emit(b"a", dumps(value, _MARSHAL))
            return None
        if kind is _Inner:
            return self._inner(value.part)
        if (named := self._named.get(id(value))) is not None:
            self._emit(b"g", named[1])
            return None
        if kind is tuple or kind is frozenset:
            if (frozen := _frozen(value)) is not None:
                self._emit(b"f", frozen)
                return None
        elif kind is types.ModuleType or isinstance(value, types.ModuleType):
            self._emit(b"m", value.__name__.encode())
            return None
        elif (name := self._name(value, kind)) is not None:
            self._named[id(value)] = (value, name.encode())
            self._emit(b"g", name.encode())
            return None
        if in_use and (made := recipe_of(value, self.namespace)) is not None:
            self.live.add(made.name)
            self._emit(b"rc", f"{made.name}:{made.digest}".encode())
            return None
        if id(value) in self.opaque:
            self.seen[id(value)] = value
            self._emit(b"o", f"{kind.__module__}.{kind.__qualname__}:{stream_position(value)}".encode())
            return None
        if (scalar := self._scalars.get(kind)) is None:
            scalar = isinstance(value, IMMUTABLE_TYPES) or _is_immutable_scalar(value)
            self._scalars[kind] = scalar
        if scalar:
            return self._scalar(value)
        if (position := self._find(id(value))) is not None:
            self._emit(b"@", position.to_bytes(8, "little"))
            return None
        self._register(value)
        handler = _HANDLERS.get(kind)
        if handler is not None:
            return handler(self, value)  # type: ignore[no-any-return]
        if isinstance(value, type):
            return self._class(value)
        if (package := kind.__module__.partition(".")[0]) in _PACKAGES and package in sys.modules:
            parts = _PACKAGES[package](self, value, sys.modules[package])
            if parts is not NotImplemented:
                return parts  # type: ignore[no-any-return]
        return self._reduced(value)

    def _name(self, value: Any, kind: type) -> str | None:
        """Return the name that stands for a function or class, noting those of the notebook."""
        if kind is not types.FunctionType and kind is not LruCacheWrapper and not isinstance(value, type):
            return None
        if (name := importable(value)) is not None:
            return name
        name = live_name(value, self.namespace)
        if name is None or name.partition(".")[0] == self.own:
            return None
        self.live.add(name.partition(".")[0])
        return f"__main__:{name}"

    def _scalar(self, value: Any) -> Parts | None:
        """Hash an immutable object by what it is made of; it has no identity."""
        kind = type(value)
        if kind in _SAID_BY_REPR and getattr(value, "tzinfo", None) is None:
            self._emit(b"sr", f"{kind.__qualname__}{value!r}".encode())
            return None
        if hasattr(value, "dtype") and hasattr(value, "tobytes"):  # a NumPy scalar
            if value.dtype.names is None and not value.dtype.hasobject:
                self._emit(b"v", repr(value.dtype).encode() + b"|" + value.tobytes())
                return None
        elif hasattr(value, "_value_") and hasattr(type(value), "__members__"):
            return self._member(value)
        return self._reduced(value)

    def _member(self, value: Any) -> Parts:
        self._emit(b"e", str(value._name_).encode())
        yield "", type(value)
        yield ".value", value._value_

    # Python's own types ------------------------------------------------------------------------------------

    def _list(self, value: list[Any] | tuple[Any, ...]) -> Parts | None:
        tag = b"l" if type(value) is list else b"t"
        if set(map(type, value)) <= ATOMS:
            self._emit(tag + b"a", dumps(value, _MARSHAL) if self.hashing else b"")
            return None
        if type(value) is list and self._plain(value):
            return None
        self._emit(tag, len(value).to_bytes(8, "little"))
        return self._mixed(enumerate(value))

    def _plain(self, root: list[Any] | dict[Any, Any]) -> bool:
        """Hash a tree of lists, dicts and atoms at once, level by level; return False if it is no such tree.

        A tree: no list or dict in it is reached twice, or was reached before. So its bytes alone say what it
        is, and `marshal`, which writes nothing but these exact types here, makes them fast.
        """
        level: list[Any] = [root]
        found: dict[int, Any] = {}
        for _ in range(_PLAIN_LEVELS):
            dicts = [item for item in level if type(item) is dict]
            members = list(chain.from_iterable(item for item in level if type(item) is list))
            members += chain.from_iterable(map(dict.values, dicts))
            kinds = set(map(type, members))
            if not kinds <= _PLAIN or not set(map(type, chain.from_iterable(dicts))) <= ATOMS:
                return False
            if tuple in kinds:
                flat = chain.from_iterable(item for item in members if type(item) is tuple)
                if not set(map(type, flat)) <= ATOMS:
                    return False
            if list not in kinds and dict not in kinds:
                break
            level = [item for item in members if type(item) is list or type(item) is dict]
            size = len(found)
            found.update(zip(map(id, level), level, strict=True))
            if len(found) < size + len(level) or id(root) in found:
                return False
        else:
            return False
        walk: Walk | None = self
        while walk is not None:
            if not walk._position.keys().isdisjoint(found):
                return False
            walk = walk.outer
        self.seen.update(found)
        self._position.update(zip(found, range(self._next, self._next + len(found)), strict=True))
        self._next += len(found)
        self._objects += len(found)
        self._emit(b"p" + type(root).__name__[:1].encode(), len(root).to_bytes(8, "little"))
        self._atoms(root.items() if isinstance(root, dict) else root)
        return True

    def _mixed(self, parts: Iterator[Part]) -> Parts:
        """Hash the atoms among some parts at once, and return the others."""
        while batch := list(islice(parts, _BATCH)):
            kinds = [type(item) in ATOMS for _, item in batch]
            if self.hashing:  # `...` is no atom
                atoms = [item if known else ... for (_, item), known in zip(batch, kinds, strict=True)]
                self._emit(b"mx", dumps(atoms, _MARSHAL))
            for part, known in zip(batch, kinds, strict=True):
                if not known:
                    yield part

    def _atoms(self, items: Any) -> None:
        """Hash what `marshal` writes of items, some at a time: their bytes need not all be in memory."""
        rest = iter(items if self.hashing else ())
        while batch := list(islice(rest, _BATCH)):
            self._emit(b"", dumps(batch, _MARSHAL))

    def _dict(self, value: dict[Any, Any]) -> Parts | None:
        if set(map(type, value)) <= ATOMS and set(map(type, value.values())) <= ATOMS:
            self._emit(b"da", dumps(list(value.items()), _MARSHAL) if self.hashing else b"")
            return None
        if self._plain(value):
            return None
        self._emit(b"d", len(value).to_bytes(8, "little"))
        return self._items(value.items())

    def _items(self, pairs: Any) -> Parts:
        pairs = list(pairs)
        yield from self._mixed(("", key) for key, _ in pairs)
        yield from self._mixed(((key,), item) for key, item in pairs)

    def _set(self, value: set[Any] | frozenset[Any]) -> Parts | None:
        tag = type(value).__name__.encode()
        if set(map(type, value)) <= ATOMS:
            self._emit(
                tag, b"".join(sorted(dumps(item, _MARSHAL) for item in value)) if self.hashing else b""
            )
            return None
        self._emit(tag, len(value).to_bytes(8, "little"))
        if not self.hashing:
            return (("", item) for item in value)
        ordered = []
        for item in value:
            walk = Walk(self.namespace, own=self.own, opaque=self.opaque, problems=self.problems, outer=self)
            digest = walk.run(item)
            self.live |= walk.live
            for owner, places in walk.memory.items():
                self.memory.setdefault(owner, []).extend(places)
            self.seen |= walk.seen
            self.pieces |= walk.pieces
            self.held += walk.held
            ordered.append(
                (
                    digest,
                    -1 if (place := self._find(id(item))) is None else place,
                    id(item) in walk.seen,
                    item,
                )
            )
        for digest, place, shareable, item in sorted(ordered, key=lambda entry: entry[:2]):
            self._emit(b"i", f"{digest}{place}".encode())
            if shareable and place < 0:
                self._register(item)
        return None

    def _bytes(self, value: Any) -> None:
        self._emit(b"b" + type(value).__name__[:1].encode(), value)

    def _memoryview(self, value: memoryview) -> Parts:
        self._emit(b"mv", repr((value.format, value.shape, value.readonly)).encode())
        self._emit(b"mb", value.tobytes())
        if not value.readonly and isinstance(value.obj, bytearray):
            yield "", value.obj  # it shares memory with it

    def _view(self, value: Any) -> Parts:
        self._emit(b"dv", DICT_VIEWS[type(value)].encode())
        yield "", underlying(value)

    def _proxy(self, value: Any) -> Parts:
        self._emit(b"mp")
        yield "", underlying(value)

    def _code(self, code: types.CodeType) -> None:
        self._emit(b"co", code_bytes(code))

    def _function(self, value: types.FunctionType) -> Parts:
        if (made := decorated(value)) is not None:
            self._emit(b"dc")
            yield "", made
            return
        self._emit(b"fn", code_bytes(value.__code__))
        yield ".__defaults__", value.__defaults__
        yield ".__kwdefaults__", value.__kwdefaults__
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield f".<{name}>", cell
        yield "", dict(value.__dict__)

    def _cell(self, value: types.CellType) -> Parts:
        self._emit(b"ce")
        try:
            content = value.cell_contents
        except ValueError:
            return
        yield "", content

    def _method(self, value: types.MethodType) -> Parts:
        self._emit(b"me", value.__func__.__name__.encode())
        yield ".__self__", value.__self__
        yield "", value.__func__

    def _builtin(self, value: Any) -> Parts:
        self._emit(b"bi", f"{value.__module__}.{value.__name__}".encode())
        if not isinstance(value.__self__, types.ModuleType):
            yield ".__self__", value.__self__

    def _descriptor(self, value: Any) -> None:
        self._emit(b"ds", value.__name__.encode())

    def _wrapped(self, value: Any) -> Parts:
        self._emit(b"w", type(value).__name__.encode())
        yield "", value.__func__

    def _property(self, value: property) -> Parts:
        self._emit(b"pr")
        for function in (value.fget, value.fset, value.fdel):
            yield "", function

    def _cached_property(self, value: functools.cached_property[Any]) -> Parts:
        self._emit(b"cp", str(value.attrname).encode())
        yield "", value.func

    def _lru(self, value: Any) -> Parts:
        self._emit(b"lru", repr(sorted(value.cache_parameters().items())).encode())
        yield "", value.__wrapped__
        if own := rebuild.own_attributes(value):
            yield from self._state(own)

    def _class(self, value: type) -> Parts:
        """Walk over a class of the notebook: its bases and what its body defined."""
        self._emit(b"cl", f"{value.__module__}.{value.__qualname__}".encode())
        yield "", type(value)
        for base in value.__bases__:
            yield "", base
        body = dict(value.__dict__)
        members: dict[str, Any] = body.get("__members__") or getattr(value, "__members__", None) or {}
        is_enum = "_member_map_" in body
        if is_enum:
            for name, member in members.items():
                self._emit(b"em", name.encode())
                yield f".{name}", member._value_
        for name, field in (body.get("__pydantic_fields__") or {}).items():
            self._emit(b"pf", name.encode())
            yield f".{name}", field.default
            yield f".{name}", field.default_factory
        for name in sorted(body):
            if name in _DERIVED or name.startswith("__pydantic_") or name in (members if is_enum else ()):
                continue
            item = body[name]
            if name == "__annotations__" and not item:  # reading it makes it
                continue
            if is_enum and not isinstance(item, types.FunctionType | property | classmethod):
                continue
            self._emit(b"at", name.encode())
            yield f".{name}", item

    def _reduced(self, value: Any) -> Parts:
        """Walk over what pickle would make of an object."""
        reduced = reduce_value(value)
        if isinstance(reduced, str):
            self._emit(b"gl", f"{getattr(value, '__module__', '')}:{reduced}".encode())
            return
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        if make is copyreg.__newobj__ and len(arguments) == 1:  # type: ignore[attr-defined]
            self._emit(b"ro")
        else:
            self._emit(b"re", len(arguments).to_bytes(8, "little"))
            yield "", make
        for argument in arguments:
            yield "", argument
        yield from self._state(state)
        if items is not None:
            self._emit(b"li")
            yield from self._mixed(enumerate(given(value, items)))
        if pairs is not None:
            self._emit(b"di")
            yield from self._items(given(value, pairs))

    def _state(self, state: Any) -> Parts:
        if (
            type(state) is tuple
            and len(state) == 2
            and all(part is None or type(part) is dict for part in state)
        ):
            self._emit(b"s2")
            for part in state:
                yield from self._state(part)
        elif type(state) is dict:
            pairs = list(state.items())
            if set(map(type, state)) == {str}:
                pairs.sort(key=itemgetter(0))  # `__setstate__` may set attributes in an order of its own
            if set(map(type, state.values())) <= ATOMS and set(map(type, state)) <= ATOMS:
                self._emit(b"sa", dumps(pairs, _MARSHAL) if self.hashing else b"")
                return
            self._emit(b"sd", len(state).to_bytes(8, "little"))
            yield from self._mixed(("", key) for key, _ in pairs)
            yield from self._mixed(
                (f".{key}" if isinstance(key, str) else (key,), item) for key, item in pairs
            )
        else:
            self._emit(b"s")
            yield "", state

    # Arrays and frames -------------------------------------------------------------------------------------

    def _array(self, array: Any, *, own_memory: bool = True) -> Parts | None:
        """Hash a NumPy array by its content, whatever its strides."""
        dtype = array.dtype
        self._emit(b"np", f"{dtype!r}{array.shape}".encode())
        if own_memory:
            if not array.flags.writeable:
                self._emit(b"ro")
            self._note_memory(array)
        if dtype.names is not None:  # field by field: padding is garbage
            return ((f"[{name!r}]", array[name]) for name in dtype.names)
        if dtype.hasobject:
            items = array.ravel().tolist()
            if not set(map(type, items)) <= ATOMS:
                return iter(enumerate(items))
            self._emit(b"oa")
            self._atoms(items)
            return None
        if self.hashing and array.size:
            flat = array.ravel()  # a view where it is contiguous
            self._emit(b"nb", memoryview(flat.view("u1")), own=flat.base is not None)
        return None

    def _note_memory(self, array: Any) -> None:
        place = (self._next, array.__array_interface__["data"][0], array.strides)
        self.memory.setdefault(id(memory_owner(array)), []).append(place)

    def _numpy(self, value: Any, numpy: Any) -> Any:
        if type(value) is numpy.ndarray:
            return self._array(value)
        if (masked := sys.modules.get("numpy.ma")) is not None and isinstance(value, masked.MaskedArray):
            return self._masked(value, masked)
        if isinstance(value, numpy.ndarray):
            self._note_memory(value)
        if isinstance(value, numpy.ufunc):
            self._emit(b"uf", value.__name__.encode())
            return None
        return NotImplemented

    def _masked(self, value: Any, masked: Any) -> Parts:
        self._emit(b"ma")
        yield "", type(value)
        yield ".data", masked.getdata(value)
        yield ".mask", masked.getmaskarray(value)
        # reading `fill_value` would set it
        fill = masked.default_fill_value(value.dtype) if value._fill_value is None else value._fill_value
        yield ".fill_value", sys.modules["numpy"].asarray(fill, dtype=value.dtype)

    def _pandas(self, value: Any, pandas: Any) -> Any:
        if isinstance(value, pandas.DataFrame):
            return self._frame(value)
        if isinstance(value, pandas.Series):
            return self._series(value)
        if isinstance(value, pandas.Index):
            return self._index(value, pandas)
        if isinstance(value, pandas.api.extensions.ExtensionArray):
            return self._column(value)
        return NotImplemented

    def _frame(self, frame: Any) -> Parts:
        self._emit(b"df", repr(frame.shape).encode())
        yield "", type(frame)
        yield ".index", _Inner(frame.index)
        yield ".columns", _Inner(frame.columns)
        yield ".attrs", frame.attrs
        yield ".flags", frame.flags.allows_duplicate_labels
        for number in range(frame.shape[1]):
            yield f"[{frame.columns[number]!r}]", _Inner(frame.iloc[:, number].array)

    def _series(self, series: Any) -> Parts:
        self._emit(b"sr")
        yield "", type(series)
        yield ".name", series.name
        yield ".index", _Inner(series.index)
        yield ".attrs", series.attrs
        yield "", _Inner(series.array)

    def _index(self, index: Any, pandas: Any) -> Parts:
        self._emit(b"ix")
        yield "", type(index)
        yield ".names", tuple(index.names)
        if isinstance(index, pandas.RangeIndex):
            yield "", (index.start, index.stop, index.step)
        elif isinstance(index, pandas.MultiIndex):
            for level, codes in zip(index.levels, index.codes, strict=True):
                yield "", _Inner(level)
                self._array(codes, own_memory=False)
        else:
            yield ".freq", getattr(index, "freqstr", None)
            yield "", _Inner(index.array)

    def _column(self, array: Any) -> Parts:
        """Walk over a pandas column; its memory is pandas' own business (copy on write), never shared."""
        self._emit(b"ea", f"{type(array).__qualname__}{array.dtype!r}".encode())
        if (arrow := getattr(array, "_pa_array", None)) is not None:
            self._arrow(arrow, sys.modules["pyarrow"])
            return
        parts: list[Any] = []
        if hasattr(array, "categories"):
            yield ".categories", _Inner(array.categories)
            parts = [array.codes]
        elif hasattr(array, "_mask") and hasattr(array, "_data"):
            parts = [array._data, array._mask]
        elif hasattr(array, "asi8"):
            parts = [array.asi8]
        elif hasattr(array, "_ndarray"):
            parts = [array._ndarray]
        elif hasattr(array, "left") and hasattr(array, "closed"):
            yield "", _Inner(array.left)
            yield "", _Inner(array.right)
        else:
            yield from self._reduced(array)
        for part in parts:
            yield from self._array(part, own_memory=False) or ()

    def _arrow(self, value: Any, arrow: Any, own: bool = True) -> Any:
        """Hash Arrow data as an IPC stream: content without chunk borders, slices and unused bytes."""
        if isinstance(value, arrow.DataType | arrow.Field):
            self._emit(b"at", str(value).encode())
            return None
        if isinstance(value, arrow.Schema):
            self._emit(b"as", bytes(value.serialize()))
            return None
        if isinstance(value, arrow.Array | arrow.ChunkedArray):
            table = arrow.table({"": value})
        elif isinstance(value, arrow.RecordBatch):
            table = arrow.Table.from_batches([value])
        elif isinstance(value, arrow.Table):
            table = value
        else:
            return NotImplemented
        self._emit(b"ar", type(value).__qualname__.encode())
        self._emit(b"as", bytes(table.schema.serialize()))
        for column in table.columns if self.hashing else ():
            compact = _compact(column, arrow)
            whole = arrow.table({"": compact})
            sink = _Sink(self, own and compact is column)
            with arrow.ipc.new_stream(arrow.PythonFile(sink, mode="w"), whole.schema) as stream:
                stream.write_table(whole)
        return None

    def _torch(self, value: Any, torch: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, torch)
        if isinstance(value, torch.Generator):
            self._emit(b"tg", str(value.device).encode() + value.get_state().numpy().tobytes())
            return None
        return NotImplemented

    def _sklearn(self, value: Any, sklearn: Any) -> Any:
        """Walk over a Bunch as the dict that it is: its own `__setstate__` forgets what else it holds."""
        if type(value) is not sklearn.utils.Bunch:
            return NotImplemented
        self._emit(b"bu")
        return self._items(value.items())

    def _tensor(self, tensor: Any, torch: Any) -> Parts:
        """Walk over a tensor: its content, whatever its strides, its gradient and its attributes."""
        if not tensor.is_leaf:
            raise Unsaveable("a tensor that remembers how it was computed", "keep its `detach()`")
        if tensor.device.type != "cpu":
            raise Unsaveable(f"a tensor on {tensor.device}", "keep its `cpu()`")
        facts = (
            type(tensor).__qualname__,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.layout,
            tensor.requires_grad,
        )
        self._emit(b"tt", repr(facts).encode())
        if tensor.layout is torch.sparse_coo:
            yield ".indices()", tensor._indices()
            yield ".values()", tensor._values()
        elif plain_tensor(tensor, torch):
            place = (self._next, tensor.data_ptr(), tensor.stride())
            self.memory.setdefault(tensor.untyped_storage()._cdata, []).append(place)
            if self.hashing and tensor.numel():
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                self._emit(b"nb", memoryview(flat.numpy()))
        else:
            yield from self._reduced(tensor)
        yield ".grad", tensor.grad
        yield "", dict(vars(tensor))

    def _matplotlib(self, value: Any, matplotlib: Any) -> Any:
        """Walk over what a figure shows, without what drawing it leaves in its parts."""
        if type(value) is matplotlib.cbook.CallbackRegistry:  # each look at it makes it count on
            self._emit(b"cr")
            return None
        state = reduce_value(value)[2] if hasattr(value, "__getstate__") else None
        if type(state) is not dict:
            return NotImplemented
        if "_restore_to_pylab" in state:  # loading a copy would hand it to pyplot, which shows it
            raise Unsaveable("a figure that pyplot still holds open", "close it first: `plt.close(figure)`")
        own = (matplotlib.transforms.Affine2D, matplotlib.transforms.Bbox)
        cached = _DRAWING if isinstance(value, own) else _DRAWING | _COMPUTED
        return self._drawn(value, {name: item for name, item in state.items() if name not in cached})

    def _drawn(self, value: Any, state: dict[str, Any]) -> Parts:
        numpy, path = sys.modules["numpy"], sys.modules["matplotlib.path"]
        own = {list, numpy.ndarray, path.Path}
        self._emit(b"dr")
        yield "", type(value)
        yield from self._state({name: _Inner(v) if type(v) in own else v for name, v in state.items()})

    def _inner(self, part: Any) -> Parts | None:
        """Walk over what belongs to the object that holds it."""
        if type(part) is list:
            self._emit(b"il")
            return enumerate(part)
        package = type(part).__module__.partition(".")[0]
        if package == "numpy":
            return self._array(part, own_memory=False)
        if package == "matplotlib":
            return iter(
                (("", _Inner(part.vertices)), ("", part.codes if part.codes is None else _Inner(part.codes)))
            )
        return self._pandas(part, sys.modules["pandas"])  # type: ignore[no-any-return]

    def _polars(self, value: Any, polars: Any) -> Any:
        if isinstance(value, polars.DataFrame):
            self._emit(b"pf", repr(value.schema).encode())
            frame = value
        elif isinstance(value, polars.Series):
            self._emit(b"ps", repr((value.name, value.dtype)).encode())
            frame = value.to_frame()
        else:
            return NotImplemented
        for column in (
            frame.get_columns() if self.hashing else ()
        ):  # Arrow's strings are a copy: one at a time
            if column.dtype in (polars.Categorical, polars.Int128, *_unsigned_128(polars)):
                column = column.cast(
                    polars.String
                )  # codes depend on what the process saw before; Arrow has no 128 bits
            self._arrow(column.to_frame().to_arrow(), sys.modules["pyarrow"], own=False)
        return None


def _unsigned_128(polars: Any) -> tuple[Any, ...]:
    return (polars.UInt128,) if hasattr(polars, "UInt128") else ()


def _compact(column: Any, arrow: Any) -> Any:
    """Return an Arrow column as one array without anything in its buffers but its own values.

    Arrow writes what stands in the buffers beyond a slice as well, up to the next eight bytes.
    """
    kinds = arrow.types
    if kinds.is_string_view(column.type) or kinds.is_binary_view(column.type):
        column = column.cast(
            arrow.large_string() if kinds.is_string_view(column.type) else arrow.large_binary()
        )
    if column.num_chunks == 1 and _fills_its_buffers(column.chunk(0), kinds):
        return column
    empty = column.chunk(0).slice(0, 0) if column.num_chunks else arrow.array([], column.type)
    try:
        return arrow.concat_arrays([*column.chunks, empty])
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError):  # offsets of 32 bits would overflow
        return column.combine_chunks()


def _fills_its_buffers(array: Any, kinds: Any) -> bool:
    kind = array.type
    if kinds.is_string(kind) or kinds.is_binary(kind):
        beyond = 4  # there is one offset more than there are values
    elif kinds.is_large_string(kind) or kinds.is_large_binary(kind):
        beyond = 8
    elif kinds.is_primitive(kind) and not kinds.is_boolean(kind):
        beyond = 0
    else:
        return False
    return not array.offset and array.get_total_buffer_size() == array.nbytes + beyond


class _Sink:
    """A file, as Arrow wants it, that hashes what is written."""

    closed = False

    def __init__(self, walk: Walk, own: bool) -> None:
        self._walk, self._own = walk, own

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._walk._emit(b"", view, own=self._own)
        return len(view)

    def flush(self) -> None: ...

    def close(self) -> None: ...


_HANDLERS: dict[type, Any] = {
    list: Walk._list,
    tuple: Walk._list,
    dict: Walk._dict,
    set: Walk._set,
    frozenset: Walk._set,
    bytearray: Walk._bytes,
    memoryview: Walk._memoryview,
    types.MappingProxyType: Walk._proxy,
    types.CodeType: Walk._code,
    types.FunctionType: Walk._function,
    types.CellType: Walk._cell,
    types.MethodType: Walk._method,
    types.BuiltinFunctionType: Walk._builtin,
    types.MethodDescriptorType: Walk._descriptor,
    types.WrapperDescriptorType: Walk._descriptor,
    types.MethodWrapperType: Walk._descriptor,
    types.ClassMethodDescriptorType: Walk._descriptor,
    types.MemberDescriptorType: Walk._descriptor,
    types.GetSetDescriptorType: Walk._descriptor,
    classmethod: Walk._wrapped,
    staticmethod: Walk._wrapped,
    property: Walk._property,
    functools.cached_property: Walk._cached_property,
    LruCacheWrapper: Walk._lru,
} | dict.fromkeys(DICT_VIEWS, Walk._view)
_PACKAGES: dict[str, Any] = {
    "numpy": Walk._numpy,
    "pandas": Walk._pandas,
    "pyarrow": Walk._arrow,
    "polars": Walk._polars,
    "matplotlib": Walk._matplotlib,
    "torch": Walk._torch,
    "sklearn": Walk._sklearn,
}


def _label(how: str | int | tuple[Any]) -> str:
    if isinstance(how, str):
        return how
    try:
        return f"[{how!r}]" if isinstance(how, int) else f"[{how[0]!r:.60}]"
    except Exception:
        return "[…]"


def _frozen(value: Any) -> bytes | None:
    """Return bytes for a value that is immutable all through (its sharing can't matter), else None."""
    kinds = set(map(type, value))
    if type(value) is tuple:
        if kinds <= ATOMS:
            return b"t" + dumps(value, _MARSHAL)
        if not kinds <= _FROZEN:
            return None
        parts = [dumps(item, _MARSHAL) if type(item) in ATOMS else _frozen(item) for item in value]
    else:
        if not kinds <= _FROZEN:
            return None
        parts = [dumps(item, _MARSHAL) if type(item) in ATOMS else _frozen(item) for item in value]
        if None not in parts:
            parts.sort()
    if None in parts:
        return None
    joined = b"".join(len(part).to_bytes(8, "little") + part for part in parts if part is not None)
    return type(value).__name__[:1].encode() + b"*" + blake3(joined).digest()


# What drawing leaves in the parts of a figure, and what transforms compute from others
_DRAWING = frozenset({"_stale", "stale", "_invalid", "_inverted", "_parents"})
_COMPUTED = frozenset({"_mtx", "_points"})
_FROZEN = ATOMS | {tuple, frozenset}
_SAID_BY_REPR = frozenset(
    {datetime.date, datetime.datetime, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID}
)


@functools.lru_cache(maxsize=4096)
def code_bytes(code: types.CodeType) -> bytes:
    """Return bytes for compiled code, without the file and the lines on which it stands."""
    facts = (
        *_instructions(code),
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags,
        code.co_name,
    )
    return blake3(dumps(facts, _MARSHAL) + b"".join(map(_constant, code.co_consts))).digest()


def _instructions(code: types.CodeType) -> tuple[Any, ...]:
    """Return a code's instructions and exception table.

    Without those that are there only to have a line (`return` above its constant), and so with jumps by position.
    """
    bytecode: Any = dis.Bytecode(code)
    kept: list[dis.Instruction] = []
    positions: dict[int, int] = {}  # offset → position of what runs there
    for instruction in bytecode:
        positions[instruction.offset] = len(kept)
        if instruction.opname not in ("NOP", "EXTENDED_ARG", "CACHE"):
            kept.append(instruction)
    jumps = {*dis.hasjrel, *dis.hasjabs}
    body = [
        (item.opname, positions.get(item.argval, -1) if item.opcode in jumps else item.arg) for item in kept
    ]
    handlers = [
        (
            positions.get(entry.start, -1),
            positions.get(entry.end, len(kept)),
            positions[entry.target],
            entry.depth,
            entry.lasti,
        )
        for entry in bytecode.exception_entries
    ]
    return body, handlers


def _constant(value: Any) -> bytes:
    if isinstance(value, types.CodeType):
        data = b"c" + code_bytes(value)
    elif type(value) in ATOMS:
        data = dumps(value, _MARSHAL)
    elif isinstance(value, tuple | frozenset):
        parts = [_constant(item) for item in value]
        data = type(value).__name__.encode() + b"".join(parts if isinstance(value, tuple) else sorted(parts))
    else:
        data = repr(value).encode()  # Ellipsis
    return len(data).to_bytes(8, "little") + data


def _is_immutable_scalar(value: Any) -> bool:
    """Tell whether a package's value has no identity: NumPy scalars, dtypes, Timedeltas, Arrow types."""
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    if isinstance(value, type) or package not in (*_PACKAGES, "typing"):
        return False
    if package == "typing":
        return not isinstance(value, typing.TypeVar | typing.ParamSpec | typing.TypeVarTuple | typing.NewType)
    module: Any = sys.modules.get(package)
    if package == "numpy":
        return isinstance(value, module.generic | module.dtype)
    if package == "pandas":
        dtype = module.api.extensions.ExtensionDtype
        kinds = (module.Timedelta, module.Period, module.Interval, module.offsets.BaseOffset, dtype)
        return value is module.NA or value is module.NaT or isinstance(value, kinds)
    if package == "pyarrow":
        return isinstance(value, module.DataType | module.Field | module.Schema | module.Scalar)
    return package == "polars" and isinstance(value, module.DataType)


_BUFFERS = (bytes, bytearray, memoryview, mmap.mmap, PickleBuffer)


def plain_walk(value: Any) -> Walk | None:
    """Return the walk over an atom, or a tree of lists, dicts and atoms in which nothing is reached twice, else None.

    `pickle` alone brings such a value back exactly.
    """
    kind, walk = type(value), Walk(None, hashing=False)
    if kind is list or kind is dict:
        walk._register(value)
        return walk if walk._plain(value) else None
    return walk if kind in ATOMS else None


def plain_tensor(tensor: Any, torch: Any) -> bool:
    """Tell whether a tensor is nothing but a view on bytes in memory."""
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or is_lazy)
    )


def memory_owner(array: Any) -> Any:
    """Return the object that owns an array's memory: an array, or a buffer of Python's own."""
    owner = array
    while isinstance(base := getattr(owner, "base", None), (type(array), *_BUFFERS)):
        owner = base
    return owner


def _own_name(value: Any, namespace: Namespace | None) -> str:
    """Return the name of a notebook function or class that is itself the value, "" for others."""
    is_code = isinstance(value, types.FunctionType | type | LruCacheWrapper)
    return (live_name(value, namespace) or "").partition(".")[0] if is_code else ""


def fingerprint(value: Any, namespace: Namespace | None = None) -> str:
    """Return the digest of a value; raises Unfingerprintable, naming the part that can't be looked into.

    Functions and classes that `namespace` holds count by name where the value merely refers to them, and by
    their code, defaults, closure and attributes where they are the value, or are not held by name.
    """
    return Walk(namespace, own=_own_name(value, namespace)).run(value)


def partial_fingerprint(
    value: Any, namespace: Namespace | None = None
) -> tuple[str, list[Problem], Walk | None]:
    """Return the digest of what can be looked into, the parts that can't, and the walk; None where there is none.

    Those count by type alone. A package's object that holds such a part (a client with its connections) is
    left out whole: its inner state changes whenever it is used. The digest of a value without problems is
    `fingerprint`'s.
    """
    opaque: frozenset[int] = frozenset()
    problems: list[Problem] = []
    while True:
        try:
            walk = Walk(namespace, own=_own_name(value, namespace), opaque=opaque)
            digest = walk.run(value)
        except Unfingerprintable as error:
            if error.problem is None or error.problem.unit in opaque or len(problems) >= MAX_OPAQUE:
                kind = type(value)
                return (
                    f"opaque:{kind.__module__}.{kind.__qualname__}:{stream_position(value)}",
                    problems,
                    None,
                )
            problems.append(error.problem)
            opaque |= {error.problem.unit}
        else:
            return (f"partly:{digest}" if problems else digest), problems, walk


def reach(value: Any, namespace: Namespace, name: str) -> tuple[Walk, list[Problem]]:
    """Return which objects a variable's value reaches, and what of it can't be saved; hashes nothing."""
    problems: list[Problem] = []
    own = _own_name(value, namespace)
    walk = Walk(namespace, hashing=False, own=own if own == name else "", problems=problems)
    walk.run(value)
    return walk, problems


def shared(walks: Mapping[str, Walk]) -> list[Shared]:
    """Return, for each object and each memory that several places of some variables reach, these places.

    A place is a variable's name and where in its walk; of memory also the address and strides of the array there.
    """
    first: dict[int, str] = {}
    common: set[int] = set()
    for name, walk in sorted(walks.items(), key=lambda item: len(item[1].seen)):
        common |= first.keys() & walk.seen.keys()
        first.update(dict.fromkeys(walk.seen, name))
    found: dict[int, list[tuple[str, int | Place]]] = {}
    for name, walk in walks.items():
        for ident in common & walk.seen.keys():
            found.setdefault(ident, []).append((name, walk.position(ident)))
        for owner, places in walk.memory.items():
            found.setdefault(-owner, []).extend((name, place) for place in places)
    return [frozenset(places) for places in found.values() if len(places) > 1]


def immutable(value: Any) -> bool:
    """Tell whether a value is known to be unable to change, so that a fingerprint of it stays true."""
    kind = type(value)
    if kind in ATOMS:
        return True
    return (kind is tuple or kind is frozenset) and _frozen(value) is not None
