"""What a notebook says of a value that can't be saved: how it is made again.

Owns the call `durable.recipe`; what becomes of it is in `checkpoint/recipes.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from nbdurable.checkpoint.recipes import may_be_made, said
from nbdurable.errors import UsageError
from nbdurable.kernel import extension

Made = TypeVar("Made")


def recipe(name: str, make: Callable[[], Made]) -> Made:
    """Make a value that can't be saved, to be bound to the variable `name`, and say how it is made again.

    `make`, without arguments, is called now. In a step it is saved in place of the value: where the step is restored
    it is called again, after the other variables of the step are there, recipes in the order in which they ran. Other
    values may hold the object and are saved all the same. It counts by what made it: changes to it are not kept.
    Raises UsageError for a name that is none, a `make` that needs arguments or is async, and a value (plain data,
    functions, classes) that is saved as it is.

        client = durable.recipe("client", lambda: httpx.Client(base_url=url))
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise UsageError(
            f"{name!r} is not a variable's name", todo="client = durable.recipe('client', make_client)"
        )
    if not callable(make):
        raise UsageError(
            f"the recipe of `{name}` is a {type(make).__name__}, not a function", todo="give what makes it"
        )
    if inspect.iscoroutinefunction(make):
        raise UsageError(
            f"the recipe of `{name}`, `{said(make)}`, is async",
            todo="make the object in a plain function, and await what it does where it is used",
        )
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UsageError(
            f"the recipe of `{name}`, `{said(make)}`, can't be called without arguments: {error}",
            todo=f"give a function without, e.g. `lambda: {said(make)}(…)`",
        ) from None
    except ValueError:  # of C, without a signature: calling it tells
        pass
    value = make()
    if not may_be_made(value):
        raise UsageError(
            f"the recipe of `{name}` made a {type(value).__name__}, which is saved as it is",
            todo="give recipes to objects that can't be saved only, one to each",
        )
    steps = extension.steps()
    if steps is not None:
        steps.note_recipe(name, value, make)
    return value
