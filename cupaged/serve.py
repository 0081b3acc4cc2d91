"""The command line of the OpenAI-compatible server: `python -m cupaged.serve`.

The only module of the library that imports the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import logging
import math
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cupaged.engine.model.model_files import check_files, check_generation_config

from .device import choose_device
from .engine.config import (
    BATCHING,
    DTYPES,
    EVICTION_POLICIES,
    KV_CACHE_DTYPES,
    MEMORY_POLICIES,
    PREEMPTION_MODES,
    SCHEDULING_POLICIES,
    EngineConfig,
)
from .engine.server.access import Access, check_certificate
from .engine.server.chat_settings import ChatSettings
from .engine.server.limits import Limits

_CHOICES = {
    "preemption_mode": PREEMPTION_MODES,
    "scheduling_policy": SCHEDULING_POLICIES,
    "memory_policy": MEMORY_POLICIES,
    "eviction_policy": tuple(EVICTION_POLICIES),
    "batching": BATCHING,
    "dtype": DTYPES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
}
_HIDDEN = ("check_integrity",)
LOG_LEVELS = ("debug", "info", "warning", "error")
_OTHER_DESCRIPTORS = 256  # file descriptors besides connections


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


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Called before the model is loaded, to notice a port in use early.

    With SO_REUSEADDR, which a restart needs, Linux lets two sockets bind an address until one of them
    listens: binding alone would not keep another server away. Clients that connect while the model is loaded
    wait.

    Raises:
        RuntimeError: the address is not available; the message names the option to change.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RuntimeError(
            f"cannot listen on {host}:{port}: no address is known for the --host ({why}); give one of this "
            "machine's, or 0.0.0.0 for all"
        ) from error
    # Prefer IPv4.
    family, _, _, _, address = min(addresses, key=lambda info: info[0] != socket.AF_INET)
    try:
        listener = socket.socket(family)
    except OSError as error:
        raise RuntimeError(_refusal(host, port, error)) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise RuntimeError(_refusal(host, port, error)) from error
    return listener


def _refusal(host: str, port: int, error: OSError) -> str:
    """Return the error message for an address that the system refuses, with the remedy."""
    another_port = "choose another --port (make serve PORT=...)"
    remedies = {
        errno.EADDRINUSE: another_port,
        errno.EACCES: "this user may not take that port, as those below 1024 are often reserved; "
        + another_port,
        errno.EADDRNOTAVAIL: f"{host} is not an address of this machine; choose another --host, or 0.0.0.0 "
        "for all it has",
        errno.EAFNOSUPPORT: "this machine has no addresses of that kind; choose another --host",
    }
    remedy = remedies.get(error.errno or 0, "choose another --host or --port")
    return f"cannot listen on {host}:{port} ({error.strerror}): {remedy}"


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C or a failure of the engine, and return the exit status."""
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
    EngineConfig(**settings)  # report a wrong setting before anything slow
    _set_up_logs(options)
    if _torchrun_rank() > 0 and options.tensor_parallel_size > 1:
        from .engine import LLMEngine

        LLMEngine(options.model, EngineConfig(**settings))  # does not return: it follows rank 0
    limits = Limits(**_settings(options, Limits))
    access, tls = _access(options), _tls(options)
    chat_settings = ChatSettings(**_settings(options, ChatSettings))
    _allow_descriptors(limits.max_connections)
    with listen(options.host, options.port) as listener:
        # Before torch and transformers are imported, and because the hub may take half a minute to fail.
        if check_files(options.model, options.max_model_len) is None and options.model is not None:
            print(f"cupaged: no {options.model!r} is here; it is looked for on the hub", flush=True)
        check_generation_config(options.generation_config)
        device, why = choose_device(options.device)
        print(f"cupaged: {why}", flush=True)
        config = EngineConfig(**{**settings, "device": str(device)})
        _run(listener, options, config, limits, access, tls, chat_settings)
    return 0


