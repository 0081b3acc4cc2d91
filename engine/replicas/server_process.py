"""Start a server in a process of its own, and send it requests over a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import httpx

Headers = Sequence[tuple[bytes, bytes]]

_POLL_SECONDS = 0.1
# Time for a server to say how it is: one that hangs must not keep those waiting who ask for all.
_STATUS_SECONDS = 3.0
# Headers about one connection, and what the other side sets itself.
_OF_CONNECTION = (
    *(b"connection", b"content-length", b"date", b"host", b"keep-alive", b"server"),
    *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
)


class ServerProcess:
    """Hold a server process, which gets a replica's requests.

    The engine needs the main thread of a process, which an actor of Ray does not give away; and what another
    process answers is what one server answers.

    Args:
        arguments: of `python -m cupaged.serve`; not its address.
        environment: environment variables of the process.
        directory: working directory of the process.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], directory: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="cupaged-")  # only this user may enter it
        path = str(Path(self._directory.name) / "socket")
        # No limits: the server has them.
        transport = httpx.AsyncHTTPTransport(
            uds=path, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64)
        )
        self._client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cupaged.engine.replicas.child", f"--uds={path}", *arguments],
            stdin=subprocess.PIPE,
            env=environment,
            cwd=directory,
        )

    async def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it has ended.
        """
        while True:
            if await self.healthy():
                return
            if (status := self.process.poll()) is not None:
                raise RuntimeError(f"the server ended with status {status} at its start; its log says why")
            await asyncio.sleep(_POLL_SECONDS)

    async def healthy(self) -> bool:
        """Return whether the server is there and says that it is well."""
        with contextlib.suppress(httpx.TransportError):
            return (await self._client.get("/health", timeout=_STATUS_SECONDS)).status_code == 200
        return False

    async def metrics(self) -> str:
        return (await self._client.get("/metrics", timeout=_STATUS_SECONDS)).text

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, path: str, query: bytes, headers: Headers, body: bytes
    ) -> AsyncIterator[tuple[int, Headers, AsyncIterator[bytes]]]:
        """Send a request, and hold the status, the headers, and the body of its answer as it comes.

        To leave before the end closes the connection, and so aborts the request.
        """
        url = httpx.URL("http://localhost", raw_path=quote(path).encode() + (b"?" + query if query else b""))
        request = self._client.build_request(method, url, headers=_passed_on(headers), content=body)
        response = await self._client.send(request, stream=True)
        try:
            yield response.status_code, _passed_on(response.headers.raw), response.aiter_raw()
        finally:
            await response.aclose()

    def stop(self) -> None:
        """End the server, whose requests may finish first, and wait for it."""
        self.process.terminate()
        self.process.wait()
        self._directory.cleanup()


def _passed_on(headers: Headers) -> Headers:
    return [pair for pair in headers if pair[0].lower() not in _OF_CONNECTION]


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of an actor's server: without the key, which the gateway has checked."""
    return {name: value for name, value in environment.items() if name != "CUPAGED_API_KEY"}
