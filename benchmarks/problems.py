"""The attention problems that are timed: their tensors, dense and paged, and checks of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import cupaged

# Scales of quantised caches: powers of two, so that a 16-bit float holds code * scale exactly.
SCALES = {torch.int8: 2.0**-4}
FP8_SCALE = 2.0**-6
SAMPLED_ROWS = 64  # maximum number of a sequence's query rows that a check computes


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """The shape of a problem; all sequences are alike. ``query_tokens`` of 1 is decode."""

    dtype: str
    num_seqs: int
    query_tokens: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int = 16
    cache_dtype: str | None = None  # dtype of a quantised cache
    shared_prefix: int = 0  # number of tokens that all sequences share, in the same blocks

    def __str__(self) -> str:
        kind = f"prefill {self.query_tokens}"
        if self.query_tokens <= 8:  # speculative decoding
            kind = "decode" if self.query_tokens == 1 else f"decode of {self.query_tokens}"
        heads = f"{self.num_heads}/{self.num_kv_heads}x{self.head_size}"
        extra = "".join(
            f" {text}"
            for text, there in (
                (f"page {self.block_size}", self.block_size != 16),
                (f"prefix {self.shared_prefix}", self.shared_prefix),
            )
            if there
        )
        dtype = (self.cache_dtype or self.dtype).replace("float8_", "")
        return f"{kind:<13} {dtype:<9} {self.num_seqs:>3} x {self.context:<6} {heads}{extra}"

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of keys and values that must be read; a shared prefix counts once."""
        tokens = self.num_seqs * (self.context - self.shared_prefix) + self.shared_prefix
        itemsize = getattr(torch, self.cache_dtype or self.dtype).itemsize
        return 2 * tokens * self.num_kv_heads * self.head_size * itemsize

    @property
    def flop(self) -> int:
        """Return the floating-point operations of the two matrix products, causal."""
        pairs = self.query_tokens * self.context - self.query_tokens * (self.query_tokens - 1) // 2
        return 4 * self.num_seqs * self.num_heads * self.head_size * pairs


