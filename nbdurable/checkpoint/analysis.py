"""What a cell's code reads and writes, and which functions, classes and modules it stands on.

Owns the reading of source. `analyse` is static and looks at one cell; `uses` follows its names through the
live namespace; `helpers_in_source` finds the same helpers in a notebook that is not running. Runs nothing
of the user's.
"""

from __future__ import annotations

import ast
import builtins
import dis
import linecache
import sys
import textwrap
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nbdurable.checkpoint.fingerprint import ATOMS, code_bytes, partial_fingerprint
from nbdurable.checkpoint.manifest import HelperFact, ModuleFact
from nbdurable.checkpoint.modules import Modules, owner_of
from nbdurable.checkpoint.objects import LruCacheWrapper, decorated, importable, undecorated
from nbdurable.checkpoint.sources import node_digest

SOURCE_BYTES = 20_000  # of a helper's source that are kept
_CELL_MAGICS = frozenset({"time", "timeit", "capture", "prun", "memit"})
_LINE_MAGICS = frozenset({"time", "timeit", "prun", "memit"})
_SCAN_OBJECTS = 2_000  # containers and instances that are looked into for code of the notebook
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign


class Found(NamedTuple):
    """A definition, and the cell in which it stands."""

    node: Any  # a Definition; a ClassDef for classes
    text: str
    file: str


@dataclass(frozen=True)
class CellNames:
    """Names of the namespace that a cell touches by its own code.

    `loads`: read, unless surely bound in the cell before. `stores`: bound, also by `import`, `for`, `with`,
    `del` followed by a binding, and `global` in a function. `imports`: modules that it imports, dotted.
    `touches`: names whose object it may change without binding them (`df["a"] = 1`, `rows.append(2)`, `fill(rows)`).
    `lines`: of the top-level statement that binds or touches a name last.
    """

    loads: frozenset[str] = frozenset()
    stores: frozenset[str] = frozenset()
    deletes: frozenset[str] = frozenset()
    imports: frozenset[str] = frozenset()
    touches: frozenset[str] = frozenset()
    lines: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass
class _Scope:
    """A function, class or comprehension, or the cell itself (`parent` is None)."""

    kind: str  # cell, function, class, comprehension
    parent: _Scope | None
    bound: set[str] = field(default_factory=set)
    globals: set[str] = field(default_factory=set)
    nonlocals: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)


