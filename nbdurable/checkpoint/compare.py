"""Two runs, or two steps, side by side: code, parameters, variables, outputs.

Owns what is compared with what. Fingerprints in the manifests say which variables differ; only those are loaded, from
manifests whose signature was verified, and compared by `diff.py`. Knows nothing of clients and kernels.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from nbdurable.checkpoint import diff
from nbdurable.checkpoint.blobs import BlobStore, digest_of
from nbdurable.checkpoint.manifest import Manifest, read_blob
from nbdurable.checkpoint.state import State, value_of
from nbdurable.errors import CheckpointError
from nbdurable.models import JSON, Run, Shape, Variable

VALUE_BYTES = 1 << 30  # larger values are not loaded to be compared
_LINES = 200  # of code or output that are shown
_CODE = {"function", "type", "module", "ABCMeta", "EnumType"}  # their text stands in the cells

Change = Literal["added", "removed", "changed"]


class StepDifference(Shape):
    name: str
    change: Change
    code: tuple[str, ...] = ()  # as `diff -u` writes it
    helpers: tuple[str, ...] = ()  # functions, classes and project modules that it uses, and that changed
    outputs: tuple[str, ...] = ()


class VariableDifference(Shape):
    name: str
    change: Change
    before: Variable | None = None
    after: Variable | None = None
    difference: dict[str, JSON] | None = None  # as `diff.compare` returns it
    why: str = ""  # why the values themselves were not compared


class RunDifference(Shape):
    """What differs; empty fields where nothing does. A value that is only on one side is missing from the other."""

    before: str
    after: str
    parameters: dict[str, dict[Literal["before", "after"], JSON]] = Field(default_factory=dict)
    result: dict[Literal["before", "after"], JSON] = Field(default_factory=dict)
    steps: tuple[StepDifference, ...] = ()
    variables: tuple[VariableDifference, ...] = ()


@dataclass(frozen=True)
class Side:
    """A run, or a step of it, with the variables as they were then."""

    run: Run
    state: State
    step: str | None = None

    @property
    def label(self) -> str:
        return f"{self.run.short}:{self.step}" if self.step else self.run.short

    @property
    def steps(self) -> dict[str, Manifest]:
        """Return the steps to compare, by name; the one step where one was named."""
        found = {manifest.step: manifest for manifest in self.state.manifests}
        return found if self.step is None else {self.step: found[self.step]}


def compare(
    before: Side, after: Side, namespace: dict[str, Any], blobs: BlobStore, unread: str = ""
) -> RunDifference:
    """Return what differs between two sides; `namespace`: where classes that values need are looked up.

    `unread`: why values may not be loaded; empty: they may.
    """
    result = (
        {}
        if before.run.result == after.run.result
        else {"before": before.run.result, "after": after.run.result}
    )
    return RunDifference(
        before=before.label,
        after=after.label,
        parameters=_parameters(before.run.parameters, after.run.parameters),
        result=result if before.step is None and after.step is None else {},
        steps=tuple(_steps(before, after, blobs)),
        variables=tuple(_variables(before.state, after.state, namespace, blobs, unread)),
    )


def _parameters(before: dict[str, JSON], after: dict[str, JSON]) -> Any:
    sides = (("before", before), ("after", after))
    return {
        name: {word: side[name] for word, side in sides if name in side}
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or before[name] != after[name]
    }


def _steps(before: Side, after: Side, blobs: BlobStore) -> Iterable[StepDifference]:
    old, new = before.steps, after.steps
    if before.step and after.step:  # two steps are compared, whatever their names
        pairs = [(before.step, old[before.step], new[after.step])]
    else:
        pairs = [(name, old.get(name), new.get(name)) for name in {**old, **new}]  # type: ignore[misc]
    for name, was, now in pairs:
        if was is None or now is None:
            yield StepDifference(name=name, change="added" if was is None else "removed")
            continue
        code = _text_diff(was.code.source, now.code.source)
        helpers = tuple(_changed_helpers(was, now))
        outputs = _text_diff(_text(was, blobs), _text(now, blobs))
        if code or helpers or outputs:
            yield StepDifference(name=name, change="changed", code=code, helpers=helpers, outputs=outputs)


def _changed_helpers(before: Manifest, after: Manifest) -> Iterable[str]:
    old, new = before.code.helpers, after.code.helpers
    for name in sorted(old.keys() & new.keys()):
        if (old[name].ast, old[name].state) != (new[name].ast, new[name].state):
            yield name
    for name in sorted(before.code.modules.keys() & after.code.modules.keys()):
        if before.code.modules[name].digest != after.code.modules[name].digest:
            yield f"module {name}"


def _text_diff(before: str, after: str) -> tuple[str, ...]:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2)
    return tuple(list(lines)[2 : _LINES + 2])


def _text(manifest: Manifest, blobs: BlobStore) -> str:
    """Return what a step displayed as text; pictures and the like as their digest."""
    if manifest.outputs is None:
        return ""
    parts = []
    for output in json.loads(bytes(read_blob(manifest.outputs, blobs))):
        if output["output_type"] == "stream":
            parts.append(output["text"])
            continue
        for mime, data in output.get("data", {}).items():
            if mime == "text/plain":
                parts.append(data if isinstance(data, str) else "".join(data))
            elif mime.startswith(("image/", "video/", "audio/")):
                parts.append(f"{mime} {digest_of(json.dumps(data).encode())[:12]}")
    return "\n".join(parts)


def _variables(
    before: State, after: State, namespace: dict[str, Any], blobs: BlobStore, unread: str
) -> Iterable[VariableDifference]:
    for name in {**before.variables, **after.variables}:
        old, new = before.variables.get(name), after.variables.get(name)
        if old is None or new is None:
            yield VariableDifference(
                name=name,
                change="added" if old is None else "removed",
                before=old and old.variable,
                after=new and new.variable,
            )
            continue
        states = {old.variable.state, new.variable.state}
        if states == {"unsaved"} or (old.fingerprint == new.fingerprint and old.fingerprint):
            continue
        found: dict[str, JSON] | None = None
        why = ""
        if "unsaved" in states:
            why = old.variable.reason or new.variable.reason
        elif old.is_made or new.is_made:
            why = "a recipe makes it, or a part of it"
        elif {old.variable.type, new.variable.type} & _CODE:
            why = "its code stands in the cell"
        elif max(old.variable.bytes, new.variable.bytes) > VALUE_BYTES:
            why = "too large to be compared value by value"
        elif unread:
            why = unread
        else:
            try:
                found = diff.compare(
                    value_of(before, name, namespace, blobs), value_of(after, name, namespace, blobs)
                )
            except CheckpointError as error:
                why = error.message
            except Exception as error:  # of the values' own code
                why = f"comparing them failed: {type(error).__name__}: {error}"
        yield VariableDifference(
            name=name, change="changed", before=old.variable, after=new.variable, difference=found, why=why
        )


def lines(found: RunDifference) -> list[str]:
    """Return a difference for people."""
    told = [f"{found.before} → {found.after}"]
    told += [f" parameter {name}: {_sides(sides)}" for name, sides in found.parameters.items()]
    for step in found.steps:
        told.append(f" step {step.name} {_WORDS[step.change]}")
        told += [f"     {line}" for line in step.code]
        if step.helpers:
            told.append(f"   uses what changed: {', '.join(step.helpers)}")
        if step.outputs:
            told += ["   displayed:", *(f"     {line}" for line in step.outputs)]
    for one in found.variables:
        kinds = [_kind(side) for side in (one.before, one.after) if side is not None]
        told.append(f" variable {one.name} {_WORDS[one.change]}: {' → '.join(dict.fromkeys(kinds))}")
        details = diff.sentences(one.difference) if one.difference is not None else []
        if one.change == "changed":
            why = one.why or "it differs in what can't be shown"
            told += [f"     {line}" for line in details or [f"({why})"]]
    if found.result:
        told.append(f" result: {_sides(found.result)}")
    return told if len(told) > 1 else [f"{told[0]}  nothing differs"]


_WORDS: dict[str, str] = {"added": "is new", "removed": "is gone", "changed": "changed"}


def _sides(sides: Any) -> str:
    words = [
        json.dumps(sides[side], ensure_ascii=False) if side in sides else "nothing"
        for side in ("before", "after")
    ]
    return " → ".join(words)


def _kind(variable: Variable) -> str:
    return " ".join(filter(None, (variable.type, variable.shape)))
