"""Add the routes that operators and clients ask beside completions: models, health, version, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import cupaged

from ..llm_engine import LLMEngine
from .errors import ERRORS, OTHER_ERRORS, Responses, UnknownModelError
from .fields import shown
from .metrics import Metrics

_UNHEALTHY: Responses = {
    503: {"description": "The engine has failed, a step of it hangs, or the server stops"}
}


class ModelNames:
    """Hold the names that the model has in requests; the first is that in answers."""

    def __init__(self, names: str | Sequence[str]) -> None:
        self.all = [names] if isinstance(names, str) else list(names)

    @property
    def first(self) -> str:
        return self.all[0]

    def check(self, name: str) -> None:
        """Check that a request's model is this server's.

        Raises:
            UnknownModelError: it is not.
        """
        if name not in self.all:
            served = ", ".join(map(repr, self.all))
            raise UnknownModelError(f"the model {shown(name)} does not exist; this server has {served}")


def add_operations(
    app: FastAPI, names: ModelNames, engine: LLMEngine, metrics: Metrics, healthy: Callable[[], bool]
) -> None:
    """Add the routes.

    Args:
        healthy: returns whether the server can answer requests.
    """
    card = {
        "object": "model",
        "created": int(time.time()),
        "owned_by": "cupaged",
        "root": engine.model_name,
        "parent": None,
        "max_model_len": engine.max_model_len,
        "has_chat_template": bool(engine.tokenizer.chat_template),
        "default_sampling_params": engine.sampling_defaults,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, **card} for name in names.all]}

    # Hub IDs and directories contain slashes.
    @app.get("/v1/models/{name:path}", responses={404: ERRORS[404], **OTHER_ERRORS})
    async def model(name: str) -> dict[str, Any]:
        names.check(name)
        return {"id": name, **card}

    async def health() -> Response:
        return Response(status_code=200 if healthy() else 503)

    for path, methods in (("/health", ["GET"]), ("/ping", ["GET", "POST"])):
        for method in methods:
            app.add_api_route(
                path,
                health,
                methods=[method],
                operation_id=f"{method.lower()}_{path[1:]}",
                response_class=Response,
                responses=_UNHEALTHY,
            )

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": cupaged.__version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
