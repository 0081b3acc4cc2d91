"""The end of a server: what runs may finish, what is new is refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .protocol import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _Refused(BaseException):
    """Goes through all of the application, up to `Drain`."""


class Drain:
    """An ASGI application around another one, which counts the POST requests that are being answered.

    Once it has begun to drain, new ones get 503 with ``Retry-After``, and so do those whose body is not
    whole. Everything else, as metrics, is answered to the end.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self.num_active = 0
        self._begun = asyncio.Event()
        self._deadline = math.inf

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    async def run(self, timeout: float) -> None:
        """Refuse what is new from now on, and wait for what runs, for so many seconds at most."""
        clock = asyncio.get_running_loop().time
        self._deadline = clock() + timeout
        self._begun.set()
        while self.num_active and clock() < self._deadline:
            await asyncio.sleep(0.05)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        whole = started = False

        async def receive_in_time() -> Message:
            nonlocal whole
            if whole:  # all that can come is that the client leaves
                return await receive()
            message = await self._unless_begun(receive)
            whole = not message.get("more_body", False)
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self.num_active += 1
        try:
            if self.begun:
                raise _Refused
            await self._app(scope, receive_in_time, noted)
        except _Refused:
            if not started:
                await self._refuse(send)
        except asyncio.CancelledError:
            # uvicorn cancels at last those whose client does not read; a traceback for each helps nobody.
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

    async def _refuse(self, send: Send) -> None:
        left = self._deadline - asyncio.get_running_loop().time()
        body = json.dumps(error_body("the server is shutting down", "server_error")).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "retry-after": str(max(1, math.ceil(left))),  # this server is gone then, another may be there
            "connection": "close",
        }
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 503, "headers": encoded})
        await send({"type": "http.response.body", "body": body})
