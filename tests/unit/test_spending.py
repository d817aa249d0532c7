"""What models' answers tell of tokens, prices, sums and budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbdurable import spending
from nbdurable.errors import UsageError
from nbdurable.models import Budget, ModelUse, Price, Usage
from nbdurable.settings import Home, Settings
from nbdurable.spending import Answer


def sse(*parts: Any) -> bytes:
    return b"".join(
        f"data: {part if isinstance(part, str) else json.dumps(part)}\n\n".encode() for part in parts
    )


CHAT = {"model": "m", "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
CACHED = {"model": "m", "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}
RESPONSE = {
    "model": "m",
    "usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 2},
}
CLAUDE = {
    "input_tokens": 2,
    "cache_read_input_tokens": 4,
    "cache_creation_input_tokens": 3,
    "output_tokens": 1,
}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (json.dumps(CHAT).encode(), Answer("m", 9, 2)),
        (json.dumps(CACHED).encode(), Answer("m", 9, None, 4)),
        (json.dumps(RESPONSE).encode(), Answer("m", 9, 2, 4)),
        (json.dumps({"type": "message", "model": "m", "usage": CLAUDE}).encode(), Answer("m", 9, 1, 4)),
        (sse({"model": "m", "usage": None}, CHAT, "[DONE]"), Answer("m", 9, 2, whole=True)),
        (sse({"model": "m"}), Answer("m")),
        (sse({"type": "response.completed", "response": RESPONSE}), Answer("m", 9, 2, 4, whole=True)),
        (
            sse(
                {"type": "message_start", "message": {"model": "m", "usage": CLAUDE}},
                {"type": "message_delta", "usage": {"output_tokens": 7, "input_tokens": None}},
                {"type": "message_stop"},
            ),
            Answer("m", 9, 7, 4, whole=True),
        ),
        (sse({"type": "error", "error": {"type": "overloaded_error"}}), Answer(failed=True)),
        (b'{"error": {"message": "with status 200"}}', Answer(failed=True)),
        (b"\xff\x00 not JSON", Answer()),
        (b'data: {"cut', Answer()),
        (b'{"model": 7, "usage": {"prompt_tokens": "many", "completion_tokens": true}}', Answer()),
        (b"", Answer()),
    ],
)
def test_an_answer_tells_its_tokens_in_each_format(body: bytes, told: Answer) -> None:
    """Guarantee 11: what can't be read tells nothing, and breaks nothing."""
    assert spending.read_answer(body) == told


def test_cost_is_by_the_million_and_sums_say_what_they_lack() -> None:
    price = Price(input=2, output=10, cached_input=1)
    assert spending.cost(Answer("m", 1_000_000, 500_000, 250_000), price) == pytest.approx(6.75)
    assert spending.cost(Answer("m", 10, 1, 5), Price(input=2)) == pytest.approx(20e-6)
    assert spending.cost(Answer("m"), price) is None
    assert spending.cost(Answer("m", 1, 1), None) is None
    assert spending.price_of({"m": price}, "other", "m") is price
    uses = [ModelUse(model="m", input_tokens=1200, output_tokens=80, cost=0.5), ModelUse(model="n")]
    usage = Usage()
    for use in uses:
        usage = spending.add(usage, use)
    assert spending.say(usage) == "2 model calls, 1,200 + 80 tokens, 0.50, 1 without a price"
    assert {name: one.calls for name, one in usage.by_model.items()} == {"m": 1, "n": 1}


@pytest.mark.parametrize(
    ("given", "amount", "of"),
    [
        (2.5, 2.5, "money"),
        ("$2.50", 2.5, "money"),
        ("200k tokens", 200_000, "tokens"),
        ("1_000 token", 1000, "tokens"),
    ],
)
def test_a_budget_is_money_or_tokens_and_is_written_as_it_is_read(given: Any, amount: float, of: Any) -> None:
    found = spending.budget(given)
    assert found == Budget(amount=amount, of=of)
    assert spending.budget(spending.say_budget(found)) == found
    assert not spending.is_spent(found, Usage())
    assert spending.is_spent(found, Usage(cost=amount, input_tokens=int(amount)))


@pytest.mark.parametrize("wrong", ["", "much", 0, -1, "0 tokens", True, "1 2", "nan", "5 apples"])
def test_what_is_no_budget_is_refused(wrong: Any) -> None:
    """Guarantee 11."""
    with pytest.raises(UsageError, match="is no budget"):
        spending.budget(wrong)


@pytest.mark.parametrize(
    ("amount", "said"), [(0, "0.00"), (12.5, "12.50"), (0.31, "0.31"), (0.00421, "0.0042"), (5e-5, "0.00005")]
)
def test_money_is_written_without_exponents(amount: float, said: str) -> None:
    assert spending.money(amount) == said


def test_prices_and_a_budget_are_settings_and_wrong_ones_are_named(tmp_path: Path) -> None:
    """Guarantee 11: file, setting and what is wrong."""
    home = Home(tmp_path)
    file = tmp_path / "settings.toml"
    file.write_text(
        'ledger = true\nbudget = "200k tokens"\n[prices."gpt-4o.mini"]\ninput = 0.15\noutput = 0.6\n'
    )
    found = Settings.load(home)
    assert found.budget == Budget(amount=200_000, of="tokens")
    assert found.prices == {"gpt-4o.mini": Price(input=0.15, output=0.6)}
    for text, said in (
        ("[prices.m]\noutput = 1", "'prices.m.input' can't be used: Field required"),
        ("[prices.m]\ninput = -1", "'prices.m.input' can't be used"),
        ("[prices.m]\ninput = 1\ninptu = 2", "'prices.m.inptu' can't be used"),
        ("budget = 'a lot'", "'budget' can't be used.*'a lot' is no budget"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=said):
            Settings.load(home)
