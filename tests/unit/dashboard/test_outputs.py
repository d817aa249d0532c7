"""Outputs of any size and content are shown without harm to the page."""

from __future__ import annotations

import base64
import html
import re
from typing import Any

import pytest

from nbdurable.dashboard import outputs, view
from nbdurable.dashboard.outputs import Shown, show

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def display(**data: Any) -> dict[str, Any]:
    """Return a display with the given MIME types (`text_html` for text/html)."""
    return {
        "output_type": "display_data",
        "data": {k.replace("_", "/", 1): v for k, v in data.items()},
        "metadata": {},
    }


def stream(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text}


def test_html_stays_in_a_sandbox() -> None:
    """HTML of an output is drawn only in a frame without any permission, and can't break out of its attribute."""
    evil = "\"'></iframe><script>parent.alert(1)</script><table><tr><td>1</td></tr></table>"
    drawn = view.render("outputs.html", outputs=show([display(text_html=evil)]), frame_style="")
    frames = re.findall(r"<iframe\b[^>]*>", drawn)
    assert len(frames) == 1
    assert 'sandbox=""' in frames[0]
    source = re.search(r'srcdoc="([^"]*)"', frames[0])
    assert source is not None
    assert html.unescape(source[1]) == evil
    assert "<script" not in drawn
    assert "without its scripts" in drawn


def test_svg_is_an_image() -> None:
    """An SVG may hold scripts; as an image it runs none."""
    (one,) = show([display(**{"image_svg+xml": "<svg><script>alert(1)</script></svg>"})])
    assert one.kind == "image"
    assert one.text.startswith("data:image/svg+xml;base64,")
    assert "<script" not in view.render("outputs.html", outputs=[one], frame_style="")


def test_the_richest_safe_form_is_shown() -> None:
    """HTML before Markdown, pictures before text; what can't be shown says so."""
    assert show([display(text_html="<b>x</b>", text_plain="x")])[0].kind == "html"
    assert show([display(image_png=PNG, text_plain="<Figure>")]) == [
        Shown("image", f"data:image/png;base64,{PNG}")
    ]
    assert show([display(text_markdown="*x*", text_plain="x")])[0].kind == "markdown"
    assert show([display(application_json={"a": 1})]) == [Shown("text", '{\n  "a": 1\n}')]
    assert show([display(**{"application_x-own": "?"})])[0].kind == "note"


def test_a_picture_that_is_none_is_not_put_into_an_address() -> None:
    """Only base64 becomes a data URL."""
    assert show([display(image_png='x" onerror="alert(1)', text_plain="plot")]) == [Shown("text", "plot")]


def test_text_of_any_size_is_cut_in_the_middle() -> None:
    """50 MB of text become a few kB with beginning, end and a note of what is left out."""
    (one,) = show([stream("begin" + "x" * 50_000_000 + "end")])
    assert len(one.text) < 1.1 * outputs.MAX_TEXT_CHARS
    assert one.text.startswith("begin")
    assert one.text.endswith("end")
    assert "49,980,008 characters are left out" in one.note


def test_html_that_is_too_large_gives_way_to_text() -> None:
    """A browser tab does not take a table of a million rows."""
    shown = show([display(text_html="<p>" * outputs.MAX_HTML_CHARS, text_plain="a table")])
    assert shown == [Shown("text", "a table")]


def test_many_outputs_are_bounded_together() -> None:
    """Neither their number nor their sum is without limit, and what is left out is counted."""
    many = show([stream("x")] * (outputs.MAX_OUTPUTS + 5))
    assert len(many) == outputs.MAX_OUTPUTS + 1
    assert many[-1].text.startswith("5 more outputs")
    picture = display(image_png="A" * (outputs.MAX_IMAGE_CHARS - 100))
    assert [one.kind for one in show([picture] * 3)] == ["image", "image", "note"]


def test_terminal_codes_are_taken_out() -> None:
    """Colours vanish; a progress bar is seen in its last state."""
    assert outputs.plain("\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\r\n") == "red link\n"
    assert outputs.plain("0%\r 50%\r100%\r\ndone") == "100%\ndone"
    (error,) = show([{"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[1mE", "v"]}])
    assert error == Shown("error", "E\nv")


@pytest.mark.parametrize(
    "odd",
    [
        None,
        1,
        "x",
        [],
        {},
        {"output_type": "stream"},
        {"output_type": "display_data", "data": 3},
        display(text_html=5),
    ],
)
def test_what_is_no_output_is_passed_over(odd: Any) -> None:
    """A checkpoint of another version never breaks the page."""
    assert [one.kind for one in show([odd, stream("x")])][-1] == "text"
