"""The public functions: check, choose the backend by device, call.

Each is registered with `torch.library`, so `torch.compile` traces through it without a graph break.
Letters in shapes: T tokens, S sequences, H query heads, Hkv KV heads, D head size, B block size.

Besides torch tensors, every array argument may be one with ``__dlpack__`` (CuPy, NumPy, JAX). It is not
copied: what a function writes lands in the caller's memory. Results are torch tensors, which have
``__dlpack__`` too, unless ``out`` was given. JAX arrays are for arguments that are only read: JAX takes them
to be immutable. NumPy and CuPy pass neither bfloat16 nor fp8: pass a view of their integers, as in
``torch.from_dlpack(x.view("uint16")).view(torch.bfloat16)``. Keep an array on a GPU until the kernel has run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import backends, checks
from .dlpack import Array, as_tensor
from .params import AttentionParams


def reshape_and_cache(
    key: Array,
    value: Array,
    kv_cache: Array,
    slot_mapping: Array,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> None:
    """Write the keys and values of T tokens into their slots of the cache. Mutates ``kv_cache``.

    Args:
        key, value: [T, Hkv, D] of one dtype, contiguous in D.
        kv_cache: [num_blocks, 2, Hkv, B, D] of the same dtype, or quantised: float8_e4m3fn, float8_e5m2
            or int8 (D a multiple of 16). Index 0 of dimension 1 holds the keys. Each block is contiguous;
            the stride between blocks is free.
        slot_mapping: int64 [T], block id * B + offset within the block; -1 skips the token. No slot may be
            there twice: which of the tokens it gets is not defined.
        k_scale, v_scale: float32 [Hkv], positive and with a finite reciprocal; with a quantised cache both
            are needed. Stored is x * (1 / scale), rounded to the nearest code with ties to even. What is
            beyond the largest code (448, 57344, 127) saturates; a NaN stays one in fp8 and becomes 0 in
            int8. The scale that just holds every key is
            ``key.abs().amax(dim=(0, 2)).float().clamp(min=1e-6) / 448``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device. Slots and scales are checked
            on the CPU, and on a GPU when ``CUPAGED_CHECK=1`` is set.
    """
    key, value = as_tensor("key", key), as_tensor("value", value)
    kv_cache = as_tensor("kv_cache", kv_cache, written=True)
    slot_mapping = as_tensor("slot_mapping", slot_mapping)
    k_scale = None if k_scale is None else as_tensor("k_scale", k_scale)
    v_scale = None if v_scale is None else as_tensor("v_scale", v_scale)
    _call("reshape_and_cache", key, value, kv_cache, slot_mapping, k_scale, v_scale)


def paged_attention(
    query: Array,
    kv_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    max_query_len: int | None = None,
    batch_invariant: bool = True,
    shared_prefix: bool = False,
    out: Array | None = None,
    return_lse: bool = False,
) -> torch.Tensor | Any:  # with return_lse a pair: Any, so that a type checker takes either use
    """Attention of a batch of sequences over their paged KV cache (PagedAttention, section 4.1).

    Decode, prefill and chunked prefill are one call: sequence s owns the query rows
    ``query_start_loc[s]`` to ``query_start_loc[s + 1]``, the last tokens of its ``seq_lens[s]``.
    Their keys and values must be in the cache already (`reshape_and_cache`). For inference: no function
    here gives gradients, whatever its inputs require.

    The logit of query position i and key position j is ``s = scale * q.k``, then
    ``cap * tanh(s / cap)``, then ``+ alibi_slope[h] * (j - i)``. Sums are in float32.

    Args:
        query: [T, H, D], float32, float16 or bfloat16, contiguous in D; H a multiple of Hkv.
        kv_cache: [num_blocks, 2, Hkv, B, D] in query's dtype, or quantised: float8_e4m3fn, float8_e5m2 or
            int8 (D a multiple of 16).
        block_tables: int32 [S, max_blocks]; entries past a sequence's last block, or wholly before
            its sliding window, are never read.
        seq_lens: int32 [S], tokens of each sequence including the query's own; 0 gives zeros.
        query_start_loc: int32 [S + 1], starting at 0; None means one query token a sequence (decode).
            Rows from ``query_start_loc[S]`` on are padding and come out as zeros.
        scale: of the logits; ``D ** -0.5`` by default.
        causal: a query sees the keys at or before its own position only.
        sliding_window: a query at i sees keys at j > i - sliding_window only.
        logits_soft_cap: bounds the logits (Gemma 2).
        alibi_slopes: float32 [H].
        sinks: float32 [H], one more logit a head in the softmax, without a value (gpt-oss). Of parts to be
            merged (`merge_attention_states`) one gets them, in which every row sees a key.
        k_scale, v_scale: float32 [Hkv], the scales of `reshape_and_cache`: a stored code reads as
            code * scale. Needed with a quantised cache. A visible NaN of a float8_e4m3fn cache may read
            as a number (480 * scale) on a GPU.
        max_query_len: the most query tokens that a sequence has, if known: a few (speculative decoding) go
            through the decode kernel. A hint: what it says decides the speed only.
        batch_invariant: a sequence's result has the same bits in whatever batch it is. False lets the keys
            of a long sequence be divided by the load of the GPU, which can be faster for few sequences: in
            decode, and in prefill of some hundred tokens over a long prefix.
        shared_prefix: look for sequences next to each other that have the same blocks, as after a common
            prompt, and read those once for all of them (cascade attention). Found in ``block_tables``, in
            pieces of 512 tokens: where nothing is shared the result is the same, to the bit. Worth a search
            for prefixes of some thousand tokens. Implies
            ``batch_invariant``; without effect in float32, with a window, in a prefill, and on a CPU.
        out: [T, H, D] to write into, in query's dtype; returned as it was given.
        return_lse: also return the natural logarithm of the softmax's denominator.

    Returns:
        The output [T, H, D] and, with ``return_lse``, float32 [T, H]; a row that sees no key is zeros
        with -inf.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device. Lengths and block ids
            are checked on the CPU, and on a GPU when ``CUPAGED_CHECK=1`` is set.
    """
    query, kv_cache = as_tensor("query", query), as_tensor("kv_cache", kv_cache)
    block_tables, seq_lens = as_tensor("block_tables", block_tables), as_tensor("seq_lens", seq_lens)
    query_start_loc = None if query_start_loc is None else as_tensor("query_start_loc", query_start_loc)
    alibi_slopes = None if alibi_slopes is None else as_tensor("alibi_slopes", alibi_slopes)
    sinks = None if sinks is None else as_tensor("sinks", sinks)
    k_scale = None if k_scale is None else as_tensor("k_scale", k_scale)
    v_scale = None if v_scale is None else as_tensor("v_scale", v_scale)
    checks.attention_settings(
        scale, causal, sliding_window, logits_soft_cap, max_query_len, batch_invariant, shared_prefix
    )
    if out is None:
        out = out_tensor = torch.empty_like(query, memory_format=torch.contiguous_format)
    else:
        out_tensor = as_tensor("out", out, written=True)
    lse = None
    if return_lse:
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    _call(
        "paged_attention",
        query,
        kv_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        None if scale is None else float(scale),
        causal,
        sliding_window,
        None if logits_soft_cap is None else float(logits_soft_cap),
        max_query_len,
        batch_invariant,
        shared_prefix,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        out_tensor,
        lse,
    )
    return out if lse is None else (out, lse)  # out may be what array the caller gave


def merge_attention_states(
    outs: Array | Sequence[Array], lses: Array | Sequence[Array]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge N attentions of the same queries over disjoint keys into the attention over all of them.

    Sinks count in every state that was computed with them: give them to one part only.

    Args:
        outs: [N, T, H, D], or a sequence of N tensors [T, H, D].
        lses: float32 [N, T, H], or a sequence of N tensors [T, H]: natural logarithms as returned by
            `paged_attention`. A state with -inf is empty, and its output is not read.

    Returns:
        The output [T, H, D] in the inputs' dtype and its lse, float32 [T, H]. Where every state is empty
        they are zeros and -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not agree.
    """
    stacked_outs, stacked_lses = checks.states("outs", outs), checks.states("lses", lses)
    sizes: dict[str, int] = {}
    checks.tensor("outs", stacked_outs, "N T H D", sizes, dtype=checks.DTYPES)
    checks.tensor("lses", stacked_lses, "N T H", sizes, dtype=torch.float32, device=stacked_outs.device)
    if sizes["N"] == 0:
        raise ValueError("outs holds no state to merge; pass at least one")
    if sizes["D"] % 8:
        raise ValueError(f"outs has head size {sizes['D']}; it must be a multiple of 8")
    if torch.is_grad_enabled():  # or torch takes the results for part of a graph
        stacked_outs, stacked_lses = stacked_outs.detach(), stacked_lses.detach()
    return _call("merge_attention_states", stacked_outs.contiguous(), stacked_lses.contiguous())


