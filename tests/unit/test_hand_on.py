"""Models whose layers drop the engine's argument: their attention gets it, for the time of a call."""

from __future__ import annotations

import pytest
import torch

from cupaged.engine.model.hand_on import hand_on


class Attention(torch.nn.Module):
    layer_idx = 0

    def forward(self, x, **kwargs):
        self.seen = kwargs
        if x is None:
            raise RuntimeError("planted")
        return x


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x, **_):
        return self.attention(x)


def test_the_argument_is_that_of_the_call():
    model = torch.nn.Sequential(Layer())
    layer = model[0]
    hand_on(model)
    for paged in ("first", "second"):
        layer(1, paged=paged)
        assert layer.attention.seen == {"paged": paged}
    with pytest.raises(RuntimeError, match="planted"):
        layer(None, paged="third")
    layer(1)
    assert layer.attention.seen == {}, "it is kept after the call"
    layer.attention(1, paged="its own")
    assert layer.attention.seen == {"paged": "its own"}
