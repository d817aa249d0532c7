"""The demo's agent works on real text: its cells run here without a kernel, on what is installed here."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "research_agent.ipynb"
PACKAGES = ("papermill", "nbclient", "tenacity", "uvicorn", "psutil", "joblib", "cloudpickle")
STEPS = ["plan", "corpus", "index", "search", "read", "analyse", "draft", "review", "publish"]


def cells() -> dict[str, Any]:
    return {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"}


def run(names: list[str], space: dict[str, Any]) -> dict[str, Any]:
    for name in names:
        source = re.sub(r"\A%%step \w+\n", "", cells()[name].source)
        exec(compile(source, name, "exec"), space)
    return space


@pytest.fixture(scope="module")
def library() -> dict[str, Any]:
    """The agent's tools, with a corpus of a few packages, indexed by its own cells."""
    tools = [name for name in cells() if name not in STEPS and name != "load"]
    space = run(tools, {"__name__": "agent"})
    space["near"] = dict.fromkeys(PACKAGES, 0)
    return run(["corpus", "index"], space)


@pytest.fixture
def ask(library: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Answer a question up to the draft: returns the variables that the cells leave."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def answer(question: str) -> dict[str, Any]:
        # The tools look up their globals in the library's namespace, so the steps run in it, too.
        library.update(question=question, rounds=3, journal=str(tmp_path / "journal"))
        return run(["plan", "search", "read", "analyse", "draft"], library)

    return answer


def test_the_notebook_is_clean() -> None:
    """Valid, without outputs, parameters tagged, each step's first line exactly `%%step name`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [name for name, cell in cells().items() if "%%step" in cell.source.splitlines()[0]] == STEPS
    assert [cells()[name].source.splitlines()[0] for name in STEPS] == [f"%%step {name}" for name in STEPS]
    assert cells()["parameters"].metadata.tags == ["parameters"]
    assert not any(cell.outputs or cell.execution_count for cell in cells().values())


@pytest.mark.parametrize(
    ("question", "package"),
    [
        ("How are notebooks parameterized with injected parameters?", "papermill"),
        ("How do I retry a call that fails, waiting longer each time?", "tenacity"),
        ("How much memory does a process use, and which connections has it open?", "psutil"),
    ],
)
def test_search_finds_the_package_that_knows(library: dict[str, Any], question: str, package: str) -> None:
    """The best five passages for a question that names no package come mostly from the right one."""
    everywhere = np.ones(len(library["passages"]))
    found = library["search"](library["index"], library["weigh"](question), everywhere)[:5]
    packages = [
        library["documents"][library["passages"][passage]["document"]]["package"] for passage, _ in found
    ]
    assert packages.count(package) >= 3, packages


def test_words_used_alike_are_learned_from_the_corpus(library: dict[str, Any]) -> None:
    """A search for one word reaches texts that only use its kin: nobody wrote a list of synonyms."""
    stem = library["stem"]
    assert stem("executing") == stem("execution") == stem("executes")
    for word, kin in [("kill", "terminate"), ("child", "parent"), ("notebook", "execute")]:
        assert stem(kin) in library["kindred"](library["index"], stem(word))


def test_the_report_says_only_what_the_sources_say(ask: Any) -> None:
    """Each sentence of the report stands in the corpus under the source that it cites; none is said twice."""
    done = ask("How does papermill execute notebooks, and what happens when a cell fails?")
    corpus = {(p["document"], p["where"]): "" for p in done["passages"]}
    for passage in done["passages"]:
        corpus[passage["document"], passage["where"]] += " " + " ".join(passage["sentences"])

    told = [evidence for finding in done["findings"] for evidence in finding["evidence"]]
    assert len(told) >= 6
    assert len({evidence["text"] for evidence in told}) == len(told)
    for evidence in told:
        assert evidence["text"] in corpus[done["sources"][evidence["source"] - 1]]
        assert evidence["text"].split(". ")[0] in done["draft"]
    assert [item["question"] for item in done["plan"]] == [
        "How does papermill execute notebooks?",
        "What happens when a cell fails?",
    ]
    assert "stop executing when they encounter a failure" in done["draft"]


def test_citations_and_sources_agree(ask: Any) -> None:
    """Citations count up from 1 as they appear, and each has its line in the list of sources."""
    body, _, sources = ask("How does a file lock wait, and what happens on a timeout?")["draft"].partition(
        "## Sources"
    )
    cited = list(dict.fromkeys(int(number) for number in re.findall(r"\[(\d+)\]", body)))
    assert cited == list(range(1, len(cited) + 1)) != []
    assert [int(number) for number in re.findall(r"^(\d+)\. ", sources, re.M)] == cited


def test_the_same_question_gets_the_same_report(ask: Any) -> None:
    """Nothing is left to chance, so a resumed run ends as an uninterrupted one does (guarantee 6)."""
    question = "How does uvicorn shut down gracefully?"
    assert ask(question)["draft"] == ask(question)["draft"]


def test_a_question_that_nothing_answers_is_told_so(ask: Any) -> None:
    """No evidence, no claim."""
    done = ask("Quo usque tandem abutere patientia nostra?")
    assert done["sources"] == []
    assert "nothing to say" in done["draft"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Run ``x`` with :class:`~a.b.Runner` and **care** for all.",
            "Run `x` with `Runner` and care for all.",
        ),
        ("See [the *long* guide](https://example.org/x) on it today.", "See the long guide on it today."),
        (
            "Reads `__init__` and `a_b_c` from *the* file here.",
            "Reads `__init__` and `a_b_c` from the file here.",
        ),
    ],
)
def test_markup_is_taken_out_and_words_are_kept(library: dict[str, Any], text: str, expected: str) -> None:
    """What is quoted reads as prose, whichever markup its source is written in."""
    assert library["inline"](text) == expected


def test_docstrings_become_prose(library: dict[str, Any]) -> None:
    """Code and examples are left out; parameters keep their names, items the sentence they hang on."""
    text = """Run a thing until it is done.

    Use it when:

    * the thing takes longer than a minute

    Parameters
    ----------
    limit : int
        How long it may take at most, in seconds.

    Examples
    --------
    >>> run(1)
    """
    assert [paragraph for _, paragraph in library["paragraphs"](text)] == [
        "Run a thing until it is done.",
        "Use it when: the thing takes longer than a minute",
        "`limit`: How long it may take at most, in seconds.",
    ]


class Model(BaseHTTPRequestHandler):
    """An endpoint that speaks the chat completions protocol and remembers what it was asked."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append({"path": self.path, "key": self.headers["Authorization"], **request})
        instructions = request["messages"][0]["content"]
        if instructions.startswith("You plan"):
            reply = 'Sure:\n["How does papermill execute notebooks?", "What if a cell fails?"]'
        elif instructions.startswith("You search"):
            reply = '["cell execution error"]'
        else:
            reply = "It runs them [2], then stops [1] at once [99]."
        body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, ask: Any) -> Iterator[type[Model]]:
    Model.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_MODEL", "some-model")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield Model
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_configured_model_plans_refines_and_writes(model: type[Model], ask: Any) -> None:
    """The usual environment variables are enough; what the model cites must exist, and the key stays out."""
    done = ask("How does papermill cope?")
    assert {(call["path"], call["key"], call["model"]) for call in model.asked} == {
        ("/v1/chat/completions", "Bearer secret", "some-model")
    }
    assert [item["question"] for item in done["plan"]] == [
        "How does papermill execute notebooks?",
        "What if a cell fails?",
    ]
    assert "cell execution error" in [call["query"] for call in done["transcript"]]
    assert "It runs them [1], then stops [2] at once." in done["draft"]
    assert len(done["references"]) == 2
    assert "secret" not in done["draft"]


