"""Deploy the gateway on Ray Serve, whose proxies then receive the requests."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from ..server.access import Access
from ..server.limits import Limits
from ..server.middleware import guarded
from .gateway import create_gateway

_MAX_ONGOING_REQUESTS = 10_000  # the replicas have limits


@serve.ingress()
class Gateway:
    """Answer requests by a deployment of replicas.

    Args:
        limits: limits of bodies; those of connections are Ray Serve's.
        access: which requests are let through.
    """

    def __init__(self, replicas: DeploymentHandle, limits: Limits, access: Access) -> None:
        self._replicas, self._limits, self._access = replicas, limits, access

    def __serve_build_asgi_app__(self) -> Any:
        return guarded(create_gateway(self._replicas, self._limits), self._access)


def ingress_application(
    replicas: serve.Application, limits: Limits, access: Access, shutdown_timeout: float
) -> serve.Application:
    """Return the application of a gateway in front of replicas."""
    deployment = serve.deployment(
        name="Gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=shutdown_timeout,
    )(Gateway)
    return deployment.bind(replicas, limits, access)
