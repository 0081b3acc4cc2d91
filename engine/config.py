"""How an engine is set up. Names are vLLM's where the thing is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .validation import is_integer, is_number

PREEMPTION_MODES = ("recompute", "swap", "auto")
SCHEDULING_POLICIES = ("fcfs", "priority")
MEMORY_POLICIES = ("paged", "orca-max", "orca-pow2", "orca-oracle")
BATCHING = ("continuous", "static")
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8")


def _count(value: Any) -> bool:
    return is_integer(value) and value >= 1


def _count_or_none(value: Any) -> bool:
    return value is None or _count(value)


# What a setting may be, and in words.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "block_size": (lambda v: is_integer(v) and v in BLOCK_SIZES, "a power of two from 8 to 256"),
    "gpu_memory_utilization": (lambda v: is_number(v) and 0 < v <= 1, "a number in (0, 1]"),
    "num_gpu_blocks_override": (_count_or_none, "an integer of at least 1 or None"),
    "swap_space": (lambda v: is_number(v) and v >= 0, "a number of GiB, at least 0"),
    "max_num_seqs": (_count, "an integer of at least 1"),
    "max_num_batched_tokens": (_count, "an integer of at least 1"),
    "max_model_len": (lambda v: v is None or (is_integer(v) and v >= 2), "an integer of at least 2 or None"),
    "preemption_mode": (lambda v: v in PREEMPTION_MODES, f"one of {', '.join(PREEMPTION_MODES)}"),
    "scheduling_policy": (lambda v: v in SCHEDULING_POLICIES, f"one of {', '.join(SCHEDULING_POLICIES)}"),
    "memory_policy": (lambda v: v in MEMORY_POLICIES, f"one of {', '.join(MEMORY_POLICIES)}"),
    "batching": (lambda v: v in BATCHING, f"one of {', '.join(BATCHING)}"),
    "enable_prefix_caching": (lambda v: isinstance(v, bool), "True or False"),
    "dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "kv_cache_dtype": (lambda v: v in KV_CACHE_DTYPES, f"one of {', '.join(KV_CACHE_DTYPES)}"),
    "seed": (is_integer, "an integer"),
    "generation_config": (lambda v: isinstance(v, str) and v != "", "'auto', 'vllm' or a directory"),
    "trust_remote_code": (lambda v: isinstance(v, bool), "True or False"),
    "device": (lambda v: v is None or isinstance(v, str), "a string or None"),
}


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine.

    Args:
        block_size: tokens a KV block holds; a power of two from 8 to 256.
        gpu_memory_utilization: share of the GPU's memory that weights, activations and KV cache may take
            together. On a CPU the cache takes at most 4 GiB and a quarter of what is available (to the
            container, where one limits it). It is never larger than twice what ``max_num_seqs`` sequences of
            ``max_model_len`` tokens take, the second time for the prefix cache.
        num_gpu_blocks_override: number of blocks of the KV cache, instead of one found by measuring memory.
        swap_space: GiB of CPU memory for the blocks of preempted requests, where ``preemption_mode`` moves
            them there. Never more than the KV cache.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of one step, prefill and decode together. Longer prompts are
            prefilled in chunks.
        max_model_len: most tokens of a sequence, prompt and output; None: the model's limit, or what the KV
            cache holds where that is less. A model with frequencies for short and for long texts ("longrope")
            uses the one set that this length asks for.
        preemption_mode: what becomes of a request that loses its blocks: "recompute" drops them, "swap" moves
            them to the swap space (and drops them when that is full), "auto" does the one that takes less
            time at the rates measured so far.
        scheduling_policy: "fcfs" runs requests in the order of their arrival, "priority" those of the lowest
            number first; one that has to wait for memory takes it from those of higher numbers.
        memory_policy: "paged" gives blocks as tokens come. The others are there to compare with: they keep
            one contiguous run of blocks for each output from its start, share and preempt nothing, and have
            no prefix cache. "orca-max" keeps ``max_model_len`` tokens, "orca-pow2" the prompt and the next
            power of two of ``max_tokens``, "orca-oracle" the prompt and ``max_tokens``: it knows how long an
            output gets where requests set ``ignore_eos``.
        batching: "continuous" lets requests join whenever there is room, "static" only when all that run
            have ended: a batch is what waits then, as far as memory, ``max_num_seqs`` and one step's tokens
            go.
        enable_prefix_caching: requests that begin alike share the blocks of what they share, and blocks stay
            to be found by later requests until their memory is needed.
        dtype: of the weights; "auto" follows the checkpoint.
        kv_cache_dtype: of the KV cache; "auto" is the weights'. "fp8" ("fp8_e4m3"), "fp8_e5m2" and "int8"
            hold twice the tokens of 16 bits in the same memory, at a loss: the least with int8, about 1.5
            times as much with fp8 and 7 times with fp8_e5m2 (SmolLM2-135M; model/kv_scales.py has figures).
            Their scales are found at the start from a drawn prompt; what lies far beyond its keys and values
            saturates.
        seed: of requests that bring none.
        generation_config: where the sampling settings of requests that leave them out come from: "auto" is
            the model's generation_config.json (temperature, top_k, top_p, min_p, repetition_penalty,
            max_new_tokens), a directory is that of another one, and "vllm" leaves it out, for the defaults of
            `SamplingParams` and of the API.
        trust_remote_code: run Python files that come with the model, where transformers has no code for it.
        device: "cuda", "cuda:1", "cpu", or None: a GPU if there is one.
        check_integrity: verify the block manager's books after every step (for tests).

    Raises:
        ValueError: a setting is out of range.
    """

    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    num_gpu_blocks_override: int | None = None
    swap_space: float = 4.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    preemption_mode: str = "recompute"
    scheduling_policy: str = "fcfs"
    memory_policy: str = "paged"
    batching: str = "continuous"
    enable_prefix_caching: bool = True
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    seed: int = 0
    generation_config: str = "auto"
    trust_remote_code: bool = False
    device: str | None = None
    check_integrity: bool = False

    def __post_init__(self) -> None:
        for name, (fits, wanted) in _RULES.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )

    @classmethod
    def from_kwargs(cls, kwargs: dict[str, Any]) -> EngineConfig:
        """The configuration with these settings.

        Raises:
            ValueError: a name is not a setting; the message lists those that are.
        """
        names = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in names:
                raise ValueError(f"no setting is called {name!r}; there are {', '.join(names)}")
        return cls(**kwargs)
