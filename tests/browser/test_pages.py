"""The pages in a real browser, over a real coordinator."""

from __future__ import annotations

import base64
import http.server
import json
import os
import signal
import threading
from typing import Any
from urllib import request
from urllib.error import HTTPError

import pytest
from playwright.sync_api import BrowserContext, expect

from nbdurable import contract
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.models import ErrorInfo, RunStatus, Variable, WaitKind, WaitStatus
from nbdurable.security import digest_of
from tests.tools.pages import PHONE, Project, Tab
from tests.tools.processes import until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(90)]

DOT = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d4944415478da63fcffff3f030005fe02fe"
        "a7d6059b0000000049454e44ae426082"
    )
).decode()
EVIL_HTML = (
    "<table><tr><th>name</th><td>solid</td></tr></table><script>document.body.textContent='pwned';"
    "parent.document.title='pwned'</script><img src=x onerror=\"parent.document.title='pwned'\">"
    "<img src='https://evil.example/pixel.png'><a id=out href='https://evil.example/' target=_top>leave</a>"
)
DRAFT = "# Solid state\n\nA **draft** with a [link](https://example.com).\n\n<script>document.title='pwned'</script>"


def outputs() -> list[dict[str, Any]]:
    return [
        {"output_type": "stream", "name": "stdout", "text": "10%\r100%\nfound <b>42</b> passages\n"},
        {"output_type": "display_data", "data": {"text/html": EVIL_HTML}, "metadata": {}},
        {"output_type": "display_data", "data": {"image/png": DOT}, "metadata": {}},
        {
            "output_type": "execute_result",
            "data": {"text/plain": "1234567"},
            "metadata": {},
            "execution_count": 1,
        },
    ]


def test_an_empty_project_says_how_to_begin(own_project: Project, own_tab: Tab) -> None:
    """The first page of a new project teaches in three lines; when the pages end, an open one says so."""
    own_tab.page.goto(f"{own_project.url}/ui")
    expect(own_tab.page.get_by_role("heading", name="Nothing has run here yet")).to_be_visible()
    assert own_tab.page.get_by_role("listitem").count() == 3
    own_tab.shoot("empty")
    os.kill(json.loads(own_project.home.dashboard.read_text(encoding="utf-8"))["pid"], signal.SIGTERM)
    until(lambda: not own_project.home.dashboard.exists(), what="the pages' file is removed")
    expect(own_tab.page.get_by_role("alert").filter(has_text="out of reach")).to_be_visible()


def test_runs_are_listed_filtered_and_followed(project: Project, tab: Tab) -> None:
    """A new run, a committed step and an end appear by themselves, and an open page is not built anew."""
    page = tab.page
    page.goto(project.entrance)
    expect(page).to_have_url(f"{project.url}/ui")
    drive = project.drive("/work/a <b>nice<i> notebook, 名前.ipynb", steps_total=2)
    row = page.locator(f"#run-{drive.run.id}")
    expect(row).to_contain_text("a <b>nice<i> notebook, 名前.ipynb")
    expect(row).to_contain_text("running")
    expect(row.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "0")
    row.evaluate("node => { node.mine = true }")
    drive.step("plan")
    expect(row.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "1")
    other = project.drive("/work/other.ipynb")
    expect(page.locator("tbody tr").first).to_have_id(f"run-{other.run.id}")
    assert row.evaluate("node => node.mine") is True, "the row was changed, not replaced"
    tab.shoot("runs")
    page.get_by_role("link", name="paused").click()
    expect(page.get_by_text("No run is paused")).to_be_visible()
    assert page.url == f"{project.url}/ui?status=paused"
    project.client.call(contract.CANCEL_RUN, contract.ByRun(run_id=other.run.id))
    page.get_by_role("link", name="cancelled").click()
    expect(row).to_have_count(0)
    page.locator(f"#run-{other.run.id}").get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("other.ipynb")


