"""What would happen to each step of a notebook or a run, and why, before anything happens."""

from __future__ import annotations

from nbdurable.cli.screen import Screen
from nbdurable.errors import UsageError


def print_plan(target: str, screen: Screen) -> None:
    """Print for each step whether it would be restored or run, with the reason."""
    raise UsageError("`nbdurable plan` is not there yet", todo="`%durable plan` in the notebook says it")
