"""Packed linear layers in a model: as right as torch's own, and what is left alone."""

from __future__ import annotations

import pytest
import torch

from cupaged.backends.cpu.packed_weight import can_pack
from cupaged.engine.model.cpu_linear import OneDNNLinear, PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bfloat16 on this CPU"
)


@pytest.mark.parametrize("kind", [PackedLinear, OneDNNLinear])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 32), (576, 1536), (7, 13), (1, 1), (100, 33)])
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 33), (2, 3)])
def test_close_to_float64_as_a_plain_layer(kind, bias, out_features, in_features, shape):
    linear = torch.nn.Linear(in_features, out_features, bias=bias).bfloat16().requires_grad_(False)
    if kind is PackedLinear and not can_pack(linear.weight):
        return  # an odd number of inputs
    x = torch.randn(*shape, in_features).bfloat16()
    exact = torch.nn.functional.linear(
        x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )
    with torch.inference_mode():
        layer = kind(linear)
        packed = layer(x)
        plain = linear(x)
    assert torch.equal(layer.weight, linear.weight)
    assert (layer.bias is None) == (linear.bias is None)
    assert packed.shape == plain.shape
    assert packed.dtype == torch.bfloat16
    error = (plain.double() - exact).abs().max()
    assert (packed.double() - exact).abs().max() <= 2 * error + 1e-5


class Derived(torch.nn.Linear):
    """May compute anything: not ours to replace."""


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.inner = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
        self.again = self.third = self.inner[0]
        self.other = Derived(16, 3)
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embedding(ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_model_computes_the_same_and_keeps_its_embedding(dtype):
    torch.manual_seed(0)
    model = Model(dtype)
    ids = torch.arange(9)[None]
    before, embedding = model(ids), model.embedding.weight.data_ptr()
    assert pack_linears(model) == 3
    assert model.inner[0] is model.again is model.third
    assert [type(m) for m in (model.inner[0], model.inner[2], model.head)] == 3 * [PackedLinear]
    assert model.embedding.weight.data_ptr() == embedding
    torch.testing.assert_close(model(ids), before, rtol=0.02, atol=0.02)
    # The plain weights are gone.
    assert {name for name, _ in model.named_parameters()} == {
        "embedding.weight",
        "other.weight",
        "other.bias",
    }
    assert pack_linears(model) == 0


def test_a_layer_with_a_hook_is_left_alone():
    model = Model(torch.bfloat16)
    model.head.register_forward_hook(lambda module, args, output: output * 2)
    assert pack_linears(model) == 2
    assert type(model.head) is torch.nn.Linear


def test_bfloat16_is_packed_for_onednn_where_the_kernel_does_not_take_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model = Model(torch.bfloat16)
    assert pack_linears(model) == 3
    assert type(model.head) is OneDNNLinear


def test_other_dtypes_are_left_alone():
    model = Model(torch.float16)
    assert pack_linears(model) == 0
    assert type(model.head) is torch.nn.Linear
