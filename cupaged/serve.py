"""The command line of the OpenAI-compatible server: `python -m cupaged.serve`.

It and the other modules of the command line are all of the library that imports the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cupaged.engine.model.model_files import check_files, check_generation_config

from .device import choose_device
from .engine.config import EngineConfig
from .engine.server.access import Access, check_certificate
from .engine.server.chat_settings import ChatSettings
from .engine.server.limits import Limits
from .listener import listen, listen_on_path
from .options import parser, replica_arguments, settings_of

if TYPE_CHECKING:
    import torch

_OTHER_DESCRIPTORS = 256  # file descriptors besides connections


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
    settings = settings_of(options, EngineConfig)
    EngineConfig(**settings)  # report a wrong setting before anything slow
    _set_up_logs(options)
    if _torchrun_rank() > 0 and options.tensor_parallel_size > 1:
        from .engine import LLMEngine

        LLMEngine(options.model, EngineConfig(**settings))  # does not return: it follows rank 0
    limits = Limits(**settings_of(options, Limits))
    access, tls = access_of(options), _tls(options)
    chat_settings = ChatSettings(**settings_of(options, ChatSettings))
    _allow_descriptors(limits.max_connections)
    check_replicas(options.replicas)
    with listen_on_path(options.uds) if options.uds else listen(options.host, options.port) as listener:
        # Before torch and transformers are imported, and because the hub may take half a minute to fail.
        if check_files(options.model, options.max_model_len) is None and options.model is not None:
            print(f"cupaged: no {options.model!r} is here; it is looked for on the hub", flush=True)
        check_generation_config(options.generation_config)
        device, why = choose_device(options.device)
        print(f"cupaged: {why}", flush=True)
        config = EngineConfig(**{**settings, "device": str(device)})
        if options.replicas is not None:
            _check_gpus(device, options.replicas, options.tensor_parallel_size)
            _run_replicas(listener, options, device.type, limits, access, tls)
        else:
            _run(listener, options, config, limits, access, tls, chat_settings)
    return 0


def _torchrun_rank() -> int:
    """Return this process's number among those that torchrun has started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def access_of(options: argparse.Namespace) -> Access:
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
    chat = bool(chat_settings.chat_template or engine.tokenizer.chat_template)
    server = Server(
        AsyncEngine(engine),
        names,
        on_start=lambda: _greet(bound, options, names[0], chat),
        limits=limits,
        access=_with_hosts(access, bound, options),
        shutdown_timeout=options.shutdown_timeout,
        step_timeout=options.step_timeout,
        log_stats=options.log_stats,
        tls=tls,
        chat_settings=chat_settings,
    )
    server.run(sockets=[bound])
    if server.failure is not None:
        raise server.failure


def check_replicas(number: int | None) -> None:
    """Check the number of replicas, if it is given."""
    if number is not None and number < 1:
        raise ValueError(f"replicas must be at least 1, got {number}")


def _check_gpus(device: torch.device, num_replicas: int, num_ranks: int) -> None:
    """Check that each rank of each replica can have a GPU of its own, if they are to run on GPUs."""
    import torch

    if device.index is not None:
        raise ValueError(f"device is {str(device)!r}, and each replica has a GPU of its own: give 'cuda'")
    if device.type == "cuda" and (count := torch.cuda.device_count()) < num_replicas * num_ranks:
        each = "one" if num_ranks == 1 else f"{num_ranks} (tensor_parallel_size)"
        raise ValueError(
            f"replicas is {num_replicas}, and there are {count} GPUs, {each} for each: give fewer replicas, "
            "or more devices in CUDA_VISIBLE_DEVICES"
        )


def _run_replicas(
    bound: socket.socket,
    options: argparse.Namespace,
    device_type: str,
    limits: Limits,
    access: Access,
    tls: tuple[Path, Path] | None,
) -> None:
    # Ray reads it when it is imported: it would leave out lines of replicas' logs that resemble others.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    try:
        from .engine.replicas.front import ReplicaServer, local_replicas, model_card
    except ModuleNotFoundError as error:
        raise ImportError(f"--replicas needs Ray ({error}): pip install 'cupaged[ray]'") from error
    print(f"cupaged: starting {options.replicas} replicas on a local Ray", flush=True)
    with local_replicas(
        replica_arguments(options),
        options.replicas,
        num_gpus=options.tensor_parallel_size if device_type == "cuda" else 0,
        max_imbalance=options.max_imbalance,
        max_ongoing_requests=limits.max_waiting_requests + options.max_num_seqs,
        shutdown_timeout=options.shutdown_timeout,
    ) as replicas:
        card = model_card(replicas)
        ReplicaServer(
            replicas,
            on_start=lambda: _greet(bound, options, card["id"], card["has_chat_template"]),
            limits=limits,
            access=_with_hosts(access, bound, options),
            shutdown_timeout=options.shutdown_timeout,
            tls=tls,
        ).run(sockets=[bound])


def _with_hosts(access: Access, bound: socket.socket, options: argparse.Namespace) -> Access:
    from .engine.server.hosts import allowed_hosts

    bound_to = bound.getsockname()[0] if options.uds is None else options.uds
    hosts = allowed_hosts(bound_to, options.host, options.allowed_hosts)
    return dataclasses.replace(access, allowed_hosts=hosts)


def _greet(bound: socket.socket, options: argparse.Namespace, model: str, chat: bool) -> None:
    if options.uds is not None:
        print(f"{model} is served on the Unix socket {options.uds}", flush=True)
        return
    scheme = "https" if options.ssl_certfile else "http"
    address = _address(options.host, bound.getsockname()[1], scheme)
    key = bool(access_of(options).api_keys)
    print(_greeting(address, model, chat=chat, key=key), flush=True)


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
