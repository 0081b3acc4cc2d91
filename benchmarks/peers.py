"""The peers that the kernels are compared with, each as one call per set of a batch that returns [T, H, D].

A peer that is not installed is left out. An exception in a peer is a failure of that peer in that row only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cupaged.backends.cuda.plans import MAX_DECODE_QUERY_LEN
from cupaged.params import AttentionParams

from .problems import Batch, Case

PeerRun = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A peer: ``prepare`` does what a user would do once per batch; the calls that it returns are timed."""

    name: str
    prepare: Callable[[Batch], list[PeerRun]]
    applies: Callable[[Case, torch.device], bool]


def peers() -> tuple[Peer, ...]:
    """Return the installed peers."""
    installed = [
        Peer("sdpa", sdpa, lambda case, device: device.type == "cpu" and not case.cache_dtype),
        Peer("gather, sdpa", gather_sdpa, _gather_applies),
    ]
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):
        name = backend.name.removesuffix("_ATTENTION").lower()
        applies = partial(_sdpa_applies, backend)
        installed.append(Peer(f"sdpa {name}", partial(sdpa, backend=backend), applies))
    installed.append(Peer("flex", flex, _flex_applies))
    installed.append(Peer("cupaged unshared", partial(ours, shared_prefix=False), _unshared_applies))
    installed.append(Peer("cupaged by load", partial(ours, batch_invariant=False), _by_load_applies))
    installed.append(Peer("cupaged mma.sync", mma_sync, _mma_sync_applies))
    if importlib.util.find_spec("flashinfer") is not None:
        for tensor_cores in (False, True):
            name = "flashinfer tc" if tensor_cores else "flashinfer"
            prepare = partial(flashinfer, tensor_cores=tensor_cores)
            installed.append(Peer(name, prepare, partial(_flashinfer_applies, tensor_cores)))
        installed.append(Peer("flashinfer cascade", flashinfer_cascade, _cascade_applies))
    return tuple(installed)


def sdpa(batch: Batch, backend: SDPBackend | None = None) -> list[PeerRun]:
    """Return calls of torch's attention over contiguous keys and values, with a backend or torch's choice."""
    attend = _sdpa_of(batch)

    def run(s: int) -> torch.Tensor:
        return attend(s, batch.key[s], batch.value[s])

    def run_on_backend(s: int) -> torch.Tensor:
        with sdpa_kernel(backend):
            return run(s)

    return [partial(run if backend is None else run_on_backend, s) for s in range(batch.num_sets)]


def gather_sdpa(batch: Batch) -> list[PeerRun]:
    """Return calls that gather the blocks of the paged cache and run torch's attention on the copy."""
    case, attend = batch.case, _sdpa_of(batch)

    def run(s: int) -> torch.Tensor:
        blocks = batch.kv_cache[batch.block_tables[s]]  # [S, max_blocks, 2, Hkv, B, D]
        key, value = (blocks[:, :, i].transpose(1, 2).flatten(2, 3)[:, :, : case.context] for i in range(2))
        return attend(s, key, value)

    return [partial(run, s) for s in range(batch.num_sets)]


def _sdpa_of(batch: Batch) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function for attention of a set's queries over dense keys and values [S, Hkv, context, D]."""
    case = batch.case
    mask = _visible(batch) if 1 < case.query_tokens < case.context else None

    def attend(s: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            batch.dense_query(s),
            key,
            value,
            attn_mask=mask,
            is_causal=case.query_tokens == case.context > 1,
            enable_gqa=case.num_heads != case.num_kv_heads,
        )
        return _rows(out)

    return attend


def flex(batch: Batch) -> list[PeerRun]:
    """Return calls of torch's FlexAttention, compiled for this shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = batch.case
    block_mask = None
    if case.query_tokens > 1:
        first = case.context - case.query_tokens
        block_mask = create_block_mask(
            lambda b, h, q, k: q + first >= k, None, None, case.query_tokens, case.context, batch.device
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = case.num_heads != case.num_kv_heads

    def run(s: int) -> torch.Tensor:
        query, key, value = batch.dense_query(s), batch.key[s], batch.value[s]
        return _rows(compiled(query, key, value, block_mask=block_mask, enable_gqa=gqa))

    return [partial(run, s) for s in range(batch.num_sets)]


def flashinfer(batch: Batch, tensor_cores: bool) -> list[PeerRun]:
    """Return calls of FlashInfer on the same paged cache, with plans made in advance."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

    case = batch.case
    blocks = -(-case.context // case.block_size)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=batch.device)
    pages = torch.arange(case.num_seqs + 1, dtype=torch.int32, device=batch.device) * blocks
    last = torch.full_like(batch.seq_lens, case.context - (blocks - 1) * case.block_size)
    heads = (case.num_heads, case.num_kv_heads, case.head_size, case.block_size)
    dtypes = {"q_data_type": batch.dtype, "kv_data_type": batch.kv_cache.dtype}
    scales = {} if batch.scale is None else {"k_scale": batch.scale, "v_scale": batch.scale}

    def planned(s: int) -> PeerRun:
        indices = batch.block_tables[s].flatten()
        if case.query_tokens == 1:
            wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
            wrapper.plan(pages, indices, last, *heads, **dtypes)
        else:
            wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            wrapper.plan(batch.query_start_loc, pages, indices, last, *heads, causal=True, **dtypes)
        return lambda: wrapper.run(batch.query[s], batch.kv_cache, **scales)

    return [planned(s) for s in range(batch.num_sets)]


def flashinfer_cascade(batch: Batch) -> list[PeerRun]:
    """Return calls of FlashInfer's cascade: a level for the shared prefix, one for each sequence's rest."""
    from flashinfer import MultiLevelCascadeAttentionWrapper

    case = batch.case
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=batch.device)
    shared = case.shared_prefix // case.block_size
    own = -(-case.context // case.block_size) - shared
    last = case.context - (shared + own - 1) * case.block_size
    each = torch.arange(case.num_seqs + 1, dtype=torch.int32, device=batch.device)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=batch.device)

    def planned(s: int) -> PeerRun:
        tables = batch.block_tables[s]
        wrapper = MultiLevelCascadeAttentionWrapper(2, workspace, "HND")
        wrapper.plan(
            [ints(0, case.num_seqs), each],
            [ints(0, shared), each * own],
            [tables[0, :shared].contiguous(), tables[:, shared:].flatten()],
            [ints(case.block_size), torch.full_like(batch.seq_lens, last)],
            case.num_heads,
            case.num_kv_heads,
            case.head_size,
            case.block_size,
            q_data_type=batch.dtype,
            kv_data_type=batch.kv_cache.dtype,
        )
        return lambda: wrapper.run(batch.query[s], batch.kv_cache)

    return [planned(s) for s in range(batch.num_sets)]


