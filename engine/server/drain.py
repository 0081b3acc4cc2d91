"""Drain a server that stops: let running requests finish and refuse new ones."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import error_json

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _Refused(BaseException):
    """Unwind the application up to `Drain`; a BaseException, so that no handler catches it."""


class Drain:
    """Wrap an ASGI application, count its active POST requests and refuse new ones while draining.

    While draining, new POST requests and those with an incomplete body get 503 with ``Retry-After``. Other
    requests, such as those for metrics, are answered until the server stops.

    Attributes:
        num_active: number of POST requests that are being received or answered.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self.num_active = 0
        self._begun = asyncio.Event()
        self._deadline = math.inf

    @property
    def begun(self) -> bool:
        """Return whether draining has begun."""
        return self._begun.is_set()

    async def run(self, timeout: float) -> None:
        """Refuse new requests from now on, and wait at most ``timeout`` seconds for active ones."""
        clock = asyncio.get_running_loop().time
        self._deadline = clock() + timeout
        self._begun.set()
        while self.num_active and clock() < self._deadline:
            await asyncio.sleep(0.05)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body_complete = answer_started = False

        async def receive_unless_draining() -> Message:
            nonlocal body_complete
            if body_complete:  # only a disconnect can follow
                return await receive()
            message = await self._unless_begun(receive)
            body_complete = not message.get("more_body", False)
            return message

        async def tracked_send(message: Message) -> None:
            nonlocal answer_started
            answer_started = True
            await send(message)

        self.num_active += 1
        try:
            if self.begun:
                raise _Refused
            await self._app(scope, receive_unless_draining, tracked_send)
        except _Refused:
            if not answer_started:
                await self._refuse(scope["path"], send)
        except asyncio.CancelledError:
            # In the end uvicorn cancels requests whose clients do not read; suppress their tracebacks.
            if not self.begun:
                raise
        finally:
            self.num_active -= 1

    async def _unless_begun(self, receive: Receive) -> Message:
        if self.begun:
            raise _Refused
        message, begun = asyncio.ensure_future(receive()), asyncio.ensure_future(self._begun.wait())
        try:
            await asyncio.wait({message, begun}, return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                raise _Refused
            return message.result()
        finally:
            message.cancel()
            begun.cancel()

    async def _refuse(self, path: str, send: Send) -> None:
        seconds_left = self._deadline - asyncio.get_running_loop().time()
        body = json.dumps(error_json(path, 503, "the server is shutting down")).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "retry-after": str(max(1, math.ceil(seconds_left))),  # by then another server may have started
            "connection": "close",
        }
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 503, "headers": encoded})
        await send({"type": "http.response.body", "body": body})
