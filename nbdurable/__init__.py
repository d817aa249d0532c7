"""Durable execution for Jupyter notebooks: the public names, loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "approve": "nbdurable.kernel.waits",
    "approve_async": "nbdurable.kernel.waits",
    "sleep": "nbdurable.kernel.waits",
    "sleep_async": "nbdurable.kernel.waits",
    "sleep_until": "nbdurable.kernel.waits",
    "sleep_until_async": "nbdurable.kernel.waits",
    "wait_for": "nbdurable.kernel.waits",
    "wait_for_async": "nbdurable.kernel.waits",
    "first_of": "nbdurable.kernel.waits",
    "first_of_async": "nbdurable.kernel.waits",
    "all_of": "nbdurable.kernel.waits",
    "all_of_async": "nbdurable.kernel.waits",
    "approval": "nbdurable.kernel.waits",
    "event": "nbdurable.kernel.waits",
    "timer": "nbdurable.kernel.waits",
    "Decision": "nbdurable.kernel.waits",
    "WaitTimeout": "nbdurable.errors",
    "ChildFailed": "nbdurable.errors",
    "RunHandle": "nbdurable.kernel.children",
    "child": "nbdurable.kernel.children",
    "trigger": "nbdurable.kernel.children",
    "trigger_and_wait": "nbdurable.kernel.children",
    "trigger_and_wait_async": "nbdurable.kernel.children",
    "trigger_async": "nbdurable.kernel.children",
    "trigger_batch": "nbdurable.kernel.children",
    "trigger_batch_and_wait": "nbdurable.kernel.children",
    "trigger_batch_and_wait_async": "nbdurable.kernel.children",
    "trigger_batch_async": "nbdurable.kernel.children",
    "current_run": "nbdurable.kernel.context",
    "result": "nbdurable.kernel.context",
    "skip_rest": "nbdurable.kernel.context",
    "on": "nbdurable.kernel.hooks",
    "load": "nbdurable.kernel.travel",
    "recipe": "nbdurable.kernel.recipes",
    "step": "nbdurable.kernel.calls",
    "Failed": "nbdurable.kernel.mapping",
    "map": "nbdurable.kernel.mapping",
    "map_async": "nbdurable.kernel.mapping",
    "ledger": "nbdurable.kernel.ledger",
    "Client": "nbdurable.client",
    "DurableError": "nbdurable.errors",
    "Abort": "nbdurable.errors",
    "RetryAfter": "nbdurable.errors",
    "load_ipython_extension": "nbdurable.kernel.extension",
    "unload_ipython_extension": "nbdurable.kernel.extension",
}

__all__ = [
    "Abort",
    "ChildFailed",
    "Client",
    "Decision",
    "DurableError",
    "Failed",
    "RetryAfter",
    "RunHandle",
    "WaitTimeout",
    "all_of",
    "all_of_async",
    "approval",
    "approve",
    "approve_async",
    "child",
    "current_run",
    "event",
    "first_of",
    "first_of_async",
    "ledger",
    "load",
    "map",
    "map_async",
    "on",
    "recipe",
    "result",
    "skip_rest",
    "sleep",
    "sleep_async",
    "sleep_until",
    "sleep_until_async",
    "step",
    "timer",
    "trigger",
    "trigger_and_wait",
    "trigger_and_wait_async",
    "trigger_async",
    "trigger_batch",
    "trigger_batch_and_wait",
    "trigger_batch_and_wait_async",
    "trigger_batch_async",
    "wait_for",
    "wait_for_async",
]

if TYPE_CHECKING:
    from nbdurable.client import Client
    from nbdurable.errors import Abort, ChildFailed, DurableError, RetryAfter, WaitTimeout
    from nbdurable.kernel.calls import step
    from nbdurable.kernel.children import (
        RunHandle,
        child,
        trigger,
        trigger_and_wait,
        trigger_and_wait_async,
        trigger_async,
        trigger_batch,
        trigger_batch_and_wait,
        trigger_batch_and_wait_async,
        trigger_batch_async,
    )
    from nbdurable.kernel.context import current_run, result, skip_rest
    from nbdurable.kernel.hooks import on
    from nbdurable.kernel.ledger import ledger
    from nbdurable.kernel.mapping import Failed, map, map_async
    from nbdurable.kernel.recipes import recipe
    from nbdurable.kernel.travel import load
    from nbdurable.kernel.waits import (
        Decision,
        all_of,
        all_of_async,
        approval,
        approve,
        approve_async,
        event,
        first_of,
        first_of_async,
        sleep,
        sleep_async,
        sleep_until,
        sleep_until_async,
        timer,
        wait_for,
        wait_for_async,
    )


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'nbdurable' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
