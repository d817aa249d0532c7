"""The coordinator's HTTP: `contract.ENDPOINTS` served by an engine's handlers.

Owns parsing, the check of token and version, errors as JSON, the OpenAPI document and its page; decides
nothing. The endpoints are plain routes of the application: FastAPI's own validation would cost more than all
the rest of a call.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import ValidationError
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nbdurable import __version__, contract
from nbdurable.contract import Endpoint
from nbdurable.errors import DurableError, NotFound, UsageError, WrongVersion
from nbdurable.models import Shape
from nbdurable.security import check_token

Handler = Callable[[Any], Awaitable[Shape]]

_log = logging.getLogger("nbdurable.coordinator")
_REFERENCE = "#/components/schemas/{model}"
_OFTEN = {
    contract.COMMIT_CALLS,
    contract.COMMIT_STEP,
    contract.BEGIN_STEP,
    contract.HEARTBEAT,
}  # matched first


def create_app(handlers: Mapping[Endpoint[Any, Any], Handler], token: str) -> FastAPI:
    """Return the application that serves every endpoint of the contract to whoever shows the token."""
    app = FastAPI(title="nbdurable coordinator", version=__version__, docs_url=None, redoc_url=None)
    for endpoint in sorted(contract.ENDPOINTS, key=lambda one: one not in _OFTEN):
        app.router.routes.append(
            Route(endpoint.path, _Call(endpoint, handlers[endpoint]), methods=[endpoint.method])
        )
    document = _document(app.title, app.version)
    page = _page(document)
    app.openapi = lambda: document  # type: ignore[method-assign]
    app.add_api_route("/docs", lambda: HTMLResponse(page), include_in_schema=False)
    app.add_exception_handler(HTTPException, _no_such_path)
    app.add_middleware(_Guard, token=token)
    return app


class _Guard:
    """Lets nobody in without the token, nor a client of another version (except to end the coordinator)."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        authorization = version = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                authorization = value.decode("latin-1")
            elif name == b"x-nbdurable-version":
                version = value.decode("latin-1")
        try:
            check_token(self._token, authorization)
            if version not in (None, __version__) and scope["path"] != contract.SHUTDOWN.path:
                raise WrongVersion(
                    f"this client is nbdurable {version}, the coordinator is {__version__}",
                    todo="`nbdurable down` ends it; the next command starts one of its own version",
                )
        except DurableError as error:
            await _refusal(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Call:
    """One endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint[Any, Any], handler: Handler) -> None:
        self._endpoint = endpoint
        self._handler = handler
        self._write = endpoint.answer.__pydantic_serializer__.to_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._handler(await self._question(scope, receive))
            response = Response(self._write(answer), media_type="application/json")
        except ClientDisconnect:
            return
        except DurableError as error:
            response = _refusal(error)
        except Exception as error:
            _log.exception("%s %s", self._endpoint.method, self._endpoint.path)
            response = _refusal(
                DurableError(f"an error of the coordinator's own: {error!r}", todo="see its log")
            )
        await response(scope, receive, send)

    async def _question(self, scope: Scope, receive: Receive) -> Any:
        """Return what was asked; raises UsageError, naming what does not fit."""
        request = Request(scope, receive)
        try:
            if self._endpoint.method == "POST":
                fields = from_json(await request.body() or b"{}")
            else:
                fields = {name: value or None for name, value in request.query_params.items()}
            return self._endpoint.question.model_validate(fields | scope["path_params"])
        except ValidationError as error:
            raise _misfit(self._endpoint, error) from None
        except (ValueError, TypeError) as error:  # no JSON, or no object
            raise UsageError(f"the question is no JSON object: {error}", todo="see /openapi.json") from None


def _misfit(endpoint: Endpoint[Any, Any], error: ValidationError) -> UsageError:
    found = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()[:5])
    return UsageError(f"this is no {endpoint.question.__name__}: {found}", todo="see /openapi.json")


def _refusal(error: DurableError) -> Response:
    return Response(to_json(error.to_wire()), error.http_status, media_type="application/json")


async def _no_such_path(request: Request, error: Exception) -> Response:
    return _refusal(NotFound(f"there is no {request.method} {request.url.path}", todo="see /openapi.json"))


# The document ----------------------------------------------------------------------------------------------


def _document(title: str, version: str) -> dict[str, Any]:
    """Return the OpenAPI document of the contract."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in contract.ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    bearer = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": bearer},
        "security": [{"token": []}],
    }


