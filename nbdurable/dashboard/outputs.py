"""Recorded outputs, made ready to be shown: which form of each, how much of it, and what is left out.

Owns the choice among MIME types and all bounds, so that an output of any size or content can't harm the page.
Pure; knows no HTML of ours: `templates/outputs.html` draws what is decided here.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_OUTPUTS = 100
MAX_TEXT_CHARS = 20_000
MAX_HTML_CHARS = 1_000_000
MAX_IMAGE_CHARS = 8_000_000
MAX_PAGE_CHARS = 16_000_000
WHOLE = "the whole of it is in the output notebook"

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_RASTER = ("image/png", "image/jpeg", "image/gif", "image/webp")
_ROW_PX, _LINE_PX, _LEAST_PX, _MOST_PX = 27, 24, 56, 480


@dataclass(frozen=True)
class Shown:
    """One output as it will be drawn.

    `text` is plain text, Markdown, a complete HTML document for a sandboxed frame, or an image's data URL.
    """

    kind: Literal["text", "error", "markdown", "html", "image", "note"]
    text: str
    note: str = ""
    height_px: int = 0  # html: a guess, since a sandboxed frame can't say its own


def show(outputs: Iterable[Any]) -> list[Shown]:
    """Choose what to draw of a step's outputs (dicts as nbformat has them), in order and within bounds."""
    shown: list[Shown] = []
    room = MAX_PAGE_CHARS
    everything = list(outputs)
    for output in everything[:MAX_OUTPUTS]:
        one = _show_one(output) if isinstance(output, Mapping) else None
        if one is None:
            continue
        if len(one.text) > room:
            one = Shown("note", f"an output of {len(one.text):,} characters is left out; {WHOLE}")
        room -= len(one.text)
        shown.append(one)
    if len(everything) > MAX_OUTPUTS:
        shown.append(Shown("note", f"{len(everything) - MAX_OUTPUTS:,} more outputs are left out; {WHOLE}"))
    return shown


def plain(text: str) -> str:
    """Return text as a terminal would leave it: without colours, progress bars in their last state."""
    text = _ANSI.sub("", text.replace("\r\n", "\n"))
    if "\r" in text:
        text = "\n".join(_last_state(line) for line in text.split("\n"))
    return text


def bounded(text: str, most: int = MAX_TEXT_CHARS) -> tuple[str, str]:
    """Return the text, without its middle where it has more than `most` characters, and a note on it."""
    if len(text) <= most:
        return text, ""
    tail = most // 4
    left_out = len(text) - most
    return f"{text[: most - tail]}\n\n[…]\n\n{text[-tail:]}", f"{left_out:,} characters are left out; {WHOLE}"


def _last_state(line: str) -> str:
    return next((part for part in reversed(line.split("\r")) if part), "")


def _show_one(output: Mapping[str, Any]) -> Shown | None:
    match output.get("output_type"):
        case "stream":
            return _text(_joined(output.get("text")))
        case "error":
            trace = _joined(output.get("traceback"), by="\n")
            return _text(trace or f"{output.get('ename', '')}: {output.get('evalue', '')}", "error")
        case "display_data" | "execute_result" | "update_display_data":
            data = output.get("data")
            return _richest(data) if isinstance(data, Mapping) else None
    return None


def _richest(data: Mapping[str, Any]) -> Shown | None:
    if (markup := _joined(data.get("text/html"))) and len(markup) <= MAX_HTML_CHARS:
        return _html(markup)
    if source := _joined(data.get("text/markdown")):
        text, note = bounded(source)
        return Shown("markdown", text, note)
    if (drawing := _joined(data.get("image/svg+xml"))) and len(drawing) <= MAX_IMAGE_CHARS:
        encoded = base64.b64encode(drawing.encode("utf-8", "replace")).decode("ascii")
        return Shown("image", f"data:image/svg+xml;base64,{encoded}")  # as an image it runs no script
    for mime in _RASTER:
        encoded = "".join(_joined(data.get(mime)).split())
        if encoded and len(encoded) <= MAX_IMAGE_CHARS and _BASE64.fullmatch(encoded):
            return Shown("image", f"data:{mime};base64,{encoded}")
    for mime in ("text/plain", "text/latex"):
        if text := _joined(data.get(mime)):
            return _text(text)
    if (value := data.get("application/json")) is not None:
        return _text(json.dumps(value, indent=2, ensure_ascii=False))
    return (
        Shown("note", f"an output of type {', '.join(sorted(map(str, data)))} can't be shown here")
        if data
        else None
    )


def _text(text: str, kind: Literal["text", "error"] = "text") -> Shown | None:
    cut, note = bounded(plain(text))
    return Shown(kind, cut.rstrip("\n"), note) if cut.strip() else None


def _html(markup: str) -> Shown:
    rows, lines = markup.count("<tr"), len(re.findall(r"<(?:p|li|h[1-6]|br|div|pre)\b|\n", markup))
    guess = rows * _ROW_PX + 40 if rows else lines * _LINE_PX + 30
    note = "shown without its scripts" if re.search(r"<script\b", markup, re.IGNORECASE) else ""
    return Shown("html", markup, note, min(max(guess, _LEAST_PX), _MOST_PX))


def _joined(value: Any, by: str = "") -> str:
    """Return nbformat's text, which may be one string or a list of them."""
    if isinstance(value, list):
        return by.join(str(part) for part in value)
    return value if isinstance(value, str) else ""
