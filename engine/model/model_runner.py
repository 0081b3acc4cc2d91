"""Build the batch of a step from its plan and run the model on it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from cupaged import backends
from cupaged.backends.cpu import backend as cpu_backend

from ..memory.block_manager import BlockManager
from ..scheduling.step_plan import ScheduledSequence
from ..transfer import to_device, with_sampled
from .attention import AttentionMetadata
from .attention_probe import SUPPORTED, LayerAttention, NotHandedOnError, probe_layers
from .cpu_linear import pack_linears
from .cuda_graph import CudaGraphs, GraphMaker
from .decode_graphs import DecodeGraphs, free_bytes, measured_bytes
from .fusion import Fusion, Proof, fuse_model
from .graph_buckets import LONG_PREFIX, Buckets
from .hand_on import hand_on
from .kv_cache import KVCache, KVShape
from .latents import cache_latents
from .step_inputs import StepInputs
from .vocabulary import num_tokens
from .workspace import Workspaces

_CACHE_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
_HEAD_SIZE_MULTIPLE = 8  # of the kernels
_WARN = "warn_if_padding_and_no_attention_mask"

_log = logging.getLogger("cupaged.engine")


class ModelRunner:
    """Run a transformers decoder that was loaded with the "cupaged" attention.

    Raises:
        ValueError: the paged cache does not support the model's attention.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        self.device = next(model.parameters()).device
        try:
            self._layers = self._check(model)
        except ValueError as error:
            kind = model.config.model_type  # type: ignore[union-attr]
            raise ValueError(f"{kind} is not supported: {error}; {SUPPORTED}") from error
        self._windows = tuple(layer.window for layer in self._layers)
        self._latent_size: int | None = None  # elements of a cached row, where latents are cached
        self._workspaces: Workspaces | None = None
        self._graphs: DecodeGraphs | None = None
        self._finds_prefixes = self.device.type != "cpu"
        for module in model.modules():  # to look whether to warn, transformers would wait for the device
            if hasattr(module, _WARN):
                setattr(module, _WARN, lambda *_: None)
        # Computes the batch of a step together with other ranks, in place of `run_inputs` alone.
        self.lead: Callable[[StepInputs, KVCache, torch.Tensor | None], torch.Tensor] | None = None

    @property
    def window(self) -> int | None:
        """Return the maximum number of tokens that a token attends to; None if a layer has no window."""
        windows = [window for window in self._windows if window is not None]
        return max(windows) if windows and len(windows) == len(self._windows) else None

    def _check(self, model: torch.nn.Module) -> tuple[LayerAttention, ...]:
        if self.config.is_encoder_decoder:
            raise ValueError("it has an encoder")
        if getattr(model, "_is_stateful", False):  # transformers' word for it
            raise ValueError("it has recurrent layers")
        if not self._takes_positions():
            raise ValueError("it does not take position_ids as the engine gives them, but counts its own")
        num_positions = getattr(self.config, "max_position_embeddings", None)
        try:
            try:
                return probe_layers(model, num_positions)
            except NotHandedOnError:
                hand_on(model)
                return probe_layers(model, num_positions)
        except (AttributeError, TypeError, LookupError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"its code fails with {type(error).__name__}: {error}") from error

    def _takes_positions(self) -> bool:
        """Return whether the model takes position_ids that begin at 0."""
        after_padding = any(  # in roberta-like models positions begin after padding_idx
            name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
            for name, module in self._model.named_modules()
        )
        return not after_padding and "position_ids" in inspect.signature(self._model.forward).parameters

    def cache_latents(self) -> None:
        """Let the cache hold the latents of a model with multi-head latent attention, as `Latents` says.

        To be called before anything else; models of other kinds are left as they are.
        """
        sizes = cache_latents(self._model, self._layers)
        self._latent_size = None if sizes is None else sizes[0]

    def kv_shape(self, block_size: int, kv_cache_dtype: str = "auto") -> KVShape:
        """Return the shape of a block of this model's cache.

        Raises:
            ValueError: a quantized cache does not support the model's head size.
        """
        if self._latent_size is not None:
            dtype = next(self._model.parameters()).dtype
            return KVShape(len(self._layers), 1, block_size, self._latent_size, dtype, latent=True)
        # What a layer has less of than another one is repeated or padded with zeros.
        head_size = max(layer.head_size for layer in self._layers)
        head_size += -head_size % _HEAD_SIZE_MULTIPLE
        if kv_cache_dtype != "auto" and head_size % 16:
            raise ValueError(
                f"kv_cache_dtype {kv_cache_dtype!r} needs a head size that is a multiple of 16, and "
                f"{self.config.model_type} has {head_size}; use 'auto'"
            )
        return KVShape(
            num_layers=len(self._layers),
            num_kv_heads=max(layer.num_kv_heads for layer in self._layers),
            block_size=block_size,
            head_size=head_size,
            dtype=_CACHE_DTYPES.get(kv_cache_dtype) or next(self._model.parameters()).dtype,
        )

    def proof(self, block_size: int) -> Proof:
        """Return what compares the model's logits with those of the same model after a change."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return Proof(self._model, self.kv_shape(block_size), self._layers, limit)

    def rewrite(self, block_size: int, fuse: bool = True) -> Fusion | None:
        """Make the model faster, in place: fuse its layers, and pack its weights for a CPU.

        Args:
            block_size: number of tokens of a block of the cache.
            fuse: rewrite layers into fused operators, as far as they compute the same.

        Returns:
            What was fused; None without ``fuse``.
        """
        fusion = None
        if fuse:
            fusion = fuse_model(self._model, self.proof(block_size))
        if fusion is not None:
            fusion.release()
        if self.device.type == "cpu":
            pack_linears(self._model)
        else:
            torch.cuda.empty_cache()  # of the weights before they were merged
        if fusion is not None:
            fusion.bind()
            on_cpu = self.device.type == "cpu" and backends.for_device("cpu") is cpu_backend
            if on_cpu and fusion.can_replay(len(self._layers)):
                self._workspaces = Workspaces(self._windows, self.kv_shape(block_size).dtype)
        return fusion

    @torch.inference_mode()
    def settle_frequencies(self, max_model_len: int) -> None:
        """Fix the rotary frequencies of "longrope" models, which have a set for short and one for long texts.

        transformers chooses by the longest sequence of a step. A request's keys would then depend on the
        other sequences of the step, and early and late keys of one sequence would not match.

        Args:
            max_model_len: maximum number of tokens of a sequence, which selects the set.
        """
        last = torch.tensor([[max_model_len - 1]], device=self.device)
        for module in self._model.modules():
            kinds = getattr(module, "rope_type", None)
            if kinds == "longrope":
                module(last.float(), last)
                module.rope_type = "default"  # type: ignore[assignment]
            elif isinstance(kinds, dict):
                for layer_type in [name for name, kind in kinds.items() if kind == "longrope"]:
                    module(last.float(), last, layer_type)
                    kinds[layer_type] = "default"

    def capture_graphs(
        self,
        cache: KVCache,
        max_num_seqs: int,
        max_model_len: int,
        make_graph: GraphMaker | None = None,
    ) -> None:
        """Capture decode steps, so that each is one launch. What cannot be captured runs as it is.

        Args:
            cache: the KV cache of the steps, which holds nothing yet.
            max_num_seqs: maximum number of sequences of a step.
            max_model_len: maximum number of tokens of a sequence.
            make_graph: makes the graphs; None: CUDA's, and none on a CPU.
        """
        graphs = self._new_graphs(cache, max_num_seqs, max_model_len, make_graph)
        if graphs is not None and graphs.try_capture():
            self._graphs = graphs

    @property
    def num_graphs(self) -> int:
        """Return the number of sizes of decode steps that are captured."""
        return 0 if self._graphs is None else len(self._graphs.buckets.all())

    def graph_bytes(self, cache: KVCache, max_num_seqs: int, max_model_len: int) -> int:
        """Return how much memory of a GPU the graphs take; 0 if there will be none.

        Args:
            cache: any cache of the shape; it is overwritten. The others are as in `capture_graphs`.
        """
        graphs = self._new_graphs(cache, max_num_seqs, max_model_len)
        return 0 if graphs is None else measured_bytes(graphs, partial(free_bytes, self.device))

    def _new_graphs(
        self, cache: KVCache, max_num_seqs: int, max_model_len: int, make_graph: GraphMaker | None = None
    ) -> DecodeGraphs | None:
        if make_graph is None:
            if self.device.type != "cuda":
                return None
            make_graph = CudaGraphs(self.device)
        if has_dynamic_frequencies(self._model):
            _log.info("decode steps run without CUDA graphs: rotary frequencies follow the longest sequence")
            return None
        return DecodeGraphs(
            self._forward,
            cache,
            self._windows,
            Buckets(max_num_seqs, max_model_len, cache.shape.block_size, self._finds_prefixes),
            num_tokens(self._model),
            make_graph,
        )

    @torch.inference_mode()
    def run(
        self,
        scheduled: tuple[ScheduledSequence, ...],
        blocks: BlockManager,
        cache: KVCache,
        sampled: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the scheduled tokens.

        Args:
            sampled: int64, on the device: the tokens that the step before has sampled. Those that the host
                does not know yet are taken from here (`StepInputs`).

        Returns:
            Logits ``[N, vocabulary]``. Each sequence, in order, has one row for each of its first
            ``num_prompt_logits`` tokens of the step and, if it samples, one for its last token. The next step
            may overwrite them.
        """
        inputs = StepInputs.of(scheduled, blocks)
        return (self.lead or self.run_inputs)(inputs, cache, sampled)

    @torch.inference_mode()
    def run_inputs(
        self, inputs: StepInputs, cache: KVCache, sampled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute a batch; `run` says what is returned."""
        shared_prefix = self._finds_prefixes and shares_prefix(inputs.block_tables, cache.shape.block_size)
        if self._graphs is not None and self._graphs.takes(inputs, cache):
            logits = self._graphs.run(inputs, shared_prefix, sampled)
            if logits is not None:
                return logits
        workspace = None
        if inputs.is_decode and self._workspaces is not None:
            workspace = self._workspaces.get(cache, len(inputs.seq_lens), inputs.block_tables.shape[1])
        read = [inputs.token_ids, inputs.positions, inputs.kept_rows]
        if workspace is not None:
            workspace.begin_step(inputs.slots, inputs.block_tables, inputs.seq_lens)
            metadata = workspace.paged
            token_ids, positions, kept_rows = to_device(read, self.device)
        else:
            paged = [inputs.slots, inputs.block_tables, inputs.seq_lens]
            if not inputs.is_decode:
                paged.append(inputs.query_start_loc)
            token_ids, positions, kept_rows, slots, tables, lens, *starts = to_device(
                read + paged, self.device
            )
            metadata = AttentionMetadata(
                kv_caches=cache.layers,
                kv_scales=cache.scales,
                slot_mapping=slots,
                block_tables=tables,
                seq_lens=lens,
                query_start_loc=starts[0] if starts else None,
                windows=self._windows,
                shared_prefix=shared_prefix,
                buffer=None if self._workspaces is None else self._workspaces.buffer(len(inputs.token_ids)),
            )
        if sampled is not None and (inputs.token_ids < 0).any():
            token_ids = with_sampled(token_ids, sampled)
        # A tensor of indices, as an int would keep at least one row.
        return self._forward(token_ids, positions, metadata, kept_rows)

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        paged: AttentionMetadata,
        kept_rows: torch.Tensor | int = 0,  # all
    ) -> torch.Tensor:
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            logits_to_keep=kept_rows,
            use_cache=False,
            paged=paged,
        )
        return output.logits[0]


def has_dynamic_frequencies(model: torch.nn.Module) -> bool:
    """Return whether rotary frequencies are computed anew for longer sequences, for which the host waits."""
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    return any(kind == "dynamic" or (isinstance(kind, dict) and "dynamic" in kind.values()) for kind in kinds)


def shares_prefix(block_tables: np.ndarray, block_size: int) -> bool:
    """Return whether two neighbouring sequences begin with the same `LONG_PREFIX` tokens.

    This is only a hint, which the kernels check: entries past the end of a short table are undefined.
    """
    blocks = LONG_PREFIX // block_size
    if block_tables.shape[1] <= blocks:
        return False
    return bool((block_tables[1:, :blocks] == block_tables[:-1, :blocks]).all(axis=1).any())
