"""Recipes: objects that can't be saved, and what makes them again.

Owns which objects of a namespace are made by recipe. Such an object counts by what made it, and values that hold it
refer to it by its variable's name; what is saved in its place is the function that makes it. Knows no steps' lives.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

_SAVED_AS_THEY_ARE = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type),
)


@dataclass(frozen=True)
class Recipe:
    """What makes an object again. The object is kept alive, so that its id stays its own."""

    name: str  # of the variable that holds it
    value: Any
    make: Callable[[], Any] | None  # None: its cell runs again
    digest: str  # of everything that it was made by
    step: str = ""  # that made it; "" for a plain cell


# By the id of the object, in the order in which they were made. Mostly empty: asked first where speed counts.
in_use: dict[int, Recipe] = {}


def may_be_made(value: Any) -> bool:
    """Tell whether an object can be one that a recipe makes: plain data and code are saved as they are."""
    return type(value) not in _SAVED_AS_THEY_ARE and not isinstance(value, type | types.ModuleType)


def note(recipe: Recipe) -> None:
    """Let an object count by its recipe, as long as its variable holds it."""
    in_use.pop(id(recipe.value), None)
    in_use[id(recipe.value)] = recipe


def recipe_of(value: Any, namespace: Mapping[str, Any] | None) -> Recipe | None:
    """Return what made an object that the variable of its recipe holds, None for all others."""
    found = in_use.get(id(value)) if in_use else None
    return (
        found if found is not None and namespace is not None and namespace.get(found.name) is value else None
    )


def made_by(step: str, namespace: Mapping[str, Any]) -> list[Recipe]:
    """Return the recipes that ran in a step, in order, of which the variables still hold what they made."""
    return [one for one in in_use.values() if one.step == step and namespace.get(one.name) is one.value]


def misnamed(step: str, namespace: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Return each recipe that ran in a step and whose variable does not hold what it made, and the names that do."""
    for one in in_use.values():
        if one.step == step and namespace.get(one.name) is not one.value:
            yield one.name, [name for name, value in list(namespace.items()) if value is one.value]


def forget_step(step: str) -> None:
    """Let a step begin anew: what its recipes made before counts as made elsewhere."""
    for ident, one in in_use.items():
        if one.step == step:
            in_use[ident] = replace(one, step="")


def forget_gone(namespace: Mapping[str, Any]) -> None:
    """Forget the objects that their variables hold no more."""
    for ident, one in list(in_use.items()):
        if namespace.get(one.name) is not one.value:
            del in_use[ident]


def said(make: Any) -> str:
    """Name the function of a recipe, for people."""
    return str(getattr(make, "__qualname__", type(make).__name__))
