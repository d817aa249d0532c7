"""`durable.recipe`: what it refuses (guarantee 11)."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nbdurable.errors import UsageError
from nbdurable.kernel.recipes import recipe


async def later() -> threading.Event:
    return threading.Event()


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("my client", threading.Event, "'my client' is not a variable's name"),
        (3, threading.Event, "3 is not a variable's name"),
        ("a", threading.Event(), "the recipe of `a` is a Event, not a function"),
        ("a", later, "the recipe of `a`, `later`, is async"),
        ("a", lambda url: url, "can't be called without arguments: missing a required argument: 'url'"),
        ("a", lambda: None, "the recipe of `a` made a NoneType, which is saved as it is"),
        ("a", lambda: [threading.Event()], "the recipe of `a` made a list, which is saved as it is"),
        ("a", lambda: threading, "the recipe of `a` made a module, which is saved as it is"),
    ],
)
def test_misuse_is_refused(name: Any, make: Any, said: str) -> None:
    """At once, with what to write instead."""
    with pytest.raises(UsageError) as caught:
        recipe(name, make)
    assert said in caught.value.message
    assert caught.value.todo


def test_without_a_run_it_merely_makes_the_value() -> None:
    """A notebook's code works as a program, too."""
    assert isinstance(recipe("event", threading.Event), threading.Event)


def test_what_fails_to_be_made_fails_as_it_would_without() -> None:
    """The user's own error, untouched."""

    def broken() -> Any:
        raise ConnectionError("nobody listens")

    with pytest.raises(ConnectionError, match="nobody listens"):
        recipe("client", broken)
