"""Data of runs never become markup of a page, whatever they are and however long."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from nbdurable import lifecycle, spending
from nbdurable.dashboard import view
from nbdurable.models import (
    Attempt,
    Budget,
    Call,
    Driver,
    DriverKind,
    ErrorInfo,
    Event,
    ModelUse,
    ProcessIdentity,
    RunDetail,
    RunStatus,
    Step,
    StepStatus,
    Usage,
    Variable,
    Wait,
    WaitAnswer,
    WaitKind,
)

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)><iframe srcdoc='x'></iframe></textarea>&lt;b&gt;"
COMMON: dict[str, Any] = {"root": "", "here": "runs", "heading": "Runs", "away": None, "open_approvals": 1}


class Parsed(HTMLParser):
    """A page as a browser reads it: its tags, their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for found, value in self.attributes if found == name]


class Said:
    text, todo, number, tone = EVIL, EVIL, 1, ""


def run(text: str, status: RunStatus = RunStatus.FAILED) -> RunDetail:
    error = ErrorInfo(name=text, message=text, traceback=text)
    attempt = Attempt(number=1, status="failed", epoch=1, started_at=1.0, ended_at=2.0, error=error)
    variables = tuple(
        Variable(name=text, type=text, shape=text, preview=text, reason=text, state=state)
        for state in ("saved", "deleted", "unsaved")
    )
    step = Step(
        name=text,
        status=StepStatus.FAILED,
        reason=text,
        attempts=(attempt,),
        variables=variables,
        checkpoint_seq=1,
    )
    process = ProcessIdentity(host=text, pid=1, started_at=0.0, role="kernel")
    return RunDetail(
        id="0" * 32,
        notebook=f"/work/{text}",
        status=status,
        reason=text,
        kind=DriverKind.HEADLESS,
        parameters={text: text, "x": {text: [text]}},
        output=text,
        tags=(text,),
        driver=Driver(kind=DriverKind.INTERACTIVE, process=process, label=text),
        result={text: text},
        error=error,
        created_at=1.0,
        updated_at=1.0,
        steps=(step,),
        waits=(wait(text),),
        usage=spending.add(Usage(), ModelUse(model=text, cost=0.5)),
        budget=Budget(amount=1, of="tokens"),
    )


def wait(text: str, answered: bool = False, **fields: Any) -> Wait:
    answer = WaitAnswer(approved=True, value={text: text}, edited=True, by=text, comment=text, at=1.0)
    usual: dict[str, Any] = {
        "id": "7K2M9Q",
        "run_id": "0" * 32,
        "key": text,
        "kind": WaitKind.APPROVAL,
        "title": text,
        "step": text,
        "value": text,
        "preview": text,
        "tags": (text,),
        "created_at": 1.0,
        "answer": answer if answered else None,
    }
    return Wait(**(usual | fields))


def call(text: str, model: ModelUse | None = None) -> Call:
    said = {"step": text, "key": text, "name": text, "given": text, "type": text, "reason": text}
    return Call(**said, duration_s=1.0, attempt=1, replayed=True, model=model, at=1.0, seq=2)


def pages(text: str) -> dict[str, str]:
    """Return every page, with `text` in every place that data can reach."""
    shown = run(text)
    event = Event(seq=1, at=1.0, run_id=shown.id, epoch=1, kind="x", sentence=text)
    progress = view.progress(shown.steps, 3)
    common = COMMON | {"said": Said, "away": text}
    items = [
        {"wait": found, "notebook": text}
        for found in (
            wait(text),
            wait(text, answered=True),
            wait(text, value={text: text}),
            wait(text, value=None),
        )
    ]
    details = {
        "events": [event],
        "earlier": 1,
        "open_waits": list(shown.waits),
        "choices": view.choices(shown),
        "error": shown.error,
        "calls": [call(text), call(text, ModelUse(model=text, input_tokens=1, output_tokens=2, cost=0.5))],
    }
    asked: dict[str, dict[str, Any]] = {
        "runs.html": {"rows": [{"run": shown, "progress": progress}], "more": True, "status": None},
        "run.html": {"run": shown, "progress": progress, **details},
        "approvals.html": {"items": items, "more": 1},
        "approval.html": {"wait": wait(text, answered=True), "notebook": text},
        "trouble.html": {"message": text, "todo": text},
    }
    return {name: view.render(name, **(common | values)) for name, values in asked.items()}


def test_hostile_text_stays_text() -> None:
    """A name, error, preview, comment or value that looks like HTML is shown as it is, and nothing of it acts."""
    harmless = pages("harmless")
    for name, html in pages(EVIL).items():
        parsed = Parsed(html)
        assert parsed.tags == Parsed(harmless[name]).tags, f"{name} has other tags than with harmless text"
        assert EVIL in parsed.text, name
        assert not [attribute for attribute, _ in parsed.attributes if attribute.startswith("on")]