class Batch:
    """The tensors of a case in ``num_sets`` sets, with keys and values both dense and in scattered blocks.

    Args:
        min_bytes: minimum size of all sets' keys and values together, which determines their number.
    """

    def __init__(self, case: Case, device: torch.device, min_bytes: int = 0, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.num_sets = max(1, -(-min_bytes // case.kv_bytes))
        self._generator = torch.Generator(device).manual_seed(seed)
        rows = case.num_seqs * case.query_tokens
        self.query = self._draw(self.num_sets, rows, case.num_heads, case.head_size)
        self.out = torch.full_like(self.query, float("nan"))
        self.seq_lens = torch.full((case.num_seqs,), case.context, dtype=torch.int32, device=device)
        self.query_start_loc = None
        if case.query_tokens > 1:
            self.query_start_loc = torch.arange(
                0, rows + 1, case.query_tokens, dtype=torch.int32, device=device
            )
        self.block_tables = self._tables(seed)  # int32 [num_sets, S, max_blocks]
        num_blocks = int(self.block_tables.max()) + 1
        cache_shape = (num_blocks, 2, case.num_kv_heads, case.block_size, case.head_size)
        cache_dtype = getattr(torch, case.cache_dtype or case.dtype)
        self.kv_cache = torch.empty(cache_shape, dtype=cache_dtype, device=device)
        self.kv_cache.view(torch.uint8).fill_(0xFF)  # NaN in every floating type
        self.scale: float | None = None  # of a quantised cache, for keys and values
        self._scales: dict[str, torch.Tensor] = {}
        if case.cache_dtype:
            self.scale = SCALES.get(cache_dtype, FP8_SCALE)
            scale = torch.full((case.num_kv_heads,), self.scale, device=device)
            self._scales = {"k_scale": scale, "v_scale": scale}
        shape = (self.num_sets, case.num_seqs, case.num_kv_heads, case.context, case.head_size)
        self.key, self.value = (torch.empty(shape, dtype=self.dtype, device=device) for _ in range(2))
        for s in range(self.num_sets):
            self._fill(s)

    def paged(self, s: int, **settings: bool) -> torch.Tensor:
        """Make the call that is timed on set ``s``, and return its output [T, H, D].

        Unless ``settings`` say otherwise, it detects shared prefixes if the case has one.
        """
        settings = {"shared_prefix": self.case.shared_prefix > 0} | settings
        return cupaged.paged_attention(
            self.query[s],
            self.kv_cache,
            self.block_tables[s],
            self.seq_lens,
            self.query_start_loc,
            max_query_len=self.case.query_tokens,
            out=self.out[s],
            **settings,
            **self._scales,
        )

    def runs(self) -> list[Callable[[], torch.Tensor]]:
        """Return the call for each set."""
        return [partial(self.paged, s) for s in range(self.num_sets)]

    def dense_query(self, s: int) -> torch.Tensor:
        """Return the query of set ``s`` as [S, H, query_tokens, D]."""
        case = self.case
        shape = (case.num_seqs, case.query_tokens, case.num_heads, case.head_size)
        return self.query[s].view(shape).transpose(1, 2)

    def complaint(
        self, run: Callable[[int], torch.Tensor], slack: float = 2.0, floor: float = 1e-5
    ) -> str | None:
        """Return what is wrong with the results [T, H, D] of ``run`` on the first and last set, or None.

        Everything must be finite. The error of sampled sequences, rows and heads may be ``slack`` times that
        of plain torch at the same dtype, both against float64, plus ``floor``.
        """
        for s in sorted({0, self.num_sets - 1}):
            self.out[s].fill_(float("nan"))
            out = run(s)
            if not bool(torch.isfinite(out).all()):
                return "the result has NaN or inf"
            if complaint := self._sampled(out, s, slack, floor):
                return complaint
        return None

    def _sampled(self, out: torch.Tensor, s: int, slack: float, floor: float) -> str | None:
        """Return what is wrong with sampled sequences, rows and heads of set ``s``, or None."""
        case = self.case
        group = case.num_heads // case.num_kv_heads
        out = out.view(case.num_seqs, case.query_tokens, case.num_heads, case.head_size)
        query = self.query[s].view_as(out)
        step = -(-case.query_tokens // SAMPLED_ROWS)
        rows = torch.arange(case.query_tokens - 1, -1, -step, device=self.device)
        positions = rows + (case.context - case.query_tokens)
        for seq in sorted({0, case.num_seqs // 2, case.num_seqs - 1}):
            for head in sorted({0, case.num_kv_heads - 1}):
                heads = slice(head * group, (head + 1) * group)
                inputs = (query[seq, rows, heads], self.key[s, seq, head], self.value[s, seq, head])
                exact = attention(*inputs, positions, torch.float64)
                plain = attention(*inputs, positions, self.dtype).double()
                error = (out[seq, rows, heads].double() - exact).abs().max().item()
                allowed = slack * (plain - exact).abs().max().item() + floor
                if not error <= allowed:
                    return f"maximum error {error:.3g}, allowed {allowed:.3g}"
        return None

    def _tables(self, seed: int) -> torch.Tensor:
        """Return block tables, int32 [num_sets, S, max_blocks], of blocks in random order."""
        case = self.case
        blocks = -(-case.context // case.block_size)
        shared = case.shared_prefix // case.block_size
        own = blocks - shared
        order = torch.randperm(
            self.num_sets * (shared + case.num_seqs * own), generator=torch.Generator().manual_seed(seed)
        ).to(self.device, torch.int32)
        prefix, rest = order.split([self.num_sets * shared, self.num_sets * case.num_seqs * own])
        prefix = prefix.view(self.num_sets, 1, shared).expand(-1, case.num_seqs, -1)
        return torch.cat([prefix, rest.view(self.num_sets, case.num_seqs, own)], dim=2).contiguous()

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def _fill(self, s: int) -> None:
        """Draw a set's keys and values and write them into its blocks, without the kernels."""
        case = self.case
        blocks = -(-case.context // case.block_size)
        ids = self.block_tables[s].flatten().long()
        cache = self.kv_cache.view(torch.uint8)
        for i, dense in enumerate((self.key[s], self.value[s])):
            codes = self._draw(*dense.shape)
            codes[1:, :, : case.shared_prefix] = codes[:1, :, : case.shared_prefix]
            if self.scale is not None:
                codes = codes / self.scale
                if self.kv_cache.dtype == torch.int8:
                    codes = codes.round().clamp(-127, 127)
                codes = codes.to(self.kv_cache.dtype)
                dense.copy_(codes.to(self.dtype) * self.scale)
            else:
                dense.copy_(codes)
            raw = codes.view(torch.uint8)  # [S, Hkv, context, D * itemsize]
            tail = blocks * case.block_size - case.context
            raw = torch.nn.functional.pad(raw, (0, 0, 0, tail), value=0xFF) if tail else raw
            raw = raw.view(case.num_seqs, case.num_kv_heads, blocks, case.block_size, -1)
            cache[ids, i] = raw.transpose(1, 2).flatten(0, 1)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute attention in ``dtype``: query [n, G, D] at ``positions`` [n], key and value [L, D]."""
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    logits = (query.transpose(0, 1) @ key.T) * query.shape[-1] ** -0.5  # [G, n, L]
    hidden = torch.arange(len(key), device=key.device) > positions[:, None]
    return (logits.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ value).transpose(0, 1)
