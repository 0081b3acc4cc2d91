"""Pack the weights of linear layers on the CPU: for cupaged's kernel, or with AMX for oneDNN.

torch passes oneDNN, or MKL in float32, a plain weight at every call, which takes longer.
"""

from __future__ import annotations

import torch

from cupaged.backends.cpu.packed_weight import PackedWeight, can_pack


class PackedLinear(torch.nn.Module):
    """Replace a `torch.nn.Linear` for inference, with a packed weight.

    The bits of a row of its output do not depend on the other rows.

    Args:
        linear: a layer on the CPU, whose weight `can_pack`.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = PackedWeight(linear.weight, linear.bias)
        self.multiply, self.bias = self.packed.multiply, self.packed.bias

    @property
    def weight(self) -> torch.Tensor:
        """Return the plain weight, a copy: some models look at it, or multiply with it themselves."""
        return self.packed.unpack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x)


class OneDNNLinear(torch.nn.Module):
    """Replace a `torch.nn.Linear` for inference, with a weight in oneDNN's layout and bitwise equal results.

    torch's inductor packs weights in the same way when it freezes a model.

    Args:
        linear: a layer on the CPU in bfloat16.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> torch.Tensor:
        """Return the plain weight, a copy: some models look at it, or multiply with it themselves."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def pack_linears(model: torch.nn.Module) -> int:
    """Replace the `torch.nn.Linear` layers of a CPU model in place, where packing makes them faster.

    The plain weights are freed unless other layers use them: a head tied to the embedding takes its size
    twice.

    Returns:
        The number of packed layers.
    """
    packed: dict[torch.nn.Module, torch.nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() yields a shared module only once
            if child is not None and child not in packed and (kind := _packed_class(child)) is not None:
                packed[child] = kind(child)  # type: ignore[arg-type]
                child._parameters = dict.fromkeys(child._parameters)  # frees the plain weight before the next
            if child in packed:
                setattr(parent, name, packed[child])
    return len(packed)


def _packed_class(module: torch.nn.Module) -> type[PackedLinear] | type[OneDNNLinear] | None:
    if type(module) is not torch.nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    weight = module.weight
    if can_pack(weight):
        return PackedLinear
    is_faster_with_onednn = (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return OneDNNLinear if is_faster_with_onednn else None