def ours(batch: Batch, **settings: bool) -> list[PeerRun]:
    """Return our own calls with other settings."""
    return [partial(batch.paged, s, **settings) for s in range(batch.num_sets)]


def mma_sync(batch: Batch) -> list[PeerRun]:
    """Return calls of our own kernel for the generations before Hopper."""
    from cupaged.backends.cuda import launcher

    case, kernels = batch.case, launcher.backend("90")
    params = AttentionParams(case.head_size**-0.5, max_query_len=case.query_tokens)

    def run(s: int) -> torch.Tensor:
        batch_tensors = batch.block_tables[s], batch.seq_lens, batch.query_start_loc
        kernels.paged_attention(
            batch.query[s], batch.kv_cache, *batch_tensors, batch.out[s], None, params, case
        )
        return batch.out[s]

    return [partial(run, s) for s in range(batch.num_sets)]


def _mma_sync_applies(case: Case, device: torch.device) -> bool:
    if device.type != "cuda" or case.query_tokens <= MAX_DECODE_QUERY_LEN or case.cache_dtype:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def _by_load_applies(case: Case, device: torch.device) -> bool:
    """Return whether the sequences may be too few to occupy a GPU."""
    return device.type == "cuda" and case.num_seqs <= 4 and not case.shared_prefix


def _unshared_applies(case: Case, device: torch.device) -> bool:
    return device.type == "cuda" and case.shared_prefix > 0


def _cascade_applies(case: Case, device: torch.device) -> bool:
    """Return whether the cascade supports the case: a prefix of whole blocks, and no scales."""
    whole = case.shared_prefix > 0 and case.shared_prefix % case.block_size == 0
    return device.type == "cuda" and whole and case.query_tokens == 1 and not case.cache_dtype


def _gather_applies(case: Case, device: torch.device) -> bool:
    return device.type == "cpu" and case.query_tokens > 1 and not case.cache_dtype


def _sdpa_applies(backend: SDPBackend, case: Case, device: torch.device) -> bool:
    if device.type == "cpu" or case.cache_dtype:
        return False
    if backend != SDPBackend.MATH:
        return True
    # It keeps all logits in memory, and a copy of the keys and values for every query head.
    repeated = case.kv_bytes * case.num_heads // case.num_kv_heads
    return case.query_tokens * case.context <= 1 << 20 and repeated <= 8 << 30


def _flex_applies(case: Case, device: torch.device) -> bool:
    """Return whether to run FlexAttention, which takes long to compile: for a few shapes only."""
    shapes = {(32, 1, 4096), (1, 1, 65536), (1, 8192, 8192)}
    shape = (case.num_seqs, case.query_tokens, case.context)
    plain = case.block_size == 16 and not case.cache_dtype and not case.shared_prefix
    return device.type == "cuda" and plain and shape in shapes and case.head_size == 128


def _flashinfer_applies(tensor_cores: bool, case: Case, device: torch.device) -> bool:
    if device.type != "cuda" or case.cache_dtype == "int8" or case.head_size not in (64, 128, 256):
        return False
    return tensor_cores or case.query_tokens == 1


def _visible(batch: Batch) -> torch.Tensor:
    """Return a mask, bool [query_tokens, context], for queries that are the last tokens."""
    case = batch.case
    ones = torch.ones(case.query_tokens, case.context, dtype=torch.bool, device=batch.device)
    return ones.tril(case.context - case.query_tokens)


def _rows(out: torch.Tensor) -> torch.Tensor:
    """Reshape [S, H, query_tokens, D] to [T, H, D]."""
    return out.transpose(1, 2).flatten(0, 1)
