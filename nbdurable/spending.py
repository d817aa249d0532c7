"""What calls of models take: what an answer tells of it, prices, sums, budgets.

Pure: no clock, no I/O. Knows the formats of OpenAI's and Anthropic's answers, whole and streamed; nothing of requests
and runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nbdurable.errors import UsageError
from nbdurable.models import Budget, ModelUse, Price, Usage, Used

_BUDGET = re.compile(r"[$€£]?\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kKM]?)\s*(tokens?)?")
_TIMES = {"": 1, "k": 1_000, "K": 1_000, "M": 1_000_000}
_PER = 1_000_000  # tokens that a price is for
_LAST = ("message_stop", "response.completed", "response.incomplete")  # types of what ends a stream


@dataclass(frozen=True)
class Answer:
    """What a model's answer tells of itself; None where it does not.

    `whole`: a stream has come to its end. `failed`: it holds an error, though its status is a good one.
    """

    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    whole: bool = False
    failed: bool = False


def read_answer(body: bytes) -> Answer:
    """Read a model's answer, JSON or a stream of server-sent events; what can't be read tells nothing."""
    model: str | None = None
    usage: dict[str, Any] = {}
    whole = failed = False
    for part in _parts(body):
        if part is None:
            whole = True
            continue
        kind = part.get("type")
        whole = whole or kind in _LAST
        failed = failed or kind in ("error", "response.failed") or bool(part.get("error"))
        for one in (part, part.get("message"), part.get("response")):
            if isinstance(one, dict):
                model = one["model"] if isinstance(one.get("model"), str) else model
                told = one.get("usage")
                usage |= {n: v for n, v in told.items() if v is not None} if isinstance(told, dict) else {}
    given = _count(usage, "prompt_tokens", "input_tokens")
    cached = _count(usage, "cache_read_input_tokens")
    if given is not None:  # Anthropic counts what it has cached, or caches now, apart
        given += (cached or 0) + (_count(usage, "cache_creation_input_tokens") or 0)
    for name in ("prompt_tokens_details", "input_tokens_details"):
        if isinstance(details := usage.get(name), dict):
            cached = _count(details, "cached_tokens") or cached
    return Answer(
        model=model,
        input_tokens=given,
        output_tokens=_count(usage, "completion_tokens", "output_tokens"),
        cached_tokens=cached or 0,
        whole=whole,
        failed=failed,
    )


def _parts(body: bytes) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON objects that an answer consists of; None for the mark that ends a stream."""
    if body.lstrip()[:1] in (b"{", b"["):
        texts = [body]
    else:
        texts = [line[5:].strip() for line in body.splitlines() if line.startswith(b"data:")]
    for text in texts:
        if text == b"[DONE]":
            yield None
            continue
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _count(found: Mapping[str, Any], *names: str) -> int | None:
    counts = (found.get(name) for name in names)
    return next((n for n in counts if isinstance(n, int) and not isinstance(n, bool) and n >= 0), None)


def price_of(prices: Mapping[str, Price], *names: str | None) -> Price | None:
    """Return the price of a model by the first of its names that has one."""
    return next((prices[name] for name in names if name is not None and name in prices), None)


def cost(answer: Answer, price: Price | None) -> float | None:
    """Return what an answer costs; None where its price or its tokens are not known."""
    if price is None or answer.input_tokens is None:
        return None
    cached = min(answer.cached_tokens, answer.input_tokens)
    cheaper = price.input if price.cached_input is None else price.cached_input
    spent = (answer.input_tokens - cached) * price.input + cached * cheaper
    return (spent + (answer.output_tokens or 0) * price.output) / _PER


def add(usage: Usage, use: ModelUse) -> Usage:
    """Return a sum with one more call."""
    of_model = usage.by_model.get(use.model, Used())
    by_model = {**usage.by_model, use.model: Used(**_sums(of_model, use))}
    return Usage(**_sums(usage, use), by_model=by_model)


def _sums(used: Used, use: ModelUse) -> dict[str, Any]:
    return {
        "calls": used.calls + 1,
        "input_tokens": used.input_tokens + (use.input_tokens or 0),
        "output_tokens": used.output_tokens + (use.output_tokens or 0),
        "cost": used.cost + (use.cost or 0.0),
        "unpriced": used.unpriced + (use.cost is None),
    }


def budget(given: str | float | Budget) -> Budget:
    """Read a budget: `2.50` (money, as the prices are), `200k tokens`; raises UsageError for what is none."""
    if isinstance(given, Budget):
        return given
    found = None if isinstance(given, bool) else _BUDGET.fullmatch(str(given).strip())
    amount = float(re.sub("[_,]", "", found[1])) * _TIMES[found[2]] if found else 0.0
    if found is None or amount <= 0:
        raise UsageError(f"{given!r} is no budget", todo="give money as 2.50, or tokens as '200k tokens'")
    return Budget(amount=amount, of="tokens" if found[3] else "money")


def is_spent(budget: Budget, used: Used) -> bool:
    """Tell whether a budget leaves nothing for another call."""
    spent = used.cost if budget.of == "money" else used.input_tokens + used.output_tokens
    return spent >= budget.amount


def money(amount: float) -> str:
    """Write an amount of money for people: `0.0042`, `0.31`, `12.50`."""
    digits = 2 if amount >= 1 or amount <= 0 else max(2, 1 - math.floor(math.log10(amount)))
    whole, _, rest = f"{amount:.{digits}f}".partition(".")
    return f"{whole}.{rest[:2]}{rest[2:].rstrip('0')}"


def say_budget(budget: Budget, times: float = 1.0) -> str:
    """Write a budget as `budget` reads it."""
    amount = budget.amount * times
    return money(amount) if budget.of == "money" else f"{amount:.0f} tokens"


def tokens(used: Used | ModelUse) -> str:
    """Write tokens for people: `1,200 + 80 tokens`, given and made."""
    if used.input_tokens is None and used.output_tokens is None:
        return "tokens not told"
    return f"{used.input_tokens or 0:,} + {used.output_tokens or 0:,} tokens"


def say_use(use: ModelUse) -> str:
    """Write what one call took for people: `10 + 2 tokens, 0.00003`."""
    return tokens(use) if use.cost is None else f"{tokens(use)}, {money(use.cost)}"


def say(used: Used) -> str:
    """Write a sum for people: `3 model calls, 1,200 + 80 tokens, 0.0042`."""
    calls = "1 model call" if used.calls == 1 else f"{used.calls:,} model calls"
    costs = [money(used.cost)] if used.unpriced < used.calls else []
    missing = [f"{used.unpriced:,} without a price"] if used.unpriced else []
    return ", ".join([calls, tokens(used), *costs, *missing])
