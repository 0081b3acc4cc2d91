"""Run decode steps as graphs, so that a step is one launch.

A graph repeats kernels with the addresses and numbers of its capture. So there is one for each `Bucket`, the
inputs stay in place (`DecodeBuffers`), and a step is padded to its bucket with slots of -1, to which nothing
is written, and lengths of 0, which attend to nothing. The kernels find the lengths on the device: what is
launched depends on the bucket only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from ..transfer import with_sampled
from .attention import AttentionMetadata
from .cuda_graph import Graph, GraphMaker
from .decode_buffers import DecodeBuffers
from .graph_buckets import Bucket, Buckets
from .graph_check import difference, draw_step, fill_with_numbers
from .kv_cache import KVCache
from .step_inputs import StepInputs

# What a model's code, torch or CUDA raise where something cannot be captured.
_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_MEASURED = 8  # graphs besides the largest, of which memory is measured

_log = logging.getLogger("cupaged.engine")

# From token IDs [S], positions [S] and what maps them to sequences to logits [S, vocabulary].
Forward = Callable[[torch.Tensor, torch.Tensor, AttentionMetadata], torch.Tensor]


class DecodeGraphs:
    """Capture and replay the forward of decode steps.

    Args:
        forward: the model, of which every step of a bucket has to launch the same.
        cache: the KV cache whose steps are run.
        windows: sliding window of each layer.
        buckets: the sizes of steps.
        vocabulary: number of tokens of the model.
        make_graph: makes the graphs.
    """

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        windows: tuple[int | None, ...],
        buckets: Buckets,
        vocabulary: int,
        make_graph: GraphMaker,
    ) -> None:
        self.cache, self.buckets = cache, buckets
        self._forward, self._windows, self._make_graph = forward, windows, make_graph
        self._vocabulary = vocabulary
        self._buffers = DecodeBuffers(
            buckets.numbers_of_seqs[-1], buckets.widths[-1], device=cache.blocks.device
        )
        self._graphs: dict[Bucket, Graph] = {}
        self._logits: torch.Tensor | None = None  # [sequences of the largest bucket, vocabulary]
        self._addresses = self._current_addresses()

    @torch.inference_mode()
    def capture(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Capture a graph of each bucket, and compare its replay with the step that it stands for.

        The cache must hold nothing yet: its first blocks are overwritten.

        Args:
            buckets: those to capture, the largest first; None: all.

        Raises:
            RuntimeError: a step cannot be captured, or its replay has other logits.
        """
        rng, start = np.random.default_rng(0), time.perf_counter()
        fill_with_numbers(self.cache)
        wanted = self.buckets.all() if buckets is None else buckets
        for bucket in tqdm(wanted, desc="Capturing decode graphs", disable=None, dynamic_ncols=True):
            self._graphs[bucket] = self._captured(bucket, rng)
        self._addresses = self._current_addresses()
        _log.info("captured %d decode graphs in %.1f s", len(wanted), time.perf_counter() - start)

    def _captured(self, bucket: Bucket, rng: np.random.Generator) -> Graph:
        """Return the graph of a bucket, captured on nothing but padding, and compared on a drawn step."""
        step = draw_step(rng, bucket, self.cache, self._vocabulary, self.buckets.max_model_len)
        previous = torch.from_numpy(rng.integers(0, self._vocabulary, len(step.token_ids)))
        self._fill(bucket, step, previous)
        with self._make_graph.warming_up():  # loads kernels and plans launches, which a capture cannot
            expected = self._run(bucket)
        if self._logits is None:
            self._logits = torch.empty_like(expected)
        logits = self._logits[: bucket.num_seqs]
        self._fill(bucket, StepInputs.padding(), torch.zeros_like(previous))
        graph = self._make_graph()
        with graph.capture():
            logits.copy_(self._run(bucket))
        self._fill(bucket, step, previous)
        graph.replay()
        count = len(step.token_ids)
        if (problem := difference(logits[:count], expected[:count])) is not None:
            raise RuntimeError(f"{problem} ({bucket})")
        return graph

    def try_capture(self) -> bool:
        """Capture all graphs; if that fails, say so in the log, and return False."""
        try:
            self.capture()
        except _ERRORS as error:
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            _log.warning("decode steps run without CUDA graphs, as one could not be captured: %s", why)
            return False
        return True

    def takes(self, inputs: StepInputs, cache: KVCache) -> bool:
        """Return whether graphs are made for such a step: of one token a sequence, each with logits."""
        return inputs.is_decode and cache is self.cache and len(inputs.kept_rows) == len(inputs.token_ids)

    def run(
        self, inputs: StepInputs, shared_prefix: bool, sampled: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Replay a step that is one of those.

        Args:
            shared_prefix: kernels are to look for shared prefixes.
            sampled: the tokens that the step before has sampled, which token IDs of ``-1 - i`` stand for.

        Returns:
            Logits ``[S, vocabulary]``, until the next step is run; None: no graph is that large.

        Raises:
            RuntimeError: something that graphs read has been moved.
        """
        count, width = inputs.block_tables.shape
        bucket = self.buckets.find(count, width, shared_prefix)
        graph = None if bucket is None else self._graphs.get(bucket)
        if graph is None or bucket is None or self._logits is None:
            return None
        if sampled is not None and len(sampled) > len(self._buffers.sampled):
            return None
        if self._current_addresses() != self._addresses:
            raise RuntimeError("tensors that decode graphs read have been moved since; please report this")
        self._fill(bucket, inputs, sampled)
        graph.replay()
        return self._logits[:count]

    def _fill(self, bucket: Bucket, inputs: StepInputs, sampled: torch.Tensor | None) -> None:
        self._buffers.fill(bucket.num_seqs, bucket.width, inputs)
        if sampled is not None and (inputs.token_ids < 0).any():
            self._buffers.sampled[: len(sampled)].copy_(sampled, non_blocking=True)

    def _run(self, bucket: Bucket) -> torch.Tensor:
        """Run the model on the inputs that are in place."""
        tensors = self._buffers.tensors(bucket.num_seqs, bucket.width)
        metadata = AttentionMetadata(
            kv_caches=self.cache.layers,
            kv_scales=self.cache.scales,
            slot_mapping=tensors.slots,
            block_tables=tensors.block_tables,
            seq_lens=tensors.seq_lens,
            query_start_loc=None,
            windows=self._windows,
            shared_prefix=bucket.shared_prefix,
        )
        token_ids = with_sampled(tensors.token_ids, self._buffers.sampled)
        return self._forward(token_ids, tensors.positions, metadata)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the inputs."""
        return self._buffers.memory.nbytes

    def _current_addresses(self) -> list[int]:
        tensors = self._buffers.memory, self._buffers.sampled, self.cache.blocks, self._logits
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def measured_bytes(graphs: DecodeGraphs, free: Callable[[], int]) -> int:
    """Return how much memory all graphs take, from that of the largest and of a few others; 0 if none can be.

    Args:
        graphs: none of which is captured.
        free: returns the number of free bytes of the GPU.
    """
    largest, *others = graphs.buckets.all()
    few = others[-_MEASURED:]
    before = free()
    try:
        graphs.capture([largest])
        between = free()
        graphs.capture(few)
    except _ERRORS:  # those of the engine will not be captured either, which the log says then
        return 0
    each = (between - free()) / max(1, len(few))
    return int(graphs.num_bytes + before - between + each * len(others))


def free_bytes(device: torch.device) -> int:
    """Return the number of bytes of a GPU that nothing takes, not even torch for later."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
