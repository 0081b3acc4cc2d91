"""The reference backend, in plain torch on any device: slow and short. It defines the right results."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch

from ..params import AttentionParams, SamplingSettings
from ..quantisation import LARGEST, dequantise, quantise

CHECKS_DATA = False


@torch.no_grad()  # otherwise the cache would become part of autograd's graph
def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    layout: Hashable = None,
) -> None:
    block_size = kv_cache.shape[3]
    keep = slot_mapping >= 0
    slots = slot_mapping[keep]
    block, offset = slots // block_size, slots % block_size
    for i, (rows, scale) in enumerate(((key[keep], k_scale), (value[keep], v_scale))):
        if scale is not None:
            # Not every version of torch can write float8 through an index.
            kv_cache.view(torch.uint8)[block, i, :, offset] = quantise(rows, scale, kv_cache.dtype).view(
                torch.uint8
            )
        else:
            kv_cache[block, i, :, offset] = rows


@torch.no_grad()
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
    compute = torch.promote_types(query.dtype, torch.float32)
    result, logsumexp = attend(
        query, kv_cache, block_tables, seq_lens, query_start_loc, params, compute_dtype=compute
    )
    out.copy_(result)
    if lse is not None:
        lse.copy_(logsumexp)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    params: AttentionParams,
    *,
    compute_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention one sequence at a time, with every product and sum in ``compute_dtype``.

    Returns:
        The output [T, H, D] and the logarithm of the softmax's denominator [T, H], in ``compute_dtype``.
    """
    out, lse = _empty_states(query, query.shape[2], compute_dtype)
    for s, rows, length in _sequences(seq_lens, query_start_loc):
        first_key = _first_visible_key(length - (rows.stop - rows.start), params.sliding_window)
        keys, values, start = _gather(kv_cache, block_tables[s], first_key, length, params, compute_dtype)
        out[rows], lse[rows] = _attend_sequence(
            query[rows].to(compute_dtype), keys, values, start, length, params
        )
    return out, lse


