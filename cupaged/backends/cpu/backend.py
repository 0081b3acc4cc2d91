"""The functions of the CPU backend, over numba kernels that read caches of every dtype in place.

A kernel is compiled at its first use and cached on disk by numba: beside this file, in NUMBA_CACHE_DIR or in
the user's cache directory (`disk_cache.py`). Kernels run on numba's threads, as many as torch uses.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from ...params import AttentionParams
from . import (
    activation,
    attention,
    decode,
    disk_cache,
    formats,
    ir,
    memory,
    norm,
    prefill,
    rope,
    simd,
    tiles,
    vector_math,
    work,
)

_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: formats.BFLOAT16,
    torch.float8_e4m3fn: formats.FLOAT8_E4M3,
    torch.float8_e5m2: formats.FLOAT8_E5M2,
    torch.int8: formats.INT8,
}
# numba's fallback thread pool aborts if two threads enter it. Two callers would share the cores anyway.
_LOCK = threading.Lock()
_SOURCES = (
    ir,
    formats,
    simd,
    tiles,
    work,
    decode,
    prefill,
    attention,
    memory,
    vector_math,
    norm,
    activation,
    rope,
)


@cache
def _version() -> str:
    digest = hashlib.sha256()
    for module in _SOURCES:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


@cache
def _kernel(build: Any) -> Any:
    return build(_version(), disk_cache.jit)


def _run(build: Any, *args: Any) -> None:
    torch_threads = torch.get_num_threads()
    threads = min(torch_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    with _LOCK:
        numba.set_num_threads(threads)
        if torch.get_num_threads() != torch_threads:  # numba's pool has started on the OpenMP of torch
            torch.set_num_threads(torch_threads)
        _kernel(build)(*args, threads)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    params: AttentionParams,
    layout: Hashable = None,
) -> None:
    num_tokens, num_heads, head_size = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    query_size, size = query.element_size(), kv_cache.element_size()
    batch = work.Batch(
        query=query.data_ptr(),
        query_token_stride=query.stride(0) * query_size,
        query_head_stride=query.stride(1) * query_size,
        out=out.data_ptr(),
        out_token_stride=out.stride(0) * query_size,
        out_head_stride=out.stride(1) * query_size,
        lse=_address(lse),
        cache=kv_cache.data_ptr(),
        block_stride=kv_cache.stride(0) * size,
        value_offset=num_kv_heads * block_size * head_size * size,
        kv_head_stride=block_size * head_size * size,
        row_bytes=head_size * size,
        block_tables=block_tables.data_ptr(),
        table_stride=block_tables.stride(0) * 4,
        seq_lens=seq_lens.data_ptr(),
        query_start_loc=_address(query_start_loc),
        alibi_slopes=_address(params.alibi_slopes),
        sinks=_address(params.sinks),
        k_scale=_address(params.k_scale),
        v_scale=_address(params.v_scale),
        num_seqs=seq_lens.shape[0],
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        itemsize=query_size,
        block_size=block_size,
        causal=int(params.causal),
        window=params.sliding_window or 0,
    )
    # The softmax is in base 2. With a soft cap the kernel's dot products are s / cap.
    q_scale, cap = params.scale * math.log2(math.e), 0.0
    if params.logits_soft_cap is not None:
        q_scale, cap = params.scale / params.logits_soft_cap, params.logits_soft_cap * math.log2(math.e)
    dtypes = _DTYPES[query.dtype], _DTYPES[kv_cache.dtype]
    _run(attention.build, *dtypes, batch, np.float32(q_scale), np.float32(cap))


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    layout: Hashable = None,
) -> None:
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    key_size, size = key.element_size(), kv_cache.element_size()
    tokens = memory.Tokens(
        key=key.data_ptr(),
        key_token_stride=key.stride(0) * key_size,
        key_head_stride=key.stride(1) * key_size,
        value=value.data_ptr(),
        value_token_stride=value.stride(0) * key_size,
        value_head_stride=value.stride(1) * key_size,
        cache=kv_cache.data_ptr(),
        block_stride=kv_cache.stride(0) * size,
        value_offset=num_kv_heads * block_size * head_size * size,
        kv_head_stride=block_size * head_size * size,
        row_bytes=head_size * size,
        slot_mapping=slot_mapping.data_ptr(),
        num_tokens=key.shape[0],
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_size=head_size,
        itemsize=key_size,
        k_scale=_address(k_scale),
        v_scale=_address(v_scale),
    )
    if k_scale is None:
        _run(memory.build_reshape_and_cache, tokens)
    else:
        _run(memory.build_quantise, _DTYPES[key.dtype], _DTYPES[kv_cache.dtype], tokens)


def merge_attention_states(
    outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    num_states, num_tokens, num_heads, head_size = outs.shape
    _run(
        memory.build_merge,
        _DTYPES[outs.dtype],
        outs.element_size(),
        outs.data_ptr(),
        lses.data_ptr(),
        num_states,
        num_tokens * num_heads,
        head_size,
        out.data_ptr(),
        lse.data_ptr(),
    )


def copy_blocks(kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
    swap_blocks(kv_cache, kv_cache, block_mapping)


def swap_blocks(src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None:
    size = src.element_size()
    _run(
        memory.build_move_blocks,
        dst.data_ptr(),
        dst.stride(0) * size,
        src.data_ptr(),
        src.stride(0) * size,
        src[0].numel() * size,
        block_mapping.data_ptr(),
        block_mapping.shape[0],
    )


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_offset: float,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    out: torch.Tensor,
    layout: Hashable = None,
) -> None:
    num_rows, size = input.shape
    itemsize = input.element_size()
    arguments = norm.Norm(
        input=input.data_ptr(),
        input_stride=input.stride(0) * itemsize,
        residual=_address(residual),
        residual_stride=0 if residual is None else residual.stride(0) * itemsize,
        out=out.data_ptr(),
        out_stride=out.stride(0) * itemsize,
        weight=weight.data_ptr(),
        input_weight=_address(input_weight),
        num_rows=num_rows,
        size=size,
        itemsize=itemsize,
        weight_itemsize=weight.element_size(),
        epsilon=epsilon,
        weight_offset=weight_offset,
    )
    _run(norm.build, _DTYPES[input.dtype], _DTYPES[weight.dtype], arguments)


def act_and_mul(
    input: torch.Tensor, activation_name: str, out: torch.Tensor, layout: Hashable = None
) -> None:
    itemsize = input.element_size()
    arguments = activation.Gated(
        input=input.data_ptr(),
        input_stride=input.stride(0) * itemsize,
        out=out.data_ptr(),
        out_stride=out.stride(0) * itemsize,
        num_rows=out.shape[0],
        size=out.shape[1],
        itemsize=itemsize,
        activation=activation.ACTIVATIONS.index(activation_name),
    )
    _run(activation.build, _DTYPES[input.dtype], arguments)


def rope_and_cache(
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
    layout: Hashable = None,
) -> None:
    num_tokens, num_heads, head_size = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    itemsize, kv_itemsize = query.element_size(), kv_cache.element_size()
    cos_itemsize = 0 if cos is None else cos.element_size()
    arguments = rope.Rotation(
        query=query.data_ptr(),
        query_token_stride=query.stride(0) * itemsize,
        query_head_stride=query.stride(1) * itemsize,
        key=key.data_ptr(),
        key_token_stride=key.stride(0) * itemsize,
        key_head_stride=key.stride(1) * itemsize,
        value=value.data_ptr(),
        value_token_stride=value.stride(0) * itemsize,
        value_head_stride=value.stride(1) * itemsize,
        cache=kv_cache.data_ptr(),
        block_stride=kv_cache.stride(0) * kv_itemsize,
        value_offset=num_kv_heads * block_size * head_size * kv_itemsize,
        kv_head_stride=block_size * head_size * kv_itemsize,
        row_bytes=head_size * kv_itemsize,
        slot_mapping=slot_mapping.data_ptr(),
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_size=head_size,
        itemsize=itemsize,
        kv_itemsize=kv_itemsize,
        k_scale=_address(k_scale),
        v_scale=_address(v_scale),
        cos=_address(cos),
        cos_stride=0 if cos is None else cos.stride(0) * cos_itemsize,
        sin=_address(sin),
        sin_stride=0 if sin is None else sin.stride(0) * cos_itemsize,
        cos_itemsize=cos_itemsize,
        num_pairs=0 if cos is None else cos.shape[1],
        interleaved=int(interleaved),
        query_weight=_address(query_weight),
        key_weight=_address(key_weight),
        weight_itemsize=0 if query_weight is None else query_weight.element_size(),
        epsilon=epsilon,
        weight_offset=weight_offset,
    )
    dtypes = [_DTYPES[(query if t is None else t).dtype] for t in (query, kv_cache, cos, query_weight)]
    _run(rope.build, *dtypes, arguments)