def test_a_run_shows_what_it_did_and_why(project: Project, tab: Tab) -> None:
    """Steps with reasons, attempts, errors, variables and outputs; no script of an output runs (guarantee 9)."""
    page = tab.page
    drive = project.drive("/work/agent.ipynb", parameters={"topic": "solid <i>state</i>"}, steps_total=3)
    variables = (
        Variable(name="results", type="list", shape="list[10]", bytes=42_000, preview="['<b>a</b>', …]"),
        Variable(name="client", type="OpenAI", state="unsaved", reason="it holds a connection"),
    )
    drive.step("search", outputs=outputs(), variables=variables)
    trace = "Traceback (most recent call last):\nValueError: <script>x</script>"
    drive.fail("analyse", ErrorInfo(name="ValueError", message="no <b>luck</b>", traceback=trace))
    page.goto(f"{project.url}/ui/runs/{drive.run.short}")
    search = page.get_by_role("region", name="step search")
    expect(search).to_contain_text("no checkpoint yet")
    expect(search.get_by_role("row", name="results")).to_contain_text("list[10]")
    expect(search.get_by_role("row", name="results")).to_contain_text("['<b>a</b>', …]")
    expect(search.get_by_role("row", name="client")).to_contain_text("it holds a connection")
    analyse = page.get_by_role("region", name="step analyse")
    expect(analyse).to_contain_text("ValueError: no <b>luck</b>")
    expect(analyse).to_contain_text("ValueError: <script>x</script>")
    expect(page.get_by_text("solid <i>state</i>")).to_be_visible()

    expect(search.get_by_text("found <b>42</b> passages")).to_be_visible()
    expect(search.get_by_text("1234567")).to_be_visible()
    picture = search.get_by_role("img", name="output 3 of the step, an image")
    assert picture.evaluate("node => node.decode().then(() => node.naturalWidth)") == 1
    frame = search.frame_locator("iframe")
    expect(frame.get_by_role("cell", name="solid")).to_be_visible()
    assert search.locator("iframe").get_attribute("sandbox") == ""
    frame.locator("#out").click()  # without permission to leave, a link of an output leads nowhere
    expect(page.get_by_role("heading", level=1)).to_contain_text("agent.ipynb")
    assert "pwned" not in page.title()
    assert page.url.startswith(project.url)

    search.get_by_text("2 variables").click()
    drive.begin("analyse", reason="asked for again")
    expect(page.locator("#timeline")).to_contain_text("asked for again")
    expect(search.get_by_text("found <b>42</b> passages")).to_be_visible()
    assert search.locator("details.variables").get_attribute("open") is None, "what was closed stays closed"
    tab.shoot("run")
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    tab.shoot("run-phone")


def test_outputs_of_any_size_do_not_kill_the_page(project: Project, tab: Tab) -> None:
    """50 MB of printed text: its beginning, its end, and how much is left out."""
    drive = project.drive("/work/loud.ipynb")
    text = "begin " + "all work and no play\n" * 2_500_000 + "the end"
    drive.step("print", outputs=[{"output_type": "stream", "name": "stdout", "text": text}])
    tab.page.goto(f"{project.url}/ui/runs/{drive.run.id}")
    step = tab.page.get_by_role("region", name="step print")
    expect(step.get_by_text("characters are left out")).to_be_visible()
    expect(step).to_contain_text("the end")


def test_an_altered_checkpoint_is_told_not_shown(project: Project, tab: Tab) -> None:
    """A blob that is not what was written is refused by name, and the rest of the page stands (guarantee 8)."""
    drive = project.drive("/work/agent.ipynb")
    recorded = drive.step(
        "search", outputs=[{"output_type": "stream", "name": "stdout", "text": "x" * 50_000}]
    )
    blob = LocalBlobs(project.home.blobs).path(recorded.digest)
    content = blob.read_bytes()
    blob.chmod(0o600)
    blob.write_bytes(content[:-9] + b"y" + content[-8:])
    tab.page.goto(f"{project.url}/ui/runs/{drive.run.id}")
    expect(tab.page.get_by_text("The outputs can't be shown")).to_contain_text("is not what was written")


