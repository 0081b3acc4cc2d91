"""The contenders: what each runs, in which environment, and what is known of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import http_client
from .job import Job
from .names import GENERATE, GENERATE_BATCH, NAMES, OPENVINO, OURS, OURS_HTTP, VLLM_CPU, VLLM_CPU_HTTP
from .processes import run_script, server

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PACKAGES = ("cupaged", "torch", "transformers", "numba", "vllm-cpu", "openvino", "openvino-genai")


@dataclass(frozen=True)
class Contender:
    """Something that runs a job.

    Args:
        command: interpreter and arguments; of a server without its settings.
        environment: variables besides those of this process.
        http: whether the command is a server.
        extra: returns what its process is told besides the job.
        own_weights: whether it computes with other weights or in other precisions, so that its tokens are
            counted and not read with the dense model.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    http: bool = False
    extra: Callable[[], Mapping[str, Any]] = dict
    own_weights: bool = False

    def measure(self, job: Job, timeout: float) -> dict[str, Any]:
        """Run the job in a fresh process, and return what it reports.

        Raises:
            ContenderError: it failed, or took longer than ``timeout`` seconds.
        """
        environment = {**_threads(job.threads), **self.environment}
        if not self.http:
            return run_script(self.command, environment, {**asdict(job), **self.extra()}, timeout)
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        command = [*self.command, *_server_settings(job, port)]
        with server(command, environment, partial(http_client.is_ready, url), timeout) as load_s:
            return {"load_s": load_s, "cases": http_client.run(url, job, timeout)}

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages in its environment."""
        code = (
            "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n"
            "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\n"
            "print(json.dumps(found))"
        )
        try:
            command = [self.command[0], "-c", code, *PACKAGES]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            return json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            return {}


def contenders(
    job: Job,
    *,
    vllm_cpu: Path | None = None,
    openvino: Path | None = None,
    openvino_model: Callable[[], Path] | None = None,
) -> dict[str, Contender]:
    """Return the contenders whose environments are known, by their names.

    Args:
        vllm_cpu: virtual environment with vllm-cpu.
        openvino: virtual environment with openvino-genai.
        openvino_model: returns what it loads; may raise ContenderError.
    """
    ours = {"PYTHONPATH": str(ROOT)}
    offline = str(HERE / "offline.py")

    def in_ours(name: str) -> Contender:
        return Contender(name, (sys.executable, offline, name.replace("-", "_")), ours)

    found = [in_ours(name) for name in (OURS, GENERATE, GENERATE_BATCH)]
    serve = (sys.executable, "-m", "cupaged.serve", "--model", job.model, "--device", job.device)
    found.append(Contender(OURS_HTTP, serve, ours, http=True))
    if vllm_cpu is not None:
        python, variables = _python(vllm_cpu), _vllm_variables(vllm_cpu, job.threads)
        # One process beside its worker; a server has one for each task.
        alone = {**variables, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        found.append(Contender(VLLM_CPU, (python, offline, "vllm"), alone))
        # What `vllm serve` runs: the command itself asks for a package named vllm, and fails in vllm-cpu's.
        serve = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", job.model)
        found.append(Contender(VLLM_CPU_HTTP, serve, variables, http=True))
    if openvino is not None and openvino_model is not None:
        found.append(
            Contender(
                OPENVINO,
                (_python(openvino), offline, "openvino"),
                extra=lambda: {"openvino_model": str(openvino_model())},
                own_weights=True,
            )
        )
    return {each.name: each for each in sorted(found, key=lambda each: NAMES.index(each.name))}


def linear_floor(job: Job, timeout: float) -> dict[str, float]:
    """Return the rate of each case if there were only the linear layers.

    Raises:
        ContenderError: it failed, or took longer than ``timeout`` seconds.
    """
    command = [sys.executable, str(HERE / "linear_floor.py")]
    return run_script(command, _threads(job.threads), asdict(job), timeout)["rates"]


def check_environment(path: Path) -> Path:
    """Return a virtual environment's path.

    Raises:
        ValueError: there is no interpreter in it.
    """
    if not Path(_python(path)).is_file():
        raise ValueError(f"{path} is not a virtual environment: it has no bin/python")
    return path


def _python(environment: Path) -> str:
    return str(environment.absolute() / "bin" / "python")


def _threads(threads: int) -> dict[str, str]:
    """Return the variables for so many threads, with the hub left alone.

    PYTHONSAFEPATH keeps the folder of the scripts, whose names others may have, out of what they import.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
    }


def _vllm_variables(environment: Path, threads: int) -> dict[str, str]:
    """Return vllm-cpu's variables: Intel's OpenMP as its manual says, and as many cores as threads.

    By itself it keeps one core of the machine from its threads, whatever OMP_NUM_THREADS says.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }
    libraries = sorted(environment.absolute().rglob("libiomp5.so"))
    return variables | ({"LD_PRELOAD": str(libraries[0])} if libraries else {})


def _server_settings(job: Job, port: int) -> list[str]:
    """Return the flags of a server, which ours and vLLM's have in common."""
    flags = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": http_client.MODEL,
        "--dtype": job.dtype,
        "--max-model-len": job.max_model_len,
        "--max-num-seqs": job.max_num_seqs,
        "--generation-config": "vllm",
    }
    return [str(each) for flag in flags.items() for each in flag] + ["--no-enable-prefix-caching"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
