"""Modules of the project: which they are, what they import, and what their code was when it was loaded.

Owns the way from a module's name to its source. Imports nothing of the user's. A module's code is that of the moment
at which this process was first seen to have it: an edit counts once the module is loaded again, since until then the
old code is what runs.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import types
from collections.abc import Iterable
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from nbdurable.checkpoint.manifest import ModuleFact
from nbdurable.checkpoint.sources import code_digest, outline

_STANDARD_FOLDERS = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})


class Modules:
    """The project's modules as this process has them."""

    def __init__(self, root: Path) -> None:
        """Begin with the project's folder."""
        self.root = root.resolve()
        self._loaded: dict[str, tuple[Any, _Source]] = {}  # by name: the spec, which a reload replaces
        self._foreign: set[str] = set()  # names of loaded modules that are not the project's

    def note(self) -> None:
        """Note the code of modules that were loaded since: it may be edited before anybody asks."""
        for name in sys.modules.keys() - self._foreign:
            if self._source(name) is None:
                self._foreign.add(name)

    def file_of(self, module: Any) -> Path | None:
        """Return the source of a module of the project, None for any other's."""
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or getattr(module, "__name__", "__main__") == "__main__":
            return None
        return _under_project(file, self.root)

    def facts(self, names: Iterable[str]) -> dict[str, ModuleFact]:
        """Return the facts of modules, with those that they import; names of other modules are passed over."""
        found: dict[str, ModuleFact] = {}
        seen: set[str] = set()
        queue = list(names)
        while queue:
            name = queue.pop()
            if name in seen or name.partition(".")[0] in sys.stdlib_module_names:
                continue
            seen.add(name)
            if "." in name:
                queue.append(name.rpartition(".")[0])  # whose `__init__` runs first
            source = self._source(name)
            if source is not None:
                found[name] = source.fact(self.root)
                queue += source.imports(name)
        return found

    def edited(self, names: Iterable[str]) -> list[str]:
        """Return those modules whose file is not any more what was loaded."""
        return [
            name
            for name in names
            if (known := self._loaded.get(name)) is not None
            and (now := _read(known[1].file)) is not None
            and now.text != known[1].text
            and now.fact(self.root).digest != known[1].fact(self.root).digest
        ]

    def _source(self, name: str) -> _Source | None:
        module = sys.modules.get(name)
        if module is None:
            file = _file_to_be(name)
            path = None if file is None else _under_project(file, self.root)
            return None if path is None else _read(path)
        known = self._loaded.get(name)
        if known is not None and known[0] is getattr(module, "__spec__", None):
            return known[1]
        path = self.file_of(module)
        source = None if path is None else _read(path)
        if source is not None:
            self._loaded[name] = (getattr(module, "__spec__", None), source)
        return source


class _Source(NamedTuple):
    file: Path
    text: str

    def fact(self, root: Path) -> ModuleFact:
        return _fact(self.text, self.file.relative_to(root).as_posix())

    def imports(self, name: str) -> list[str]:
        """Return the absolute names of what the module may import, wherever in it that stands."""
        package = name if self.file.name == "__init__.py" else name.rpartition(".")[0]
        return list(_imports(self.text, package))


def _read(file: Path) -> _Source | None:
    try:
        return _Source(file, file.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return None


def _file_to_be(name: str) -> str | None:
    """Return the file that an import of a module would load; nothing is imported for that."""
    path: Any = None
    spec = None
    done = ""
    for part in name.split("."):
        done = f"{done}.{part}" if done else part
        try:
            spec = PathFinder.find_spec(done, path)
        except (ImportError, ValueError, OSError):
            return None
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and done != name:
            return None
    return None if spec is None else spec.origin


@lru_cache(maxsize=4096)
def _under_project(file: str, root: Path) -> Path | None:
    standard = file.startswith(_STANDARD_FOLDERS) and not str(root).startswith(_STANDARD_FOLDERS)
    if standard or f"{os.sep}site-packages{os.sep}" in file:  # most are: no need to ask the disk
        return None
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_relative_to(root):
        return None
    if {"site-packages", "dist-packages"} & set(path.parts):
        return None
    own = Path(__file__).resolve().parents[1]
    for foreign in (own, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()):
        if foreign != root and foreign.is_relative_to(root) and path.is_relative_to(foreign):
            return None
    return None if path.is_relative_to(own) else path


@lru_cache(maxsize=1024)
def _imports(text: str, package: str) -> tuple[str, ...]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ()
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{above}.{base}" if base else above
            found[base] = None
            found.update(dict.fromkeys(f"{base}.{alias.name}" for alias in node.names if alias.name != "*"))
    return tuple(name for name in found if name)


@lru_cache(maxsize=1024)
def _fact(text: str, file: str) -> ModuleFact:
    return ModuleFact(digest=code_digest(text), file=file, outline=outline(text))


def fact_of_file(file: Path, root: Path) -> ModuleFact | None:
    """Return the fact of a module's source as it stands on disk; None where there is none."""
    source = _read(file)
    return None if source is None else source.fact(root)


def owner_of(value: Any) -> str:
    """Return the name of the module that a value's code, or its type's, stands in."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    owner = getattr(value, "__module__", None)
    return owner if isinstance(owner, str) else type(value).__module__
