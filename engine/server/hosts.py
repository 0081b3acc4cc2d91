"""Check the Host header of requests, against DNS rebinding.

Any web page can make its own host name resolve to this machine, and browsers then let it send requests to a
server here as if it were its own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import error_json
from .fields import shown


def allowed_hosts(bound_to: str, host: str, more: Collection[str]) -> frozenset[str] | None:
    """Return the names that the Host header may have; None: any.

    Args:
        bound_to: address that the server listens on.
        host: name of that address on the command line.
        more: further names that the user allows; "*": any.
    """
    if "*" in more or not (more or _is_loopback(bound_to)):
        return None
    return frozenset(name.lower() for name in ("localhost", bound_to, host, *more))


class HostCheck:
    """Refuse requests for other hosts than the allowed ones and loopback addresses.

    Args:
        allowed: names in lower case; None: any.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str] | None) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is None or self._allowed is None or self._is_allowed(host):  # browsers always send the header
            await self._app(scope, receive, send)
            return
        message = (
            f"the host {shown(host)} is not allowed: use localhost, or start the server with --allowed-hosts"
        )
        body = error_json(scope["path"], 403, message)
        await JSONResponse(body, status_code=403)(scope, receive, send)

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
