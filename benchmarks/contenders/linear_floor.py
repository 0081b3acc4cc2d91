"""Time the linear layers of a model alone, with random weights: `python linear_floor.py JOB.json`.

They are packed for oneDNN, and those with one input, such as query, key and value, are merged: no engine that
calls the same matrix products can be faster on this machine. It prints a rate for every case of the job, in
the way of `offline.py`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
SECONDS = 1.0  # a step is repeated for so long, and the fastest counts
REPEATS = 3  # ... and as often at least
Shape = tuple[int, int]  # output and input features


def shapes(model: str) -> tuple[list[Shape], Shape]:
    """Return the shapes of the merged linear layers and of the head. No weight is loaded.

    Raises:
        ValueError: the model has weights of experts, of which a token uses some.
    """
    config = tf.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = tf.AutoModelForCausalLM.from_config(config)
    if any(parameter.dim() > 2 for parameter in network.parameters()):
        raise ValueError(f"{model} has weights that are no matrices: the floor is of dense models")
    head = network.get_output_embeddings()
    layers = []
    for parent in network.modules():
        linear = {
            name: _shape(child)
            for name, child in parent.named_children()
            if isinstance(child, (torch.nn.Linear, tf.pytorch_utils.Conv1D)) and child is not head
        }
        for names in SAME_INPUT:
            if names <= linear.keys():
                merged = [linear.pop(name) for name in sorted(names)]
                layers.append((sum(out for out, _ in merged), merged[0][1]))
        layers += linear.values()
    return layers, _shape(head)


def rate(case: dict[str, Any], step: Callable[[int, int], float]) -> float:
    """Return a case's tokens per second when a step takes ``step(rows, rows of the head)`` seconds."""
    num_prompts, num_prompt_tokens = len(case["prompts"]), sum(map(len, case["prompts"]))
    if case["kind"] == "prefill":
        return num_prompt_tokens / step(num_prompt_tokens, num_prompts)
    return num_prompts / step(num_prompts, num_prompts)


def run(job: dict[str, Any]) -> dict[str, float]:
    layers, head = shapes(job["model"])
    dtype = getattr(torch, job["dtype"])
    packed = [(_packed(shape, dtype), shape[1]) for shape in [*layers, head]]
    known: dict[tuple[int, int], float] = {}

    def step(*rows: int) -> float:
        if rows not in known:
            known[rows] = _seconds(packed, dtype, *rows)
        return known[rows]

    return {case["name"]: rate(case, step) for case in job["cases"]}


def _shape(layer: torch.nn.Module) -> Shape:
    out, width = layer.weight.shape
    return (out, width) if isinstance(layer, torch.nn.Linear) else (width, out)


def _packed(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight((torch.randn(*shape) * 0.02).to(dtype))


@torch.inference_mode()
def _seconds(packed: list[tuple[torch.Tensor, int]], dtype: torch.dtype, rows: int, head_rows: int) -> float:
    """Return the time of the fastest step; the last weight is the head's."""
    x = {width: torch.randn(rows, width).to(dtype) for _, width in packed}
    *layers, (head, head_width) = packed
    head_x = x[head_width][:head_rows]
    linear = torch.ops.mkldnn._linear_pointwise
    fastest, end, repeats = float("inf"), time.perf_counter() + SECONDS, 0
    while repeats < REPEATS or time.perf_counter() < end:
        start = time.perf_counter()
        for weight, width in layers:
            linear(x[width], weight, None, "none", [], "")
        linear(head_x, head, None, "none", [], "")
        fastest, repeats = min(fastest, time.perf_counter() - start), repeats + 1
    return fastest


if __name__ == "__main__":
    print("RESULT " + json.dumps({"rates": run(json.loads(Path(sys.argv[1]).read_text()))}))
