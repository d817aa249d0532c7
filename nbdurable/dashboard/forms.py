"""A wait's JSON schema as fields of a page, and what a person entered back as JSON. Pure.

Owns which schemas are simple enough for a field of their own (text, number, yes or no, choice); all others are entered
as JSON. Whether an answer fits is the coordinator's to say: here is only what can't be read at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nbdurable.errors import UsageError
from nbdurable.models import Wait

MAX_FIELDS = 100
MAX_CHARS = 1_000_000


@dataclass(frozen=True)
class Field:
    """One thing to be entered. `name` is "" where the answer is no object, but this one value.

    `value` is what stands in it at first, as text; of a choice, texts are JSON.
    """

    name: str
    label: str
    kind: Literal["text", "long text", "number", "integer", "yes or no", "choice", "json"]
    value: str
    is_required: bool
    about: str = ""
    choices: tuple[tuple[str, str], ...] = ()  # JSON and what people read
    least: Any = None
    most: Any = None


def fields(wait: Wait) -> tuple[Field, ...]:
    """Return what a person enters to approve a wait; nothing where it has no form."""
    schema = wait.form
    if schema is None:
        return ()
    properties = schema.get("properties")
    simple = isinstance(properties, dict) and len(properties) <= MAX_FIELDS and "" not in properties
    if schema.get("type") != "object" or not isinstance(properties, dict) or not simple:
        return (_field("", schema, schema, wait.value, required=True),)
    proposed = wait.value if isinstance(wait.value, dict) else {}
    required = schema.get("required", ())
    return tuple(
        _field(name, part, schema, proposed.get(name), required=name in required)
        for name, part in properties.items()
    )


def _field(name: str, part: Any, root: dict[str, Any], proposed: Any, *, required: bool) -> Field:
    found, optional = _resolved(part, root)
    value = found.get("default") if proposed is None else proposed
    label = str(found.get("title") or name.replace("_", " ").capitalize() or "Answer")
    common: dict[str, Any] = {
        "name": name,
        "label": label,
        "is_required": required and not optional,
        "about": str(found.get("description", "")),
    }
    choices = found.get("enum")
    if isinstance(choices, list) and len(choices) <= MAX_FIELDS:
        texts = tuple((json.dumps(one), one if isinstance(one, str) else json.dumps(one)) for one in choices)
        return Field(kind="choice", value=_json(value), choices=texts, **common)
    match found.get("type"):
        case "string" if value is None or isinstance(value, str):
            long = isinstance(value, str) and ("\n" in value or len(value) > 80)
            return Field(kind="long text" if long else "text", value=value or "", **common)
        case "integer" | "number" as kind if value is None or isinstance(value, int | float):
            least, most = found.get("minimum"), found.get("maximum")
            return Field(kind=kind, value=_json(value), least=least, most=most, **common)
        case "boolean":
            return Field(kind="yes or no", value="true" if value is True else "", **common)
    return Field(kind="json", value="" if value is None else json.dumps(value, indent=2), **common)


def _json(value: Any) -> str:
    return "" if value is None else json.dumps(value)


def _resolved(part: Any, root: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the schema of a property, and whether null is allowed: a reference is followed, `X | None` is X."""
    found = part if isinstance(part, dict) else {}
    options = found.get("anyOf")
    if isinstance(options, list):
        others = [one for one in options if one != {"type": "null"}]
        if len(options) == 2 and len(others) == 1:
            return _resolved({**{k: v for k, v in found.items() if k != "anyOf"}, **others[0]}, root)[0], True
    if isinstance(reference := found.get("$ref"), str):
        there = root.get("$defs", {}).get(reference.removeprefix("#/$defs/"))
        if isinstance(there, dict) and "$ref" not in there:
            return {**there, **{k: v for k, v in found.items() if k != "$ref"}}, False
    return found, False


def entered(wait: Wait, entries: Mapping[str, Any]) -> Any:
    """Return what a person entered as JSON; raises UsageError, naming the field, for what can't be read."""
    found = {field.name: _read(field, entries.get(field.name)) for field in fields(wait)}
    if "" in found:
        return found[""][0] if found[""] else None
    given = {name: value[0] for name, value in found.items() if value}
    kept = wait.value if isinstance(wait.value, dict) else {}
    return {**{name: value for name, value in kept.items() if name not in found}, **given}


def _read(field: Field, entry: Any) -> tuple[Any] | None:
    """Return a field's value in a tuple, None for one that is left empty."""
    if field.kind == "yes or no":
        return (entry is True,)
    text = entry if isinstance(entry, str) else ""
    if len(text) > MAX_CHARS:
        raise UsageError(f"{field.label}: that is too long", todo="nothing was answered")
    if field.kind in ("text", "long text"):
        return (text,) if text or field.is_required else None
    if not text.strip():
        return None
    try:
        return (json.loads(text),)
    except ValueError:
        what = "JSON" if field.kind == "json" else "a number"
        raise UsageError(
            f"{field.label}: {text[:100]!r} is not {what}", todo="nothing was answered"
        ) from None
