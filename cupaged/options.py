"""Define the options of `python -m cupaged.serve`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .engine.config import (
    ADMISSION_POLICIES,
    BATCHING,
    DTYPES,
    EVICTION_POLICIES,
    KV_CACHE_DTYPES,
    MEMORY_POLICIES,
    PREEMPTION_MODES,
    SCHEDULING_POLICIES,
    EngineConfig,
)
from .engine.server.chat_settings import ChatSettings
from .engine.server.limits import Limits

_CHOICES = {
    "preemption_mode": tuple(PREEMPTION_MODES),
    "scheduling_policy": tuple(SCHEDULING_POLICIES),
    "admission_policy": tuple(ADMISSION_POLICIES),
    "memory_policy": MEMORY_POLICIES,
    "eviction_policy": tuple(EVICTION_POLICIES),
    "batching": BATCHING,
    "dtype": DTYPES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
}
_HIDDEN = ("check_integrity",)
# Options that replicas do not get: they have other addresses, and the gateway has checked who may use them.
_GATEWAY_OPTIONS = (
    *("host", "port", "uds", "root_path", "ssl_certfile", "ssl_keyfile", "keep_alive_timeout"),
    *("replicas", "max_imbalance", "allowed_hosts", "allowed_origins", "api_key"),
)
LOG_LEVELS = ("debug", "info", "warning", "error")


def parser() -> argparse.ArgumentParser:
    """Return a parser of the server's options, with one for each setting of `Limits` and `EngineConfig`."""
    cli = argparse.ArgumentParser(
        prog="python -m cupaged.serve",
        description="Serve a model over an OpenAI-compatible API.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cli.add_argument(
        "--model", help="Hugging Face directory, hub id or GGUF file; SmolLM2-135M-Instruct if not given"
    )
    cli.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what requests call the model; of several names the first is that in answers and metrics; "
        "--model if not given",
    )
    cli.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    cli.add_argument("--port", type=port_number, default=8000, help="port to listen on; 0 for a free one")
    cli.add_argument("--uds", metavar="PATH", help="Unix socket to listen on in place of --host and --port")
    cli.add_argument(
        "--shutdown-timeout",
        type=seconds,
        default=25.0,
        help="seconds that running requests have to finish after SIGTERM or Ctrl-C, while new ones get 503; "
        "Kubernetes kills after 30; a second signal ends at once",
    )
    cli.add_argument(
        "--step-timeout",
        type=seconds,
        default=300.0,
        help="seconds after which a step of the engine is taken to hang, and /health says 503 until it ends; "
        "to compile a kernel at its first use takes a minute where a machine is busy; 0: never",
    )
    cli.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="what the log, on standard error, begins at"
    )
    cli.add_argument(
        "--log-requests",
        "--access-log",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="log a line for each request that has ended",
    )
    cli.add_argument(
        "--log-stats",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="log a line about load and cache every ten seconds while there is load",
    )
    _add_access(cli.add_argument_group("access"))
    _add_replicas(cli.add_argument_group("replicas"))
    _add_settings(cli.add_argument_group("chat"), ChatSettings)
    _add_settings(cli.add_argument_group("limits"), Limits)
    _add_settings(cli.add_argument_group("engine"), EngineConfig)
    return cli


def _add_access(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="HOST",
        help="names besides localhost that requests may give as their host, * for any; without this option "
        "any, unless --host is a loopback address",
    )
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins of web pages whose requests browsers let through (CORS), such as "
        "https://app.example.com, * for all; without this option only the server's own page",
    )
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="key that requests must have, as a bearer token or as x-api-key; may be given several times; "
        "without this option that in CUPAGED_API_KEY, which no list of processes shows, or else none",
    )
    group.add_argument("--root-path", default="", help="prefix of all paths behind a proxy, such as /llm")
    group.add_argument("--ssl-certfile", type=Path, help="certificate chain in PEM, to serve HTTPS")
    group.add_argument(
        "--ssl-keyfile",
        type=Path,
        help="its private key in PEM, without a password; in --ssl-certfile if not given",
    )


def _add_replicas(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="number of replicas of the engine behind this address, each with a GPU of its own if there are "
        "any; they run on a local Ray (pip install 'cupaged[ray]'); without this option one engine, no Ray",
    )
    group.add_argument(
        "--max-imbalance",
        type=int,
        default=8,
        help="number of requests by which the replica that has seen the longest beginning of a prompt may be "
        "busier than the least loaded one and still get the prompt",
    )


def _add_settings(group: argparse._ArgumentGroup, settings: type) -> None:
    """Add an option for each field of a dataclass, with the field's text in the docstring as its help."""
    hints, texts = get_type_hints(settings), _setting_texts(settings)
    for field in dataclasses.fields(settings):
        if field.name in _HIDDEN:
            continue
        kinds = [
            kind for kind in get_args(hints[field.name]) or (hints[field.name],) if kind is not type(None)
        ]
        option = f"--{field.name.replace('_', '-')}"
        text = texts[field.name].replace("%", "%%")
        if kinds[0] is bool:  # --enable-prefix-caching, --no-enable-prefix-caching
            flag = argparse.BooleanOptionalAction
            group.add_argument(option, action=flag, default=field.default, help=text)
            continue
        group.add_argument(
            option, type=kinds[0], default=field.default, choices=_CHOICES.get(field.name), help=text
        )


def replica_arguments(options: argparse.Namespace) -> list[str]:
    """Return the command line of a replica: the options that are given, but for those of the gateway."""
    arguments = []
    for action in parser()._actions:
        value = getattr(options, action.dest, action.default)
        if action.dest in _GATEWAY_OPTIONS or value == action.default:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            negative = next(name for name in action.option_strings if name.startswith("--no-"))
            arguments.append(action.option_strings[0] if value else negative)
        elif isinstance(value, list):
            arguments += [action.option_strings[0], *value]
        else:
            arguments.append(f"{action.option_strings[0]}={value}")
    return [*arguments, "--keep-alive-timeout=3600"]


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 on")
    return number


def port_number(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not from 0 to 65535")
    return port


def _setting_texts(settings: type) -> dict[str, str]:
    """Return the text of each field in the ``Args:`` of a dataclass's docstring."""
    arguments = (settings.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    texts = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in texts}


def settings_of(options: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return the options that are fields of a dataclass."""
    names = (field.name for field in dataclasses.fields(settings) if field.name not in _HIDDEN)
    return {name: getattr(options, name) for name in names}
