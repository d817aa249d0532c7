"""Requests of httpx, and of httpx2 that is like it, on their way through `ledger.py`.

Owns the one place in each where every client sends: `send` of `Client` and `AsyncClient`. Recorded are an answer's
status, headers and bytes as they came, before anything is decoded. Imports neither: a module that is there is changed
at once, one that is imported later when that happens. Knows no models and no runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdurable.kernel.ledger import Exchange, Recorded

NAMES = ("httpx", "httpx2")
_ENCODED = ("content-encoding", "content-length", "transfer-encoding")


@dataclass(frozen=True)
class Head:
    """An answer without its bytes, and what it was asked for with."""

    status: int
    headers: list[tuple[str, str]]
    version: bytes
    url: str
    asked_with: list[tuple[str, str]]
    decode: Callable[[Sequence[bytes]], bytes]  # returns the bytes that the chunks stand for


def install() -> None:
    """Let requests through `ledger.py`; again, it changes nothing."""
    for name in NAMES:
        if (module := sys.modules.get(name)) is not None:
            _change(module)
    if _importing not in sys.meta_path:
        sys.meta_path.insert(0, _importing)


def remove() -> None:
    """Put back what was there, unless somebody else has changed it since: then it only lets everything pass."""
    if _importing in sys.meta_path:
        sys.meta_path.remove(_importing)
    for name in NAMES:
        module = sys.modules.get(name)
        for client in () if module is None else (module.Client, module.AsyncClient):
            if (former := getattr(client.send, "__nbdurable_former__", None)) is not None:
                client.send = former


class _Importing(MetaPathFinder):
    """Changes a module right after its own code has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in NAMES else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_importing = _Importing()


def _change(module: Any) -> None:
    """Change the clients of a module; changed ones stay as they are."""
    if hasattr(module.Client.send, "__nbdurable_former__"):
        return
    send, send_async = module.Client.send, module.AsyncClient.send
    tape, async_tape, played = _streams(module)

    @functools.wraps(send)
    def recorded_send(self: Any, request: Any, *, stream: bool = False, **options: Any) -> Any:
        found = _exchange(request)
        if found is None:
            return send(self, request, stream=stream, **options)
        if (known := found.recorded()) is not None:
            response = _played(module, self, request, known, played)
        else:
            try:
                response = send(self, request, stream=True, **options)
            except BaseException:
                found.drop()
                raise
            _record(module, response, found, tape)
        if not stream:
            try:
                response.read()
            except BaseException:
                response.close()
                raise
        return response

    @functools.wraps(send_async)
    async def recorded_send_async(self: Any, request: Any, *, stream: bool = False, **options: Any) -> Any:
        found = _exchange(request)
        if found is None:
            return await send_async(self, request, stream=stream, **options)
        if (known := found.recorded()) is not None:
            response = _played(module, self, request, known, played)
        else:
            try:
                response = await send_async(self, request, stream=True, **options)
            except BaseException:
                found.drop()
                raise
            _record(module, response, found, async_tape)
        if not stream:
            try:
                await response.aread()
            except BaseException:
                await response.aclose()
                raise
        return response

    recorded_send.__nbdurable_former__ = send  # type: ignore[attr-defined]
    recorded_send_async.__nbdurable_former__ = send_async  # type: ignore[attr-defined]
    module.Client.send, module.AsyncClient.send = recorded_send, recorded_send_async


def _exchange(request: Any) -> Exchange | None:
    from nbdurable.kernel.ledger import exchange  # which asks for this module

    return exchange(request.method, str(request.url), lambda: request.content)


def _record(module: Any, response: Any, found: Exchange, tape: Any) -> None:
    """Let an answer's bytes be recorded while they are read; one that is an error is let pass."""
    if not response.is_success:
        found.drop()
        return
    read = response.is_stream_consumed  # by a hook of the client's; its bytes are decoded already
    headers = [
        (name, value) for name, value in response.headers.multi_items() if not (read and name in _ENCODED)
    ]

    def decode(chunks: Sequence[bytes]) -> bytes:
        whole = b"".join(chunks)
        try:
            return bytes(module.Response(200, headers=headers, content=whole).content)
        except Exception:
            return whole

    head = Head(
        status=response.status_code,
        headers=headers,
        version=response.extensions.get("http_version", b"HTTP/1.1"),
        url=str(response.request.url),
        asked_with=list(response.request.headers.multi_items()),
        decode=decode,
    )
    if read:
        found.take(response.content)
        found.keep(head)
    else:
        response.stream = tape(response.stream, found, head)


def _played(module: Any, client: Any, request: Any, known: Recorded, played: Any) -> Any:
    """Return a recorded answer as if it had just come."""
    response = module.Response(
        known.status,
        headers=known.headers,
        stream=played(known.chunks),
        request=request,
        extensions={"http_version": known.version},
    )
    response.default_encoding = getattr(client, "_default_encoding", "utf-8")
    response.elapsed = timedelta(seconds=known.duration_s)
    return response


def _streams(module: Any) -> tuple[Any, Any, Any]:
    """Return the streams of a module's answers: one that is recorded, its async twin, and one that is played."""

    class Tape(module.SyncByteStream):  # type: ignore[misc]
        def __init__(self, source: Any, found: Exchange, head: Head) -> None:
            self._source, self._found, self._head = source, found, head

        def __iter__(self) -> Iterator[bytes]:
            try:
                for chunk in self._source:
                    self._found.take(chunk)
                    yield chunk
            except GeneratorExit:
                raise  # who reads it may have seen its end: `close` finds out
            except BaseException:
                self._found.drop()
                raise
            self._found.keep(self._head)

        def close(self) -> None:
            self._source.close()
            self._found.keep(self._head, read_whole=False)

    class AsyncTape(module.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, source: Any, found: Exchange, head: Head) -> None:
            self._source, self._found, self._head = source, found, head

        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                async for chunk in self._source:
                    self._found.take(chunk)
                    yield chunk
            except GeneratorExit:
                raise
            except BaseException:
                self._found.drop()
                raise
            await self._found.keep_async(self._head)

        async def aclose(self) -> None:
            await self._source.aclose()
            await self._found.keep_async(self._head, read_whole=False)

    class Played(module.SyncByteStream, module.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, chunks: list[bytes]) -> None:
            self._chunks = chunks

        def __iter__(self) -> Iterator[bytes]:
            yield from self._chunks

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for chunk in self._chunks:
                yield chunk

    return Tape, AsyncTape, Played