def test_a_model_that_answers_nonsense_is_an_error(
    library: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model: type[Model]
) -> None:
    """A step fails, and can be run again, rather than going on with what is not a list."""
    with pytest.raises(RuntimeError, match="asked for a JSON list"):
        library["ask_for_list"]("Write freely.", "anything")


def test_a_report_is_published_whole_and_only_if_approved(library: dict[str, Any], tmp_path: Path) -> None:
    """A rejected report leaves no file; an approved one replaces it, as edited, with nothing beside it."""

    class Decision:
        approved, value, by, comment = False, "# Edited\n", "ann", "too thin"

    class Durable:
        @staticmethod
        def result(**values: Any) -> None:
            library["published"] = values

    report = tmp_path / "report.md"
    library.update(
        decision=Decision(), durable=Durable, report_path=str(report), journal=None, references=["a"]
    )
    run(["publish"], library)
    assert not report.exists()
    assert library["published"] == {"report": None, "approved": False, "sources": ["a"]}

    Decision.approved = True
    run(["publish"], library)
    assert report.read_text() == "# Edited\n"
    assert list(tmp_path.iterdir()) == [report]
    assert library["published"]["report"] == str(report.resolve())


def test_each_finished_step_is_noted_once(ask: Any, tmp_path: Path) -> None:
    """The journal is the demo's evidence that no step ran twice."""
    ask("How does uvicorn reload?")
    lines = (tmp_path / "journal").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["plan", "search", "read", "analyse", "draft"]
