"""Compare the logits of a rewritten model with those of the untouched one.

The operators round less often than the modules that they replace, so that logits differ, and in bfloat16 by
some percent. How much they may differ is measured on the untouched model: it runs a second time with the
result of each of its parts changed at random by as much as rounding changes it. No copy of the weights in
another dtype is needed. What the operators compute was compared in float32, module by module, before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..attention import AttentionMetadata
from ..attention_probe import LayerAttention
from ..kv_cache import KVCache, KVShape
from ..vocabulary import num_tokens

_LENGTHS = (9, 4, 1)  # tokens of the prompts
_MAX_POSITION = 1 << 20
_FACTOR = 4.0  # maximum difference, as a multiple of that by rounding
_MOST = 0.5  # relative to the standard deviation of a row
_FLOOR = 1e-5  # relative to a row's largest logit


class Proof:
    """Run a few prompts, then one more token of each, over a small paged cache.

    Args:
        model: a transformers decoder.
        shape: shape of a block of the cache, in the model's dtype.
        layers: the attention of each layer.
        max_positions: number of positions that the model has, if it is limited. The prompts begin at the
            first, in the middle and near the end, as some models scale queries by position.
    """

    def __init__(
        self, model: Any, shape: KVShape, layers: tuple[LayerAttention, ...], max_positions: int | None
    ) -> None:
        self._model, self._shape = model, shape
        self.attending = tuple(layer.module for layer in layers)
        own = (shape.num_kv_heads, shape.head_size, shape.head_size)
        self.padded = frozenset(
            layer.module
            for layer in layers
            if shape.latent or (layer.num_kv_heads, layer.head_size, layer.value_size) != own
        )
        self._windows = tuple(layer.window for layer in layers)
        self._device = next(model.parameters()).device
        self._has_experts = any(parameter.dim() > 2 for parameter in model.parameters())
        self._blocks_each = -(-(max(_LENGTHS) + 1) // shape.block_size)
        generator = torch.Generator().manual_seed(1)
        vocabulary = num_tokens(model)
        self._tokens = torch.randint(vocabulary, (sum(_LENGTHS) + len(_LENGTHS),), generator=generator)
        last = min(max_positions if max_positions and max_positions > 0 else _MAX_POSITION, _MAX_POSITION) - 1
        self._starts = [max(0, min(start, last - max(_LENGTHS))) for start in (0, last // 2, last)]

    @torch.no_grad()  # not in inference mode, in which weights that are merged could not be used outside
    def logits(
        self,
        prefill_watch: AbstractContextManager[Any] | None = None,
        decode_watch: AbstractContextManager[Any] | None = None,
    ) -> torch.Tensor:
        """Return the logits of the last token of each prompt and of the token after it, float32.

        Args:
            prefill_watch: entered while the prompts run.
            decode_watch: entered while the tokens after them run.
        """
        cache = self._cache()
        with prefill_watch or nullcontext():
            prefill = self._run(cache, [(0, n) for n in _LENGTHS], self._tokens[: sum(_LENGTHS)])
        with decode_watch or nullcontext():
            decode = self._run(cache, [(n, 1) for n in _LENGTHS], self._tokens[sum(_LENGTHS) :])
        return torch.cat((prefill, decode))

    def _cache(self) -> KVCache:
        blocks = len(_LENGTHS) * self._blocks_each
        cache = KVCache(self._shape, blocks, 0, self._device)
        cache.blocks.zero_()
        return cache

    def _run(self, cache: KVCache, steps: list[tuple[int, int]], tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the last token of each sequence.

        Args:
            steps: for each sequence the number of tokens before the step and in it.
        """
        tables = torch.arange(len(cache.blocks), dtype=torch.int32).view(len(steps), -1)
        within = [torch.arange(start, start + count) for start, count in steps]
        first = tables[:, :1].long() * self._shape.block_size  # the blocks of a sequence are contiguous
        counts = torch.tensor([count for _, count in steps])
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int()
        device = self._device
        paged = AttentionMetadata(
            kv_caches=cache.layers,
            kv_scales=None,
            slot_mapping=torch.cat([base + i for base, i in zip(first, within)]).to(device),
            block_tables=tables.to(device),
            seq_lens=torch.tensor([sum(step) for step in steps], dtype=torch.int32).to(device),
            query_start_loc=None if int(counts.max()) == 1 else starts.to(device),
            windows=self._windows,
        )
        positions = torch.cat([start + i for start, i in zip(self._starts, within)])
        output = self._model(
            input_ids=tokens[None].to(device),
            position_ids=positions[None].to(device),
            logits_to_keep=(counts.cumsum(0) - 1).to(device),
            use_cache=False,
            paged=paged,
        )
        return output.logits[0].float()

    def bound(self, plain: torch.Tensor) -> torch.Tensor:
        """Return how far each row of other logits may be from ``plain``, those of the untouched model."""
        with _rounding(self._model), torch.no_grad():
            other = self._run(self._cache(), [(0, n) for n in _LENGTHS], self._tokens[: sum(_LENGTHS)])
        largest = _distance(other, plain[: len(_LENGTHS)]).max()
        # Where rounding changes logits by more than this, they could not tell a wrong model from a right one.
        most = _MOST * plain.std(-1)
        return most.clamp(max=_FACTOR * largest) + _FLOOR * plain.abs().amax(-1)

    def difference(self, logits: torch.Tensor, plain: torch.Tensor, bound: torch.Tensor) -> str | None:
        """Return what is wrong with logits, or None if they are within the bound."""
        if not bool(plain.isfinite().all()):
            return "the model's own logits are not finite"
        ratio = _distance(logits, plain) / bound
        ratio[ratio.isnan()] = torch.inf
        # Rounding may choose other experts for a token, which is no small difference.
        strays = 1 if self._has_experts and self._shape.dtype.itemsize < 4 else 0
        decisive = ratio.view(2, -1).sort(-1).values[:, -1 - strays].max()
        if float(decisive) <= 1:
            return None
        return f"they differ by {float(decisive):.2g} times what rounding explains"


def _distance(logits: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Return the root mean square difference of each row."""
    return (logits - plain).square().mean(-1).sqrt()


@contextmanager
def _rounding(model: torch.nn.Module) -> Iterator[None]:
    """Change the results of a model's leaves by up to one unit in the last place, at random."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(2)

    def change(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        noise = torch.rand(output.shape, generator=generator, device=output.device) * 2 - 1
        return (output.double() * (1 + noise * torch.finfo(output.dtype).eps)).to(output.dtype)

    handles = [m.register_forward_hook(change) for m in model.modules() if not m._modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
