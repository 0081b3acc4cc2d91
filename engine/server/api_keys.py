"""Let only requests with one of the server's API keys through."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import error_json

# What monitors and browsers ask for without a key. The page's requests to the API need one.
_OPEN_PATHS = frozenset({"/", "/health", "/ping", "/metrics", "/version"})
_PAGE_FILES = "/page/"


class ApiKeys:
    """Refuse requests without a key, before their bodies are received.

    Args:
        keys: the keys, any of which will do; none: requests need none.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._digests or scope["type"] != "http" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        given = _keys_of(Headers(scope=scope))
        if any(self._is_valid(key) for key in given):
            await self._app(scope, receive, send)
            return
        message = "the API key is not one of this server's" if given else "this server needs an API key"
        body = error_json(
            scope["path"],
            401,
            f"{message}: send one as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'",
            code="invalid_api_key",
        )
        response = JSONResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _is_valid(self, key: str) -> bool:
        """Compare a key with all that are valid, in a time that tells nothing about them."""
        digest = _digest(key)
        return bool(sum([hmac.compare_digest(digest, valid) for valid in self._digests]))


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_PAGE_FILES)


def _digest(key: str) -> bytes:
    """Return a hash of a key, whose comparison does not depend on the key's length."""
    return hashlib.sha256(key.encode("utf-8")).digest()


def _keys_of(headers: Headers) -> list[str]:
    """Return the keys of a request: OpenAI's clients send a bearer token, Anthropic's an x-api-key."""
    keys = []
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        keys.append(token.strip())
    if key := headers.get("x-api-key"):
        keys.append(key)
    return keys