def copy_blocks(kv_cache: Array, block_mapping: Array) -> None:
    """Copy whole blocks inside a cache, for copy-on-write (section 4.4). Mutates ``kv_cache``.

    Args:
        kv_cache: [num_blocks, ...], each block contiguous. With the block-major allocation
            [num_blocks, num_layers, 2, Hkv, B, D] one call copies all layers.
        block_mapping: int64 [N, 2] of (source, destination) on the cache's device. The pairs are copied
            in no order: no block may be a destination twice, or both a source and a destination.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device.
    """
    kv_cache = as_tensor("kv_cache", kv_cache, written=True)
    block_mapping = as_tensor("block_mapping", block_mapping)
    _check_block_cache("kv_cache", kv_cache)
    checks.block_mapping("block_mapping", block_mapping, kv_cache.device)
    _call("copy_blocks", kv_cache, block_mapping)


def swap_blocks(src: Array, dst: Array, block_mapping: Array) -> None:
    """Copy whole blocks from one cache to another, GPU to CPU or back (section 4.5). Mutates ``dst``.

    Runs on the current stream and does not wait: the CPU cache should be pinned, and must be left alone, and
    alive, until the stream has been synchronised.

    Args:
        src, dst: [num_blocks, ...] with blocks of one shape and dtype, each block contiguous.
        block_mapping: int64 [N, 2] of (block of src, block of dst), on the CPU; it may change as soon as the
            call returns. The pairs are copied in no order: no block of dst may be named twice, or be a
            source as well where src and dst share memory.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device.
    """
    src, dst = as_tensor("src", src), as_tensor("dst", dst, written=True)
    block_mapping = as_tensor("block_mapping", block_mapping)
    _check_block_cache("src", src)
    _check_block_cache("dst", dst)
    if src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        raise ValueError(
            f"dst must have blocks like src's, {list(src.shape[1:])} of {src.dtype}, "
            f"got {list(dst.shape[1:])} of {dst.dtype}"
        )
    checks.block_mapping("block_mapping", block_mapping, torch.device("cpu"))
    _call("swap_blocks", src, dst, block_mapping)


