"""Time whole decode steps of the engine, with CUDA graphs and with overlap, and without.

The model has the shape of Llama 3 8B, on a CPU of a small one, and random weights that are drawn on the
device: no time depends on them. A step is the engine's own, with scheduler, sampler and text; greedy, as
many requests as stand in the row, and prompts of a few hundred tokens before.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from ..report import Context, Row, reason

if TYPE_CHECKING:
    from cupaged.engine import LLMEngine

MAX_MODEL_LEN = 2048
SHAPES: dict[str, dict[str, int]] = {
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "small": {
        "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """The loads on an engine.

    Args:
        shape: name of the model's shape.
        requests: numbers of requests that decode at once.
        prompt: number of tokens of their prompts.
        steps: number of steps that are timed.
    """

    shape: str
    requests: tuple[int, ...]
    prompt: int
    steps: int


def load_of(context: Context) -> Load:
    if context.quick:
        return Load("tiny", (1, 3), 20, 4)
    return Load("8B", (1, 16, 64, 256), 256, 48) if context.on_gpu else Load("small", (1, 16, 64), 64, 16)


def run(context: Context) -> None:
    if importlib.util.find_spec("transformers") is None:
        context.result.left_out.append("all of it: transformers is not installed")
        return
    load = load_of(context)
    for graphs, overlap in context.within_budget(list(variants(context)), _name):
        context.progress(f"  engine {_name((graphs, overlap))}")
        row: Row = {"name": load.shape, "graphs": graphs, "overlap": overlap, "prompt": load.prompt}
        try:
            engine = _engine(context, load, graphs, overlap)
            row["graphs"] = engine._runner.num_graphs > 0
            if row["graphs"] != graphs:
                context.result.notes.append("the graphs could not be captured: see the log")
            row["seconds"] = {}
            for count in context.within_budget(load.requests, "{} requests".format):
                row["seconds"][str(count)] = step_seconds(engine, count, load)
        except Exception as error:
            context.result.wrong.append(f"engine {_name((graphs, overlap))}: {reason(error)}")
        context.result.rows.append(row)
        engine = None
        gc.collect()  # before the next one is built, which needs the memory
        context.release()


def variants(context: Context) -> Iterator[tuple[bool, bool]]:
    """Yield with and without graphs, which only a GPU has, and overlap."""
    from cupaged.engine import EngineConfig

    overlaps = (True, False) if _OVERLAP in {field.name for field in fields(EngineConfig)} else (False,)
    yield from product((True, False) if context.on_gpu else (False,), overlaps)


_OVERLAP = "async_scheduling"


def _name(variant: tuple[bool, bool]) -> str:
    graphs, overlap = variant
    return f"{'with' if graphs else 'without'} graphs, {'with' if overlap else 'without'} overlap"


def _engine(context: Context, load: Load, graphs: bool, overlap: bool) -> LLMEngine:
    """Return an engine over a model of random weights."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from cupaged.engine import EngineConfig, LLMEngine
    from cupaged.engine.model.attention import ATTENTION_NAME, register_attention
    from cupaged.engine.model.worker import Worker

    shape = SHAPES[load.shape]

    def random_model(*_: object) -> tuple[Any, Any]:
        register_attention()
        config = LlamaConfig(**shape, max_position_embeddings=MAX_MODEL_LEN, eos_token_id=None)
        with context.device:
            made = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME
            )
        words = {f"w{i} ": i for i in range(shape["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0 "))
        return made.eval().requires_grad_(False), PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    settings: dict[str, Any] = {"device": str(context.device), "max_model_len": MAX_MODEL_LEN}
    settings |= {"max_num_seqs": max(load.requests), "enforce_eager": not graphs}
    if not context.on_gpu:
        settings["num_gpu_blocks_override"] = MAX_MODEL_LEN // 16 + max(load.requests) * load.prompt // 4
    if _OVERLAP in {field.name for field in fields(EngineConfig)}:
        settings[_OVERLAP] = overlap
    with mock.patch.object(Worker, "_load", random_model):
        engine = LLMEngine(None, EngineConfig(**settings))
    if engine._runner.config.hidden_size != shape["hidden_size"]:
        raise RuntimeError("the engine runs another model")
    return engine


def step_seconds(engine: LLMEngine, count: int, load: Load) -> float:
    """Return the seconds of a decode step with so many requests, the median."""
    from cupaged.engine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=load.steps + 8 + count, ignore_eos=True)
    vocabulary = SHAPES[load.shape]["vocab_size"]
    for i in range(count):
        prompt = [(7919 * i + 31 * j) % vocabulary for j in range(load.prompt)]  # of no two the same
        engine.add_request(f"{count}/{i}", {"prompt_token_ids": prompt}, params)
    seen: set[str] = set()
    while len(seen) < count:  # the prompts
        seen |= {output.request_id for output in engine.step()}
    seconds = []
    for step in range(load.steps + 4):
        start = time.perf_counter()
        outputs = engine.step()
        if len(outputs) != count:
            raise RuntimeError(f"a step of {count} requests had {len(outputs)} outputs")
        if step >= 4:
            seconds.append(time.perf_counter() - start)
    for i in range(count):
        engine.abort(f"{count}/{i}")
    while engine.has_unfinished():
        engine.step()
    return statistics.median(seconds)
