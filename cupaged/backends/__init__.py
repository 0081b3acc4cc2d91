"""The backends: `reference` in plain torch, `cpu` in numba, `cuda` in CUDA C++.

`reference` defines the right results. A backend is loaded at the first call with a tensor on its device.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Protocol, cast

import torch

from ..layout import Layout
from ..params import AttentionParams, SamplingSettings

NAMES = ("reference", "cpu", "cuda")


class Backend(Protocol):
    """Describe the functions of a backend. They get checked arguments and allocated outputs.

    A ``layout`` stands for the shapes, strides, dtypes and devices of a call's tensors: it is the key under
    which a backend caches whatever these determine.
    """

    CHECKS_DATA: bool  # the attention and the cache write check lengths, ids and scales themselves

    def reshape_and_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
        layout: Layout,
    ) -> None: ...

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
        layout: Layout,
    ) -> None: ...

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
        layout: Layout,
    ) -> None: ...

    def concat_and_cache_mla(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        layout: Layout,
    ) -> None: ...

    def merge_attention_states(
        self, outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None: ...

    def copy_blocks(self, kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None: ...

    def swap_blocks(self, src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None: ...

    def rms_norm(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        weight_offset: float,
        residual: torch.Tensor | None,
        input_weight: torch.Tensor | None,
        out: torch.Tensor,
        layout: Layout,
    ) -> None: ...

    def act_and_mul(
        self, input: torch.Tensor, activation: str, out: torch.Tensor, layout: Layout
    ) -> None: ...

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
        layout: Layout,
    ) -> None: ...

    def sample(
        self, logits: torch.Tensor, settings: SamplingSettings, out: torch.Tensor, layout: Layout
    ) -> None: ...


@cache
def for_device(device_type: str) -> Backend:
    """Return the backend for tensors on ``device_type``; ``CUPAGED_BACKEND`` overrides the choice.

    Raises:
        ValueError: no backend runs on that device, or ``CUPAGED_BACKEND`` names none.
        ImportError: a package that the backend needs is missing; the message names it.
    """
    name = os.environ.get("CUPAGED_BACKEND") or device_type
    if name not in NAMES:
        raise ValueError(
            f"no cupaged backend is called {name!r}: tensors must be on 'cuda' or 'cpu', "
            f"and CUPAGED_BACKEND, when set, must be one of {', '.join(NAMES)}"
        )
    return load(name)


def load(name: str) -> Backend:
    """Import and return the backend called ``name``.

    Raises:
        ImportError: a package that the backend needs is missing; the message names it.
    """
    modules = {"reference": ".reference", "cpu": ".cpu.backend", "cuda": ".cuda.launcher"}
    module = importlib.import_module(modules[name], __name__)
    return cast(Backend, module.backend() if name == "cuda" else module)