def _empty_states(
    query: torch.Tensor, value_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the logarithms of rows that see no key."""
    out = torch.zeros(*query.shape[:2], value_size, dtype=dtype, device=query.device)
    return out, torch.full(query.shape[:2], float("-inf"), dtype=dtype, device=query.device)


def _sequences(
    seq_lens: torch.Tensor, query_start_loc: torch.Tensor | None
) -> Iterator[tuple[int, slice, int]]:
    """Yield the index, the query rows and the length of each sequence that has both."""
    lengths = seq_lens.tolist()
    starts = list(range(len(lengths) + 1)) if query_start_loc is None else query_start_loc.tolist()
    for s, length in enumerate(lengths):
        if length and starts[s + 1] > starts[s]:
            yield s, slice(starts[s], starts[s + 1]), length


def _first_visible_key(query_position: int, window: int | None) -> int:
    return 0 if window is None else max(0, query_position - window + 1)


def _gather(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    first_key: int,
    length: int,
    params: AttentionParams,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return keys and values [Hkv, length - start, D] in ``dtype``, and the position ``start`` of the first.

    It is that of the block that holds ``first_key``.
    """
    block_size = kv_cache.shape[3]
    start_block = min(first_key // block_size, (length - 1) // block_size)
    blocks = block_table[start_block : (length + block_size - 1) // block_size].long()
    start = start_block * block_size
    if params.k_scale is not None and params.v_scale is not None:
        codes = kv_cache.view(torch.uint8)[blocks].view(kv_cache.dtype)
        pair = (dequantise(codes[:, i], s, dtype) for i, s in enumerate((params.k_scale, params.v_scale)))
    else:
        pair = (kv_cache[blocks, i].to(dtype) for i in range(2))
    keys, values = (x.transpose(0, 1).flatten(1, 2)[:, : length - start] for x in pair)
    return keys, values, start


def _attend_sequence(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    length: int,
    params: AttentionParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of a sequence's query rows [rows, H, D] over keys from position ``start`` on."""
    num_rows, num_heads, _ = query.shape
    group = num_heads // keys.shape[0]
    keys = keys.repeat_interleave(group, dim=0)
    values = values.repeat_interleave(group, dim=0)
    i = torch.arange(length - num_rows, length, device=query.device)[:, None]
    j = torch.arange(start, length, device=query.device)[None, :]
    visible = torch.ones(num_rows, length - start, dtype=torch.bool, device=query.device)
    if params.causal:
        visible &= j <= i
    if params.sliding_window is not None:
        visible &= j > i - params.sliding_window

    logits = params.scale * (query.transpose(0, 1) @ keys.transpose(1, 2))
    if params.logits_soft_cap is not None:
        logits = params.logits_soft_cap * torch.tanh(logits / params.logits_soft_cap)
    if params.alibi_slopes is not None:
        logits = logits + params.alibi_slopes.to(query.dtype)[:, None, None] * (j - i)
    logits = logits.masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(dim=-1)
    if params.sinks is not None:
        lse = torch.logaddexp(lse, params.sinks.to(query.dtype)[:, None])
    empty = ~visible.any(dim=1)
    weights = torch.exp(logits - lse[..., None]).masked_fill(empty[None, :, None], 0.0)
    # A masked key has weight 0, but 0 times the NaN of an unwritten slot would be NaN.
    values = values.masked_fill(~visible.any(dim=0)[None, :, None], 0.0)
    lse = lse.masked_fill(empty, float("-inf"))
    return (weights @ values).transpose(0, 1), lse.transpose(0, 1)


@torch.no_grad()
def mla_attention(
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
    compute = torch.promote_types(query.dtype, torch.float32)
    tensors = query, kv_cache, block_tables, seq_lens, query_start_loc
    result, logsumexp = attend_latents(*tensors, out.shape[-1], params, compute_dtype=compute)
    out.copy_(result)
    if lse is not None:
        lse.copy_(logsumexp)


def attend_latents(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    value_size: int,
    params: AttentionParams,
    *,
    compute_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute latent attention one sequence at a time, as `attend` does attention."""
    block_size = kv_cache.shape[1]
    out, lse = _empty_states(query, value_size, compute_dtype)
    for s, rows, length in _sequences(seq_lens, query_start_loc):
        blocks = block_tables[s, : (length + block_size - 1) // block_size].long()
        keys = kv_cache[blocks].to(compute_dtype).flatten(0, 1)[None, :length]
        out[rows], lse[rows] = _attend_sequence(
            query[rows].to(compute_dtype), keys, keys[..., :value_size], 0, length, params
        )
    return out, lse


@torch.no_grad()
def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Hashable = None,
) -> None:
    keep = slot_mapping >= 0
    slots, block_size = slot_mapping[keep], kv_cache.shape[1]
    kv_cache[slots // block_size, slots % block_size] = torch.cat((kv_c, k_pe), dim=-1)[keep]


def merge_attention_states(
    outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    total = lses.logsumexp(dim=0)
    weights = torch.exp(lses - total).nan_to_num(nan=0.0)
    lse.copy_(total)
    # The output of an empty state may be anything, NaN included.
    non_empty = outs.to(lses.dtype).masked_fill(torch.isneginf(lses)[..., None], 0.0)
    out.copy_((weights[..., None] * non_empty).sum(dim=0))


def copy_blocks(kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
    if kv_cache.dtype in LARGEST:
        kv_cache = kv_cache.view(torch.uint8)
    kv_cache[block_mapping[:, 1]] = kv_cache[block_mapping[:, 0]]


def swap_blocks(src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None:
    for source, target in block_mapping.tolist():
        dst[target].copy_(src[source], non_blocking=True)


def normalise(x: torch.Tensor, weight: torch.Tensor, epsilon: float, weight_offset: float) -> torch.Tensor:
    """Return the RMS norm of x over its last dimension, in x's dtype."""
    rms = (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    return x / rms * (weight_offset + weight.to(x.dtype))


@torch.no_grad()
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
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    if input_weight is not None:
        x = normalise(x, input_weight, epsilon, weight_offset)
    if residual is not None:
        residual.copy_(residual.to(x.dtype) + x)
        x = residual.to(x.dtype)
    out.copy_(normalise(x, weight, epsilon, weight_offset))


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """Return an activation of `act_and_mul`, in gate's dtype."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


@torch.no_grad()
def act_and_mul(input: torch.Tensor, activation: str, out: torch.Tensor, layout: Hashable = None) -> None:
    gate, up = input.to(torch.promote_types(input.dtype, torch.float32)).chunk(2, dim=-1)
    out.copy_(activate(gate, activation) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return heads [T, H, D] whose first 2 * cos.shape[1] dimensions are rotated, in x's dtype."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    rotated, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    pairs = rotated.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1 if interleaved else -2)
    return torch.cat((turned.flatten(-2), rest), dim=-1)


@torch.no_grad()
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
    turned = []
    for x, weight in ((query, query_weight), (key, key_weight)):
        heads = x.to(torch.promote_types(x.dtype, torch.float32))
        if weight is not None:
            heads = normalise(heads, weight, epsilon, weight_offset)
        if cos is not None and sin is not None:
            heads = rotate(heads, cos, sin, interleaved)
        turned.append(heads.to(x.dtype))
    query.copy_(turned[0])
    reshape_and_cache(turned[1], value, kv_cache, slot_mapping, k_scale, v_scale)


@torch.no_grad()
def sample(
    logits: torch.Tensor, settings: SamplingSettings, out: torch.Tensor, layout: Hashable = None
) -> None:
    x = logits.double().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    largest = x.amax(dim=-1, keepdim=True)
    tokens = torch.arange(x.shape[1], device=x.device)
    greedy = torch.where(x == largest, tokens, x.shape[1]).amin(dim=-1)
    temperature, top_k, top_p, min_p = (column[:, None] for column in settings[:4])
    # Sorted by descending logit, then by ascending token.
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    weights = ((ordered - largest) / temperature.clamp(1e-30, 1e30)).exp()
    weights = weights.masked_fill(weights < min_p.clamp(max=1), 0)
    weights = weights.masked_fill((tokens >= top_k) & (top_k > 0), 0)
    before = weights.cumsum(dim=-1) - weights
    cut = (before >= top_p.clamp(min=0) * weights.sum(dim=-1, keepdim=True)) & (top_p < 1) & (tokens > 0)
    weights = weights.masked_fill(cut, 0)
    cumulative = torch.zeros_like(x).scatter_(-1, order, weights).cumsum(dim=-1)
    target = uniform(*settings[4:])[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=x.shape[1] - 1)
    at_maximum = ~(settings.temperature > 0) | largest[:, 0].isinf()
    out.copy_(torch.where(at_maximum, greedy, drawn[:, 0]))


def uniform(seeds: torch.Tensor, indices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return float64 numbers in [0, 1) that are a hash of three int64 tensors, elementwise."""
    return _shift(_mix(_mix(_mix(seeds) + indices) + positions), 11).double() * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Apply the SplitMix64 mixing function, a bijection of 64 bits, on which int64 wraps around."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right, without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
