"""The HTTP around the routes: who may ask, how much a body may hold, errors in one form, a line for each request."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from typing import get_type_hints
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafit.serving.errors import ApiError, as_api_error, client_gone, of_validation, shutting_down, unreadable
from lorafit.serving.routes import router
from lorafit.serving.service import Service
from lorafit.serving.settings import KEY_VARIABLE, LARGEST_BODY_BYTES, is_this_machine

_DRAINED_BYTES = 64 << 20  # of a body that is too large: who hears 413 only at the end of it has not sent it in vain
_BODY_SECONDS = 60.0  # that a body may take, so that none trickles in for ever
_SHOWN_CHARACTERS = 80  # of what a client has sent
_FREE = ("/health",)
_UNCOUNTED = ("/health", "/metrics")


def build_app(service: Service) -> ASGIApp:
    """The whole server as an ASGI application."""
    app = FastAPI(openapi_url=None)
    app.state.service = service
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, _tell)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(Exception, _tell)
    app.add_exception_handler(ApiError, _tell)
    return Gate(app, service)


async def _tell(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        told = of_validation(error.errors(), _fields(request))
        if told.param is None and "json" not in (request.headers.get("content-type") or ""):
            told = ApiError(
                400, "the body was not sent as JSON; send it with the header Content-Type: application/json"
            )
    elif isinstance(error, HTTPException) and error.status_code == 400:  # fastapi's, of a body that json cannot read
        told = unreadable()
    elif isinstance(error, HTTPException):
        place = f"{request.method} {request.url.path[:_SHOWN_CHARACTERS]}"
        told = ApiError(error.status_code, f"{place}: {str(error.detail).lower()}")
        told.headers |= error.headers or {}  # 405 says which methods there are
    else:
        told = as_api_error(error)
    request.state.note = told.note
    return JSONResponse(told.to_json(), told.status, told.headers)


def _fields(request: Request) -> list[str]:
    """Names that a body of the request's route may hold."""
    kinds = get_type_hints(request.scope["route"].endpoint).values()
    return [name for kind in kinds for name in getattr(kind, "model_fields", ())]


class Gate:
    """Stands before the routes: key, size of the body, shutdown; and writes the log.

    Args:
        app: The routes.
        service: Whose settings and state count.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's."""
        if scope["type"] != "http":
            return
        began, status = time.perf_counter(), 0

        async def note_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        scope["state"] = {}
        counted = scope["path"] not in _UNCOUNTED
        self._service.running += counted
        try:
            await self._let_in(scope, receive, note_status)
        except Exception as error:  # told to the client where that is still possible
            if not status:
                await _send(as_api_error(error), scope, receive, note_status)
        finally:
            self._service.running -= counted
            if counted:
                seconds, note = time.perf_counter() - began, scope["state"].get("note")
                parts = (f"{scope['method']} {scope['path'][:_SHOWN_CHARACTERS]} {status}", note, f"{seconds:.2f} s")
                line = ", ".join(filter(None, parts))  # of which a client may have written any letter
                if (code := scope["state"].get("failed", status)) >= 400:
                    self._service.metrics.http_error(code)
                self._service.reporter.info("".join(one if one.isprintable() else "�" for one in line))

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        body = b""
        if refused is None and scope["method"] == "POST":
            body, refused = await self._read(headers, receive)
        if refused is not None:
            await _send(refused, scope, receive, send)
            return
        is_read = scope["method"] != "POST"

        async def hand_on() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, hand_on, send)

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> ApiError | None:
        """Why a request is not even read."""
        key = self._service.settings.key
        given = headers.get(b"authorization", b"").strip()
        if key is not None and scope["path"] not in _FREE and not hmac.compare_digest(given, b"Bearer " + key.encode()):
            message = f"send the server's {KEY_VARIABLE} as Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key")
        origin, host = headers.get(b"origin"), headers.get(b"host")
        if key is None and origin is not None and not _is_here(origin):
            return ApiError(403, f"a page from elsewhere may not ask a server without a key; set {KEY_VARIABLE}")
        if key is None and host is not None and not _is_here(b"//" + host):  # a page's name that now leads here
            called = host.decode("latin-1")[:_SHOWN_CHARACTERS]
            message = f"a server without a key is called 127.0.0.1 or localhost, not '{called}'; set {KEY_VARIABLE}"
            return ApiError(403, message)
        if self._service.is_closing and scope["path"] not in _UNCOUNTED:
            return shutting_down()
        return None

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive) -> tuple[bytes, ApiError | None]:
        """The body; or the refusal of one that is too large, which is read on for a while and forgotten."""
        body, size, more = bytearray(), 0, True
        if b"expect" in headers and headers.get(b"content-length", b"").isdigit():  # the client waits for our word
            size = int(headers[b"content-length"]) if int(headers[b"content-length"]) > LARGEST_BODY_BYTES else 0
            more = not size
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while more and size <= _DRAINED_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b"", client_gone()
                    chunk = message.get("body", b"")
                    size, more = size + len(chunk), message.get("more_body", False)
                    if size <= LARGEST_BODY_BYTES:
                        body += chunk
        except TimeoutError:
            return b"", ApiError(408, f"the body was not here within {_BODY_SECONDS:g} seconds; send it again")
        if size <= LARGEST_BODY_BYTES:
            return bytes(body), None
        return b"", ApiError(413, f"the body is larger than {LARGEST_BODY_BYTES >> 20} MiB; send less")


def _is_here(address: bytes) -> bool:
    """Whether a page's address, or the name that a request calls the server by, is this machine's; `null` is not."""
    try:
        return is_this_machine(urlsplit(address.decode("latin-1")).hostname or "")
    except ValueError:
        return False


async def _send(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    scope["state"]["note"] = error.note
    await JSONResponse(error.to_json(), error.status, error.headers)(scope, receive, send)
