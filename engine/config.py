"""Define and check the settings of an engine, under vLLM's names where vLLM has the same setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .memory.eviction import EVICTION_POLICIES, MakePolicy
from .scheduling.admission import ADMISSION_POLICIES, MakeAdmissionPolicy
from .scheduling.order import SCHEDULING_POLICIES, MakeSchedulingPolicy
from .scheduling.preemption import PREEMPTION_MODES, MakePreemptionPolicy
from .validation import is_integer, is_number

MEMORY_POLICIES = ("paged", "orca-max", "orca-pow2", "orca-oracle")
BATCHING = ("continuous", "static")
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8")


def _count(value: Any) -> bool:
    return is_integer(value) and value >= 1


def _count_or_none(value: Any) -> bool:
    return value is None or _count(value)


def _policy(names: Mapping[str, Any]) -> tuple[Callable[[Any], bool], str]:
    """Return the rule of a setting that names a policy, or makes one."""
    wanted = f"one of {', '.join(names)}, or a class or function that makes one"
    return lambda v: v in names if isinstance(v, str) else callable(v), wanted


# By setting: a check of its value, and a description of valid values.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "block_size": (lambda v: is_integer(v) and v in BLOCK_SIZES, "a power of two from 8 to 256"),
    "gpu_memory_utilization": (lambda v: is_number(v) and 0 < v <= 1, "a number in (0, 1]"),
    "num_gpu_blocks_override": (_count_or_none, "an integer of at least 1 or None"),
    "swap_space": (lambda v: is_number(v) and v >= 0, "a number of GiB, at least 0"),
    "max_num_seqs": (_count, "an integer of at least 1"),
    "max_num_batched_tokens": (_count, "an integer of at least 1"),
    "max_model_len": (lambda v: v is None or (is_integer(v) and v >= 2), "an integer of at least 2 or None"),
    "preemption_mode": _policy(PREEMPTION_MODES),
    "scheduling_policy": _policy(SCHEDULING_POLICIES),
    "admission_policy": _policy(ADMISSION_POLICIES),
    "memory_policy": (lambda v: v in MEMORY_POLICIES, f"one of {', '.join(MEMORY_POLICIES)}"),
    "batching": (lambda v: v in BATCHING, f"one of {', '.join(BATCHING)}"),
    "eviction_policy": _policy(EVICTION_POLICIES),
    "enable_prefix_caching": (lambda v: isinstance(v, bool), "True or False"),
    "tensor_parallel_size": (_count, "an integer of at least 1"),
    "distributed_timeout_seconds": (lambda v: is_number(v) and v > 0, "a number of seconds above 0"),
    "dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "kv_cache_dtype": (lambda v: v in KV_CACHE_DTYPES, f"one of {', '.join(KV_CACHE_DTYPES)}"),
    "seed": (is_integer, "an integer"),
    "generation_config": (lambda v: isinstance(v, str) and v != "", "'auto', 'vllm' or a directory"),
    "trust_remote_code": (lambda v: isinstance(v, bool), "True or False"),
    "fuse": (lambda v: isinstance(v, bool), "True or False"),
    "async_scheduling": (lambda v: v is None or isinstance(v, bool), "True, False or None"),
    "enforce_eager": (lambda v: isinstance(v, bool), "True or False"),
    "device": (lambda v: v is None or isinstance(v, str), "a string or None"),
}


@dataclass(frozen=True)
class EngineConfig:
    """Hold the settings of one engine.

    Args:
        block_size: number of tokens of a KV block; a power of two from 8 to 256.
        gpu_memory_utilization: fraction of the GPU's memory for weights, activations and KV cache together.
            On a CPU the cache takes at most 4 GiB and a quarter of the available memory (of the container, if
            one limits it). The cache is never larger than ``max_num_seqs`` sequences of ``max_model_len``
            tokens need, or twice that with the prefix cache.
        num_gpu_blocks_override: number of blocks of the KV cache, instead of one found by measuring memory.
        swap_space: GiB of CPU memory for the blocks of preempted requests, unless ``preemption_mode`` is
            "recompute". It is never larger than the KV cache, and the ranks of ``tensor_parallel_size`` have
            equal parts of it.
        max_num_seqs: maximum number of sequences in a step.
        max_num_batched_tokens: maximum number of tokens in a step, of prefill and decode together. Longer
            prompts are prefilled in chunks.
        max_model_len: maximum number of tokens of a sequence, prompt and output; None: the model's maximum,
            or the size of the KV cache if that is less. It also selects between the rotary frequencies for
            short and for long texts of models that have both ("longrope").
        preemption_mode: how preempted requests resume: "recompute" drops their blocks and computes them
            again, "swap" moves them to the swap space (and drops them when that is full), "auto" chooses the
            faster of the two at the rates measured so far. From Python also a class derived from
            `PreemptionPolicy` (scheduling/preemption.py), or a function that makes one, as of the policies
            below.
        scheduling_policy: "fcfs" runs requests in the order of their arrival, "priority" those with the
            lowest number first; a request that needs memory preempts requests with higher numbers.
            "shortest-prompt" lets short prompts pass long ones, "longest-prefix" those that the prefix cache
            knows the others, as far as nobody starves. From Python also a `SchedulingPolicy`
            (scheduling/order.py).
        admission_policy: how many blocks stay free for the running requests when another one is admitted:
            "watermark" a hundredth of all, "greedy" none, "conservative" all that they may come to need by
            their ``max_tokens``, so that nobody is preempted. From Python also an `AdmissionPolicy`
            (scheduling/admission.py).
        memory_policy: "paged" allocates blocks as tokens come. The others are baselines for comparison: they
            reserve one contiguous range of blocks for each output at its start, neither share nor preempt,
            and have no prefix cache. "orca-max" reserves ``max_model_len`` tokens, "orca-pow2" the prompt and
            the next power of two of ``max_tokens``, "orca-oracle" the prompt and ``max_tokens``, which is the
            exact length if requests set ``ignore_eos``.
        batching: "continuous" admits requests whenever there is room, "static" only when all running requests
            have finished: the next batch is then formed from the waiting requests, within memory,
            ``max_num_seqs`` and the tokens of one step.
        enable_prefix_caching: share the blocks of common prefixes between requests, and keep blocks for later
            requests until their memory is needed.
        eviction_policy: which unused block of the prefix cache loses its content first: "lru" the least
            recently used one, "lfu" the least frequently used one, "cost" the one that costs least to lose,
            by how often and how long ago it was used and how many blocks are of no use without it. From
            Python also an `EvictionPolicy` (memory/eviction.py).
        tensor_parallel_size: number of GPUs among which the model is divided. Each has a process, a rank,
            with its part of the weights and of the KV cache. Without a GPU the ranks run on the CPU.
        distributed_timeout_seconds: seconds after which a rank that does not answer in a step is taken to
            hang, which ends the engine.
        dtype: dtype of the weights; "auto" follows the checkpoint.
        kv_cache_dtype: dtype of the KV cache; "auto" is that of the weights. "fp8" ("fp8_e4m3"), "fp8_e5m2"
            and "int8" hold twice the tokens of a 16-bit cache in the same memory, at a loss of accuracy: it
            is smallest with int8, about 1.5 times as large with fp8 and 7 times with fp8_e5m2 (SmolLM2-135M;
            model/kv_scales.py has figures). Scales are calibrated at startup on a prompt of random tokens;
            keys and values far beyond the prompt's saturate.
        seed: seed for requests without one.
        generation_config: source of the default sampling settings of requests: "auto" is the model's
            generation_config.json (temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens), a
            directory is that of another one, and "vllm" selects the defaults of `SamplingParams` and of the
            API.
        trust_remote_code: run Python files that come with the model, if transformers has no code for it.
        fuse: rewrite the model's layers into fused operators and merged projections when it is loaded, as far
            as they compute the same (``python -m cupaged.engine.explain`` lists what is fused).
        async_scheduling: schedule and launch a step before the tokens of the step before have reached the
            host, as long as no request needs them for that; None: on a GPU, where the host works while the
            device computes.
        enforce_eager: launch the kernels of a decode step one by one: no CUDA graphs are captured.
        device: "cuda", "cuda:1", "cpu", or None: a GPU if there is one.
        check_integrity: check the block manager's state after every step (for tests).

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
    preemption_mode: str | MakePreemptionPolicy = "recompute"
    scheduling_policy: str | MakeSchedulingPolicy = "fcfs"
    admission_policy: str | MakeAdmissionPolicy = "watermark"
    memory_policy: str = "paged"
    batching: str = "continuous"
    enable_prefix_caching: bool = True
    eviction_policy: str | MakePolicy = "lru"
    tensor_parallel_size: int = 1
    distributed_timeout_seconds: float = 300.0
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    seed: int = 0
    generation_config: str = "auto"
    trust_remote_code: bool = False
    fuse: bool = True
    async_scheduling: bool | None = None
    enforce_eager: bool = False
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
        """Return the configuration with these settings.

        Raises:
            ValueError: a name is not a setting (the message lists all of them), or a value is out of range.
        """
        names = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in names:
                raise ValueError(f"no setting is called {name!r}; there are {', '.join(names)}")
        return cls(**kwargs)
