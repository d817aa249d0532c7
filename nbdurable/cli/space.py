"""Space for people: what takes it, and a clean-up that is shown before it is carried out."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from nbdurable.cli.project import hint, near
from nbdurable.cli.screen import STYLES, Part, Screen, clip
from nbdurable.client import Client
from nbdurable.contract import CLEAN, SPACE, Clean, Cleaned, Fate, ReadSpace, RunSpace
from nbdurable.policies import size

_PATIENCE_S = 600.0  # a clean-up looks at everything there is
_SHOWN = 20


def print_space(client: Client, run: str | None, screen: Screen) -> None:
    """Print what the project takes and which runs take most, or the steps and variables of one run."""
    found = client.call(SPACE, ReadSpace(run_id=run), timeout_s=_PATIENCE_S)
    if screen.json_mode:
        screen.data(found)
        return
    if run is not None:
        for one in found.runs:
            _print_run(one, screen)
        if not found.runs:
            screen.say("this run holds no checkpoints")
        return
    screen.say(
        f"{size(found.blob_bytes)} in {found.blobs} blobs, {size(found.store_bytes)} in the store;"
        f" {size(found.unused_bytes)} of the blobs are used by nothing"
    )
    if found.runs:
        rows: list[tuple[Part, ...]] = [
            (one.id[-8:], (one.status.value, STYLES[one.status]), near(Path(one.notebook)), *_amounts(one))
            for one in found.runs[:_SHOWN]
        ]
        screen.table(("RUN", "STATUS", "NOTEBOOK", "SIZE", "ITS OWN", "SHARED", "IN THE STORE"), rows)
    if len(found.runs) > _SHOWN:
        screen.say(f"and {len(found.runs) - _SHOWN} more; --json has them all")
    if found.unused_bytes:
        screen.say("  → ", (hint(client.home)("gc --dry-run"), "bold"))


def _print_run(run: RunSpace, screen: Screen) -> None:
    screen.say(
        (Path(run.notebook).name, "bold"),
        f"  run {run.id[-8:]}  {size(run.bytes)}, {size(run.unique)} of it used by no other run",
    )
    rows = []
    for step in run.steps:
        rows.append((step.name, "", *_amounts(step)))
        rows += [("", variable.name, *_amounts(variable)) for variable in step.variables]
    screen.table(("STEP", "VARIABLE", "SIZE", "ITS OWN", "SHARED", "IN THE STORE"), rows)


def _amounts(of: object) -> tuple[str, ...]:
    return tuple(size(getattr(of, name)) for name in ("bytes", "unique", "shared", "inline"))


def clean_up(client: Client, rules: Clean, screen: Screen, *, dry_run: bool, ask: bool) -> None:
    """Show what a clean-up removes and keeps, with reasons; then, unless it is a dry run, carry that out.

    On a terminal a person is asked in between.
    """
    plan = client.call(CLEAN, rules, timeout_s=_PATIENCE_S)
    if not screen.json_mode:
        _print_plan(plan, screen)
    if not dry_run and any(fate.action == "remove" for fate in plan.fates):
        if ask and sys.stdin.isatty() and not typer.confirm("Remove them?", default=False, err=True):
            screen.say("nothing was removed")
            return
        shown = tuple(fate.id for fate in plan.fates if fate.kind == "run" and fate.action == "remove")
        doing = rules.model_copy(update={"dry_run": False, "only": shown})
        plan = client.call(CLEAN, doing, timeout_s=_PATIENCE_S)
        screen.say(f"removed {size(plan.bytes)} in {plan.files} blobs")
    if screen.json_mode:
        screen.data(plan)


def _print_plan(plan: Cleaned, screen: Screen) -> None:
    if not any(fate.action == "remove" for fate in plan.fates):
        screen.say("nothing to remove")
    for action, style in (("remove", "red"), ("keep", "green")):
        found = [fate for fate in plan.fates if fate.action == action]
        if found:
            rows: list[tuple[Part, ...]] = [
                ((action, style), _what(fate), size(fate.bytes), clip(fate.reason, 160))
                for fate in found[:_SHOWN]
            ]
            screen.table(("", "WHAT", "SIZE", "WHY"), rows)
            if len(found) > _SHOWN:
                screen.say(f"and {len(found) - _SHOWN} more; --json has them all")
    screen.say(f"{size(plan.bytes)} in {plan.files} blobs would go; the history of every run stays")


def _what(fate: Fate) -> str:
    if fate.kind == "blobs":
        return f"{fate.count} blobs"
    run = f"run {fate.id[-8:]} of {Path(fate.notebook).name}"
    return run if fate.kind == "run" else f"{fate.count} earlier checkpoints of {run}"
