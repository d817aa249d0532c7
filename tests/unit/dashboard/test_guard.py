"""Nobody uses the pages but the person who was given the address (HTTP and websocket, on the real application)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bokeh.util.token import get_token_payload

from nbdurable.client import Client
from nbdurable.dashboard.app import create_app
from nbdurable.dashboard.guard import Guard
from nbdurable.security import load_token
from nbdurable.settings import Home

# Panel 1.9 makes a Tornado request by arguments that Tornado 6.7 will drop; our requirement keeps it below.
pytestmark = [
    pytest.mark.timeout(20),
    pytest.mark.filterwarnings("ignore:The .* to HTTPServerRequest:DeprecationWarning"),
]

HOST = "127.0.0.1:8977"
OURS = f"http://{HOST}"
FOREIGN = "https://evil.example"
ADDRESSES = [
    "/",
    "/ui",
    "/ui/approvals",
    "/ui/runs/x",
    "/ui/outputs",
    "/ui/alive",
    "/static/js/bokeh.min.js",
    "/none",
]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str


class Browser:
    """Speaks ASGI to the application, with headers as they come over the wire."""

    def __init__(self, app: Guard, token: str, runner: asyncio.Runner) -> None:
        self.app, self.token, self.run = app, token, runner.run

    def http(
        self, path: str, query: str = "", method: str = "GET", host: str | None = HOST, **headers: str
    ) -> Answer:
        return self.run(self._http(path, query, method, host, headers))

    def sign_in(self) -> str:
        """Return the cookie that the token is exchanged for."""
        return self.http("/ui", f"token={self.token}").headers["set-cookie"].split(";")[0]

    def websocket(self, *, host: str = HOST, protocols: tuple[str, ...] = (), **headers: str) -> str:
        """Return the type of the first message that a websocket is answered with."""
        return self.run(self._websocket(host, protocols, headers))

    async def open_page(self, cookie: str) -> str:
        """Open the list of runs and its websocket, as one browser tab; return how the websocket is answered."""
        page = await self._http("/ui", "", "GET", HOST, {"cookie": cookie})
        token = re.search(r'"token":"([^"]+)"', page.body)
        assert token is not None, page.body[:500]
        return await self._websocket(HOST, ("bokeh", token[1]), {"cookie": cookie, "origin": OURS})

    async def _http(
        self, path: str, query: str, method: str, host: str | None, headers: dict[str, str]
    ) -> Answer:
        sent: list[dict[str, Any]] = []
        body_sent = False

        async def receive() -> dict[str, Any]:
            nonlocal body_sent
            if body_sent:
                await asyncio.Event().wait()  # the browser stays connected
            body_sent = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(_scope("http", path, query, host, headers) | {"method": method}, receive, send)
        body = b"".join(message.get("body", b"") for message in sent[1:])
        found = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, body.decode("utf-8", "replace"))

    async def _websocket(self, host: str, protocols: tuple[str, ...], headers: dict[str, str]) -> str:
        sent: list[dict[str, Any]] = []
        incoming = iter([{"type": "websocket.connect"}])

        async def receive() -> dict[str, Any]:
            return next(incoming, {"type": "websocket.disconnect", "code": 1000})

        async def send(message: Any) -> None:
            sent.append(message)

        scope = _scope("websocket", "/ui/ws", "", host, headers) | {"subprotocols": list(protocols)}
        await self.app(scope, receive, send)
        return str(sent[0]["type"])


def _scope(kind: str, path: str, query: str, host: str | None, headers: dict[str, str]) -> dict[str, Any]:
    named = {"host": host} if host is not None else {}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http" if kind == "http" else "ws",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in named.items()],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8977),
        "state": {},
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    home = Home(tmp_path_factory.mktemp("project") / ".nbdurable").create()
    with Client(home, start=False, timeout_s=0.1) as client, asyncio.Runner() as runner:
        yield Browser(create_app(client), load_token(home), runner)


@pytest.mark.parametrize("path", ADDRESSES)
def test_without_token_there_is_only_the_way_in(browser: Browser, path: str) -> None:
    """Every address, files and unknown ones included, says how to get in, and nothing else."""
    answer = browser.http(path)
    assert answer.status == 401
    assert "nbdurable up" in answer.body
    assert "set-cookie" not in answer.headers
    assert browser.token not in answer.body


@pytest.mark.parametrize("given", ["", "x", "0" * 64])
def test_a_wrong_token_is_refused(browser: Browser, given: str) -> None:
    """No cookie is given for it, even beside a good cookie."""
    for headers in ({}, {"cookie": browser.sign_in()}):
        answer = browser.http("/ui", f"token={given}", **headers)
        assert answer.status == 401
        assert "set-cookie" not in answer.headers


def test_the_token_is_exchanged_for_a_cookie(browser: Browser) -> None:
    """The address loses the token, keeps everything else, and the cookie is out of reach of scripts and sites."""
    answer = browser.http("/ui/runs/\u00e4 b", f"status=failed&token={browser.token}&x=%26")
    assert answer.status == 303
    assert answer.headers["location"] == "/ui/runs/%C3%A4%20b?status=failed&x=%26"
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert browser.token not in cookie, (
        "other ports of 127.0.0.1 see the cookie: it must not open the coordinator"
    )
    assert browser.http("/ui/alive", cookie=cookie).status == 200


@pytest.mark.parametrize("path", ["//evil.example/ui", "///evil.example", "/\\evil.example", "/a//b"])
def test_the_exchange_never_leads_to_another_host(browser: Browser, path: str) -> None:
    """An address that begins with two slashes would be another host's."""
    location = browser.http(path, f"token={browser.token}").headers["location"]
    assert re.match(r"/[^/\\]", location), location