def test_approve_in_the_inbox(project: Project, tab: Tab) -> None:
    """The value is shown, the answer arrives with name and comment, and stands (guarantee 5)."""
    page = tab.page
    drive = project.drive("/work/agent.ipynb")
    page.goto(f"{project.url}/ui/approvals")
    expect(page.get_by_role("heading", name="Approvals")).to_be_visible()
    wait = drive.ask("Publish <b>it</b>?", DRAFT, tags=("report",))
    card = page.locator(f"#wait-{wait.id}")
    expect(card.get_by_role("heading", name="Publish <b>it</b>?")).to_be_visible()
    expect(card.get_by_role("heading", name="Solid state")).to_be_visible()
    expect(card.get_by_text("<script>document.title='pwned'</script>").first).to_be_visible()
    expect(card).to_contain_text("agent.ipynb")
    expect(card).to_contain_text("step review")
    expect(page.get_by_role("navigation").get_by_label("open")).to_be_visible()
    comment = card.get_by_label("Comment")
    comment.fill("Looks good, 要確認 <b>")
    second = drive.ask("Send 1,204 e-mails?", {"to": "all", "dry_run": False})
    expect(page.locator(f"#wait-{second.id}")).to_contain_text('"dry_run": false')
    expect(comment).to_have_value("Looks good, 要確認 <b>")
    tab.shoot("approvals")
    card.get_by_role("button", name="Approve").click()
    expect(card.get_by_text("Approved by")).to_be_visible()
    expect(card.get_by_role("button")).to_have_count(0)
    answer = drive.answer_of(wait).answer
    assert answer is not None
    assert answer.approved
    assert answer.comment == "Looks good, 要確認 <b>"
    assert answer.by.endswith("(dashboard)")
    assert answer.value == DRAFT
    assert drive.answer_of(second).status is WaitStatus.OPEN
    page.reload()
    expect(page.locator(f"#wait-{second.id}")).to_be_visible()
    expect(card).to_have_count(0)


