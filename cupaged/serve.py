"""`python -m cupaged.serve`: the command line of the OpenAI-compatible server.

The one module of the library that imports the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import socket
import sys
from typing import Any, get_args, get_type_hints

from .device import choose_device
from .engine.config import (
    BATCHING,
    DTYPES,
    KV_CACHE_DTYPES,
    MEMORY_POLICIES,
    PREEMPTION_MODES,
    SCHEDULING_POLICIES,
    EngineConfig,
)
from .engine.server.limits import Limits

_CHOICES = {
    "preemption_mode": PREEMPTION_MODES,
    "scheduling_policy": SCHEDULING_POLICIES,
    "memory_policy": MEMORY_POLICIES,
    "batching": BATCHING,
    "dtype": DTYPES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
}
_HIDDEN = ("check_integrity",)
_OTHER_DESCRIPTORS = 256  # for files, libraries and what refuses connections


def parser() -> argparse.ArgumentParser:
    """The options: those of the server, then one for each setting of `Limits` and of `EngineConfig`."""
    found = argparse.ArgumentParser(
        prog="python -m cupaged.serve",
        description="Serve a model over an OpenAI-compatible API.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument(
        "--model", help="Hugging Face directory, hub id or GGUF file; SmolLM2-135M-Instruct if not given"
    )
    found.add_argument("--served-model-name", help="what requests call the model; --model if not given")
    found.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    found.add_argument("--port", type=port_number, default=8000, help="port to listen on; 0 for a free one")
    found.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="HOST",
        help="names besides localhost that requests may give as their host, * for any; without this option "
        "any, unless --host is a loopback address",
    )
    _add_settings(found.add_argument_group("limits"), Limits)
    _add_settings(found.add_argument_group("engine"), EngineConfig)
    return found


def _add_settings(group: argparse._ArgumentGroup, settings: type) -> None:
    """An option for each field of a dataclass, with what its docstring says of it."""
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


def port_number(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not from 0 to 65535")
    return port


def _setting_texts(settings: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each setting."""
    arguments = (settings.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is noticed before a model is loaded.

    With SO_REUSEADDR, which a restart needs, Linux gives one address to two sockets until one of them
    listens: being bound would not keep another server away. Who connects while the model is loaded waits.

    Raises:
        RuntimeError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()
    except OSError as error:
        found.close()
        raise RuntimeError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port (make serve PORT=...)"
        ) from error
    return found


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C, or the death of the engine. Returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return _serve(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _serve(options: argparse.Namespace) -> int:
    settings = _settings(options, EngineConfig)
    EngineConfig(**settings)  # a wrong setting is said at once
    limits = Limits(**_settings(options, Limits))
    _allow_descriptors(limits.max_connections)
    with listen(options.host, options.port) as found:
        device, why = choose_device(options.device)
        print(f"cupaged: {why}", flush=True)
        _run(found, options, EngineConfig(**{**settings, "device": str(device)}), limits)
    return 0


def _settings(options: argparse.Namespace, settings: type) -> dict[str, Any]:
    """What is given for the fields of a dataclass."""
    names = (field.name for field in dataclasses.fields(settings) if field.name not in _HIDDEN)
    return {name: getattr(options, name) for name in names}


def _allow_descriptors(connections: int) -> None:
    """Raise the process's limit of file descriptors, as far as it may be, so that there are enough."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + _OTHER_DESCRIPTORS
        if soft != resource.RLIM_INFINITY and soft < wanted:
            wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _run(bound: socket.socket, options: argparse.Namespace, config: EngineConfig, limits: Limits) -> None:
    from .engine import LLMEngine
    from .engine.server.async_engine import AsyncEngine
    from .engine.server.hosts import allowed_hosts
    from .engine.server.http_server import Server

    engine = LLMEngine(options.model, config)
    print("cupaged: warming up (the first start compiles kernels)", flush=True)
    engine.warm_up()
    name = options.served_model_name or engine.model_name
    bound_to, port = bound.getsockname()[:2]
    address = _address(options.host, port)

    server = Server(
        AsyncEngine(engine),
        name,
        on_start=lambda: print(_greeting(address, name), flush=True),
        limits=limits,
        allowed_hosts=allowed_hosts(bound_to, options.host, options.allowed_hosts),
    )
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        print("Stopped.")
    if server.failure is not None:
        raise server.failure


def _address(host: str, port: int) -> str:
    """Where to find a server on this machine that listens there."""
    if host in ("127.0.0.1", "0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greeting(address: str, model: str) -> str:
    return f"""{model} is served on {address} (chat in a browser, or)

curl {address}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is paging?"}}]}}'

Ctrl-C ends it."""


if __name__ == "__main__":
    sys.exit(main())
