"""A real HTTP server that speaks the formats of OpenAI and Anthropic, whole and streamed, and counts requests.

It answers each prompt with that prompt in capitals, a word at a time. Run as a process of its own it outlives kernels:
`with ModelServer() as server:` gives it to a test; `server.url` ends with `/v1`.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Message = dict[str, Any]


class ModelServer:
    """The server, in threads of this process.

    `asked`: the bodies that came, in order. `failures`: status codes that the next requests get instead of an answer.
    `gate`: where it is set, a stream holds after its first word until the event is set.
    """

    def __init__(self) -> None:
        self.asked: list[Message] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []
        self.gate: threading.Event | None = None
        self.first_word = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def count(self) -> int:
        """Return how many requests came since the last time."""
        count = len(self.asked)
        self.asked.clear()
        self.headers.clear()
        return count

    def __enter__(self) -> ModelServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.gate is not None:
            self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                server.headers.append(dict(self.headers))
                if server.failures:
                    self._whole({"error": {"message": "busy", "type": "busy"}}, server.failures.pop(0))
                    return
                answer = _ANSWERS[self.path.removeprefix("/v1")](body)
                if not body.get("stream"):
                    self._whole(answer[0])
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Set-Cookie", "session=cookie-of-the-server")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for number, event in enumerate(answer[1:]):
                    self._chunk(event)
                    if number == 1 and server.gate is not None:
                        server.first_word.set()
                        server.gate.wait(60)
                self._chunk("")

            def _whole(self, answer: Message, status: int = 200) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                self.send_header("Set-Cookie", "session=cookie-of-the-server")
                self.send_header("X-Request-Id", f"req-{len(server.asked)}")
                self.end_headers()
                self.wfile.write(data)

            def _chunk(self, text: str) -> None:
                data = text.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

        return Handler


def _text(found: Any) -> str:
    if isinstance(found, list):
        return " ".join(_text(one) for one in found)
    if isinstance(found, dict):
        return _text(found.get("content", found.get("text", "")))
    return str(found or "")


def _words(prompt: str) -> list[str]:
    return [f"{word} " for word in prompt.upper().split()]


def _event(data: Message | str, name: str = "") -> str:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


def _chat(body: Message) -> list[Any]:
    prompt = _text(body["messages"][-1])
    words = _words(prompt)
    usage = {"prompt_tokens": 10, "completion_tokens": len(words), "total_tokens": 10 + len(words)}
    head = {"id": "chat-1", "created": 1, "model": f"{body['model']}-2026"}
    message = {"role": "assistant", "content": "".join(words).strip()}
    whole = {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": usage,
    }
    head["object"] = "chat.completion.chunk"
    chunks = [
        {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": word}}]} for word in words
    ]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": usage})
    return [whole, *(_event(chunk) for chunk in chunks), _event("[DONE]")]


def _responses(body: Message) -> list[Any]:
    given = body["input"]
    words = _words(_text(given if isinstance(given, str) else given[-1]))
    part = {"type": "output_text", "text": "".join(words).strip(), "annotations": []}
    message = {"id": "m1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    whole = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": body["model"],
        "status": "completed",
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 10,
            "input_tokens_details": {"cached_tokens": 4},
            "output_tokens": len(words),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 10 + len(words),
        },
    }
    deltas: list[Message] = [
        {
            "type": "response.output_text.delta",
            "delta": word,
            "item_id": "m1",
            "output_index": 0,
            "content_index": 0,
            "sequence_number": number,
            "logprobs": [],
        }
        for number, word in enumerate(words)
    ]
    last = {"type": "response.completed", "response": whole, "sequence_number": len(words)}
    return [whole, *(_event(one, one["type"]) for one in [*deltas, last])]


def _messages(body: Message) -> list[Any]:
    words = _words(_text(body["messages"][-1]))
    head = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "stop_sequence": None,
    }
    given = {"input_tokens": 6, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0}
    whole = {
        **head,
        "content": [{"type": "text", "text": "".join(words).strip()}],
        "stop_reason": "end_turn",
        "usage": {**given, "output_tokens": len(words)},
    }
    began = {**head, "content": [], "stop_reason": None, "usage": {**given, "output_tokens": 1}}
    events: list[Message] = [
        {"type": "message_start", "message": began},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
            for word in words
        ),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": len(words)},
        },
        {"type": "message_stop"},
    ]
    return [whole, *(_event(one, one["type"]) for one in events)]


def _embeddings(body: Message) -> list[Any]:
    given = body["input"] if isinstance(body["input"], list) else [body["input"]]
    data = [
        {"object": "embedding", "index": index, "embedding": [float(len(str(one))), 1.0]}
        for index, one in enumerate(given)
    ]
    usage = {"prompt_tokens": 3 * len(given), "total_tokens": 3 * len(given)}
    return [{"object": "list", "model": body["model"], "data": data, "usage": usage}]


_ANSWERS = {
    "/chat/completions": _chat,
    "/responses": _responses,
    "/messages": _messages,
    "/embeddings": _embeddings,
}
