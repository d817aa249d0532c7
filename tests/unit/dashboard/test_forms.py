"""Forms: which schemas become fields, and what was entered back as JSON; what can't be read is named (guarantee 11)."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
import pytest

from nbdurable.dashboard.forms import entered, fields
from nbdurable.errors import UsageError
from nbdurable.models import Wait, WaitKind


class Address(pydantic.BaseModel):
    city: str


class Edit(pydantic.BaseModel):
    title: str = pydantic.Field(description="shown first")
    words: int = pydantic.Field(10, ge=1, le=300)
    price: float | None = None
    urgent: bool = False
    tone: Literal["plain", "warm"] = "plain"
    level: Literal[1, 2] | None = None
    to: list[str] = []
    address: Address | None = None


def a_wait(form: dict[str, Any] | None, value: Any = None) -> Wait:
    return Wait(
        id="7K2MXD",
        run_id="r",
        key="k",
        kind=WaitKind.APPROVAL,
        title="Edit?",
        form=form,
        value=value,
        created_at=0,
    )


def test_a_models_fields_are_what_people_enter() -> None:
    found = fields(a_wait(Edit.model_json_schema(), {"title": "Draft", "words": 5}))
    assert [(f.name, f.kind, f.value, f.is_required) for f in found] == [
        ("title", "text", "Draft", True),
        ("words", "integer", "5", False),
        ("price", "number", "", False),
        ("urgent", "yes or no", "", False),
        ("tone", "choice", '"plain"', False),
        ("level", "choice", "", False),
        ("to", "json", "[]", False),
        ("address", "json", "", False),
    ]
    assert (found[0].about, found[1].least, found[1].most) == ("shown first", 1, 300)
    assert found[5].choices == (("1", "1"), ("2", "2"))
    assert fields(a_wait(None)) == ()


def test_what_was_entered_comes_back_with_its_types() -> None:
    wait = a_wait(Edit.model_json_schema(), {"title": "Draft", "note": "not in the form"})
    found = entered(
        wait,
        {
            "title": "12",
            "words": "7",
            "price": "1.5",
            "urgent": True,
            "tone": '"warm"',
            "level": "2",
            "to": '["a"]',
            "address": "",
        },
    )
    assert found == {
        "note": "not in the form",
        "title": "12",
        "words": 7,
        "price": 1.5,
        "urgent": True,
        "tone": "warm",
        "level": 2,
        "to": ["a"],
    }
    assert Edit.model_validate(found).level == 2
    assert entered(a_wait({"type": "integer"}), {"": "7"}) == 7
    assert entered(a_wait({"type": "string"}), {"": "7"}) == "7"
    assert entered(a_wait({"type": "string"}), {}) == ""


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("words", "many", "Words: 'many' is not a number"), ("to", "[a", "To: '\\[a' is not JSON")],
)
def test_what_cannot_be_read_is_named(name: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        entered(a_wait(Edit.model_json_schema()), {"title": "x", name: text})


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"type": "object"},
        {"type": ["string", "null"]},
        {"type": "object", "properties": {"a": True, "b": {"$ref": "#/nowhere"}, "c": {"enum": []}}},
        {"type": "object", "properties": {"a": {"anyOf": []}, "": {"type": "string"}}},
        {"type": "object", "properties": {"n": {"type": "integer", "default": "text"}}},
    ],
)
def test_any_schema_can_be_shown_and_answered(form: dict[str, Any]) -> None:
    """A form that is no simple one is entered as JSON; none brings the page down."""
    wait = a_wait(form)
    fields(wait)
    entered(wait, {field.name: field.value for field in fields(wait)})
