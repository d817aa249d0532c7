"""Which runs keep their checkpoints, and which checkpoints of a kept run are still within reach, pure.

Owns the rules of `nbdurable gc`, each verdict with its reason; knows nothing of files, blobs and the store.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdurable.contract import Clean
from nbdurable.models import Run
from nbdurable.policies import span


@dataclass(frozen=True)
class Judgement:
    """Whether a run keeps its checkpoints, and why."""

    run: Run
    keep: bool
    reason: str


def judge(runs: Iterable[Run], rules: Clean, now: float) -> list[Judgement]:
    """Return what the rules say of each run, newest first.

    A run is kept while it is open, and by any rule that it meets; all are kept where there is no rule.
    """
    seen: Counter[str] = Counter()
    found = []
    for run in sorted(runs, key=lambda run: run.id, reverse=True):
        seen[run.notebook] += 1
        found.append(_judge(run, rules, now, seen[run.notebook]))
    return found


def _judge(run: Run, rules: Clean, now: float, place: int) -> Judgement:
    """Judge one run, the `place`-th newest of its notebook."""
    if not run.status.is_final:
        how = ", until somebody cancels it" if run.status == "paused" else ""
        return Judgement(run, True, f"it is {run.status}, and may go on{how}")
    age_s = max(0.0, now - (run.ended_at or run.updated_at))
    misses = [f"it {_ended(run)} {span(age_s)} ago"]
    if rules.keep_last is not None:
        name = Path(run.notebook).name
        if place <= rules.keep_last:
            return Judgement(run, True, f"it is among the newest {rules.keep_last} of {name}")
        misses.append(f"not among the newest {rules.keep_last} of {name}")
    if rules.keep_for_s is not None:
        if age_s <= rules.keep_for_s:
            return Judgement(
                run, True, f"it {_ended(run)} {span(age_s)} ago, within {span(rules.keep_for_s)}"
            )
        misses.append(f"longer than {span(rules.keep_for_s)}")
    if rules.keep_tagged:
        if run.tags:
            return Judgement(run, True, f"it is tagged {', '.join(run.tags)}")
        misses.append("without a tag")
    if len(misses) == 1:
        return Judgement(run, True, "no rule says that an ended run may go")
    if rules.only is not None and run.id not in rules.only:
        return Judgement(run, True, "it was not among those that were shown")
    return Judgement(run, False, ", ".join(misses))


def _ended(run: Run) -> str:
    return "was cancelled" if run.status == "cancelled" else str(run.status)


def out_of_reach(committed: Sequence[tuple[int, str]]) -> set[int]:
    """Return the checkpoints of a run, (number, step) in order, that no state of the run is made of.

    The state as of a step's newest checkpoint is made of the newest one of each step until then. An earlier
    checkpoint is within reach as long as another step's newest one stands between it and its successor.
    """
    newest = {step: seq for seq, step in committed}
    ends = sorted(newest.values())
    gone = set()
    following: dict[str, int] = {}
    for seq, step in reversed(committed):
        after = following.get(step)
        following[step] = seq
        if after is not None:
            place = bisect_left(ends, seq)
            if place == len(ends) or ends[place] >= after:
                gone.add(seq)
    return gone
