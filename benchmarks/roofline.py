"""Estimate the cost model of a model on a device that was not measured, from its size and the device's peaks.

Assumed: matrix products reach half of the peak, reading weights and keys and values four fifths of the
bandwidth, a step takes 5 ms besides, and a block costs as much to read as four tokens more (`cost_model.py`
says why) and 5 us for each transfer when it is moved. `step_times.py` measures instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cost_model import BLOCK_TOKENS, TRANSFER, Costs

_FLOPS, _BANDWIDTH = 0.5, 0.8  # of the peak
_HOST = 5e-3  # seconds of a step besides


@dataclass(frozen=True)
class Device:
    """The peaks of a device, from its data sheet.

    Args:
        memory: bytes.
        bandwidth: bytes/s of the memory.
        flops: of dense 16-bit matrix products, per second.
        link: bytes/s to the host, in one direction.
    """

    memory: float
    bandwidth: float
    flops: float
    link: float


DEVICES = {
    "a100-40gb": Device(40 * 2**30, 1.555e12, 312e12, 25e9),
    "a100-80gb": Device(80 * 2**30, 2.039e12, 312e12, 25e9),
    "h100": Device(80 * 2**30, 3.35e12, 989e12, 50e9),
    "h200": Device(141e9, 4.8e12, 989e12, 50e9),
    "l4": Device(24 * 2**30, 0.3e12, 121e12, 25e9),
    "l40s": Device(48 * 2**30, 0.864e12, 362e12, 25e9),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder.

    Args:
        parameters: number of weights, in 16 bits.
        kv_heads, head_size: of each layer.
    """

    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def values_per_token(self) -> int:
        """Return the number of keys' and values' elements of a token."""
        return 2 * self.layers * self.kv_heads * self.head_size


MODELS = {
    "opt-13b": Shape(13e9, 40, 40, 40, 128),
    "llama-2-7b": Shape(6.7e9, 32, 32, 32, 128),
    "llama-3-8b": Shape(8.0e9, 32, 32, 8, 128),
    "qwen2.5-7b": Shape(7.6e9, 28, 28, 4, 128),
    "smollm2-135m": Shape(0.135e9, 30, 9, 3, 64),
}


def shape(model: str) -> Shape:
    """Return the sizes of a model by its name, or of a directory with a config.json.

    Raises:
        ValueError: there is neither; the message lists the names.
    """
    if model in MODELS:
        return MODELS[model]
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--model {model}: no model of this name ({', '.join(MODELS)}), nor a directory with a "
            "config.json"
        )
    config: dict[str, Any] = json.loads(path.read_text())
    try:
        hidden, layers, heads = (
            config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        inner, vocabulary = config["intermediate_size"], config["vocab_size"]
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it is not the configuration of a decoder") from error
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_size * (heads + kv_heads)
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    parameters = layers * (attention + 3 * hidden * inner) + embeddings
    return Shape(parameters, layers, heads, kv_heads, head_size)


def num_slots(model: Shape, device: Device, value_bytes: float, utilization: float = 0.9) -> int:
    """Return the number of tokens whose keys and values fit beside the weights.

    Raises:
        ValueError: the weights do not fit.
    """
    free = utilization * device.memory - 2 * model.parameters
    slots = int(free / (value_bytes * model.values_per_token))
    if slots < 1:
        raise ValueError(
            f"the weights have {2 * model.parameters / 2**30:.0f} GiB, and the device "
            f"{device.memory / 2**30:.0f} GiB: choose a larger device or a smaller model"
        )
    return slots


def costs(model: Shape, device: Device, block_size: int, value_bytes: float) -> Costs:
    """Return the estimated cost model.

    Args:
        value_bytes: bytes of an element of keys and values.
    """
    kv_bytes = value_bytes * model.values_per_token
    per_token = 2 * model.parameters / (_FLOPS * device.flops)
    return Costs(
        step=2 * model.parameters / (_BANDWIDTH * device.bandwidth) + _HOST,
        prompt_token=per_token,
        prompt_pair=4 * model.layers * model.heads * model.head_size / (_FLOPS * device.flops),
        decoded_token=per_token,
        context_token=kv_bytes / (_BANDWIDTH * device.bandwidth) * (1 + BLOCK_TOKENS / block_size),
        moved_block=2 * model.layers * TRANSFER + block_size * kv_bytes / device.link,
    )