def _operation(endpoint: Endpoint[Any, Any]) -> dict[str, Any]:
    """Return what OpenAPI says of an endpoint beyond its path: parameters, body, answers."""
    schema = endpoint.question.model_json_schema(ref_template=_REFERENCE)
    parameters = []
    for name, field in schema.get("properties", {}).items():
        in_path = f"{{{name}}}" in endpoint.path
        if in_path or endpoint.method == "GET":
            required = in_path or name in schema.get("required", ())
            where = "path" if in_path else "query"
            parameters.append({"name": name, "in": where, "required": required, "schema": field})
    operation: dict[str, Any] = {
        "summary": endpoint.about,
        "parameters": parameters,
        "responses": {
            "200": {"description": "The answer.", "content": _content(endpoint.answer)},
            "default": {
                "description": "An error: its slug, what happened, and what to do next.",
                "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}},
            },
        },
    }
    if endpoint.method == "POST":
        operation["requestBody"] = {"required": True, "content": _content(endpoint.question)}
    return operation


def _content(shape: type[Shape]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=shape.__name__)}}}


def _schemas() -> dict[str, Any]:
    """Return the JSON schemas of all shapes that the endpoints use."""
    found: dict[str, Any] = {
        "Error": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("error", "message", "todo")},
            "required": ["error", "message", "todo"],
        }
    }
    for endpoint in contract.ENDPOINTS:
        for shape in (endpoint.question, endpoint.answer):
            schema = shape.model_json_schema(ref_template=_REFERENCE)
            found |= schema.pop("$defs", {})
            found[shape.__name__] = schema
    return found


def _page(document: dict[str, Any]) -> str:
    """Return the OpenAPI document as one page without scripts."""
    rows = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            fields = ", ".join(one["name"] for one in operation.get("parameters", ()))
            body = operation.get("requestBody")
            question = (
                body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1] if body else fields
            )
            answer = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rsplit(
                "/", 1
            )[1]
            cells = (f"{method.upper()} {path}", operation["summary"], question, answer)
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    shapes = [
        f"<h3 id='{name}'>{name}</h3><p>{html.escape(schema.get('description', ''))}</p><pre>"
        + html.escape(
            "\n".join(f"{key}: {_type(field)}" for key, field in schema.get("properties", {}).items())
        )
        + "</pre>"
        for name, schema in sorted(document["components"]["schemas"].items())
    ]
    return (
        "<!doctype html><meta charset='utf-8'><title>nbdurable coordinator</title>"
        "<style>body{font:15px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}"
        "td:first-child{font-family:monospace}</style>"
        f"<h1>nbdurable coordinator {html.escape(document['info']['version'])}</h1>"
        "<p>Every request carries <code>Authorization: Bearer TOKEN</code>. Document: /openapi.json.</p>"
        "<table><tr><th>call<th>what<th>question<th>answer</tr>"
        + "".join(f"<tr>{row}</tr>" for row in rows)
        + "</table><h2>Shapes</h2>"
        + "".join(shapes)
    )


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[1]
    if "anyOf" in field:
        return " | ".join(_type(one) for one in field["anyOf"])
    if field.get("type") == "array":
        return f"[{_type(field.get('items', {}))}]"
    return str(
        field.get("const") or " | ".join(map(str, field.get("enum", ()))) or field.get("type", "any JSON")
    )
