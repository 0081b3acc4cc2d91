"""Which names of the server requests may use: a page anywhere can have its own name point to this machine
(DNS rebinding), and browsers then let it talk to a server here as to its own."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .protocol import error_body, shown


def allowed_hosts(bound_to: str, host: str, more: Collection[str]) -> frozenset[str] | None:
    """Return the names that the Host header may have; None is any.

    Args:
        bound_to: the address that the server listens on.
        host: how that was named.
        more: names that the user allows; "*" is any.
    """
    if "*" in more or not (more or _is_loopback(bound_to)):
        return None
    return frozenset(name.lower() for name in ("localhost", bound_to, host, *more))


class HostCheck:
    """Refuses requests for other hosts. Loopback addresses are always allowed: they are not names."""

    def __init__(self, app: ASGIApp, allowed: frozenset[str] | None) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is None or self._allowed is None or self._is_allowed(host):  # browsers always name one
            await self._app(scope, receive, send)
            return
        message = (
            f"the host {shown(host)} is not allowed: use localhost, or start the server with --allowed-hosts"
        )
        body = error_body(message, "invalid_request_error")
        await JSONResponse(body, status_code=403, headers={"Connection": "close"})(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        parts = re.fullmatch(r"(?:\[([\da-fA-F:.]+)\]|([^:\[\]]+))(?::\d*)?", host)
        if parts is None:
            return False
        name = (parts[1] or parts[2]).lower().removesuffix(".")
        return name in (self._allowed or ()) or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
