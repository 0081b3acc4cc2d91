"""Implement the operators over the kernels in `cuda/`: find or make the plan of a call, and launch it.

`plans.py` says what to launch, once for each layout of the tensors. A `Launcher` runs it: that of
`launcher.py`, or the tests', which runs the same sources on the CPU. Nothing on the way waits for the GPU,
reads its memory or allocates outside torch's allocator, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...params import AttentionParams, SamplingSettings
from . import cache_plans, fused_plans, layouts, mla_plans, plans
from .plans import DecodePlan, PrefillPlan
from .specs import KernelCall

PLANS = 1024  # kept at most; the layers of a batch share theirs
# Swapping has two ways: a GPU's copy engine, or a kernel that reads and writes pinned memory. Published for
# an H100, in GB/s: the engine 2 in pieces of 8 KB, 8 of 32 KB, 37 of 512 KB, 46 of 2 MB, 51 of 16 MB; a
# kernel 22, 34, 48, 49, 49. Where they are even the engine is better: it leaves the multiprocessors alone.
# `benchmarks/kernels.py --section memory` measures both.
COPY_ENGINE_BYTES = 4 << 20
# Runs a prepared kernel on the current stream. A tensor stands for its address, None for a null pointer.
Tensors = Sequence[torch.Tensor | None]
Launch = Callable[[Tensors], None]


class Launcher(Protocol):
    """Prepare and run launches. All tensors of a launch are on one device."""

    def prepare(self, call: KernelCall, device: torch.device) -> Launch:
        """Return a launch without its addresses, to be called many times.

        It is given the tensors of the arguments' pointers, in their order.
        """

    def sm_count(self, device: torch.device) -> int:
        """Return the number of streaming multiprocessors of the device."""

    def arch(self, device: torch.device) -> str:
        """Return the architecture that kernels for the device are compiled for: "75", "90a"."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Allocate workspace that lives at least until what is launched now has run."""

    def reaches(self, tensor: torch.Tensor, device: torch.device) -> bool:
        """Return whether kernels on the device can access the tensor: it is there, or in pinned memory."""

    def upload(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Copy a tensor from the CPU to the device, for later launches, without waiting."""


@dataclass(frozen=True)
class PreparedPrefill:
    """The launches of a `plans.PrefillPlan`."""

    plan: PrefillPlan
    schedule: Launch
    prefill: Launch
    merge: Launch | None


@dataclass(frozen=True)
class PreparedAttention:
    """The launches of an attention call: prefill for sequences of many query tokens, if there may be some,
    and a `plans.DecodePlan` for those of one or a few."""

    plan: DecodePlan
    prefill: PreparedPrefill | None
    search: Launch | None
    wide: Launch | None
    decode: Launch
    merge: Launch | None


class Kernels:
    """Implement the operators over a launcher.

    Plans are kept under the call's layout, the alignment of its addresses and its settings: all that they are
    made from. No tensor is kept.

    Args:
        copy_engine_bytes: runs of blocks from this size on are swapped by the copy engine.
    """

    CHECKS_DATA = False

    def __init__(self, launcher: Launcher, copy_engine_bytes: int = COPY_ENGINE_BYTES) -> None:
        self._launcher = launcher
        self._copy_engine_bytes = copy_engine_bytes
        self._plans: dict[Hashable, Any] = {}

    def reshape_and_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
        layout: Hashable,
    ) -> None:
        plan_key = layout, key.data_ptr() % 16, value.data_ptr() % 16, kv_cache.data_ptr() % 16
        launch = self._plans.get(plan_key)
        if launch is None:
            call = cache_plans.reshape_and_cache(key, value, kv_cache)
            launch = self._keep(plan_key, self._launcher.prepare(call, kv_cache.device))
        launch((key, value, kv_cache, slot_mapping, k_scale, v_scale))

    def copy_blocks(self, kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
        self._copy(kv_cache, kv_cache, block_mapping, kv_cache.device)

    def _copy(
        self, src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor, device: torch.device
    ) -> None:
        call = cache_plans.copy_blocks(src, dst, block_mapping.shape[0])
        self._launcher.prepare(call, device)((src, dst, block_mapping))

    def paged_attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
        layout: Hashable,
    ) -> None:
        alignment = query.data_ptr() % 16, kv_cache.data_ptr() % 16, out.data_ptr() % 16
        plan_key = layout, alignment, params.settings
        plan = self._plans.get(plan_key)
        if plan is None:
            plan = self._keep(
                plan_key, self._prepare(query, kv_cache, block_tables, query_start_loc, out, params)
            )
        # In the order of the arguments' pointers, which is what a launch takes.
        sinks = params.sinks
        tensors = (
            query,
            kv_cache,
            block_tables,
            seq_lens,
            query_start_loc,
            params.alibi_slopes,
            sinks,
            params.k_scale,
            params.v_scale,
            out,
            lse,
        )
        self._decode(plan, tensors, block_tables, seq_lens, query_start_loc, sinks, out, lse)
        if plan.prefill is not None:
            self._prefill(plan.prefill, tensors, seq_lens, query_start_loc, sinks, out, lse)

    def _prefill(
        self,
        prepared: PreparedPrefill,
        tensors: Tensors,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        plan, device, empty = prepared.plan, out.device, self._launcher.empty
        schedule = empty((plan.schedule_size,), torch.int32, device)
        prepared.schedule((seq_lens, query_start_loc, schedule))
        partials = None if plan.partials is None else empty(plan.partials, torch.float32, device)
        prepared.prefill((*tensors, schedule, partials))
        if prepared.merge is not None:  # the schedule begins with the size of KV splits
            prepared.merge((partials, seq_lens, query_start_loc, schedule, sinks, out, lse))

    def _decode(
        self,
        prepared: PreparedAttention,
        tensors: Tensors,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        plan, device, empty = prepared.plan, out.device, self._launcher.empty
        partials = None if plan.partials is None else empty(plan.partials, torch.float32, device)
        split_size = empty((1,), torch.int32, device) if plan.balances else None
        counts = tiles = None
        if prepared.search is not None and plan.tile_lists is not None:
            lists = empty(plan.tile_lists[:2], torch.int32, device)
            tile_lists = empty(plan.tile_lists, torch.int32, device)
            prepared.search((block_tables, seq_lens, query_start_loc, lists, tile_lists))
            counts, tiles = lists[0], tile_lists[0]
            if prepared.wide is not None:
                prepared.wide((*tensors, partials, split_size, lists[1], tile_lists[1]))
        prepared.decode((*tensors, partials, split_size, counts, tiles))
        if prepared.merge is not None:
            prepared.merge((partials, seq_lens, query_start_loc, split_size, sinks, out, lse))

    def _prepare(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        out: torch.Tensor,
        params: AttentionParams,
    ) -> PreparedAttention:
        device = query.device
        arch, sm_count = self._launcher.arch(device), self._launcher.sm_count(device)
        plan = plans.decode(query, kv_cache, block_tables, query_start_loc, out, params, arch, sm_count)

        def prepare(call: KernelCall | None) -> Any:
            return None if call is None else self._launcher.prepare(call, device)

        prefill = None
        if not plans.all_decode(params, query_start_loc):
            prefill_plan = plans.prefill(query, kv_cache, block_tables, out, params, arch, sm_count)
            calls = prefill_plan.schedule, prefill_plan.prefill, prefill_plan.merge
            prefill = PreparedPrefill(prefill_plan, *map(prepare, calls))
        return PreparedAttention(
            plan, prefill, *map(prepare, (plan.search, plan.wide, plan.decode, plan.merge))
        )

    def mla_attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
        layout: Hashable,
    ) -> None:
        device, empty = query.device, self._launcher.empty
        plan_key = "mla", layout, _alignment((query, kv_cache, out)), params.settings
        launches = self._plans.get(plan_key)
        if launches is None:
            arch, sm_count = self._launcher.arch(device), self._launcher.sm_count(device)
            plan = mla_plans.attention(
                query, kv_cache, block_tables, query_start_loc, out, params, arch, sm_count
            )
            launches = self._keep(plan_key, [launch.prepare(self._launcher, device) for launch in plan])
        for attend, merge, shape in launches:
            partials = None if shape is None else empty(shape, torch.float32, device)
            attend((query, kv_cache, block_tables, seq_lens, query_start_loc, out, lse, partials))
            if merge is not None:
                merge((partials, seq_lens, query_start_loc, None, None, out, lse))

    def concat_and_cache_mla(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        layout: Hashable,
    ) -> None:
        plan_key = "concat_and_cache_mla", layout, _alignment((kv_c, k_pe, kv_cache))
        launch = self._plans.get(plan_key)
        if launch is None:
            call = mla_plans.concat_and_cache(kv_c, k_pe, kv_cache)
            launch = self._keep(plan_key, self._launcher.prepare(call, kv_cache.device))
        launch((kv_c, k_pe, kv_cache, slot_mapping))

    def merge_attention_states(
        self, outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        call = plans.merge_states(outs, out)
        self._launcher.prepare(call, outs.device)((outs, lses, out, lse))

    def swap_blocks(self, src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None:
        device = src.device if src.is_cuda else dst.device
        reached = self._launcher.reaches(src, device) and self._launcher.reaches(dst, device)
        by_kernel: list[list[int]] = []
        engine_bytes = self._copy_engine_bytes if reached and layouts.copy_unit(src, dst) == 16 else 0
        block_bytes = src.shape[1:].numel() * src.element_size()
        # One copy a run of neighbouring blocks.
        for run in layouts.runs(block_mapping.tolist(), src.is_contiguous() and dst.is_contiguous()):
            (first_src, first_dst), count = run[0], len(run)
            if count * block_bytes < engine_bytes:
                by_kernel += run
            else:
                blocks = src[first_src : first_src + count]
                dst[first_dst : first_dst + count].copy_(blocks, non_blocking=True)
        if by_kernel:
            self._copy(src, dst, self._launcher.upload(torch.tensor(by_kernel), device), device)

    def rms_norm(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        weight_offset: float,
        residual: torch.Tensor | None,
        input_weight: torch.Tensor | None,
        out: torch.Tensor,
        layout: Hashable,
    ) -> None:
        tensors = input, weight, residual, input_weight, out
        plan_key = "rms_norm", layout, _alignment(tensors), epsilon, weight_offset
        launch = self._plans.get(plan_key)
        if launch is None:
            call = fused_plans.rms_norm(input, weight, epsilon, weight_offset, residual, input_weight, out)
            launch = self._keep(plan_key, self._launcher.prepare(call, input.device))
        launch(tensors)

    def act_and_mul(self, input: torch.Tensor, activation: str, out: torch.Tensor, layout: Hashable) -> None:
        plan_key = "act_and_mul", layout, _alignment((input, out)), activation
        launch = self._plans.get(plan_key)
        if launch is None:
            call = fused_plans.act_and_mul(input, activation, out)
            launch = self._keep(plan_key, self._launcher.prepare(call, input.device))
        launch((input, out))

    def rope_and_cache(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        interleaved: bool,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        epsilon: float,
        weight_offset: float,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
        layout: Hashable,
    ) -> None:
        alignment = _alignment((query, key, value, cos, sin, query_weight, key_weight))
        settings = interleaved, epsilon, weight_offset
        plan_key = "rope_and_cache", layout, alignment, kv_cache.data_ptr() % 16, settings
        launch = self._plans.get(plan_key)
        if launch is None:
            call = fused_plans.rope_and_cache(
                query,
                key,
                value,
                cos,
                sin,
                kv_cache,
                interleaved,
                query_weight,
                key_weight,
                epsilon,
                weight_offset,
            )
            launch = self._keep(plan_key, self._launcher.prepare(call, kv_cache.device))
        launch(
            (
                query,
                key,
                value,
                cos,
                sin,
                kv_cache,
                slot_mapping,
                query_weight,
                key_weight,
                k_scale,
                v_scale,
            )
        )

    def sample(
        self, logits: torch.Tensor, settings: SamplingSettings, out: torch.Tensor, layout: Hashable
    ) -> None:
        plan_key = "sample", layout, _alignment((logits,))
        launch = self._plans.get(plan_key)
        if launch is None:
            call = fused_plans.sample(logits)
            launch = self._keep(plan_key, self._launcher.prepare(call, logits.device))
        launch((logits, *settings, out))

    def _keep(self, plan_key: Hashable, plan: Any) -> Any:
        if len(self._plans) >= PLANS:  # new lengths of prompts fill it again in no time
            self._plans.clear()
        self._plans[plan_key] = plan
        return plan


def _alignment(tensors: Tensors) -> int:
    """Return how all addresses together lie between multiples of 16 bytes; 0 where each is one."""
    positions = 0
    for tensor in tensors:
        if tensor is not None:
            positions |= tensor.data_ptr()
    return positions % 16
