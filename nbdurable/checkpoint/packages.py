"""Versions of the installed packages that a checkpoint depends on.

Owns the way from an imported module to the distribution that it came with. Imports no package, and says nothing about
what a difference means.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata

_OWN = frozenset({"nbdurable", "IPython", "ipykernel", "__main__", "__mp_main__", "builtins"})


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Return {distribution: version} of those modules that are of installed packages and loaded in this process."""
    found = {}
    for top in sorted({name.partition(".")[0] for name in modules}):
        name = _distribution(top) if top in sys.modules and top not in sys.stdlib_module_names else None
        if name is not None and (version := installed(name)) is not None:
            found[name] = version
    return found


@cache
def installed(distribution: str) -> str | None:
    """Return the version of a distribution that this process found first; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, ValueError):
        return None


@cache
def _distribution(top: str) -> str | None:
    if top in _OWN:
        return None
    if installed(top) is not None:  # most are named so
        return top
    places = [getattr(sys.modules[top], "__file__", None), *getattr(sys.modules[top], "__path__", ())]
    if not any("site-packages" in str(place) or "dist-packages" in str(place) for place in places):
        return None
    for found in metadata.distributions():
        record = found.read_text("RECORD") or ""
        if any(f"\n{top}{end}" in f"\n{record}" for end in ("/__init__.py,", ".py,", "/")):
            return str(found.name)
    return None
