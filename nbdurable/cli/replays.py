"""Many runs at once: replays by filter, and one step sampled several times, side by side.

Owns what a person sees of them; how each is made is `past.py`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from nbdurable.cli.follow import states, took
from nbdurable.cli.past import Change, matching, replay
from nbdurable.cli.plans import as_json
from nbdurable.cli.screen import STYLES, Part, Screen, clip, clock, plain, warn
from nbdurable.client import Client
from nbdurable.contract import GET_RUN, ByRun
from nbdurable.errors import DurableError
from nbdurable.models import Run, RunDetail, RunStatus, Step

Filter = tuple[RunStatus | None, Path | None, str | None, float | None, int]


def replay_all(
    client: Client,
    screen: Screen,
    typed: Sequence[str] | None,
    wanted: Filter,
    parameters: Mapping[str, Any],
    *,
    dry_run: bool,
    ask: bool,
) -> int:
    """Replay runs, shown first; return how many could not be. On a terminal a person is asked in between."""
    if typed:
        sources = [client.call(GET_RUN, ByRun(run_id=one)) for one in dict.fromkeys(typed)]
    else:
        sources = matching(client, *wanted)
    changes: list[Change] = []
    rows: list[tuple[Part, ...]] = []
    failed = 0
    for source in sources:
        said: Part
        try:
            changes.append(replay(client, source, parameters))
            said = clip(", ".join(f"{n}={v!r}" for n, v in {**source.parameters, **parameters}.items()), 80)
        except DurableError as error:
            if typed:  # nothing happens where one of those that were named can't be replayed
                raise
            failed, said = failed + 1, (f"not replayed: {error.message}", "red")
        name = Path(source.notebook).name
        state = (source.status.value, STYLES[source.status])
        rows.append((source.short, state, name, clock(source.created_at), said))
    if rows:
        screen.table(("RUN", "STATUS", "NOTEBOOK", "CREATED", "PARAMETERS"), rows)
    else:
        screen.say("no run matches")
    for note in dict.fromkeys(note for change in changes for note in change.notes):
        warn(("note: ", "yellow"), note)
    if dry_run or not changes:
        screen.say("nothing was started")
        if screen.json_mode:
            plans = [{"run": one.source.id, "plan": [as_json(step) for step in one.plan]} for one in changes]
            screen.data(plans if dry_run else [])
        return failed
    many = f"{len(changes)} run{'s' if len(changes) > 1 else ''}"
    if ask and sys.stdin.isatty() and not typer.confirm(f"Replay {many}?", default=False, err=True):
        screen.say("nothing was started")
        return failed
    made: list[Run] = []
    for change in changes:
        run = change.carry_out()
        made.append(run)
        screen.say(f"run {run.short} is {run.status}: {run.reason}")
    if screen.json_mode:
        screen.data(made[0] if typed and len(typed) == 1 else made)
    return failed


def compare_samples(
    client: Client, samples: Sequence[Run], step: str, name: str | None, screen: Screen
) -> int:
    """Follow samples of a step to their ends, and print side by side what each left; return the exit status."""
    screen.say(f"{len(samples)} samples of {step}: ", ", ".join(run.short for run in samples))
    ended = [_ended(client, run) for run in samples]
    found = [next((one for one in run.steps if one.name == step), None) for run in ended]
    values = [_value(client, run, step, name) if name else {} for run in ended]
    if screen.json_mode:
        screen.data([_as_json(*one) for one in zip(ended, found, values, strict=True)])
    else:
        _print_samples(ended, found, values, name, screen)
    return 0 if all(run.status is RunStatus.COMPLETED for run in ended) else 1


def _ended(client: Client, run: Run) -> RunDetail:
    *_, (last, _events) = states(client, run.id)
    return last


def _value(client: Client, run: RunDetail, step: str, name: str) -> dict[str, Any]:
    """Return the value of a variable as a sample left it, whole, or why it can't be had."""
    from nbdurable.checkpoint import state as held
    from nbdurable.checkpoint.blobs import LocalBlobs
    from nbdurable.kernel.travel import read_state
    from nbdurable.security import load_key

    if run.status is not RunStatus.COMPLETED:
        return {"error": run.reason}
    try:
        _, state = read_state(client, load_key(client.home), run.id, step)
        value = held.value_of(state, name, {"__name__": "__main__"}, LocalBlobs(client.home.blobs))
    except DurableError as error:
        return {"error": error.message}
    return {"value": value}


def _previews(step: Step | None) -> dict[str, str]:
    return {} if step is None else {one.name: one.preview or one.shape or one.type for one in step.variables}


def _as_json(run: RunDetail, step: Step | None, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": run.id,
        "status": run.status,
        "reason": run.reason,
        "variables": _previews(step),
        **value,
    }


def _print_samples(
    runs: Sequence[RunDetail],
    steps: Sequence[Step | None],
    values: Sequence[dict[str, Any]],
    name: str | None,
    screen: Screen,
) -> None:
    """Print what differs between the samples as a table, and name what is the same in all."""
    previews = [_previews(step) for step in steps]
    names = list(dict.fromkeys(one for found in previews for one in found))
    differing = [one for one in names if len({found.get(one) for found in previews}) > 1]
    rows: list[tuple[Part, ...]] = []
    for run, step, found in zip(runs, steps, previews, strict=True):
        state = (run.status.value, STYLES[run.status])
        shown = [clip(found.get(one, "–"), 60) for one in differing]
        rows.append((run.short, state, took(step) if step else "", *shown))
    screen.table(("RUN", "STATUS", "TOOK", *differing), rows)
    same = [one for one in names if one not in differing]
    if same and len(runs) > 1:
        screen.say("the same in all: ", ", ".join(same))
    for run in runs:
        if run.status is not RunStatus.COMPLETED:
            screen.say(("✗", "red"), f" {run.short}  {clip(run.reason, 300)}")
    if name is not None:
        for run, value in zip(runs, values, strict=True):
            screen.say((f"── {run.short}  {name}", "bold"))
            screen.say(value["error"] if "error" in value else plain(_text(value["value"])))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
