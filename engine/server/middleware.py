"""Change requests on their way to the application, and its answers on their way back."""

from __future__ import annotations

import re
import uuid
from collections.abc import MutableMapping
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .access import Access
from .api_keys import ApiKeys
from .errors import is_anthropic
from .hosts import HostCheck

_USABLE_ID = re.compile(r"[!-~]{1,128}")  # visible ASCII: it is written to the log and into headers


def guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """Return an application that `access` protects, and adds an ID to every request."""
    app = ApiKeys(app, access.api_keys)
    if access.allowed_origins:  # outside of the keys: browsers ask beforehand, without a key
        app = CORSMiddleware(
            app,
            allow_origins=access.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app = RequestIds(HostCheck(app, access.allowed_hosts))
    return RootPath(app, access.root_path)


class HeadAsGet:
    """Answer HEAD requests like GET; the server, which knows the method, does not send the body.

    The scope says so in "head", for answers that would not end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET", "head": True}
        await self.app(scope, receive, send)


class RootPath:
    """Remove a prefix from paths that have it, so that it makes no difference whether a proxy does."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._root_path and scope["type"] == "http":
            path = scope["path"]
            if path == self._root_path:  # the page's links are relative to the path with a slash
                await RedirectResponse(f"{path}/")(scope, receive, send)
                return
            if path.startswith(f"{self._root_path}/"):
                path = path[len(self._root_path) :]
            scope = {**scope, "path": path, "root_path": self._root_path}
        await self._app(scope, receive, send)


class RequestIds:
    """Give every request an ID, its client's X-Request-Id if that is usable, and return it in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        usable = _USABLE_ID.fullmatch(given) is not None
        request_id = given if usable else uuid.uuid4().hex
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        # A client may send the same ID again while its first request runs.
        state["unique_id"] = f"{request_id}-{uuid.uuid4().hex[:16]}" if usable else request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if is_anthropic(scope["path"]):  # where its clients read it
                    headers["request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def unique_id(request: Request) -> str:
    """Return an ID that no other request has; it begins with the client's own, if there is one."""
    return getattr(request.state, "unique_id", None) or uuid.uuid4().hex
