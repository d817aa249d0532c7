"""The web application: pages, their files, recorded outputs, and the guard in front of all of it.

Owns the list of addresses. Knows neither how pages are drawn nor the process around it.
"""

from __future__ import annotations

import asyncio
import html
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from nbdurable import contract
from nbdurable.checkpoint import manifest
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.client import Client
from nbdurable.contract import ReadStep
from nbdurable.dashboard import outputs, view
from nbdurable.dashboard.guard import CALLBACKS, Guard
from nbdurable.errors import DurableError, UsageError
from nbdurable.security import load_key, load_token
from nbdurable.settings import Home

MAX_OUTPUTS_BYTES = 256_000_000
MAX_ANSWER_BYTES = 1_000_000

# Outputs are drawn on paper, as their authors saw them; their own document knows nothing of our colours.
_FRAME_STYLE = (
    "<!doctype html><style>body{margin:8px;background:#fff;color:#111;font:14px/1.5 system-ui,sans-serif}"
    "table{border-collapse:collapse;border:0}"
    "td,th{padding:2px 10px;text-align:right;border:0;border-bottom:1px solid #e5e5e5}"
    "img{max-width:100%}</style>"
)


def create_app(client: Client) -> Guard:
    """Return the whole application for a project, as ASGI."""
    from panel.io.fastapi import add_applications

    from nbdurable.dashboard.pages import applications

    home = client.home
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/ui/static", StaticFiles(directory=view.FOLDER / "static"), name="ui-static")

    @app.get("/", include_in_schema=False)
    @app.get("/ui/", include_in_schema=False)
    def start() -> RedirectResponse:
        return RedirectResponse("/ui", 303)

    @app.get("/ui/alive")
    def alive() -> JSONResponse:
        return JSONResponse({"alive": True}, headers={"cache-control": "no-store"})

    @app.post(CALLBACKS + "{secret}")
    async def callback(secret: str, request: Request) -> JSONResponse:
        try:
            answer = _callback_answer(secret, await _body(request))
            await asyncio.to_thread(client.call, contract.ANSWER_CALLBACK, answer)
        except DurableError as error:
            return JSONResponse(error.to_wire(), error.http_status)
        return JSONResponse({"answered": True})

    @app.get("/docs")
    def docs() -> HTMLResponse:
        try:
            return HTMLResponse(client.page("/docs"))
        except DurableError as error:
            return HTMLResponse(f"<p>{html.escape(str(error))}</p>", 503)

    @app.get("/ui/outputs")
    def show_outputs(run_id: str, step: str) -> HTMLResponse:
        body = _outputs_html(client, home, run_id, step).encode("utf-8", "replace")
        return HTMLResponse(body, headers={"cache-control": "no-store"})

    # Neither headers nor cookies of the request belong into the session's token, which stands in the page.
    add_applications(applications(client), app=app, title="nbdurable", include_headers=[], include_cookies=[])
    return Guard(app, load_token(home))


async def _body(request: Request) -> bytes:
    """Return what was posted; raises UsageError for more than an answer may have."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise UsageError(f"an answer has at most {view.size(MAX_ANSWER_BYTES)}")
    return body


def _callback_answer(secret: str, body: bytes) -> contract.AnswerCallback:
    """Return the answer that was posted: JSON, or nothing at all to approve; raises UsageError."""
    try:
        fields = json.loads(body or b"{}")
        answer = {"by": "callback", **fields, "secret": secret, "edited": "value" in fields}
        return contract.AnswerCallback.model_validate(answer)
    except (ValueError, TypeError):
        raise UsageError(
            "this is no answer",
            todo='post a JSON object: {"approved": true}, with "value", "comment" and "by" as you like',
        ) from None


def _outputs_html(client: Client, home: Home, run_id: str, step: str) -> str:
    """Return what a step displayed, as HTML; where that can't be read, a line that says why."""
    try:
        recorded = _read_outputs(client, home, run_id, step)
    except DurableError as error:
        shown = [outputs.Shown("note", f"The outputs can't be shown: {error.message}", error.todo)]
    else:
        shown = outputs.show(recorded)
    return view.render("outputs.html", outputs=shown, frame_style=_FRAME_STYLE)


def _read_outputs(client: Client, home: Home, run_id: str, step: str) -> list[Any]:
    """Return the recorded outputs of a step's checkpoint. Only JSON is read; nothing is unpickled."""
    checkpoint = client.call(contract.GET_STEP, ReadStep(run_id=run_id, step=step)).checkpoint
    if checkpoint is None:
        return []
    sealed = manifest.unseal(checkpoint.manifest, load_key(home), of=f"the checkpoint of step {step!r}")
    if sealed.outputs is None:
        return []
    if sealed.outputs.size > MAX_OUTPUTS_BYTES:
        return [
            {"output_type": "stream", "text": f"{view.size(sealed.outputs.size)} of outputs; {outputs.WHOLE}"}
        ]
    recorded = json.loads(bytes(manifest.read_blob(sealed.outputs, LocalBlobs(home.blobs))))
    return recorded if isinstance(recorded, list) else []