EDIT = {
    "type": "object",
    "$defs": {"Tone": {"enum": ["plain", "warm"], "type": "string"}},
    "properties": {
        "title": {"type": "string", "minLength": 3},
        "words": {"type": "integer", "minimum": 1, "description": "at most so many"},
        "send": {"type": "boolean"},
        "tone": {"$ref": "#/$defs/Tone"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "to": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["title", "words", "send", "tone"],
}


def test_a_form_is_filled_in_and_refused_until_it_fits(project: Project, tab: Tab) -> None:
    """Guarantee 11: what does not fit is named, nothing is answered by it, and what was entered stays."""
    page = tab.page
    drive = project.drive("/work/agent.ipynb")
    proposed = {"title": "Draft <b>", "words": 200, "send": False, "tone": "plain", "to": ["ann"]}
    wait = drive.ask("Edit it?", proposed, form=EDIT, reviewers=("ann", "bob"), deadline_in_s=9000)
    page.goto(f"{project.url}/ui/approvals/{wait.id}")
    expect(page.get_by_label("Title")).to_have_value("Draft <b>")
    expect(page.get_by_text("Asks ann, bob")).to_be_visible()
    page.get_by_label("Title").fill("Final")
    page.get_by_label("Words").fill("0")
    page.get_by_label("Send").check()
    page.get_by_label("Tone").select_option("warm")
    page.locator("[data-field=to]").fill('["bob"]')
    page.get_by_label("Answer as").select_option("bob")
    page.get_by_role("button", name="Approve").click()
    expect(page.locator("#notice")).to_contain_text("words: 0 is less than the minimum of 1")
    expect(page.get_by_label("Title")).to_have_value("Final")
    tab.shoot("approval-form")
    page.get_by_label("Words").fill("150")
    page.get_by_role("button", name="Approve").click()
    expect(page.get_by_text("with edits by")).to_contain_text("bob (dashboard)")
    answer = drive.answer_of(wait).answer
    assert answer is not None
    assert answer.value == {"title": "Final", "words": 150, "send": True, "tone": "warm", "to": ["bob"]}
    question = drive.ask("City?", form={"type": "string"}, kind=WaitKind.QUESTION)
    page.goto(f"{project.url}/ui/approvals")
    card = page.locator(f"#wait-{question.id}")
    card.get_by_label("City?", exact=True).fill("Berlin")
    tab.shoot("question")
    card.get_by_role("button", name="Answer").click()
    expect(card.get_by_text("Berlin")).to_have_count(1)
    assert (drive.answer_of(question).answer or answer).value == "Berlin"


def test_a_callback_url_answers_its_wait_without_a_token_once(project: Project) -> None:
    """A service outside posts to an address that it was given; no other address lets it in."""
    drive = project.drive("/work/agent.ipynb")
    wait = drive.ask(
        "Pay?", {"n": 0}, form={"properties": {"n": {"minimum": 1}}}, callback=digest_of("s3cret")
    )

    def post(secret: str, body: bytes) -> tuple[int, dict[str, object]]:
        sent = request.Request(f"{project.url}/v1/callbacks/{secret}", body, {"Host": "tunnel.example"})
        try:
            with request.urlopen(sent, timeout=30) as found:
                return found.status, json.load(found)
        except HTTPError as error:
            return error.code, json.load(error)

    assert post("other", b"")[0] == 404
    assert post("s3cret", b"nonsense")[0] == 422
    assert post("s3cret", b'{"approved": 7}')[0] == 422
    assert post("s3cret", b"x" * 1_100_000)[0] == 422
    status, said = post("s3cret", b'{"approved": true, "value": {"n": 0}}')
    assert (status, "less than the minimum" in str(said["message"])) == (422, True)
    assert drive.answer_of(wait).status is WaitStatus.OPEN
    assert post("s3cret", b'{"value": {"n": 2}, "by": "bank"}') == (200, {"answered": True})
    answer = drive.answer_of(wait).answer
    assert answer is not None
    assert (answer.approved, answer.value, answer.by) == (True, {"n": 2}, "bank")
    assert post("s3cret", b"")[0] == 404


def test_reject_on_the_page_of_the_approval(project: Project, context: BrowserContext, tab: Tab) -> None:
    """One approval has an address of its own; whoever comes second is told who was first (guarantee 5)."""
    page = tab.page
    drive = project.drive("/work/agent.ipynb")
    wait = drive.ask("Publish?", DRAFT)
    page.set_viewport_size(PHONE)
    page.goto(f"{project.url}/ui/approvals/{wait.id.lower()}")
    expect(page.get_by_role("heading", name="Publish?")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    tab.shoot("approval-phone")
    page.get_by_label("Comment").fill("numbers are missing")
    page.get_by_role("button", name="Reject").click()
    expect(page.get_by_text("Rejected by")).to_contain_text("(dashboard)")
    expect(page.get_by_role("blockquote")).to_have_text("numbers are missing")
    answer = drive.answer_of(wait).answer
    assert answer is not None
    assert not answer.approved
    assert answer.comment == "numbers are missing"
    tab.shoot("approval-answered")


def test_a_second_answer_is_refused_with_the_first(project: Project, tab: Tab) -> None:
    """Somebody answers elsewhere while the page's own click is under way: the page says who was first."""
    page = tab.page
    drive = project.drive("/work/agent.ipynb")
    wait = drive.ask("Publish?")
    page.goto(f"{project.url}/ui/approvals/{wait.id}")
    expect(page.get_by_role("button", name="Approve")).to_be_visible()
    pages = json.loads(project.home.dashboard.read_text(encoding="utf-8"))["pid"]
    os.kill(pages, signal.SIGSTOP)  # the page can't learn of the other answer before the click is on its way
    try:
        first = contract.AnswerWait(wait_id=wait.id, approved=False, by="ada", comment="no", nonce="1")
        project.client.call(contract.ANSWER_WAIT, first)
        page.get_by_role("button", name="Approve").click()
    finally:
        os.kill(pages, signal.SIGCONT)
    expect(page.locator("#notice")).to_contain_text("ada")
    expect(page.locator(".decision")).to_contain_text("Rejected by ada")
    answer = drive.answer_of(wait).answer
    assert answer is not None
    assert not answer.approved


def test_cancel_and_resume(project: Project, tab: Tab) -> None:
    """The buttons are those that the run's status allows, and say what happened."""
    page = tab.page
    drive = project.drive("/work/agent.ipynb")
    page.goto(f"{project.url}/ui/runs/{drive.run.id}")
    expect(page.get_by_role("button", name="Resume")).to_have_count(0)
    page.get_by_role("button", name="Cancel run").click()
    expect(page.locator("#notice")).to_contain_text("The run is cancelled")
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel run")).to_have_count(0)
    found = project.client.call(contract.GET_RUN, contract.ByRun(run_id=drive.run.id))
    assert found.status is RunStatus.CANCELLED


def test_the_page_outlives_the_coordinator(project: Project, tab: Tab) -> None:
    """Without a coordinator the page keeps what it shows and says so; it comes back by itself."""
    page = tab.page
    drive = project.drive("/work/agent.ipynb")
    page.goto(f"{project.url}/ui")
    row = page.locator(f"#run-{drive.run.id}")
    expect(row).to_be_visible()
    pid = json.loads(project.home.coordinator.read_text(encoding="utf-8"))["pid"]
    os.kill(pid, signal.SIGKILL)
    expect(page.get_by_role("alert").filter(has_text="What you see may be old")).to_be_visible()
    expect(row).to_be_visible()
    tab.shoot("away")
    project.client.call(contract.HEALTH, contract.Nothing())
    expect(page.get_by_text("What you see may be old")).to_have_count(0)


def test_what_does_not_exist_is_said(project: Project, tab: Tab) -> None:
    """An unknown run or approval: what, and where to go on."""
    for path, said in (("runs/ffffffff", "ffffffff"), ("approvals/000000", "000000")):
        project.client.call(contract.HEALTH, contract.Nothing())
        tab.page.goto(f"{project.url}/ui/{path}")
        expect(tab.page.get_by_role("heading", level=1)).to_contain_text(said)


def test_a_link_in_jupyter_leads_to_the_approval(project: Project, context: BrowserContext, tab: Tab) -> None:
    """Jupyter runs on localhost, the pages on 127.0.0.1: other sites to the browser, which keeps the strict cookie
    back from the link's first request. The reader sees the approval all the same, once let in."""
    drive = project.drive("/work/agent.ipynb")
    wait = drive.ask("Publish?")

    class Notebook(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f'<a href="{project.url}/ui/approvals/{wait.id}">answer</a>'.encode()
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notebook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = context.new_page()
        page.goto(f"http://localhost:{server.server_port}/")
        page.get_by_role("link", name="answer").click()
        expect(page.get_by_role("button", name="Approve")).to_be_visible()
        server.shutdown()


def test_nobody_gets_in_without_the_token(project: Project, context: BrowserContext) -> None:
    """A browser that was never let in sees the way in, and no data."""
    project.drive("/work/secret.ipynb")
    page = context.new_page()
    answer = page.goto(f"{project.url}/ui")
    assert answer is not None
    assert answer.status == 401
    expect(page.get_by_text("nbdurable up")).to_be_visible()
    assert "secret" not in page.content()