@pytest.mark.parametrize(
    "text", ["这是一个很长的名字" * 500, "اسم الدفتر\u202etxt.exe", "é\x00\x1b[31m\ufffe", "x" * 300_000]
)
def test_names_of_any_script_and_length_are_shown(text: str) -> None:
    """Long texts are cut with a mark of it; right-to-left ones are isolated; control characters do no harm."""
    for name, html in pages(text).items():
        assert text[:20] in Parsed(html).text, name
        assert len(html) < 1_000_000


@pytest.mark.parametrize(
    "source",
    [
        "<script>alert(1)</script>",
        "[x](javascript:alert(1))",
        "[x](vbscript:x) [y](data:text/html,<script>alert(1)</script>)",
        "![x](https://evil.example/pixel.png)",
        '<https://evil.example/"onmouseover=alert(1)>',
        "`<b>` **<img src=x onerror=alert(1)>**",
        "[x]: javascript:alert(1)\n\n[x]",
        "```<script>\n</script><script>alert(1)</script>\n```",
    ],
)
def test_markdown_brings_no_markup_of_its_own(source: str) -> None:
    """No script, no image (a request to elsewhere), no handler, no link that is not a web or mail address."""
    parsed = Parsed(view.markdown(source))
    assert not {"script", "img", "iframe"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert all(link.startswith(("https://", "http://", "mailto:")) for link in parsed.values("href"))


def test_markdown_is_formatted() -> None:
    """A draft reads as its author meant it; its links tell nobody where they were followed."""
    html = view.markdown("# Title\n\n**bold**\n\n|a|b|\n|-|-|\n|1|2|\n\n[link](https://example.com)")
    parsed = Parsed(html)
    assert {"h1", "strong", "table", "a"} <= set(parsed.tags)
    assert parsed.values("rel") == ["noopener noreferrer"]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (RunStatus.RUNNING, {"cancel": True, "resume": False}),
        (RunStatus.WAITING, {"cancel": True, "resume": False}),
        (RunStatus.PAUSED, {"cancel": True, "resume": True}),
        (RunStatus.FAILED, {"cancel": False, "resume": True}),
        (RunStatus.CANCELLED, {"cancel": False, "resume": True}),
        (RunStatus.COMPLETED, {"cancel": False, "resume": False}),
    ],
)
def test_buttons_are_the_legal_moves(status: RunStatus, expected: dict[str, bool]) -> None:
    """A button is there exactly where the table of moves allows what it does."""
    assert view.choices(run("x", status)) == expected
    assert expected["resume"] == ((status, lifecycle.Happening.RESUME) in lifecycle.MOVES)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (3120, "3.1 kB"),
        (42_000, "42 kB"),
        (10**9, "1.0 GB"),
        (10**13, "10000 GB"),
    ],
)
def test_sizes_read_well(count: int, expected: str) -> None:
    """Sizes have at most two digits behind their first."""
    assert view.size(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "0 ms"),
        (0.0123, "12 ms"),
        (8.44, "8.4 s"),
        (59.4, "59 s"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_read_well(seconds: float, expected: str) -> None:
    """Durations have two units at most."""
    assert view.span(seconds) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/a/b.ipynb", "b.ipynb"), ("C:\\x\\b.ipynb", "b.ipynb"), ("b", "b"), ("/", "/"), ("/a/", "a")],
)
def test_notebooks_are_named_by_their_file(path: str, expected: str) -> None:
    """Whichever system wrote the path."""
    assert view.filename(path) == expected


def test_progress_counts_what_is_done() -> None:
    """A step that will run again (replay) is done for now; more steps than were foreseen don't pass 100 %."""
    steps = tuple(Step(name=str(i), status=status, reason="") for i, status in enumerate(StepStatus))
    assert view.progress(steps, 10) == {"done": 2, "total": 10, "percent": 20}
    assert view.progress(steps, None) == {"done": 2, "total": None, "percent": None}
    assert view.progress(steps, 1)["total"] == len(steps)
    assert view.progress((), 0)["percent"] is None


def test_an_error_is_shown_once() -> None:
    """What a failed step shows is not repeated above it; an error of the run itself is shown."""
    failed = run("x")
    assert view.own_error(failed) is None
    elsewhere = failed.model_copy(update={"error": ErrorInfo(name="DeadKernelError", message="x")})
    assert view.own_error(elsewhere) == elsewhere.error
    assert view.own_error(failed.model_copy(update={"steps": ()})) == failed.error
