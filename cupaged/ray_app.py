"""Build the application for a Ray cluster: `serve run cupaged.ray_app:app`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click
import ray
from ray import serve

# Ray's own view of what `serve run` will connect to or start; the latter's cores are those of a container.
from ray._private.services import get_ray_address_from_environment
from ray._private.utils import get_num_cpus
from ray.serve.config import AutoscalingConfig

from .engine.config import EngineConfig
from .engine.replicas.deployment import replica_application
from .engine.replicas.ingress import ingress_application
from .engine.server.limits import Limits
from .options import parser, replica_arguments, settings_of
from .serve import access_of, check_replicas

_OF_RAY = ("autoscaling_config", "ray_actor_options")
_OF_PROXIES = ("host", "port", "uds", "root_path", "ssl_certfile", "ssl_keyfile")  # Ray Serve's own


def app(args: Mapping[str, Any]) -> serve.Application:
    """Return the application: an ingress, and replicas of the engine behind it.

    Args:
        args: options of `python -m cupaged.serve`, without dashes in front (``model``, ``max_model_len``);
            ``replicas`` is 1 if not given, and the address is Ray Serve's. ``ray_actor_options`` are the
            resources of a replica, by default a GPU for each rank or, without GPUs, a share of the cores, and
            ``autoscaling_config``, in place of ``replicas``, Ray Serve's settings of autoscaling; both are
            mappings, or JSON.

    Raises:
        ValueError: an argument is unknown or wrong.
    """
    of_ray = {name: _mapping(name, args[name]) for name in _OF_RAY if name in args}
    options = _parsed({name: value for name, value in args.items() if name not in _OF_RAY})
    EngineConfig(**settings_of(options, EngineConfig))  # report a wrong setting here
    limits = Limits(**settings_of(options, Limits))
    check_replicas(options.replicas)
    if options.device is not None and ":" in options.device:
        raise ValueError(f"device is {options.device!r}, and Ray gives each replica GPUs: give 'cuda'")
    if options.replicas is not None and "autoscaling_config" in of_ray:
        raise ValueError("replicas and autoscaling_config are given: leave one out")
    scaling = of_ray.get("autoscaling_config")
    replicas = replica_application(
        replica_arguments(options),
        num_replicas=options.replicas or 1,
        autoscaling_config=scaling,
        ray_actor_options=of_ray.get("ray_actor_options")
        or _resources(options.device, options.tensor_parallel_size, _max_replicas(options.replicas, scaling)),
        max_imbalance=options.max_imbalance,
        max_ongoing_requests=limits.max_waiting_requests + options.max_num_seqs,
        shutdown_timeout=options.shutdown_timeout,
    )
    hosts = frozenset(options.allowed_hosts)
    access = dataclasses.replace(access_of(options), allowed_hosts=None if "*" in hosts else hosts or None)
    return ingress_application(replicas, limits, access, options.shutdown_timeout)


def _max_replicas(replicas: int | None, scaling: Mapping[str, Any] | None) -> int:
    """Return the maximum number of replicas."""
    return AutoscalingConfig(**scaling).max_replicas if scaling is not None else replicas or 1


def _resources(device: str | None, num_ranks: int, num_replicas: int) -> dict[str, float]:
    """Return what a replica reserves: a GPU for each rank, or a share of the cores if there are no GPUs."""
    nodes = _nodes()
    if device != "cpu" and (device is not None or any(node.get("GPU") for node in nodes)):
        return {"num_gpus": num_ranks}
    return {"num_cpus": _cores_of_each([node.get("CPU", 0) for node in nodes], num_replicas)}


def _cores_of_each(cores: Sequence[float], num_replicas: int) -> float:
    """Return the number of cores that each replica can have: whole ones, or a part of one if they are few.

    Args:
        cores: number of cores of each node, none of which a replica spans.
        num_replicas: number of replicas.
    """
    for share in range(int(max(cores, default=0)), 0, -1):
        if sum(of_node // share for of_node in cores) >= num_replicas:
            return share
    parts = 1  # of a core
    while 0 < sum(map(int, cores)) * parts < num_replicas:
        parts += 1
    return 10_000 // parts / 10_000  # Ray counts ten-thousandths


def _nodes() -> list[Mapping[str, float]]:
    """Return the resources of the cluster's nodes, or of this machine if there is no cluster yet."""
    if ray.is_initialized():
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # `serve run` connects later, with settings of its own: this is to look only, at the same cluster.
    command = click.get_current_context(silent=True)
    given = command.params.get("address") if command else None
    address = get_ray_address_from_environment(given, None)
    if address in (None, "local"):  # it will start one
        import torch

        return [{"CPU": get_num_cpus(), "GPU": torch.cuda.device_count()}]
    ray.init(address, configure_logging=False, log_to_driver=False)
    try:
        return _nodes()
    finally:
        ray.shutdown()


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} must be a mapping, or one in JSON, got {value!r}: {error}") from None
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{name} must be a mapping, or one in JSON, got {value!r}")
    return mapping


def _parsed(args: Mapping[str, Any]) -> argparse.Namespace:
    """Return the options that arguments by name stand for."""
    cli = parser()
    actions = {action.dest: action for action in cli._actions if action.dest != "help"}
    arguments = []
    for name, value in args.items():
        action = actions.get(name.replace("-", "_"))
        if action is None or action.dest in _OF_PROXIES:
            why = (
                "no option of python -m cupaged.serve"
                if action is None
                else "a matter of Ray Serve's proxies"
            )
            raise ValueError(f"the argument {name} is {why}: leave it out")
        option = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            if str(value).lower() not in ("true", "false"):
                raise ValueError(f"{name} must be true or false, got {value!r}")
            arguments.append(option if str(value).lower() == "true" else f"--no-{option[2:]}")
        elif isinstance(value, list):
            arguments += [option, *map(str, value)]
        else:
            arguments.append(f"{option}={value}")

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    cli.error = refuse  # type: ignore[method-assign]  # in place of ending the process
    return cli.parse_args(arguments)
