"""Build the application for a Ray cluster: `serve run cupaged.ray_app:app`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import ray
from ray import serve

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
            resources of a replica, by default a GPU for each rank if the cluster has any, and
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
    if options.replicas is not None and "autoscaling_config" in of_ray:
        raise ValueError("replicas and autoscaling_config are given: leave one out")
    replicas = replica_application(
        replica_arguments(options),
        num_replicas=options.replicas or 1,
        autoscaling_config=of_ray.get("autoscaling_config"),
        ray_actor_options=of_ray.get("ray_actor_options")
        or _resources(options.device, options.tensor_parallel_size),
        max_imbalance=options.max_imbalance,
        max_ongoing_requests=limits.max_waiting_requests + options.max_num_seqs,
        shutdown_timeout=options.shutdown_timeout,
    )
    hosts = frozenset(options.allowed_hosts)
    access = dataclasses.replace(access_of(options), allowed_hosts=None if "*" in hosts else hosts or None)
    return ingress_application(replicas, limits, access, options.shutdown_timeout)


def _resources(device: str | None, num_ranks: int) -> dict[str, float]:
    """Return what a replica reserves for each rank: a GPU, or a core if there are none, or not wanted."""
    on_cpu = device == "cpu" or (ray.is_initialized() and not ray.cluster_resources().get("GPU"))
    return {"num_cpus" if on_cpu else "num_gpus": num_ranks}


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