def _torchrun_rank() -> int:
    """Return this process's number among those that torchrun has started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _access(options: argparse.Namespace) -> Access:
    """Return who may use the server, but for the hosts, which depend on its address."""
    keys = options.api_key or [key for key in [os.environ.get("CUPAGED_API_KEY")] if key]
    return Access(
        allowed_origins=tuple(options.allowed_origins),
        api_keys=tuple(keys),
        root_path=options.root_path.rstrip("/"),
    )


def _tls(options: argparse.Namespace) -> tuple[Path, Path] | None:
    """Return the files with the certificate chain and the private key; None without."""
    if options.ssl_certfile is None:
        if options.ssl_keyfile is not None:
            raise ValueError("ssl_keyfile is given and no ssl_certfile: give both")
        return None
    files = options.ssl_certfile, options.ssl_keyfile or options.ssl_certfile
    check_certificate(*files)
    return files


def _set_up_logs(options: argparse.Namespace) -> None:
    """Log to standard error: this package from ``--log-level`` on, libraries from warnings on."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("cupaged").setLevel(options.log_level.upper())
    logging.getLogger("cupaged.requests").disabled = not options.log_requests


def _settings(options: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return the options that are fields of a dataclass."""
    names = (field.name for field in dataclasses.fields(settings) if field.name not in _HIDDEN)
    return {name: getattr(options, name) for name in names}


def _allow_descriptors(connections: int) -> None:
    """Raise the process's limit of file descriptors as far as needed and allowed."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + _OTHER_DESCRIPTORS
        if soft != resource.RLIM_INFINITY and soft < wanted:
            wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _run(
    bound: socket.socket,
    options: argparse.Namespace,
    config: EngineConfig,
    limits: Limits,
    access: Access,
    tls: tuple[Path, Path] | None,
    chat_settings: ChatSettings,
) -> None:
    from .engine import LLMEngine
    from .engine.server.async_engine import AsyncEngine
    from .engine.server.hosts import allowed_hosts
    from .engine.server.http_server import Server

    engine = LLMEngine(options.model, config)
    if defaults := engine.sampling_defaults:
        settings = ", ".join(f"{name}={value}" for name, value in defaults.items())
        print(
            f"cupaged: {settings} for requests that do not say, by the model's generation_config.json "
            "(--generation-config vllm leaves it out)",
            flush=True,
        )
    print("cupaged: warming up (the first start compiles kernels)", flush=True)
    engine.warm_up()
    names = options.served_model_name or [engine.model_name]
    bound_to, port = bound.getsockname()[:2]
    address = _address(options.host, port, "https" if tls else "http")
    chat = bool(chat_settings.chat_template or engine.tokenizer.chat_template)
    greeting = _greeting(address, names[0], chat=chat, key=bool(access.api_keys))
    hosts = allowed_hosts(bound_to, options.host, options.allowed_hosts)
    server = Server(
        AsyncEngine(engine),
        names,
        on_start=lambda: print(greeting, flush=True),
        limits=limits,
        access=dataclasses.replace(access, allowed_hosts=hosts),
        shutdown_timeout=options.shutdown_timeout,
        step_timeout=options.step_timeout,
        log_stats=options.log_stats,
        tls=tls,
        chat_settings=chat_settings,
    )
    server.run(sockets=[bound])
    if server.failure is not None:
        raise server.failure


def _address(host: str, port: int, scheme: str = "http") -> str:
    """Return the URL at which this machine reaches a server that listens there."""
    if host in ("127.0.0.1", "0.0.0.0", "::"):
        host = "localhost"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _greeting(address: str, model: str, chat: bool, key: bool = False) -> str:
    if chat:
        where, path = f"{address} (chat in a browser, or)", "chat/completions"
        asked = '"messages": [{"role": "user", "content": "What is paging?"}]'
    else:
        where, path = (
            f"{address}\n(it has no chat template: it continues texts, and does not chat)",
            "completions",
        )
        asked = '"prompt": "Paging is", "max_tokens": 50'
    authorization = "  -H 'Authorization: Bearer YOUR_API_KEY' \\\n" if key else ""
    return f"""{model} is served on {where}

curl {address}/v1/{path} -H 'Content-Type: application/json' \\
{authorization}  -d '{{"model": "{model}", {asked}}}'

Ctrl-C ends it."""


if __name__ == "__main__":
    sys.exit(main())
