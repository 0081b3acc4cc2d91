"""Serve replicas on a Ray that runs on this machine alone, from the process that a user starts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle

from ..server.access import Access
from ..server.drain import Drain
from ..server.http_server import HttpServer
from ..server.limits import Limits
from .deployment import replica_application
from .gateway import create_gateway, end_requests
from .ray_router import Route

APPLICATION = "cupaged"
_OBJECT_STORE_BYTES = 100_000_000  # answers are smaller than what goes through it


@contextlib.contextmanager
def local_replicas(
    arguments: Sequence[str],
    num_replicas: int,
    num_gpus: int,
    autoscaling_config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[DeploymentHandle]:
    """Start a local Ray and replicas on it, and stop both in the end.

    Args:
        arguments: of `python -m cupaged.serve`, for each replica.
        num_replicas: number of replicas, or the maximum with ``autoscaling_config``.
        num_gpus: number of GPUs of each replica; with none they share the cores.
        autoscaling_config: Ray Serve's settings of autoscaling.
        settings: those of `replica_application`.
    """
    # A cluster of its own, without a dashboard. Its log has what the replicas' servers write.
    cores = os.cpu_count() or 1
    share = max(cores // num_replicas, 1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default, which would starve engines on CPUs
    ray.init(
        address="local",
        num_cpus=max(cores, share * num_replicas),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        configure_logging=False,
    )
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        handle = serve.run(
            replica_application(
                arguments,
                num_replicas=num_replicas,
                autoscaling_config=autoscaling_config,
                ray_actor_options={"num_cpus": share, "num_gpus": num_gpus},
                **settings,
            ),
            name=APPLICATION,
            route_prefix=None,
        )
        yield handle
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


def model_card(handle: DeploymentHandle) -> Mapping[str, Any]:
    """Return what `/v1/models` of a replica says about the model under its first name."""
    _, *content = handle.options(stream=True).forward.remote("GET", "/v1/models", b"", [], b"", Route())
    return json.loads(b"".join(content))["data"][0]


class ReplicaServer(HttpServer):
    """Serve replicas over HTTP, with the access and the limits of one server."""

    def __init__(
        self,
        handle: DeploymentHandle,
        on_start: Callable[[], None],
        *,
        limits: Limits,
        access: Access,
        shutdown_timeout: float,
        tls: tuple[Path, Path] | None,
    ) -> None:
        self._gateway = create_gateway(handle, limits, lambda: self._drain.begun)
        super().__init__(Drain(self._gateway), on_start, limits, access, shutdown_timeout, tls)

    def _drained(self) -> None:
        end_requests(self._gateway)
