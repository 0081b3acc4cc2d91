"""Run a job with an engine, inside the engine's own environment: `python offline.py ENGINE JOB.json`.

The last line that is printed is `RESULT ` and JSON: the seconds and the tokens of every case, and the seconds
that loading took. Only the standard library is imported before the engine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tokens = list[list[int]]
Generate = Callable[[Tokens, int], Tokens]
WARM_UP_REQUESTS, WARM_UP_TOKENS = 4, 8
BLOCK_SIZE = 256  # tokens, of transformers' continuous batching


def cupaged(job: dict[str, Any]) -> Generate:
    from cupaged.engine import LLM, SamplingParams

    llm = LLM(job["model"], device=job["device"], **_settings(job))

    def generate(prompts: Tokens, tokens: int) -> Tokens:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def vllm(job: dict[str, Any]) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(job["model"], gpu_memory_utilization=0.3, **_settings(job))

    def generate(prompts: Tokens, tokens: int) -> Tokens:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def openvino(job: dict[str, Any]) -> Generate:
    """Return a run of OpenVINO GenAI's continuous batching over ``job["openvino_model"]``."""
    import numpy as np
    from openvino import Tensor
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.max_num_seqs = job["max_num_seqs"]
    scheduler.enable_prefix_caching = False
    precision = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[job["dtype"]]
    properties = {
        "INFERENCE_NUM_THREADS": job["threads"],
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,  # 8 bits unless it is set
    }
    pipeline = ContinuousBatchingPipeline(job["openvino_model"], scheduler, "CPU", properties)

    def generate(prompts: Tokens, tokens: int) -> Tokens:
        config = GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        ids = [Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [list(r.m_generation_ids[0]) for r in pipeline.generate(ids, [config] * len(ids))]

    return generate


def transformers_generate(job: dict[str, Any]) -> Generate:
    """Return a run of transformers on one static batch, padded on the left to the longest prompt."""
    import torch
    import transformers as tf

    model = _transformers_model(job)

    def generate(prompts: Tokens, tokens: int) -> Tokens:
        longest = max(map(len, prompts))
        batch = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        config = tf.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return model.generate(batch, attention_mask=mask, generation_config=config)[:, longest:].tolist()

    return generate


def transformers_generate_batch(job: dict[str, Any]) -> Generate:
    """Return a run of transformers' continuous batching."""
    import transformers as tf
    from transformers.generation import ContinuousBatchingConfig

    model = _transformers_model(job)
    # By itself it fills the memory with blocks and prepares them at every call.
    blocks = job["max_num_seqs"] * -(-job["max_model_len"] // BLOCK_SIZE)
    cache = ContinuousBatchingConfig(
        page_size=BLOCK_SIZE, num_blocks=blocks, max_batch_tokens=job["max_model_len"]
    )

    def generate(prompts: Tokens, tokens: int) -> Tokens:
        config = tf.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False
        )
        by_prompt = {tuple(o.prompt_ids): o.generated_tokens for o in outputs.values()}
        return [list(by_prompt[tuple(prompt)]) for prompt in prompts]

    return generate


ENGINES = {
    engine.__name__: engine
    for engine in (cupaged, vllm, openvino, transformers_generate, transformers_generate_batch)
}


def run(job: dict[str, Any], load: Callable[[dict[str, Any]], Generate]) -> dict[str, Any]:
    """Load an engine, run every case, and return the result."""
    start = time.perf_counter()
    generate = load(job)
    load_s = time.perf_counter() - start
    first = job["cases"][0]
    generate(first["prompts"][:WARM_UP_REQUESTS], min(WARM_UP_TOKENS, first["tokens"]))
    results = {}
    for case in job["cases"]:
        seconds, answers = [], []
        for _ in range(job["repeats"]):
            start = time.perf_counter()
            answers.append(generate(case["prompts"], case["tokens"]))
            seconds.append(time.perf_counter() - start)
        results[case["name"]] = {"seconds": seconds, "answers": answers}
    return {"load_s": load_s, "cases": results}


def _settings(job: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that our engine and vLLM have in common."""
    settings = {name: job[name] for name in ("dtype", "max_model_len", "max_num_seqs")}
    return settings | {"enable_prefix_caching": False}


def _transformers_model(job: dict[str, Any]) -> Any:
    import torch
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    return model.to(job["device"]).eval()


if __name__ == "__main__":
    print("RESULT " + json.dumps(run(json.loads(Path(sys.argv[2]).read_text()), ENGINES[sys.argv[1]])))
