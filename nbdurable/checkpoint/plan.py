"""Whether a step is restored or runs, and why: the rules of `design.md` §5, pure.

Owns `Origins` (where each variable came from) and `decide`. Knows nothing of kernels, stores or files; what it
compares comes from `analysis.py` and `fingerprint.py`. Used by the live kernel and by the printed plan alike, so
that a plan says what will happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from blake3 import blake3

from nbdurable.checkpoint.analysis import CellNames, explain_helper_change
from nbdurable.checkpoint.manifest import CodeFacts, InputFact, Manifest
from nbdurable.checkpoint.watched import ENVIRONMENT, Watched

OnDrift = Literal["keep", "rerun", "error"]
Action = Literal["execute", "restore", "continue", "refuse"]


def digest(*parts: str) -> str:
    """Return the digest of some texts; no two different sequences share one."""
    hasher = blake3()
    for part in parts:
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest(16)


@dataclass(frozen=True)
class Origin:
    """Where a variable came from: a digest that changes when anything behind it changes, and words for people."""

    digest: str
    label: str
    step: str | None = None  # the step that wrote it; None: a plain cell, or the parameters


UNKNOWN = Origin("", "something outside the notebook's cells")


class Origins:
    """The origin of each variable, kept up to date cell by cell.

    A plain cell's variables come from its code and from the origins of what it read; a step's from the value that
    it left. So a change is seen through any number of plain cells, while a value that merely comes out differently
    (`datetime.now()`) is not a change of origin but drift.
    """

    def __init__(self) -> None:
        self._known: dict[str, Origin] = {}

    def __getitem__(self, name: str) -> Origin:
        return self._known.get(name, UNKNOWN)

    def plain_cell(self, names: CellNames, code_digest: str, label: str) -> None:
        """Note what a plain cell wrote."""
        behind = digest(code_digest, *(f"{name}={self[name].digest}" for name in sorted(names.loads)))
        for name in names.stores:
            self._known[name] = Origin(digest(behind, name), label)
        for name in names.deletes:
            self._known.pop(name, None)

    def step(self, step: str, fingerprints: Mapping[str, str], deleted: Iterable[str]) -> None:
        """Note what a step wrote."""
        for name, value in fingerprints.items():
            self._known[name] = Origin(digest("step", step, name, value), f"step {step}", step)
        for name in deleted:
            self._known.pop(name, None)


@dataclass(frozen=True)
class Verdict:
    """What happens to a step, and why, in one plain sentence."""

    action: Action
    reason: str
    drifted: tuple[str, ...] = ()


def _code_change(old: CodeFacts, new: CodeFacts) -> str | None:
    # The digest is of the syntax tree, whose shape may change between Python versions; equal text is equal code.
    if old.digest != new.digest and (old.python == new.python or old.source != new.source):
        return "its code changed"
    for name in sorted(old.helpers.keys() | new.helpers.keys()):
        before, after = old.helpers.get(name), new.helpers.get(name)
        if before is None:
            return f"it now uses helper `{name}`"
        if after is None:
            return f"helper `{name}` is gone"
        if before.ast != after.ast or (before.state != after.state and after.state and before.state):
            return explain_helper_change(before, after, name)
    for module in sorted(old.modules.keys() | new.modules.keys()):
        if old.modules.get(module) != new.modules.get(module):
            return f"module `{module}` changed"
    return _watched_change(old.watched, new.watched)


def _watched_change(old: Watched, new: Watched) -> str | None:
    for declared, now in sorted(new.items()):
        if (was := old.get(declared)) is None:
            return f"it now watches {declared}"
        names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        if names:
            is_variable = declared.startswith(ENVIRONMENT)
            words = ("was set", "was unset") if is_variable else ("was added", "was removed")
            word = words[0] if names[0] not in was else words[1] if names[0] not in now else "changed"
            what = names[0].removeprefix(ENVIRONMENT) if is_variable else names[0]
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            return f"watched {'environment variable' if is_variable else 'file'} {what} {word}{more}"
    return None


def _origin_change(name: str, old: InputFact, new: InputFact) -> str:
    if new.label == old.label:
        return f"its input `{name}` is another one ({new.label})"
    return f"its input `{name}` now comes from {new.label}"


def decide(
    recorded: Manifest | None,
    code: CodeFacts,
    inputs: Callable[[], Mapping[str, InputFact]],
    *,
    step: str,
    visited: bool,
    on_drift: OnDrift | None = None,
    forced: str | None = None,
) -> Verdict:
    """Decide about a step.

    `recorded`: its checkpoint, or None. `inputs`: gives the facts of its inputs now; asked for only if the code is
    the same. `visited`: whether this kernel ran or restored it before. `on_drift` overrides the rule for inputs of
    the same origin but another value: keep (restore), rerun, or error; None: restore on the first visit, run
    afterwards. `forced`: why it must run whatever is known, or None.
    """
    if forced is not None:
        return Verdict("execute", forced)
    if recorded is None:
        return Verdict("execute", "it has no checkpoint yet")
    if change := _code_change(recorded.code, code):
        return Verdict("execute", change)
    now = inputs()
    drifted: list[str] = []
    for name in sorted(recorded.inputs.keys() | now.keys()):
        before, after = recorded.inputs.get(name), now.get(name)
        if before is None:
            return Verdict("execute", f"it now reads `{name}`")
        if after is None:
            return Verdict("execute", f"its input `{name}` is gone")
        if before.value == after.value:
            continue
        if before.origin != after.origin:
            return Verdict("execute", _origin_change(name, before, after))
        drifted.append(name)
    going_on: Action = "restore" if recorded.resume_at is None else "continue"
    if not drifted:
        reason = "same code and inputs"
        if going_on == "continue":
            reason += "; goes on behind what it waited for"
        return Verdict(going_on, reason)
    names = ", ".join(f"`{name}`" for name in drifted)
    plural = "s" if len(drifted) > 1 else ""
    if on_drift == "error":
        return Verdict(
            "refuse", f"the value of input{plural} {names} differs (--on-drift error)", tuple(drifted)
        )
    if on_drift == "rerun" or (on_drift is None and visited):
        return Verdict("execute", f"the value of its input{plural} {names} changed", tuple(drifted))
    return Verdict(
        going_on,
        f"same code; the value of input{plural} {names} differs now, the kept result was not made from it "
        f"(`%durable rerun {step}` runs it again)",
        tuple(drifted),
    )
