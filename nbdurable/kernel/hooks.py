"""Functions that are told what happens to their run: `durable.on`.

Owns the functions that a notebook registered, and the call of one. When they are called, and that it is once, is the
runner's and the coordinator's. `python -m nbdurable.kernel.hooks module:function` calls one of a project's settings,
with the occasion as JSON on stdin; `--check` imports it only.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from nbdurable.errors import UsageError
from nbdurable.models import HookKind, Occasion

Function = TypeVar("Function", bound=Callable[[Occasion], Any])

_registered: dict[str, dict[str, Callable[[Occasion], Any]]] = {}
_error: tuple[str, str] | None = None  # of the newest call: the class's name, the message


def on(kind: HookKind) -> Callable[[Function], Function]:
    """Register a function to be called with an Occasion when the headless run starts, fails, ….

    `kind`: start, resume, wait, success, failure or cancel. Write it in a plain cell above the first step. What it
    prints goes to the run's log; an error in it changes nothing about the run. A function of the same name replaces
    the one before. Raises UsageError for another kind, and inside a step, which would not run when it is restored.
    """
    if kind not in get_args(HookKind):
        raise UsageError(
            f"there are no hooks of the kind {kind!r}", todo=f"one of {', '.join(get_args(HookKind))}"
        )
    from nbdurable.kernel import extension

    steps = extension.steps()
    if steps is not None and steps.execution is not None:
        raise UsageError(
            f"step `{steps.execution.name}` registers a hook, which is gone once the step is restored",
            todo="write `durable.on` in a plain cell above the first step",
        )

    def register(function: Function) -> Function:
        name = getattr(function, "__qualname__", repr(function))
        _registered.setdefault(kind, {})[name] = function
        return function

    return register


def registered() -> str:
    """Return the names of the functions by kind as JSON, each with whether it is to be awaited."""
    kinds = {
        kind: {name: inspect.iscoroutinefunction(function) for name, function in found.items()}
        for kind, found in _registered.items()
    }
    return json.dumps(kinds)


def tell(name: str, occasion: str) -> None:
    """Call a function; `report` says how it ended."""
    global _error
    told, _error = Occasion.model_validate_json(occasion), None
    with _dice_untouched():
        try:
            _registered[told.kind][name](told)
        except BaseException as error:
            _note(error)


async def tell_async(name: str, occasion: str) -> None:
    """Await a function; `report` says how it ended."""
    global _error
    told, _error = Occasion.model_validate_json(occasion), None
    with _dice_untouched():
        try:
            await _registered[told.kind][name](told)
        except BaseException as error:
            _note(error)


def report() -> str:
    """Return as JSON how the newest call ended: null, or the error's name and message."""
    return json.dumps(_error)


@contextmanager
def _dice_untouched() -> Iterator[None]:
    """Leave the random generators as they are: a run that was resumed tells other hooks, and must end the same."""
    numpy = sys.modules.get("numpy.random")
    states = random.getstate(), numpy.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.set_state(states[1])


def _note(error: BaseException) -> None:
    global _error
    import traceback

    _error = type(error).__name__, str(error)
    traceback.print_exception(error)


def main(arguments: Sequence[str]) -> int:
    """Call, or with `--check` only import, a function that the settings name."""
    module, _, name = arguments[0].partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{arguments[0]} is no function")
    if "--check" not in arguments:
        result = function(Occasion.model_validate_json(sys.stdin.read()))
        if inspect.iscoroutine(result):
            asyncio.run(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
