"""Register the operators with torch.library; each checks its tensors and runs a backend.

torch.compile traces the public functions in `ops` with fake tensors, for which a fake operator checks shapes,
strides, dtypes and devices. Data is checked at run time only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import _profiler_enabled

from . import backends, checks, fused_checks, mla_checks, sampling_checks
from .params import AttentionParams, SamplingSettings

_LIBRARY = torch.library.Library("cupaged", "DEF")
_SCHEMAS = (
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor? k_scale, Tensor? v_scale) -> ()",
    "paged_attention(Tensor query, Tensor kv_cache, Tensor block_tables, Tensor seq_lens, "
    "Tensor? query_start_loc, float? scale, bool causal, int? sliding_window, float? logits_soft_cap, "
    "int? max_query_len, bool batch_invariant, bool shared_prefix, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? k_scale, Tensor? v_scale, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    "mla_attention(Tensor query, Tensor kv_cache, Tensor block_tables, Tensor seq_lens, "
    "Tensor? query_start_loc, float scale, bool causal, int? max_query_len, Tensor(a!) out, "
    "Tensor(b!)? lse) -> ()",
    "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()",
    "merge_attention_states(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    "copy_blocks(Tensor(a!) kv_cache, Tensor block_mapping) -> ()",
    "swap_blocks(Tensor src, Tensor(a!) dst, Tensor block_mapping) -> ()",
    "rms_norm(Tensor input, Tensor weight, float epsilon, float weight_offset, Tensor(a!)? residual, "
    "Tensor? input_weight, Tensor(b!) out) -> ()",
    "act_and_mul(Tensor input, str activation, Tensor(a!) out) -> ()",
    "rope_and_cache(Tensor(a!) query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, "
    "Tensor(b!) kv_cache, Tensor slot_mapping, bool interleaved, Tensor? query_weight, Tensor? key_weight, "
    "float epsilon, float weight_offset, Tensor? k_scale, Tensor? v_scale) -> ()",
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor indices, Tensor positions, Tensor(a!) out) -> ()",
)


def _reads_data(tensor: torch.Tensor) -> bool:
    """Return whether to check ids and scales: always on the CPU; on a GPU it synchronises, so on request."""
    return tensor.is_cpu or checks.device_checks_enabled()


def _backend(tensor: torch.Tensor) -> backends.Backend:
    # `is_cuda` and `is_cpu` are faster than `device.type`.
    if tensor.is_cuda:
        return backends.for_device("cuda")
    return backends.for_device("cpu" if tensor.is_cpu else tensor.device.type)


def _reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    layout = checks.cache_write_once(key, value, kv_cache, slot_mapping, k_scale, v_scale)
    backend = _backend(kv_cache)
    if not backend.CHECKS_DATA and _reads_data(kv_cache):
        checks.slots(slot_mapping, kv_cache)
        checks.scale_values("k_scale", k_scale)
        checks.scale_values("v_scale", v_scale)
    if key.shape[0]:
        backend.reshape_and_cache(key, value, kv_cache, slot_mapping, k_scale, v_scale, layout)


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
    backend = _backend(kv_cache)
    if not backend.CHECKS_DATA and _reads_data(kv_cache):
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
    backend.paged_attention(
        query, kv_cache, block_tables, seq_lens, query_start_loc, out, lse, params, layout
    )


def _fake_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    *settings_and_tensors: Any,
) -> None:
    *_, alibi_slopes, sinks, k_scale, v_scale, out, _lse = settings_and_tensors
    checks.attention(
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


def _mla_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    scale: float,
    causal: bool,
    max_query_len: int | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    tensors = query, kv_cache, block_tables, seq_lens, query_start_loc
    layout = mla_checks.attention_once(*tensors, out)
    backend = _backend(kv_cache)
    if not backend.CHECKS_DATA and _reads_data(kv_cache):
        checks.attention_ids(*tensors, None)
    if query.numel() == 0:
        return
    if block_tables.numel() == 0:  # nothing but padding
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return
    params = AttentionParams(scale, causal, max_query_len=max_query_len)
    backend.mla_attention(*tensors, out, lse, params, layout)


def _fake_mla_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    *settings_and_tensors: Any,
) -> None:
    *_, out, _lse = settings_and_tensors
    mla_checks.attention(query, kv_cache, block_tables, seq_lens, query_start_loc, out)


def _concat_and_cache_mla(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    layout = mla_checks.cache_write_once(kv_c, k_pe, kv_cache, slot_mapping)
    backend = _backend(kv_cache)
    if not backend.CHECKS_DATA and _reads_data(kv_cache):
        checks.slots(slot_mapping, kv_cache)
    if slot_mapping.numel():
        backend.concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, layout)


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


def _rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_offset: float,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    layout = fused_checks.rms_norm_once(input, weight, residual, input_weight, out)
    if input.numel():
        _backend(input).rms_norm(input, weight, epsilon, weight_offset, residual, input_weight, out, layout)


def _fake_rms_norm(
    input: torch.Tensor, weight: torch.Tensor, epsilon: float, weight_offset: float, *tensors: Any
) -> None:
    fused_checks.rms_norm(input, weight, *tensors)


def _act_and_mul(input: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    layout = fused_checks.act_and_mul_once(input, activation, out)
    if input.numel():
        _backend(input).act_and_mul(input, activation, out, layout)


def _fake_act_and_mul(input: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    fused_checks.act_and_mul(input, out)


def _rope_and_cache(
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
) -> None:
    layout = fused_checks.rope_and_cache_once(
        query, key, value, cos, sin, kv_cache, slot_mapping, query_weight, key_weight, k_scale, v_scale
    )
    backend = _backend(kv_cache)
    if not backend.CHECKS_DATA and _reads_data(kv_cache):
        checks.slots(slot_mapping, kv_cache)
        checks.scale_values("k_scale", k_scale)
        checks.scale_values("v_scale", v_scale)
    if slot_mapping.numel():
        backend.rope_and_cache(
            query,
            key,
            value,
            cos,
            sin,
            kv_cache,
            slot_mapping,
            interleaved,
            query_weight,
            key_weight,
            epsilon,
            weight_offset,
            k_scale,
            v_scale,
            layout,
        )


def _fake_rope_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *settings_and_tensors: Any,
) -> None:
    _, query_weight, key_weight, *_, k_scale, v_scale = settings_and_tensors
    fused_checks.rope_and_cache(
        query, key, value, cos, sin, kv_cache, slot_mapping, query_weight, key_weight, k_scale, v_scale
    )


def _sample(logits: torch.Tensor, *settings_and_out: torch.Tensor) -> None:
    layout = sampling_checks.sample_once(logits, *settings_and_out)
    *settings, out = settings_and_out
    if logits.shape[0]:
        _backend(logits).sample(logits, SamplingSettings(*settings), out, layout)


def _fake_merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])


def _fake_mutation(*args: object) -> None:
    """Do nothing: an operator that only writes into an argument returns and allocates nothing."""


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "reshape_and_cache": (_reshape_and_cache, checks.cache_write),
    "paged_attention": (_paged_attention, _fake_attention),
    "mla_attention": (_mla_attention, _fake_mla_attention),
    "concat_and_cache_mla": (_concat_and_cache_mla, mla_checks.cache_write),
    "merge_attention_states": (_merge_attention_states, _fake_merge),
    "copy_blocks": (_copy_blocks, _fake_mutation),
    "swap_blocks": (_swap_blocks, _fake_mutation),
    "rms_norm": (_rms_norm, _fake_rms_norm),
    "act_and_mul": (_act_and_mul, _fake_act_and_mul),
    "rope_and_cache": (_rope_and_cache, _fake_rope_and_cache),
    "sample": (_sample, sampling_checks.sample),
}

for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _implementation, _fake = _IMPLEMENTATIONS[_name]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cupaged::{_name}", _fake, lib=_LIBRARY)

# Types of arguments with which an implementation can be called directly: no fake tensor or other subclass of
# Tensor, no symbol for a number.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, float, int, bool, str, type(None)))


def call(name: str, *arguments: Any) -> Any:
    """Call an operator, past torch's dispatcher where nothing observes operators.

    The dispatcher would add a third to the host time of a decode call: 3 to 5 us.
    """
    if _needs_dispatcher(arguments):
        return getattr(torch.ops.cupaged, name).default(*arguments)
    return _IMPLEMENTATIONS[name][0](*arguments)


def _needs_dispatcher(arguments: tuple[Any, ...]) -> bool:
    """Return whether something may observe or replace operators, which then go through the dispatcher."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _len_torch_dispatch_stack() > 0  # TorchDispatchMode, make_fx, FakeTensorMode
        or _len_torch_function_stack() > 0  # TorchFunctionMode
        or peek_interpreter_stack() is not None  # vmap and other transforms
        or _profiler_enabled()
        or not _PLAIN.issuperset(map(type, arguments))
    )