def _check_block_cache(name: str, cache: torch.Tensor) -> None:
    if cache.dim() < 2:
        raise ValueError(f"{name} must be a tensor [num_blocks, ...] of at least 2 dimensions")
    checks.blocks_contiguous(name, cache)


# The operators below check the tensors and run the backends. Under torch.compile the functions above are
# traced with fake tensors, of which the fake operators check the layouts; their data only a run has.

_LIBRARY = torch.library.Library("cupaged", "DEF")
_SCHEMAS = (
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor? k_scale, Tensor? v_scale) -> ()",
    "paged_attention(Tensor query, Tensor kv_cache, Tensor block_tables, Tensor seq_lens, "
    "Tensor? query_start_loc, float? scale, bool causal, int? sliding_window, float? logits_soft_cap, "
    "int? max_query_len, bool batch_invariant, bool shared_prefix, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? k_scale, Tensor? v_scale, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    "merge_attention_states(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    "copy_blocks(Tensor(a!) kv_cache, Tensor block_mapping) -> ()",
    "swap_blocks(Tensor src, Tensor(a!) dst, Tensor block_mapping) -> ()",
)


def _reads_data(tensor: torch.Tensor) -> bool:
    """On the CPU reading ids is cheap and a wrong one would crash; a GPU would have to synchronise."""
    return tensor.is_cpu or checks.device_checks_enabled()