class _Names(ast.NodeVisitor):
    """Visits a cell in the order in which Python evaluates it."""

    def __init__(self) -> None:
        self.loads: set[str] = set()
        self.stores: set[str] = set()
        self.deletes: set[str] = set()
        self.imports: set[str] = set()
        self.touches: set[str] = set()
        self.lines: dict[str, int] = {}
        self.line = 0  # of the top-level statement that is visited
        self._sure: set[str] = set()  # bound by now on every path
        self._scope = _Scope("cell", None)

    # Names -------------------------------------------------------------------------------------------------

    def _load(self, name: str) -> None:
        scope = self._scope
        if scope.kind == "cell":
            if name not in self._sure:
                self.loads.add(name)
        elif scope.kind == "class" and name in scope.bound and name not in scope.globals:
            return
        else:
            scope.loads.append(name)  # what it means is known when the scope ends

    def _store(self, name: str) -> None:
        scope = self._scope
        if name in scope.globals:
            self.stores.add(name)
        elif scope.kind != "cell":
            scope.bound.add(name)
        else:
            self.lines[name] = self.line
            self.stores.add(name)
            self.deletes.discard(name)
            self._sure.add(name)

    def _delete(self, name: str) -> None:
        scope = self._scope
        if name in scope.globals or scope.kind == "cell":
            if name not in self._sure:
                self.loads.add(name)
            self.deletes.add(name)
            self._sure.discard(name)
        else:
            scope.bound.add(name)

    def _touch(self, node: ast.expr) -> None:
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call | ast.Starred | ast.Await):
            node = node.func if isinstance(node, ast.Call) else node.value
        if isinstance(node, ast.Name) and self._scope.kind == "cell":
            self.touches.add(node.id)
            self.lines[node.id] = self.line

    def visit_Attribute(self, node: ast.Attribute | ast.Subscript) -> None:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            self._touch(node)

    visit_Subscript = visit_Attribute

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._load(node.id)
        elif isinstance(node.ctx, ast.Store):
            self._store(node.id)
        else:
            self._delete(node.id)

    def visit_Global(self, node: ast.Global) -> None:
        self._scope.globals.update(node.names)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self._scope.nonlocals.update(node.names)

    # Statements whose parts are not evaluated in the order in which they are written
    # --------------------------

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        self._each(node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        self.visit(node.annotation)
        if node.value is not None or not isinstance(node.target, ast.Name):
            self.visit(node.target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self._load(node.target.id)
        self.visit(node.value)
        self.visit(node.target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        inner = self._scope
        while self._scope.kind == "comprehension" and self._scope.parent is not None:
            self._scope = self._scope.parent
        self.visit(node.target)
        self._scope = inner

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        with self._maybe():
            self.visit(node.target)
            self._each(node.body)
        self._perhaps(node.orelse)

    visit_AsyncFor = visit_For

    def visit_If(self, node: ast.If | ast.While) -> None:
        self.visit(node.test)
        self._perhaps(node.body)
        self._perhaps(node.orelse)

    visit_While = visit_If

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self._perhaps([node.body])
        self._perhaps([node.orelse])

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self._perhaps(node.values[1:])

    def visit_Try(self, node: ast.Try | ast.TryStar) -> None:
        self._perhaps([*node.body, *node.orelse])
        for handler in node.handlers:
            self._perhaps([handler])
        self._each(node.finalbody)

    visit_TryStar = visit_Try

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.type is not None:
            self.visit(node.type)
        if node.name:  # bound, and unbound when the handler ends
            self._store(node.name)
        self._each(node.body)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        for case in node.cases:
            self._perhaps([case])

    def visit_MatchAs(self, node: ast.MatchAs | ast.MatchStar) -> None:
        if node.name:
            self._store(node.name)
        self.generic_visit(node)

    visit_MatchStar = visit_MatchAs

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        self.generic_visit(node)
        if node.rest:
            self._store(node.rest)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports.add(alias.name)
            self._store(alias.asname or alias.name.partition(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            self.imports.add(node.module)
            self.imports.update(f"{node.module}.{alias.name}" for alias in node.names if alias.name != "*")
        for alias in node.names:
            if alias.name != "*":
                self._store(alias.asname or alias.name)

    # Scopes ------------------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._each(node.decorator_list)
        self._signature(node.args)
        if node.returns is not None:
            self.visit(node.returns)
        self._store(node.name)  # before its body: it may call itself
        with self._inside("function"):
            self._parameters(node.args, getattr(node, "type_params", []))
            self._each(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._signature(node.args)
        with self._inside("function"):
            self._parameters(node.args, [])
            self.visit(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._each(node.decorator_list)
        self._each(node.bases)
        self._each(node.keywords)
        with self._inside("class"):
            self._scope.bound.update({"__module__", "__qualname__"})
            self._scope.bound.update(parameter.name for parameter in getattr(node, "type_params", []))
            self._each(node.body)
        self._store(node.name)

    def _comprehension(self, node: Any) -> None:
        self.visit(node.generators[0].iter)
        with self._inside("comprehension"):
            for number, generator in enumerate(node.generators):
                if number:
                    self.visit(generator.iter)
                self.visit(generator.target)
                self._each(generator.ifs)
            for part in ("key", "elt", "value"):
                if (expression := getattr(node, part, None)) is not None:
                    self.visit(expression)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _signature(self, arguments: ast.arguments) -> None:
        self._each(
            [*arguments.defaults, *(default for default in arguments.kw_defaults if default is not None)]
        )
        for argument in _arguments(arguments):
            if argument.annotation is not None:
                self.visit(argument.annotation)

    def _parameters(self, arguments: ast.arguments, type_parameters: list[Any]) -> None:
        self._scope.bound.update(argument.arg for argument in _arguments(arguments))
        self._scope.bound.update(parameter.name for parameter in type_parameters)

    def _inside(self, kind: str) -> _Within:
        return _Within(self, kind)

    def _leave(self, scope: _Scope) -> None:
        """Resolve what a finished scope read: its own, or an enclosing function's, or the namespace's."""
        assert scope.parent is not None
        self._scope = scope.parent
        for name in scope.loads:
            if name in scope.globals:
                if name not in self._sure:
                    self.loads.add(name)
            elif scope.kind == "class" or name not in scope.bound or name in scope.nonlocals:
                self._load_outside(name)

    def _load_outside(self, name: str) -> None:
        """Note a read on behalf of a finished inner scope; scopes of classes are not looked into."""
        scope = self._scope
        while scope.kind == "class" and scope.parent is not None:
            scope = scope.parent
        inner, self._scope = self._scope, scope
        self._load(name)
        self._scope = inner

    def _maybe(self) -> _Maybe:
        return _Maybe(self)

    def _perhaps(self, nodes: Iterable[ast.AST]) -> None:
        with self._maybe():
            self._each(nodes)

    def _each(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    # Magics ------------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute):
            self._touch(node.func)
        if not isinstance(node.func, ast.Name) or not hasattr(builtins, node.func.id):
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                self._touch(argument)
        texts = [
            item.value if isinstance(item, ast.Constant) and isinstance(item.value, str) else ""
            for item in node.args
        ]
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        sources: list[str] = []
        if name == "run_cell_magic" and len(texts) == 3 and texts[0] in _CELL_MAGICS:
            sources = [texts[2]]
        if name in ("run_cell_magic", "run_line_magic") and len(texts) >= 2 and texts[0] in _LINE_MAGICS:
            sources.append(texts[1])
        for source in sources:
            tree = _parse_lenient(source)
            if tree is not None:
                with self._maybe():
                    self._each(tree.body)


class _Within:
    def __init__(self, names: _Names, kind: str) -> None:
        self._names, self._kind = names, kind

    def __enter__(self) -> None:
        self._names._scope = self._mine = _Scope(self._kind, self._names._scope)

    def __exit__(self, *_: object) -> None:
        self._names._leave(self._mine)


class _Maybe:
    """Code that may not run: what it binds is surely bound inside, but not afterwards."""

    def __init__(self, names: _Names) -> None:
        self._names = names

    def __enter__(self) -> None:
        self._before = set(self._names._sure)

    def __exit__(self, *_: object) -> None:
        self._names._sure &= self._before


def _arguments(arguments: ast.arguments) -> Iterator[ast.arg]:
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    yield from (extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None)


def _parse_lenient(source: str) -> ast.Module | None:
    """Parse a magic's body, in which lines may be magics or shell commands; None if it is not Python."""
    lines = []
    for line in source.splitlines():
        code = line.lstrip()
        if code.startswith(("%", "!")):
            magic, _, rest = code.removeprefix("%").partition(" ")
            line = line[: len(line) - len(code)] + (rest.strip() if magic in _LINE_MAGICS else "pass")
        lines.append(line)
    try:
        return ast.parse("\n".join(lines))
    except (SyntaxError, ValueError):
        return None


def analyse(tree: ast.Module, source: str = "") -> CellNames:
    """Return the names that a cell touches; `tree` is its transformed Python, `source` its text."""
    names = _Names()
    for node in tree.body:
        names.line = node.lineno
        names.visit(node)
    return CellNames(
        loads=frozenset(names.loads),
        stores=frozenset(names.stores),
        deletes=frozenset(names.deletes),
        imports=frozenset(names.imports),
        touches=frozenset(names.touches - names.stores),
        lines=names.lines,
    )


# Definitions -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _first_line(node: Definition) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _segment(node: Definition, text: str) -> str:
    lines = text.splitlines()[_first_line(node) - 1 : node.end_lineno]
    source = textwrap.dedent("\n".join(lines))
    return source.encode()[:SOURCE_BYTES].decode("utf-8", "ignore")


def _definitions(tree: ast.AST, path: tuple[str, ...]) -> Iterator[Definition]:
    """Find definitions by their path of names, e.g. ("timed", "wrapper"), wherever control flow puts them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == path[0]:
                if len(path) == 1:
                    yield node
                else:
                    yield from _definitions(node, path[1:])
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            if (
                len(path) == 1
                and isinstance(node.value, ast.Lambda)
                and isinstance(target, ast.Name)
                and target.id == path[0]
            ):
                yield node
        elif isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _definitions(node, path)


def _key(qualname: str) -> str:
    return qualname.replace(".<locals>", "")


# Through the live namespace --------------------------------------------------------------------------------


@dataclass
class Uses:
    """What a cell stands on.

    `inputs`: variables that it reads, with the helper that reads them ("": the cell itself). `helpers`: functions and
    classes of the notebook. `imports`: names that mean a foreign module, function or class. `modules`: those of the
    project. `packages`: top-level names of all other modules that it uses directly.
    """

    inputs: dict[str, str] = field(default_factory=dict)
    helpers: dict[str, HelperFact] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    modules: dict[str, ModuleFact] = field(default_factory=dict)
    packages: set[str] = field(default_factory=set)


def uses(
    names: Iterable[str],
    namespace: Mapping[str, Any],
    project: Path | Modules,
    *,
    imports: Iterable[str] = (),
    label: Callable[[str], str] = lambda file: "",
) -> Uses:
    """Follow names through functions, methods, closures and classes of the notebook.

    Variables that those read are inputs too. Modules, builtins, functions and classes of packages are not
    inputs; modules of the project (files under its folder, outside virtual environments) count by their
    source. `imports`: modules that the cell itself will import. `label`: names a cell by its file, for people.
    """
    modules = project if isinstance(project, Modules) else Modules(project)
    search = _Search(namespace, modules, label)
    for name in sorted(names):
        search.name(name)
    search.foreign |= set(imports)
    search.found.modules = modules.facts(search.foreign)
    search.found.packages = {name.partition(".")[0] for name in search.foreign}
    return search.found


def uses_of(
    function: Any,
    namespace: Mapping[str, Any],
    modules: Modules,
    *,
    label: Callable[[str], str] = lambda file: "",
) -> Uses:
    """Follow what a function or another callable stands on, as `uses` does for the names of a cell."""
    search = _Search(namespace, modules, label)
    search.data(undecorated(function), getattr(function, "__name__", ""))
    search.found.modules = modules.facts(search.foreign)
    return search.found


class _Search:
    def __init__(self, namespace: Mapping[str, Any], modules: Modules, label: Callable[[str], str]) -> None:
        self.found = Uses()
        self.foreign: set[str] = set()  # modules
        self._namespace = namespace
        self._modules = modules
        self._label = label
        self._via: list[str] = [""]  # the helpers that lead to what is looked at now
        self._visited: dict[int, Any] = {id(namespace): namespace}
        self._names: set[str] = set()
        self._budget = _SCAN_OBJECTS
        self._slots: dict[
            type, tuple[Any, ...] | None
        ] = {}  # by type: its slots; None: not to be looked into

    def name(self, name: str) -> None:
        if name in self._names or name not in self._namespace:
            return
        self._names.add(name)
        value = self._namespace[name]
        if isinstance(value, types.ModuleType):
            self.found.imports[name] = value.__name__
            self.module(value)
        elif isinstance(value, types.FunctionType | type | LruCacheWrapper | types.BuiltinFunctionType):
            if (foreign := importable(value)) is not None:
                self.found.imports[name] = _meaning(foreign)
            self.code(value, name)
        else:
            if not (isinstance(value, types.MethodType) and importable(type(value.__self__))):
                self.found.inputs[name] = self._via[-1]
            self.data(value, name)

    def code(self, value: Any, name: str) -> None:
        """Visit a function or a class."""
        if id(value) in self._visited:
            return
        self._visited[id(value)] = value
        if importable(value) is None and (made := decorated(value)) is not None:
            for part in made[1]:
                self.data(part, name)
            return
        if importable(value) is not None or not self._of_notebook(value):
            self.module(sys.modules.get(getattr(value, "__module__", None) or ""))
        elif isinstance(value, types.FunctionType):
            self.function(value, name)
        elif isinstance(value, type):
            self.klass(value)
        if isinstance(wrapped := getattr(value, "__wrapped__", None), types.FunctionType):
            self.code(wrapped, name)

    def _of_notebook(self, value: Any) -> bool:
        if isinstance(value, types.FunctionType) and value.__globals__ is self._namespace:
            return True
        module = getattr(value, "__module__", None)
        return module in ("__main__", self._namespace.get("__name__", "__main__"))

    def function(self, function: types.FunctionType, name: str) -> None:
        code = function.__code__
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        closure = {name: _content(cell) for name, cell in cells.items()}
        defaults = _defaults(function)
        attributes = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        state = {
            **{f"default `{name}`": value for name, value in defaults.items()},
            **{
                f"closure variable `{name}`": value
                for name, value in closure.items()
                if not isinstance(value, types.FunctionType | type)
            },
            **{f"attribute `{name}`": value for name, value in attributes.items()},
        }
        definition = _function_definition(code)
        key = self._function_key(code, definition, name)
        if definition is not None or not _is_generated(code):
            self._add(key, definition, state, lambda: code_bytes(code).hex())
            self._via.append(key)
        else:
            self._via.append(self._via[-1])
        for value in (*closure.values(), *defaults.values(), *attributes.values()):
            self.data(value, "")
        if function.__globals__ is self._namespace:
            for name in sorted(globals_read(code)):
                self.name(name)
        else:
            self.module(sys.modules.get(function.__module__ or ""))
        self._via.pop()

    def _function_key(self, code: types.CodeType, definition: Found | None, name: str) -> str:
        if code.co_name != "<lambda>":
            return _key(code.co_qualname)
        if definition is not None:  # `name = lambda …`
            return str(definition.node.targets[0].id)
        return name or f"<lambda {sum(key.startswith('<lambda ') for key in self.found.helpers) + 1}>"

    def klass(self, kind: type) -> None:
        body = {name: value for name, value in vars(kind).items() if not name.startswith("__")}
        code_like = (
            types.FunctionType,
            type,
            classmethod,
            staticmethod,
            property,
            types.MemberDescriptorType,
        )
        data = {name: body[name] for name in sorted(body) if not isinstance(body[name], code_like)}
        data = {name: value for name, value in data.items() if name[:1] != "_" or not name.endswith("_")}
        data.pop("_abc_impl", None)
        state = {f"attribute `{name}`": value for name, value in data.items()}
        # Its own methods are part of its definition; functions that were put into it otherwise are not.
        own: list[types.FunctionType] = []
        strange: list[types.FunctionType] = []
        for name, value in vars(kind).items():
            for held in (value, getattr(value, "__func__", None), *_accessors(value)):
                part = undecorated(held)
                if not isinstance(part, types.FunctionType):
                    continue
                foreign = part.__globals__ is not self._namespace
                meant = importable(part) if foreign else part.__code__.co_qualname
                if _is_generated(part.__code__) or meant in (None, f"{kind.__qualname__}.{name}"):
                    own.append(part)
                else:
                    strange.append(part)
                    state[f"method `{name}`"] = meant
        definition = _class_definition(kind)
        by_value = partial(self._fingerprint, kind)
        key = _key(kind.__qualname__)
        self._add(key, definition, {} if definition is None else state, by_value)
        self._via.append(key)
        for base in (*kind.__bases__, type(kind)):
            self.code(base, base.__name__)
        for function in own:
            self._method(function)
        for function in strange:
            self.code(function, function.__name__)
        for value in vars(kind).values():
            if isinstance(value, type):
                self.code(value, value.__name__)
            elif not isinstance(value, types.FunctionType | classmethod | staticmethod | property):
                self.data(value, "")
        self._via.pop()

    def _method(self, function: types.FunctionType) -> None:
        """Follow what a method reads; its code is part of its class's."""
        if id(function) in self._visited:
            return
        self._visited[id(function)] = function
        if function.__globals__ is self._namespace:
            for name in sorted(globals_read(function.__code__)):
                self.name(name)
        for cell in function.__closure__ or ():
            self.data(_content(cell), "")

    def data(self, value: Any, name: str) -> None:
        """Look into a value for functions, classes and instances of the notebook and the project.

        Containers and instances are looked into breadth first, up to 2,000 of them for a cell.
        """
        queue = deque([value])
        while queue:
            value = queue.popleft()
            kind = type(value)
            if kind in _CONTAINERS:
                if id(value) not in self._visited and self._budget:
                    self._visited[id(value)] = value
                    self._budget -= 1
                    queue += self._parts(value)
            elif isinstance(value, types.FunctionType | type | LruCacheWrapper):
                self.code(value, name)
            elif isinstance(value, types.ModuleType):
                self.module(value)
            elif isinstance(value, types.MethodType):
                queue += (value.__func__, value.__self__)
            elif isinstance(value, partial):
                queue += (value.func, *value.args, *value.keywords.values())
            elif kind not in ATOMS and id(value) not in self._visited and self._budget:
                self._visited[id(value)] = value
                self._budget -= 1
                self.code(kind, kind.__name__)
                queue += self._parts(value)

    def _parts(self, value: Any) -> Iterable[Any]:
        """Return what a container or an instance holds that may hold code."""
        if isinstance(value, dict):
            members: Collection[Any] = dict.values(value)
        elif isinstance(value, list | tuple | set | frozenset | deque):
            members = value
        else:
            members = self._attributes(value)
        return [member for member in islice(members, _SCAN_OBJECTS) if type(member) not in ATOMS]

    def _attributes(self, value: Any) -> list[Any]:
        kind = type(value)
        if kind not in self._slots:
            named = {(base.__module__, base.__name__) for base in kind.__mro__}
            slots = (member for base in kind.__mro__ for member in vars(base).values())
            # each part of Jupyter holds the kernel, and so every variable
            is_jupyters = ("traitlets.config.configurable", "Configurable") in named
            found = tuple(slot for slot in slots if isinstance(slot, types.MemberDescriptorType))
            self._slots[kind] = None if is_jupyters else found
        if (descriptors := self._slots[kind]) is None:
            return []
        held = []
        with suppress(AttributeError):  # it has slots only
            held += object.__getattribute__(value, "__dict__").values()
        for descriptor in descriptors:
            with suppress(AttributeError):  # an empty slot
                held.append(descriptor.__get__(value, kind))
        return held

    def module(self, module: types.ModuleType | None) -> None:
        """Note a module; of the project's also those whose objects it holds."""
        if module is None or id(module) in self._visited:
            return
        self._visited[id(module)] = module
        self.foreign.add(module.__name__)
        if self._modules.file_of(module) is not None:
            for value in list(vars(module).values()):
                self.module(sys.modules.get(owner_of(value)))

    def _fingerprint(self, value: Any) -> str:
        return partial_fingerprint(value, self._namespace)[0]

    def _add(self, key: str, definition: Found | None, state: Mapping[str, Any], by_value: Any) -> None:
        if key in self.found.helpers:
            return
        digests = {name: self._fingerprint(value) for name, value in state.items()}
        if definition is None:
            self.found.helpers[key] = HelperFact(ast=f"value:{by_value()}", state=digests)
        else:
            self.found.helpers[key] = HelperFact(
                ast=node_digest(definition.node),
                state=digests,
                source=_segment(definition.node, definition.text),
                label=self._label(definition.file),
                line=_first_line(definition.node),
            )


def _meaning(importable_name: str) -> str:
    """Return what `module:name` means in any version of a package: its top-level module and the name."""
    module, _, name = importable_name.partition(":")
    return f"{module.partition('.')[0]}:{name}"


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    code = function.__code__
    found = function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][code.co_argcount - len(found) :]
    return {**dict(zip(names, found, strict=True)), **(function.__kwdefaults__ or {})}


def _is_generated(code: types.CodeType) -> bool:
    """Tell whether a package wrote the source of a function, as `dataclasses` and `attrs` do."""
    return code.co_filename.startswith(("<string>", "<attrs"))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _accessors(value: Any) -> tuple[Any, ...]:
    return (value.fget, value.fset, value.fdel) if isinstance(value, property) else ()


def globals_read(code: types.CodeType) -> set[str]:
    """Return the global names that compiled code and the code within it mention."""
    found = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= globals_read(constant)
    return found


def _cell_text(file: str) -> str:
    return "".join(linecache.getlines(file))


def _function_definition(code: types.CodeType) -> Found | None:
    """Find the source of compiled code; None where there is none, or it is not its own any more."""
    text = _cell_text(code.co_filename)
    tree = _parsed(text) if text else None
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (node.name, _first_line(node)) == (code.co_name, code.co_firstlineno):
                return Found(node, text, code.co_filename)
        elif code.co_name == "<lambda>" and (made := _named_lambda(node, code.co_firstlineno)) is not None:
            return Found(made, text, code.co_filename)
    return None


def _named_lambda(node: ast.AST, line: int) -> ast.Assign | None:
    """Return the statement `name = lambda …` on a line, if it is one."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda) and node.value.lineno == line:
        return node if isinstance(node.targets[0], ast.Name) else None
    return None


def _class_definition(kind: type) -> Found | None:
    """Find the source of a class of the notebook; None where there is none.

    A class does not know its file, but its methods do; one without methods is looked for in all cells, and the last
    one that binds the same names is taken.
    """
    path = tuple(_key(kind.__qualname__).split("."))
    members = [
        undecorated(part)
        for value in vars(kind).values()
        for part in (value, getattr(value, "__func__", None), *_accessors(value))
    ]
    functions = [part.__code__ for part in members if isinstance(part, types.FunctionType)]
    own = f"{kind.__qualname__}."  # others were put into it from elsewhere
    files = sorted({code.co_filename for code in functions if code.co_qualname.startswith(own)})
    found = _classes_in(files, path)
    if not found:
        cells = [
            file for file, entry in list(linecache.cache.items()) if len(entry) == 4 and entry[1] is None
        ]
        found = [item for item in _classes_in(cells, path) if _binds_names_of(item.node, kind)]
    return found[-1] if found else None


def _classes_in(files: Iterable[str], path: tuple[str, ...]) -> list[Found]:
    texts = [(file, _cell_text(file)) for file in files]
    return [
        Found(node, text, file)
        for file, text in texts
        for node in _definitions_in(text, path)
        if isinstance(node, ast.ClassDef)
    ]


def _binds_names_of(node: ast.ClassDef, kind: type) -> bool:
    """Tell whether a class statement without methods may be the one that made a class."""
    names = _Names()
    names._each(node.body)
    fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
    annotated = {field.id for field in fields if isinstance(field, ast.Name)}
    body = vars(kind)  # `kind.__annotations__` would write an empty one into the class
    known = body.get("__annotations__")
    if known is None and sys.version_info >= (3, 14):
        known = kind.__annotations__
    members = getattr(kind, "__members__", {})
    return names.stores <= {*body, *members, *(known or ())} and annotated == set(known or ())


def source_of_code(value: Any) -> tuple[str, str] | None:
    """Return (file, text) of the cell that defines a function or class, if that is known."""
    if isinstance(value, types.FunctionType):
        file = value.__code__.co_filename
        entry = linecache.cache.get(file)
        return (
            (file, _cell_text(file)) if entry is not None and len(entry) == 4 and entry[1] is None else None
        )
    found = _class_definition(value)
    return None if found is None else (found.file, found.text)


def remember_sources(sources: Mapping[str, str]) -> None:
    """Make the sources of restored code known, to tracebacks and to `uses`."""
    for file, text in sources.items():
        linecache.cache.setdefault(file, (len(text), None, text.splitlines(keepends=True), file))


def _definitions_in(text: str, path: tuple[str, ...]) -> list[Definition]:
    tree = _parsed(text)
    return [] if tree is None else list(_definitions(tree, path))


# Without a kernel ------------------------------------------------------------------------------------------


def helpers_in_source(sources: Iterable[tuple[str, str]], names: Iterable[str]) -> dict[str, HelperFact]:
    """Find helpers by name in a notebook's cells, given as (label, transformed source).

    The last definition counts. The `ast` of each is the one that `uses` gives; its state is unknown, since nothing
    runs.
    """
    trees = [(label, source, _parsed(source)) for label, source in sources]
    found: dict[str, HelperFact] = {}
    for name in names:
        path = tuple(name.split("."))
        for label, source, tree in trees:
            for node in [] if tree is None else _definitions(tree, path):
                found[name] = HelperFact(
                    ast=node_digest(node),
                    state=None,
                    source=_segment(node, source),
                    label=label,
                    line=_first_line(node),
                )
    return found


def imports_in_source(sources: Iterable[tuple[str, str]], recorded: Mapping[str, str]) -> dict[str, str]:
    """Say what names would mean that recorded code imports, as `Uses.imports` does.

    A name that is imported from where the recorded object may well come is taken to mean that; one whose import is
    not found, too.
    """
    found = dict(recorded)
    for _, source in sources:
        tree = _parsed(source)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    if name in recorded:
                        found[name] = _meant(node, alias, recorded[name])
    return found


def _meant(node: ast.Import | ast.ImportFrom, alias: ast.alias, recorded: str) -> str:
    if isinstance(node, ast.Import):
        return alias.name if alias.asname else alias.name.partition(".")[0]
    top = (node.module or "").partition(".")[0]
    module, _, name = recorded.partition(":")
    if not name:  # a module: `from matplotlib import pyplot`
        return (
            recorded
            if module in (f"{node.module}.{alias.name}", "posixpath", "ntpath")
            else f"{top}:{alias.name}"
        )
    both_standard = {top, module} <= sys.stdlib_module_names  # `os.getcwd` is `posix.getcwd`
    alike = name.rpartition(".")[2] == alias.name and (top == module or both_standard)
    return recorded if alike else f"{top}:{alias.name}"
