"""Deploy replicas of the engine on Ray Serve: each an actor with a server of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from .ray_router import PrefixRouter, Route
from .server_process import Headers, ServerProcess, server_environment

_log = logging.getLogger("cupaged.server")

MAX_ATTEMPTS = 2  # to start a replica
_SECONDS_TO_EXIT = 10.0  # beyond the time that requests have to finish


class ReplicaLostError(Exception):
    """Report that a replica has ended before its answer was complete."""


class Replica:
    """Hold a server, and send it the requests that Ray Serve routes here.

    The actor ends with its server, so that Ray Serve starts another one.

    Args:
        arguments: of `python -m cupaged.serve`; not its address.
        directory: working directory of the server, if it exists on this machine.
    """

    async def __init__(self, arguments: Sequence[str], directory: str) -> None:  # type: ignore[misc]
        self._id = serve.get_replica_context().replica_id.unique_id
        if not os.path.isdir(directory):
            directory = os.getcwd()
        self._server = ServerProcess(arguments, server_environment(os.environ), directory)
        self._stopping = False
        await self._server.wait_until_ready()
        threading.Thread(target=self._end_with_server, name="cupaged-server", daemon=True).start()

    def _end_with_server(self) -> None:
        status = self._server.process.wait()
        if not self._stopping:
            _log.error("the server of replica %s has ended with status %d", self._id, status)
            logging.shutdown()
            os._exit(1)

    async def forward(
        self, method: str, path: str, query: bytes, headers: Headers, body: bytes, route: Route
    ) -> AsyncIterator[Any]:
        """Yield this replica's ID, the status and the headers of the answer, and then its body in parts.

        Args:
            route: read by the router.
        """
        try:
            async with self._server.request(method, path, query, headers, body) as answer:
                status, answered, parts = answer
                yield self._id, status, answered
                async for part in parts:
                    yield part
        except httpx.TransportError as error:
            raise ReplicaLostError(f"replica {self._id} has ended") from error

    async def metrics(self) -> tuple[str, str]:
        """Return this replica's ID and its metrics."""
        return self._id, await self._server.metrics()

    async def healthy(self) -> bool:
        return await self._server.healthy()

    async def check_health(self) -> None:
        """Let Ray Serve replace this replica when its engine fails or hangs."""
        if not await self.healthy():
            raise RuntimeError(f"the server of replica {self._id} answers /health with 503")

    def __del__(self) -> None:
        self._stopping = True
        if hasattr(self, "_server"):
            self._server.stop()


def replica_application(
    arguments: Sequence[str],
    *,
    num_replicas: int,
    autoscaling_config: Mapping[str, Any] | None,
    ray_actor_options: Mapping[str, Any],
    max_imbalance: int,
    max_ongoing_requests: int,
    shutdown_timeout: float,
) -> serve.Application:
    """Return the deployment of replicas, bound to their arguments.

    Args:
        arguments: of `python -m cupaged.serve`, for each replica.
        num_replicas: number of replicas, unless ``autoscaling_config`` is given.
        autoscaling_config: Ray Serve's settings of autoscaling.
        ray_actor_options: resources of a replica: ``num_cpus``, ``num_gpus``.
        max_imbalance: number of requests by which the replica with the longest beginning of a prompt may be
            busier than the least loaded one.
        max_ongoing_requests: maximum number of requests that a replica has at once.
        shutdown_timeout: seconds that the requests of a replica have to finish when it is stopped.
    """
    scale: dict[str, Any] = {"num_replicas": num_replicas}
    if autoscaling_config is not None:
        scale = {"autoscaling_config": dict(autoscaling_config)}
    deployment = serve.deployment(
        ray_actor_options=dict(ray_actor_options),
        max_ongoing_requests=max_ongoing_requests,
        max_constructor_retry_count=MAX_ATTEMPTS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=shutdown_timeout + _SECONDS_TO_EXIT,
        health_check_period_s=2,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"max_imbalance": max_imbalance}
        ),
        **scale,
    )(Replica)
    return deployment.bind(list(arguments), os.getcwd())
