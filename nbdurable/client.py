"""The client: finds or starts the project's coordinator, and calls its API across restarts.

Owns connections and repetition; every path and field name comes from `contract.py`. Knows nothing of how the
coordinator works, and imports nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from httptools import HttpParserError, HttpResponseParser

from nbdurable import __version__, contract, processes
from nbdurable.contract import Endpoint
from nbdurable.errors import CoordinatorError, CoordinatorUnreachable, DurableError, UsageError, from_wire
from nbdurable.models import Event, Sent, Shape
from nbdurable.policies import seconds, span
from nbdurable.security import load_token
from nbdurable.settings import Home, find_home
from nbdurable.telemetry import fault_point

Question = TypeVar("Question", bound=Shape)
Answer = TypeVar("Answer", bound=Shape)

START_S = 20.0  # a coordinator that does not answer after so long has not started
_CONNECT_S = 5.0
_TROUBLE = (OSError, HttpParserError)


class Client:
    """Calls the coordinator of a project; may be used from several threads at once.

    `home`: the project's state folder (default: `find_home()`). `start`: start a coordinator where none
    answers. `timeout_s`: how long a call is repeated while the coordinator is away.
    """

    def __init__(self, home: Home | None = None, *, start: bool = True, timeout_s: float = 30.0) -> None:
        self._idle: list[_Connection] = []  # as many as threads have called at once
        self.home = home or find_home()
        self._start = start
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._headers = ""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the kept connections; a later call opens a new one."""
        while self._idle:
            self._idle.pop().close()

    def call(
        self, endpoint: Endpoint[Question, Answer], question: Question, *, timeout_s: float | None = None
    ) -> Answer:
        """Ask the coordinator, and return its answer.

        Where the connection breaks, the question is sent again (to a coordinator that is started, if need be)
        until `timeout_s` is over: each question is safe to repeat. Raises the error that the coordinator
        answered, or CoordinatorUnreachable.
        """
        path, body = _encode(endpoint, _repeatable(question))
        response = self._exchange(
            endpoint.method,
            path,
            body,
            patience_s=self._timeout_s if timeout_s is None else timeout_s,
            held_s=float(getattr(question, "hold_s", 0.0)),
            on_sent=_commit_sent if endpoint is contract.COMMIT_STEP else None,
        )
        return endpoint.answer.model_validate_json(response.body)

    def ask(self, endpoint: Endpoint[Question, Answer], question: Question) -> Callable[[], Answer]:
        """Send a question, and return what waits for its answer, as `call` does: other work may be done meanwhile.

        Trouble of any kind is seen, and mended by asking again, when the answer is taken.
        """
        path, body = _encode(endpoint, question)
        asked: _Connection | None = None
        with contextlib.suppress(*_TROUBLE):
            asked = self._connection()
            asked.wait_at_most(self._timeout_s)
            asked.send(endpoint.method, path, self._headers, body)

        def take() -> Answer:
            if asked is not None:
                try:
                    response = self._taken(asked, asked.receive())
                except _TROUBLE:
                    asked.close()
                except BaseException:
                    asked.close()
                    raise
                else:
                    return endpoint.answer.model_validate_json(response.body)
            return self.call(endpoint, question)

        return take

    def send(
        self,
        event: str,
        payload: Any = None,
        *,
        idempotency_key: str | None = None,
        ttl: str | float | timedelta = contract.EVENT_LIFE_S,
        by: str = "",
    ) -> Sent:
        """Send an event to every run that waits for it (`durable.wait_for`) and whose match it fits.

        It is kept for `ttl` (7 days; at most 30): a wait that opens within that time takes the oldest event that
        fits it and that its run has not taken before. So each run gets it at most once, and it matters not which
        came first, the event or the wait; `ttl=0` reaches only those who wait now. `payload`: JSON. The same
        `idempotency_key` (per event name, for 7 days or `ttl`) sends once; with another payload it raises Conflict.
        Raises UsageError for a payload that is no JSON, is larger than 1 MB, or does not fit the schema of the runs
        that wait for it: then nothing is sent.
        """
        try:
            json.dumps(payload, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"the payload of {event!r} is not JSON: {error}",
                todo="send text, numbers, lists and dicts; nothing was sent",
            ) from None
        ttl_s = seconds(ttl)
        if not 0 < len(event) <= 200 or ttl_s > contract.MAX_EVENT_LIFE_S:
            raise UsageError(
                f"the event {event[:200]!r} can't be sent so, with a ttl of {span(ttl_s)}",
                todo="a name has 1 to 200 characters, and `ttl` is at most 30d; nothing was sent",
            )
        question = contract.SendEvent(
            event=event, payload=payload, idempotency_key=idempotency_key, ttl_s=ttl_s, by=by
        )
        return self.call(contract.SEND_EVENT, question)

    def page(self, path: str) -> str:
        """Return one of the coordinator's own pages, such as `/docs` or `/openapi.json`."""
        return self._exchange("GET", path, b"", patience_s=self._timeout_s).body.decode()

    def _exchange(
        self,
        method: str,
        path: str,
        body: bytes,
        *,
        patience_s: float,
        held_s: float = 0.0,
        on_sent: Callable[[], None] | None = None,
    ) -> _Response:
        deadline = time.monotonic() + patience_s
        failures = 0
        while True:
            try:
                connection = self._connection()
                try:
                    connection.wait_at_most(held_s + max(0.1, deadline - time.monotonic()))
                    connection.send(method, path, self._headers, body)
                    if on_sent is not None:
                        on_sent()
                    response = connection.receive()
                except BaseException:  # also an interrupt: the next call must not read this answer
                    connection.close()
                    raise
            except _TROUBLE as trouble:
                self._recover(trouble, deadline, failures)
                failures += 1
                continue
            return self._taken(connection, response)

    def _taken(self, connection: _Connection, response: _Response) -> _Response:
        """Keep the connection of a whole answer; raises the error that it may be."""
        if response.is_last:
            connection.close()
        else:
            self._idle.append(connection)
        if response.status == 200:
            return response
        raise _error(response.status, response.body)

    def follow(self, run_id: str, after: int = 0) -> Iterator[Event]:
        """Yield a run's events after the sequence number `after`, as they happen, until the run has ended."""
        while True:
            page = self.call(
                contract.READ_EVENTS, contract.ReadEvents(run_id=run_id, after=after, hold_s=contract.HOLD_S)
            )
            yield from page.events
            if page.events:
                after = page.events[-1].seq
            elif page.run.status.is_final:
                return

    def _connection(self) -> _Connection:
        if self._pid != os.getpid():  # after a fork the connections are the parent's
            self._idle, self._pid = [], os.getpid()
        try:
            return self._idle.pop()
        except IndexError:
            connection = _connect(self.home)
        if not self._headers:
            self._headers = (
                "Host: localhost\r\n"
                f"Authorization: Bearer {load_token(self.home)}\r\n"
                f"X-NBDurable-Version: {__version__}\r\n"
                "Content-Type: application/json\r\n"
            )
        return connection

    def _recover(self, trouble: Exception, deadline: float, failures: int) -> None:
        """See to it that a coordinator answers, after a call met `trouble`; raises CoordinatorUnreachable."""
        self.close()
        self._headers = ""
        if time.monotonic() >= deadline:
            raise self._unreachable(f"did not answer in time ({_named(trouble)})")
        if failures:
            time.sleep(min(0.5, 0.01 * 2**failures))
        if self._answers():
            return
        if not self._start:
            raise self._unreachable("is not running") from None
        try:
            with processes.lock(self.home.start_lock, timeout_s=START_S):
                if not self._answers():  # nobody else started one while this client waited for the lock
                    self._start_one()
        except processes.LockTimeout:
            raise self._unreachable(f"was being started by another process for {START_S:.0f} s") from None

    def _answers(self) -> bool:
        try:
            _connect(self.home).close()
        except _TROUBLE:
            return False
        return True

    def _start_one(self) -> None:
        self.home.create()
        load_token(self.home)
        child = processes.spawn(
            ["-m", "nbdurable.coordinator", "--home", str(self.home.root)],
            log=self._log,
            cwd=self.home.root,
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if child.poll() is not None:
                raise self._last_words() or self._unreachable(f"ended at once, status {child.returncode}")
            if time.monotonic() >= deadline:
                raise self._unreachable(f"was started and did not answer within {START_S:.0f} s")
            time.sleep(0.01)

    @property
    def _log(self) -> Path:
        return self.home.logs / "coordinator.log"

    def _last_words(self) -> DurableError | None:
        """Return the error that a coordinator which could not start left in its log."""
        for line in reversed(processes.tail(self._log, 3)):
            with contextlib.suppress(ValueError):
                if isinstance(body := json.loads(line), dict) and "error" in body:
                    return from_wire(body)
        return None

    def _unreachable(self, what: str) -> CoordinatorUnreachable:
        lines = "".join(f"\n    {line}" for line in processes.tail(self._log))
        return CoordinatorUnreachable(
            f"the coordinator of {self.home.root} {what}",
            todo=f"`nbdurable doctor` looks for the cause; its log is {self._log}"
            + (f", which ends:{lines}" if lines else ""),
        )


@dataclass
class _Response:
    """An answer as httptools' parser reports it."""

    status: int = 0
    body: bytes = b""
    is_complete: bool = False
    is_last: bool = False  # on its connection

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"connection":
            self.is_last = value.lower() == b"close"

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_complete = True


class _Connection:
    """A kept connection that speaks HTTP/1.1.

    `http.client` would do, but sends a question in two parts and reads headers as e-mail: half of a call's time.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def __del__(self) -> None:
        self.close()  # an answer that nobody takes any more

    def wait_at_most(self, seconds: float) -> None:
        self._socket.settimeout(seconds)

    def send(self, method: str, path: str, headers: str, body: bytes) -> None:
        head = f"{method} {path} HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode("ascii") + body)

    def receive(self) -> _Response:
        response = _Response()
        parser = HttpResponseParser(response)
        while not response.is_complete:
            data = self._socket.recv(65_536)
            if not data:
                raise ConnectionResetError("the connection was closed before the answer")
            parser.feed_data(data)
        response.status = parser.get_status_code()
        return response

    def close(self) -> None:
        self._socket.close()


def _connect(home: Home) -> _Connection:
    """Connect to where the coordinator says that it is; raises OSError where it is not."""
    try:
        place = json.loads(home.coordinator.read_text(encoding="utf-8"))
        url, pid = str(place["url"]), int(place["pid"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConnectionError(f"{home.coordinator} can't be read: {error}") from None
    if url.startswith("unix:"):
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(_CONNECT_S)
            connected.connect(url.removeprefix("unix:"))
        except OSError:
            connected.close()
            raise
        return _Connection(connected)
    if not processes.exists(pid):  # its port may be somebody else's by now, who must not see the token
        raise ConnectionError(f"the coordinator {pid} is gone")
    parts = urlsplit(url)
    connected = socket.create_connection((str(parts.hostname), parts.port or 80), _CONNECT_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _Connection(connected)


def _encode(endpoint: Endpoint[Any, Any], question: Shape) -> tuple[str, bytes]:
    """Return a question as path and body; a GET carries what differs from the defaults, null as nothing."""
    path = endpoint.path
    if "{" in path:
        fields = ((name, value) for name, value in question if f"{{{name}}}" in endpoint.path)
        path = path.format_map({name: quote(str(value), safe="") for name, value in fields})
    if endpoint.method == "POST":
        return path, question.model_dump_json().encode()
    others = question.model_dump(mode="json", exclude_defaults=True)
    given = {
        name: "" if value is None else value
        for name, value in others.items()
        if f"{{{name}}}" not in endpoint.path
    }
    return (f"{path}?{urlencode(given)}" if given else path), b""


def _repeatable(question: Shape) -> Shape:
    """Give a new run or event a key, so that repeating the wish after a lost answer makes no second one."""
    if isinstance(question, contract.CreateRun | contract.SendEvent) and question.idempotency_key is None:
        return question.model_copy(update={"idempotency_key": f"request-{uuid.uuid4().hex}"})
    return question


def _commit_sent() -> None:
    fault_point("commit-sent")


def _error(status: int, text: bytes) -> DurableError:
    try:
        return from_wire(json.loads(text))
    except (ValueError, AttributeError):
        return CoordinatorError(f"the coordinator answered {status}: {text[:200].decode('utf-8', 'replace')}")


def _named(trouble: Exception) -> str:
    return f"{type(trouble).__name__}: {trouble}" if str(trouble) else type(trouble).__name__
