"""Whether data fit: an event's payload a wait's match, an answer its form. Pure, and data only: nothing is executed.

Knows nothing of waits and runs. Schemas are JSON Schema (draft 2020-12 unless they say otherwise); what they refer to
must stand in them: nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 3  # misfits named in one message
_MISSING = object()


def misfit(value: Any, schema: Mapping[str, Any]) -> str:
    """Say where a value does not fit a JSON schema, or return ""."""
    from jsonschema.exceptions import best_match, relevance
    from referencing.exceptions import Unresolvable

    try:
        errors = sorted(_validator(schema).iter_errors(value), key=relevance, reverse=True)
    except Unresolvable as error:
        return f"the schema refers to what does not stand in it: {error}"
    found = [best_match([error]) for error in errors[:_SHOWN]]
    said = "; ".join(f"{_place(error.absolute_path)}{error.message[:200]}" for error in found)
    return said + (f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else "")


def bad_schema(schema: Mapping[str, Any]) -> str:
    """Say why something is no JSON schema, or return ""."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    try:
        validator_for(schema, default=_draft()).check_schema(schema)
    except SchemaError as error:
        return f"{_place(error.absolute_path)}{error.message[:200]}"
    return ""


def _draft() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator


def _validator(schema: Mapping[str, Any]) -> Any:
    from jsonschema.validators import validator_for
    from referencing import Registry

    return validator_for(schema, default=_draft())(schema, registry=Registry())


def _place(path: Any) -> str:
    return f"{'.'.join(map(str, path))}: " if path else ""


def matches(payload: Any, match: Mapping[str, Any]) -> bool:
    """Tell whether a payload has the values of a match, each at its path.

    A path is a name, or names and list positions with dots between them (`order.items.0.id`). An object as value asks
    for its own fields only; anything else must be equal, and `true` is not 1.
    """
    return all(_has(_at(payload, path), wanted) for path, wanted in match.items())


def _at(value: Any, path: str) -> Any:
    if isinstance(value, Mapping) and path in value:  # a name may have dots itself
        return value[path]
    for name in path.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return _MISSING
    return value


def _has(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(value, Mapping) and matches(value, wanted)
    if isinstance(wanted, list):
        return (
            isinstance(value, list)
            and len(value) == len(wanted)
            and all(_has(one, other) for one, other in zip(value, wanted, strict=True))
        )
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    return bool(value == wanted)
