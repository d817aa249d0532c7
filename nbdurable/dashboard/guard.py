"""Who may talk to the pages: an ASGI middleware in front of everything, HTTP and websocket alike.

Owns token, cookie, Host and Origin checks and the security headers. Knows nothing of pages. The server
listens on the loopback interface only, which keeps other machines out, but neither other users of this one
(token), nor web pages in the user's own browser (Origin, SameSite), nor names that were made to point here
(Host: DNS rebinding).
"""

from __future__ import annotations

import hmac
import html
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CALLBACKS = "/v1/callbacks/"
"""Where addresses begin that end with the secret of one wait: they need no token, and answer that wait only."""

_LOOPBACK = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_REFUSED = 1008  # websocket close code: policy violation

nonce: ContextVar[str] = ContextVar("nonce", default="")
"""What marks the scripts of the page that is being made as ours."""


def _policy(script_nonce: str, host: str) -> str:
    # blob: is how Panel loads its components' modules. Images and frames of outputs reach no network.
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' 'nonce-{script_nonce}' blob:",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "font-src 'self' data:",
            f"connect-src 'self' ws://{host} blob:",  # not every browser counts websockets as 'self'
            "frame-src 'none'",
            "frame-ancestors 'self'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _headers(script_nonce: str, host: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-security-policy", _policy(script_nonce, host).encode()),
        (b"x-frame-options", b"SAMEORIGIN"),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
    ]


class Guard:
    """Lets in who shows the project's token once, and from then on its cookie.

    `token`: the project's token. The cookie holds a value derived from it, since a browser sends cookies of
    127.0.0.1 to every port there; its name is the project's own, so that two projects don't sign each other
    out.
    """

    def __init__(self, app: App, token: str) -> None:
        self._app = app
        self._token = token
        self._pass = hmac.new(token.encode(), b"nbdurable dashboard cookie", sha256).hexdigest()
        self.cookie = f"nbdurable-{sha256(self._pass.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        script_nonce = secrets.token_urlsafe(16)
        host = _header(scope, b"host") or ""
        ours = _headers(script_nonce, host if _LOOPBACK.fullmatch(host) else "127.0.0.1")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in ours}
                kept = [
                    (name, value) for name, value in message.get("headers", ()) if name.lower() not in names
                ]
                message = {**message, "headers": [*kept, *ours]}
            await send(message)

        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].startswith(CALLBACKS):
            await self._app(scope, receive, with_headers)  # from anywhere: the address is the secret
            return
        refusal = self._refusal(scope)
        if scope["type"] == "websocket":
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                await receive()  # the connect; closed before it is accepted, it becomes a 403
                await send({"type": "websocket.close", "code": _REFUSED, "reason": refusal[1][:120]})
            return
        if refusal is not None:
            status, sentence = refusal
            again = status == 401 and _came_from_elsewhere(scope)
            await _answer(with_headers, status, _notice(sentence, again=again))
        elif (clean := self._clean_url(scope)) is not None:
            cookie = f"{self.cookie}={self._pass}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
            extra = [
                (b"location", clean.encode()),
                (b"set-cookie", cookie.encode()),
                (b"cache-control", b"no-store"),
            ]
            await _answer(with_headers, 303, b"", extra)
        else:
            marked = nonce.set(script_nonce)
            try:
                await self._app(scope, receive, with_headers)
            finally:
                nonce.reset(marked)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return status and sentence for a request that may not pass, else None."""
        host = _header(scope, b"host")
        if host is None or _LOOPBACK.fullmatch(host) is None:
            return 403, "These pages answer only to 127.0.0.1 and localhost, not to the name that you used."
        origin = _header(scope, b"origin")
        unsafe = scope["type"] == "websocket" or scope["method"] not in _SAFE
        if (unsafe and origin is None) or (origin is not None and urlsplit(origin).netloc != host):
            return 403, "This request comes from another page than ours."
        given = _token_of(scope)
        known = (
            hmac.compare_digest(given.encode(), self._token.encode())
            if given is not None and not unsafe
            else hmac.compare_digest(self._cookie_of(scope).encode(), self._pass.encode())
        )
        return (
            None if known else (401, "These pages belong to somebody: you need the address with the token.")
        )

    def _cookie_of(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == b"cookie":
                try:
                    found = SimpleCookie(value.decode("latin-1")).get(self.cookie)
                except CookieError:
                    continue
                if found is not None:
                    return found.value
        return ""

    def _clean_url(self, scope: Scope) -> str | None:
        """Return the address without the token, where it had one."""
        if _token_of(scope) is None:
            return None
        rest = [pair for pair in _query(scope) if pair[0] != "token"]
        # A path that begins with two slashes would lead to another host.
        path = "/" + quote(scope["path"].lstrip("/"), safe="/:@-._~!$&'()*+,;=")
        return path + (f"?{urlencode(rest)}" if rest else "")


def _header(scope: Scope, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), None)


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)


def _token_of(scope: Scope) -> str | None:
    return next((value for name, value in _query(scope) if name == "token"), None)


def _came_from_elsewhere(scope: Scope) -> bool:
    """Tell whether a link on another site led here: then the browser kept the strict cookie back.

    Our own notice reloads itself once, and to that reload the browser adds the cookie.
    """
    return (
        _header(scope, b"sec-fetch-site") == "cross-site" and _header(scope, b"sec-fetch-mode") == "navigate"
    )


def _notice(sentence: str, *, again: bool) -> bytes:
    refresh = '<meta http-equiv="refresh" content="0">' if again else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>nbdurable</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}'
        "<style>:root{color-scheme:light dark}body{font:16px/1.6 system-ui,sans-serif;max-width:34rem;"
        "margin:18vh auto;padding:0 1.5rem}code{font:0.95em ui-monospace,monospace}</style></head><body>"
        f"<h1>nbdurable</h1><p>{html.escape(sentence)}</p>"
        "<p>In the project's folder, <code>nbdurable up</code> prints the address that lets you in.</p>"
        "</body></html>"
    ).encode()


async def _answer(
    send: Send, status: int, body: bytes, extra: list[tuple[bytes, bytes]] | None = None
) -> None:
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *(extra or [])]})
    await send({"type": "http.response.body", "body": body})
