"""What a person or a program may answer with: a pydantic model or a JSON schema, and values as JSON beside it.

Owns `Form`; knows nothing of waits. The coordinator checks an answer against the JSON schema before it takes it; the
model's own validators run here, in the notebook's process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from nbdurable.errors import UsageError

MAX_VALUE_BYTES = 256_000  # of a value shown whole to whoever decides


@dataclass(frozen=True)
class Form:
    """A shape of answers: its JSON schema, and what makes a value of it (None: JSON as it is)."""

    schema: dict[str, Any]
    adapter: TypeAdapter[Any] | None = None

    @classmethod
    def of(cls, given: Any) -> Form | None:
        """Return the form of a pydantic model or another type that pydantic knows, or of a JSON schema (a dict).

        Raises UsageError for anything else.
        """
        if given is None:
            return None
        if isinstance(given, dict):
            return cls(given)
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(given)
            return cls(adapter.json_schema(), adapter)
        except Exception as error:  # whatever pydantic raises for what is no type
            raise UsageError(
                f"{given!r} can't be a form: {str(error).splitlines()[0]}",
                todo="give a pydantic model, a type such as int or Literal['a', 'b'], or a JSON schema",
            ) from None

    def made(self, value: Any) -> Any:
        """Return a JSON value as the form's type has it; raises ValueError with one line that says what is wrong."""
        if self.adapter is None:
            return value
        try:
            return self.adapter.validate_json(json.dumps(value))
        except ValidationError as error:
            said = "; ".join(
                f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()[:3]
            )
            raise ValueError(said) from None


def as_json(value: Any) -> Any:
    """Return a value that is JSON (a model as its fields), and small enough to be edited; else None."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if len(text) <= MAX_VALUE_BYTES and json.loads(text) == value else None
