"""Shapes to HTML: pure, everything escaped.

Owns the templates and how sizes, durations and texts read. Knows neither Panel nor the client. Data reach
HTML only through Jinja's automatic escaping, or through `markdown`, whose parser lets no HTML pass. Times are
written as seconds; the browser (`static/live.js`) turns them into words of its own time zone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from nbdurable import lifecycle, spending
from nbdurable.dashboard import forms
from nbdurable.dashboard.outputs import MAX_TEXT_CHARS, bounded
from nbdurable.models import ErrorInfo, RunDetail, RunStatus, Step, StepStatus

FOLDER = Path(__file__).parent
MAX_MARKDOWN_CHARS = 60_000
MAX_WORD_CHARS = 1_000  # a name, a path, a sentence

_DONE = (StepStatus.COMPLETED, StepStatus.REPLAY)


def render(template: str, **values: Any) -> str:
    """Return a page's HTML; raises jinja2.UndefinedError where a template asks for what was not given."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_short,
    )
    environment.filters |= {
        "size": size,
        "span": span,
        "filename": filename,
        "markdown": markdown,
        "pretty": pretty,
        "cut": cut,
        "use": spending.say_use,
        "usage": spending.say,
        "budget": spending.say_budget,
        "fields": forms.fields,
    }
    environment.globals |= {"RunStatus": RunStatus}
    return environment


def _short(value: Any) -> Any:
    """Bound whatever text a template shows without saying how much of it."""
    return cut(value, MAX_WORD_CHARS) if isinstance(value, str) and not isinstance(value, Markup) else value


def cut(text: str, most: int = MAX_TEXT_CHARS) -> Markup:
    """Return text, escaped, its middle left out where it has more than `most` characters."""
    return escape(bounded(text, most)[0])


def size(count: int) -> str:
    """Return a number of bytes as people read it, e.g. `42 kB`."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5 or unit == "GB":
            return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError


def span(seconds: float) -> str:
    """Return a duration as people read it, e.g. `8.4 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    seconds = max(seconds, 0.0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for unit, small, length, part in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if whole < {"min": 3600, "h": 86400, "d": float("inf")}[unit]:
            rest = whole % length // part
            return f"{whole // length} {unit} {rest} {small}" if rest else f"{whole // length} {unit}"
    raise AssertionError


def filename(path: str) -> str:
    """Return a path's last part, whichever system wrote it."""
    return (PureWindowsPath(path).name if "\\" in path else path.rstrip("/").rpartition("/")[2]) or path


def pretty(value: Any) -> str:
    """Return a JSON value as text: a string as it is, anything else as indented JSON."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def markdown(text: str) -> Markup:
    """Return Markdown as HTML in which nothing of the text is markup of its own: no tags, no images."""
    return Markup(_parser().render(bounded(text, MAX_MARKDOWN_CHARS)[0]))


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    parser = (
        MarkdownIt("commonmark", {"html": False, "maxNesting": 30})
        .enable(["table", "strikethrough"])
        .disable("image")
    )

    def link_open(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        tokens[index].attrSet("rel", "noopener noreferrer")
        tokens[index].attrSet("target", "_blank")
        return str(self.renderToken(tokens, index, options, env))

    parser.add_render_rule("link_open", link_open)
    return parser


def progress(steps: tuple[Step, ...], total: int | None) -> Mapping[str, int | None]:
    """Return how many steps are done, how many there are, where known, and the share in percent."""
    done = sum(step.status in _DONE for step in steps)
    most = max(total, len(steps)) if total is not None else None
    return {"done": done, "total": most, "percent": round(100 * done / most) if most else None}


def own_error(run: RunDetail) -> ErrorInfo | None:
    """Return the run's error, unless a step that failed shows it already."""
    shown = [
        step.attempts[-1].error for step in run.steps if step.status is StepStatus.FAILED and step.attempts
    ]
    error = run.error
    if error is None or any(one and (one.name, one.message) == (error.name, error.message) for one in shown):
        return None
    return error


def choices(run: RunDetail) -> Mapping[str, bool]:
    """Return which buttons a run has: what the table of legal moves allows."""
    cancel = lifecycle.cancellation(run.status, run.kind)
    return {
        "cancel": (run.status, cancel) in lifecycle.MOVES and not run.cancel_requested,
        "resume": (run.status, lifecycle.Happening.RESUME) in lifecycle.MOVES,
    }
