"""The kernels of latent attention as NVRTC compiles them, interpreted, against float64."""

from __future__ import annotations

import random

import pytest
import torch

from cupaged import backends
from tests.kernels import test_mla
from tests.kernels.mla_cases import check, draw

from . import launcher


@pytest.fixture(params=["80", *(pytest.param(arch, marks=pytest.mark.matrix) for arch in ("75", "90a"))])
def arch(request, monkeypatch, seed) -> str:
    """Run on what is compiled for this architecture."""
    module = launcher.backend(seed, request.param)
    monkeypatch.setattr(backends, "for_device", lambda device_type: module)
    return request.param


@pytest.mark.parametrize("mode", ["decode", pytest.param("prefill", marks=pytest.mark.matrix)])
def test_attention(arch, seed, mode):
    """Keys of one tile or of several, and rows that fill a tile of rows or do not."""
    rng = random.Random(seed)
    check(
        draw(
            seed,
            dtype=rng.choice([torch.float16, torch.bfloat16]),
            num_heads=rng.choice([3, 16, 20] if mode == "decode" else [3, 24]),
            sizes=rng.choice([(192, 128), (136, 104)] if mode == "decode" else [(192, 128), (576, 512)]),
            block_size=rng.choice([1, 8, 16]),
            seq_lens=[0, 1, rng.randrange(30, 80)],
            query_lens=None if mode == "decode" else [0, 1, rng.randrange(2, 6)],
            padding_rows=0 if mode == "decode" else 2,
        )
    )


@pytest.mark.matrix
def test_attention_of_long_sequences(arch, seed):
    """Run several KV splits, and float32."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32])
    check(draw(seed, dtype=dtype, num_heads=4, sizes=(24, 16), seq_lens=[rng.randrange(513, 600), 9]))


def test_latents_are_written_into_their_slots(arch, seed):
    test_mla.test_latents_are_written_into_their_slots(
        ("cuda_ptx", "cpu"), seed, random.Random(seed).choice(test_mla.DTYPES)
    )