def test_cookies_that_are_not_ours_are_refused(browser: Browser) -> None:
    """A damaged one, one with the token itself, one of another project."""
    name, _, value = browser.sign_in().partition("=")
    for cookie in (
        f"{name}=",
        f"{name}={value[:-1]}",
        f"{name}={browser.token}",
        f"other={value}",
        ";;=;\u00e9",
    ):
        assert browser.http("/ui", cookie=cookie).status == 401


def test_projects_do_not_sign_each_other_out(browser: Browser, tmp_path: Path) -> None:
    """Cookies of one address are shared by all its ports, so each project's has a name of its own."""
    home = Home(tmp_path / ".nbdurable").create()
    other = Guard(browser.app._app, load_token(home))
    assert other.cookie != browser.app.cookie
    both = f"{other.cookie}=x; {browser.sign_in()}"
    assert browser.http("/ui/alive", cookie=both).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8977",
        "127.0.0.1.evil.example",
        "",
        "[",
        None,
        "a@127.0.0.1",
        "127.0.0.1; x",
    ],
)
def test_forged_hosts_are_refused(browser: Browser, host: str | None) -> None:
    """DNS rebinding: a name that was made to point to 127.0.0.1 opens nothing, even with cookie and token."""
    cookie = browser.sign_in()
    assert browser.http("/ui", host=host, cookie=cookie).status == 403
    assert browser.http("/ui", f"token={browser.token}", host=host).status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "[::1]:8977"])
def test_loopback_hosts_are_served(browser: Browser, host: str) -> None:
    """Any port: a tunnel may have another one."""
    assert browser.http("/ui/alive", host=host, cookie=browser.sign_in()).status == 200


def test_forged_origins_are_refused(browser: Browser) -> None:
    """Other sites can't make the reader's browser do anything here, nor read."""
    cookie = browser.sign_in()
    for origin in (FOREIGN, "null", "http://127.0.0.1:8888", "http://localhost:8977"):
        for method in ("GET", "POST", "DELETE"):
            assert browser.http("/ui/alive", method=method, cookie=cookie, origin=origin).status == 403
    assert browser.http("/ui/alive", method="POST", cookie=cookie).status == 403
    passed = browser.http("/ui/alive", method="POST", cookie=cookie, origin=OURS)
    assert passed.status == 405, "the guard let it through, and the application has no such method"


