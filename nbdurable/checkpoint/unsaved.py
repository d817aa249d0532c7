"""The placeholder for a variable that a checkpoint could not hold.

Owns one promise: whatever is done with it raises NotRestorable with the reason that was shown when the step
was saved.
"""

from __future__ import annotations

from typing import Any, NoReturn

from nbdurable.errors import NotRestorable

_RAISING = (
    "call iter next len bool getitem setitem delitem contains add radd iadd sub rsub mul rmul truediv rtruediv "
    "floordiv rfloordiv mod rmod pow rpow matmul rmatmul neg pos abs invert and rand or ror xor rxor lshift rshift "
    "lt le gt ge eq ne hash int float complex index round enter exit aenter aexit await aiter anext str bytes format "
    "copy deepcopy reduce_ex reversed fspath setattr delattr"
)


class Unsaved:
    """Stands for a variable that was not saved; every use raises NotRestorable. Its repr says what it is."""

    __slots__ = ("_name", "_reason", "_step")

    def __init__(self, name: str, step: str, reason: str) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_step", step)
        object.__setattr__(self, "_reason", reason)

    def __repr__(self) -> str:
        return f"<`{self._name}` of step {self._step} was not saved: {self._reason}>"

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(self)


def _refuse(placeholder: Unsaved, *_: Any, **__: Any) -> NoReturn:
    raise NotRestorable(
        f"`{placeholder._name}` was not saved with step `{placeholder._step}`: {placeholder._reason}",
        todo=f"or run the step again: `%durable rerun {placeholder._step}`",
    )


for _name in _RAISING.split():
    setattr(Unsaved, f"__{_name}__", _refuse)


def reason_of(placeholder: Unsaved) -> str:
    """Return why the variable was not saved."""
    return str(placeholder._reason)