def _backend(tensor: torch.Tensor) -> backends.Backend:
    # Asking for the device's type takes a while.
    return backends.for_device("cuda" if tensor.is_cuda else tensor.device.type)


def _reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    layout = checks.cache_write_once(key, value, kv_cache, slot_mapping, k_scale, v_scale)
    if _reads_data(kv_cache):
        checks.slots(slot_mapping, kv_cache)
        checks.scale_values("k_scale", k_scale)
        checks.scale_values("v_scale", v_scale)
    if key.shape[0]:
        _backend(kv_cache).reshape_and_cache(key, value, kv_cache, slot_mapping, k_scale, v_scale, layout)


def _paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    max_query_len: int | None,
    batch_invariant: bool,
    shared_prefix: bool,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    layout = checks.attention_once(
        query,
        kv_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        out,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
    )
    if _reads_data(kv_cache):
        checks.attention_ids(query, kv_cache, block_tables, seq_lens, query_start_loc, sliding_window)
    if query.numel() == 0:
        return
    if block_tables.numel() == 0:  # nothing but padding
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return
    params = AttentionParams(
        query.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        sliding_window,
        logits_soft_cap,
        max_query_len,
        batch_invariant,
        shared_prefix,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
    )
    _backend(kv_cache).paged_attention(
        query, kv_cache, block_tables, seq_lens, query_start_loc, out, lse, params, layout
    )


def _fake_attention(*arguments: Any) -> None:
    batch, optional, out = arguments[:5], arguments[-6:-2], arguments[-2]
    checks.attention(*[*batch, out, *optional])


def _merge_attention_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    if outs.shape[1]:
        _backend(outs).merge_attention_states(outs, lses, out, lse)
    return out, lse


def _copy_blocks(kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
    if _reads_data(kv_cache):
        checks.mapping_ids(block_mapping, kv_cache.shape[0], kv_cache.shape[0])
    if block_mapping.shape[0]:
        _backend(kv_cache).copy_blocks(kv_cache, block_mapping)


def _swap_blocks(src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None:
    checks.mapping_ids(block_mapping, src.shape[0], dst.shape[0])
    if block_mapping.shape[0]:
        device_type = "cuda" if "cuda" in (src.device.type, dst.device.type) else src.device.type
        backends.for_device(device_type).swap_blocks(src, dst, block_mapping)


def _fake_merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])


def _fake_mutation(*args: object) -> None:
    """The operators that only write into an argument return nothing and allocate nothing."""


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "reshape_and_cache": (_reshape_and_cache, checks.cache_write),
    "paged_attention": (_paged_attention, _fake_attention),
    "merge_attention_states": (_merge_attention_states, _fake_merge),
    "copy_blocks": (_copy_blocks, _fake_mutation),
    "swap_blocks": (_swap_blocks, _fake_mutation),
}

for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _implementation, _fake = _IMPLEMENTATIONS[_name]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cupaged::{_name}", _fake, lib=_LIBRARY)

# What may be passed to an implementation as it is. A subclass of Tensor may stand for something else.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, float, int, bool, type(None)))


def _call(name: str, *arguments: Any) -> Any:
    """Call an operator: its implementation itself where torch's dispatcher would do no more than find it.

    The dispatcher takes 5 us for the arguments of an attention. It is needed where something watches
    operators or replaces them: autograd, torch.compile and other tracers, modes, transforms such as vmap,
    the profiler, subclasses of Tensor.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, arguments))
    ):
        return getattr(torch.ops.cupaged, name).default(*arguments)
    return _IMPLEMENTATIONS[name][0](*arguments)