def test_a_token_in_the_address_does_not_excuse_an_unsafe_request(browser: Browser) -> None:
    """Only the cookie, which other sites can't make the browser send, lets a POST through."""
    assert browser.http("/ui/alive", f"token={browser.token}", method="POST", origin=OURS).status == 401


def test_websockets_are_guarded(browser: Browser) -> None:
    """bokeh-fastapi checks neither Origin nor anything else: whoever is not let in is closed before the accept."""
    cookie = browser.sign_in()
    assert browser.websocket(origin=OURS) == "websocket.close"
    assert browser.websocket(cookie=cookie) == "websocket.close"
    assert browser.websocket(cookie=cookie, origin=FOREIGN) == "websocket.close"
    assert browser.websocket(cookie=cookie, origin="http://127.0.0.1:8888") == "websocket.close"
    assert (
        browser.websocket(cookie=cookie, origin="http://evil.example", host="evil.example")
        == "websocket.close"
    )
    assert browser.run(browser.open_page(cookie)) == "websocket.accept"


@pytest.mark.parametrize(
    "path", ["/ui", "/ui/approvals", "/ui/static/pages.css", "/none", "/static/js/bokeh.min.js"]
)
@pytest.mark.parametrize("inside", [True, False])
def test_every_answer_has_the_security_headers(browser: Browser, path: str, inside: bool) -> None:
    """No outside source of anything, no framing by others, no guessing of types, no address passed on."""
    headers = browser.http(path, **({"cookie": browser.sign_in()} if inside else {})).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'self'"
    assert not re.search(
        r"https?:|\*|unsafe-eval|wss?://(?!127\.0\.0\.1:8977 )", headers["content-security-policy"]
    )
    assert "unsafe-inline" not in policy["script-src"]
    assert headers["x-frame-options"] == "SAMEORIGIN"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_only_scripts_of_the_page_itself_run(browser: Browser) -> None:
    """Each script tag has the nonce of its own answer; nothing comes from elsewhere."""
    cookie = browser.sign_in()
    pages = [browser.http("/ui", cookie=cookie) for _ in range(2)]
    nonces = []
    for page in pages:
        found = re.search(r"'nonce-([^']+)'", page.headers["content-security-policy"])
        assert found is not None
        tags = re.findall(r"<script\b[^>]*>", page.body)
        assert tags
        assert all(f'nonce="{found[1]}"' in tag for tag in tags)
        assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page.body)
        nonces.append(found[1])
    assert nonces[0] != nonces[1]


def test_the_page_does_not_repeat_the_cookie(browser: Browser) -> None:
    """Bokeh writes the request's headers and cookies into the page, where scripts could read them; not here."""
    cookie = browser.sign_in()
    page = browser.http("/ui", cookie=cookie, accept_language="de")
    token = re.search(r'"token":"([^"]+)"', page.body)
    assert token is not None
    payload = get_token_payload(token[1])
    assert payload["cookies"] == {}
    assert payload["headers"] == {}
    assert cookie.partition("=")[2] not in page.body


def test_a_link_from_another_site_works_at_the_second_try(browser: Browser) -> None:
    """A strict cookie is kept back when a link on another site (Jupyter on localhost) leads here; the notice
    reloads itself once, which is a request of our own page."""
    navigation = {"sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    first = browser.http("/ui/approvals/7K2M9Q", sec_fetch_site="cross-site", **navigation)
    again = browser.http("/ui/approvals/7K2M9Q", sec_fetch_site="same-origin", **navigation)
    assert first.status == again.status == 401
    assert 'http-equiv="refresh"' in first.body
    assert "refresh" not in again.body


def test_a_callback_needs_no_token_and_opens_nothing_else(browser: Browser) -> None:
    """Who has such an address may post to it from anywhere; reading it, or going on from it, needs the token."""
    assert browser.http("/v1/callbacks/secret", method="POST", host="tunnel.example").status == 500
    assert browser.http("/v1/callbacks/secret").status == 401
    assert browser.http("/v1/callbacks", method="POST", origin=OURS).status == 401
    assert browser.http("/v1/callbacks/../ui", method="POST").status in (404, 405)
