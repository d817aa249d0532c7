"""Parameters of a run as text: `-p NAME VALUE`, and a file of them.

Owns how a word of the command line becomes a JSON value; knows no notebook and no run: which names
and values a notebook takes is checked when the run is created.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nbdurable.errors import ParameterError

_WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}


def join_pairs(words: Sequence[str]) -> list[str]:
    """Write `-p NAME VALUE` as the one-word option `--parameter=NAME=VALUE`.

    `-p NAME=VALUE` is understood too: no parameter's name contains an equals sign.
    """
    joined: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*joined, word, *rest]
        if word not in ("-p", "--parameter"):
            joined.append(word)
            continue
        pair = next(rest, None)
        if pair is not None and "=" not in pair:
            value = next(rest, None)
            pair = None if value is None else f"{pair}={value}"
        if pair is None:
            raise ParameterError(
                "-p needs a name and a value", todo='for example: -p topic "solid state batteries"'
            )
        joined.append(f"--parameter={pair}")
    return joined


def read_value(text: str) -> Any:
    """Return the value of a word, as papermill's `-p` reads it: True, False, None, numbers, else text.

    JSON is understood as well (`[1, 2]`, `{"a": 1}`, `"42"` for the text 42); a date stays ISO text.
    """
    if text in _WORDS:
        return _WORDS[text]
    for read in (json.loads, int, float):
        try:
            value = read(text)
        except (ValueError, RecursionError):
            continue
        if not (isinstance(value, float) and not math.isfinite(value)):  # nan and infinity are no JSON
            return value
    return text


def read_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Return the parameters of `NAME=VALUE` words; raises ParameterError for a name no variable can have."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ParameterError(
                f"{name!r} can't be the name of a parameter",
                todo='for example: -p topic "solid state batteries"',
            )
        found[name] = read_value(text)
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Return the parameters of a YAML or JSON file; dates stay dates.

    Raises ParameterError, naming the file, if it is missing, is no YAML or no mapping of names.
    """
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(
            f"the parameter file {path} can't be read: {error.strerror}", todo="check the path"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ParameterError(f"the parameter file {path} is not YAML: {error}", todo="mend it") from None
    if not isinstance(loaded, dict | None) or not all(isinstance(name, str) for name in loaded or ()):
        raise ParameterError(
            f"the parameter file {path} must hold names and values", todo="for example `topic: batteries`"
        )
    return loaded or {}
