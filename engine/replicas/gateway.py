"""Answer requests by replicas: the application in front of them, with the HTTP API of one server."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect

from ..server.bodies import Bodies, is_json
from ..server.completions import unless_disconnected
from ..server.errors import add_error_handlers, error_json, is_anthropic
from ..server.event_stream import encode
from ..server.limits import BusyError, Limits
from .deployment import ReplicaLostError
from .prompt_key import prompt_hashes
from .ray_router import Route
from .replica_metrics import merged

_log = logging.getLogger("cupaged.server")

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_ATTEMPTS = 2  # replicas that a request is sent to at most: one may be what ends them
_STATUS_SECONDS = 5.0  # in which replicas have to say how they are
_LOST = (RayActorError, ReplicaLostError)
_LOST_MESSAGE = "the replica that ran the request has ended; send the request again"
_STOPPED_MESSAGE = "the server is shutting down"


def create_gateway(
    handle: DeploymentHandle, limits: Limits, stopping: Callable[[], bool] = lambda: False
) -> FastAPI:
    """Create the application.

    Args:
        handle: of the deployment of replicas.
        limits: limits of bodies; replicas have those of requests.
        stopping: returns whether ``/health`` answers 503 because the gateway is stopped.
    """
    bodies = Bodies(limits, None)
    running = set[Any]()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        bodies.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.running = running
    add_error_handlers(app, {})
    # Each is a call of the deployment's method, and returns a generator.
    forward = handle.options(stream=True).forward

    async def health(request: Request) -> Response:
        return Response(status_code=200 if not stopping() and await _any_healthy(handle) else 503)

    for path, methods in (("/health", ["GET", "HEAD"]), ("/ping", ["GET", "HEAD", "POST"])):
        app.add_route(path, health, methods=methods)

    async def metrics(request: Request) -> Response:
        answers = await _ask_all(handle, "metrics")
        texts = dict(sorted(each for each in answers if not isinstance(each, BaseException)))
        return PlainTextResponse(merged(texts), media_type=CONTENT_TYPE_LATEST)

    app.add_route("/metrics", metrics, methods=["GET", "HEAD"])

    async def answer(request: Request) -> Response:
        body, hashes = b"", list[bytes]()
        if request.method == "POST" and is_json(request.headers.get("content-type", "")):
            body, hashes = await bodies.read(request, lambda body, _: (body, prompt_hashes(body)))
        route = Route(hashes)
        for attempt in range(1, _ATTEMPTS + 1):
            scope = request.scope
            parts = forward.remote(
                scope["method"], scope["path"], scope["query_string"], scope["headers"], body, route
            )
            running.add(parts)
            try:
                response = await unless_disconnected(request, _begin(request, parts, running))
            except RequestCancelledError:
                return _unavailable(request, _STOPPED_MESSAGE)
            except _LOST as error:
                _log.warning("a replica has ended with a request (attempt %d): %s", attempt, error)
                continue
            except BackPressureError:
                raise BusyError("too many requests wait: send the request again later") from None
            if response is None:
                raise ClientDisconnect
            if response.status_code != 503 or attempt == _ATTEMPTS:
                return response
            route = Route(hashes, avoid=response.headers["x-replica"])  # it stops, or its engine has failed
        return _unavailable(request, _LOST_MESSAGE)

    app.add_route("/{path:path}", answer, methods=_METHODS)
    return app


def end_requests(app: FastAPI) -> None:
    """End the requests that are still running with an error."""
    for parts in list(app.state.running):
        parts.cancel()


def _unavailable(request: Request, message: str) -> Response:
    body = error_json(request.scope["path"], 503, message)
    return JSONResponse(body, status_code=503, headers={"Retry-After": "1"})


async def _ask_all(handle: DeploymentHandle, method: str) -> list[Any]:
    """Return the result or the exception of a method of each replica; none if one takes too long."""
    try:
        return await handle.broadcast(method).results_async(timeout_s=_STATUS_SECONDS, return_exceptions=True)
    except (TimeoutError, DeploymentUnavailableError):
        return []


async def _any_healthy(handle: DeploymentHandle) -> bool:
    return any(each is True for each in await _ask_all(handle, "healthy"))


async def _begin(request: Request, parts: Any, running: set[Any]) -> Response:
    """Return an answer that is complete, or of which a part has come if it is streamed.

    So a replica that ends before anything was sent can be replaced by another one.
    """
    streams = False
    try:
        replica, status, headers = await anext(parts)
        kind = dict(headers).get(b"content-type", b"")
        if streams := kind.startswith(b"text/event-stream"):
            first = await anext(parts, b"")
            events = _events(request.scope["path"], first, parts, running)
            response: Response = StreamingResponse(events, status_code=status)
        else:
            content = b"".join([part async for part in parts])
            response = Response(content, status_code=status)
            headers = [*headers, (b"content-length", b"%d" % len(content))]
    except BaseException:
        streams = False
        parts.cancel()
        raise
    finally:
        if not streams:
            running.discard(parts)
    response.raw_headers = [*headers, (b"x-replica", replica.encode())]
    return response


async def _events(path: str, first: bytes, parts: Any, running: set[Any]) -> AsyncIterator[bytes]:
    """Yield the events of a stream, whole ones only, and an error if its replica ends."""
    try:
        rest = first
        while True:
            events, end, rest = rest.rpartition(b"\n\n")
            if end:
                yield events + end
            try:
                rest += await anext(parts)
            except StopAsyncIteration:
                break
        yield rest
    except _LOST as error:
        _log.warning("a replica has ended with a stream: %s", error)
        yield _last_event(path, _LOST_MESSAGE)
    except RequestCancelledError:
        yield _last_event(path, _STOPPED_MESSAGE)
    finally:
        running.discard(parts)
        parts.cancel()  # nothing if it has ended


def _last_event(path: str, message: str) -> bytes:
    """Return the event of an error that ends a stream."""
    error = error_json(path, 500, message)
    if is_anthropic(path):
        return f"event: error\ndata: {encode(error)}\n\n".encode()
    if path.endswith("/responses"):
        error = {"type": "error", "code": "server_error", "message": message, "param": None}
        return f"event: error\ndata: {encode(error)}\n\n".encode()
    return f"data: {encode(error)}\n\ndata: [DONE]\n\n".encode()
