"""Whether a step is restored or runs, and why: the rules of `design.md` §5, pure.

Owns `Origins` (where each variable came from) and `decide`. Knows nothing of kernels, stores or files; what it
compares comes from `analysis.py` and `fingerprint.py`. Used by the live kernel and by the printed plan alike, so
that a plan says what will happen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from blake3 import blake3

from nbdurable.checkpoint.analysis import CellNames
from nbdurable.checkpoint.manifest import CodeFacts, InputFact, Manifest
from nbdurable.checkpoint.packages import installed
from nbdurable.checkpoint.reasons import Cause, code_cause, input_cause, versions_differ

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
    cell: str = ""  # where the source of a plain cell's variable stands: "cell 2"
    line: int = 0  # of that cell


UNKNOWN = Origin("", "something outside the notebook's cells")


class Origins:
    """The origin of each variable, kept up to date cell by cell.

    A plain cell's variables come from its code and from the origins of what it read; a step's from the value that
    it left. So a change is seen through any number of plain cells, while a value that merely comes out differently
    (`datetime.now()`) is not a change of origin but drift. A plain cell that may have changed a variable's object
    without binding it (`rows.append(2)`) is behind it as well, once, however often it is executed.
    """

    def __init__(self) -> None:
        self._known: dict[str, Origin] = {}
        self._touched: dict[
            str, tuple[Origin, set[str]]
        ] = {}  # where it was bound, and the cells that touched it since

    def __getitem__(self, name: str) -> Origin:
        return self._known.get(name, UNKNOWN)

    def plain_cell(self, names: CellNames, code_digest: str, label: str, cell: str = "") -> None:
        """Note what a plain cell wrote; `cell` names its place for people."""
        behind = digest(code_digest, *(f"{name}={self[name].digest}" for name in sorted(names.loads)))
        touched = {
            name: self._touch(name, names, code_digest) for name in names.touches if name in self._known
        }
        for name, found in touched.items():
            self._known[name] = replace(found, label=label, cell=cell, line=names.lines.get(name, 0))
        for name in names.stores:
            self._bind(name, Origin(digest(behind, name), label, cell=cell, line=names.lines.get(name, 0)))
        for name in names.deletes:
            self._known.pop(name, None)

    def _touch(self, name: str, names: CellNames, code_digest: str) -> Origin:
        others = (f"{other}={self[other].digest}" for other in sorted(names.loads - {name}))
        bound, cells = self._touched.setdefault(name, (self._known[name], set()))
        cells.add(digest(code_digest, *others))
        return replace(bound, digest=digest(bound.digest, *sorted(cells)))

    def _bind(self, name: str, origin: Origin) -> None:
        self._known[name] = origin
        self._touched.pop(name, None)

    def step(self, step: str, fingerprints: Mapping[str, str], deleted: Iterable[str]) -> None:
        """Note what a step wrote."""
        for name, value in fingerprints.items():
            self._bind(name, Origin(digest("step", step, name, value), f"step {step}", step))
        for name in deleted:
            self._known.pop(name, None)

    def by_hand(self, values: Mapping[str, Any]) -> None:
        """Note that a person gave variables these JSON values."""
        for name, value in values.items():
            text = json.dumps(value, sort_keys=True)
            self._bind(name, Origin(digest("set by hand", name, text), "set by hand"))


@dataclass(frozen=True)
class Verdict:
    """What happens to a step, and why, in one plain sentence."""

    action: Action
    reason: str
    drifted: tuple[str, ...] = ()
    cause: Cause | None = None  # of an execution, where it is a change


def decide(
    recorded: Manifest | None,
    code: CodeFacts,
    inputs: Callable[[], Mapping[str, InputFact]],
    *,
    step: str,
    visited: bool,
    on_drift: OnDrift | None = None,
    forced: str | None = None,
    installed: Callable[[str], str | None] = installed,
) -> Verdict:
    """Decide about a step.

    `recorded`: its checkpoint, or None. `inputs`: gives the facts of its inputs now; asked for only if the code is
    the same. `visited`: whether this kernel ran or restored it before. `on_drift` overrides the rule for inputs of
    the same origin but another value: keep (restore), rerun, or error; None: restore on the first visit, run
    afterwards. `forced`: why it must run whatever is known, or None. `installed`: the version of a distribution here;
    a checkpoint made with another one is restored, and the reason says so.
    """
    if forced is not None:
        return Verdict("execute", forced)
    if recorded is None:
        return Verdict("execute", "it has no checkpoint yet")
    if recorded.by_hand:
        return Verdict("restore", recorded.by_hand)
    if (cause := code_cause(recorded.code, code)) is not None:
        return Verdict("execute", cause.sentence, cause=cause)
    if recorded.code.python != code.python and any(group.code for group in recorded.groups + recorded.later):
        said = f"it left functions or classes of Python {recorded.code.python}, which Python {code.python} can't load"
        return Verdict("execute", said, cause=Cause(said, "python"))
    now = inputs()
    drifted: list[str] = []
    for name in sorted(recorded.inputs.keys() | now.keys()):
        before, after = recorded.inputs.get(name), now.get(name)
        if before is None:
            cause = Cause(f"it now reads `{name}`", "input", name, after.cell if after else "")
            return Verdict("execute", cause.sentence, cause=cause)
        if after is None:
            cause = Cause(f"its input `{name}` is gone", "input", name)
            return Verdict("execute", cause.sentence, cause=cause)
        if before.value == after.value:
            continue
        if before.origin != after.origin:
            cause = input_cause(name, before, after)
            return Verdict("execute", cause.sentence, cause=cause)
        drifted.append(name)
    going_on: Action = "restore" if recorded.resume_at is None else "continue"
    made_with = versions_differ(recorded.code, code.python, installed)
    made_with = f"; {made_with}" if made_with else ""
    if not drifted:
        reason = "same code and inputs"
        if going_on == "continue":
            reason += "; goes on behind what it waited for"
        return Verdict(going_on, reason + made_with)
    names = ", ".join(f"`{name}`" for name in drifted)
    plural = "s" if len(drifted) > 1 else ""
    if on_drift == "error":
        return Verdict(
            "refuse", f"the value of input{plural} {names} differs (--on-drift error)", tuple(drifted)
        )
    if on_drift == "rerun" or (on_drift is None and visited):
        said = f"the value of its input{plural} {names} changed"
        return Verdict("execute", said, tuple(drifted), Cause(said, "input", drifted[0]))
    return Verdict(
        going_on,
        f"same code; the value of input{plural} {names} differs now, the kept result was not made from it "
        f"(`%durable rerun {step}` runs it again){made_with}",
        tuple(drifted),
    )
