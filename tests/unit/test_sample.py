"""`sample` apart from drawn input: bad input, and torch.library."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cupaged
from cupaged import backends
from cupaged.backends import reference

from .test_ops import Seen, opcheck


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setattr(backends, "for_device", lambda device_type: reference)


def arguments(**changes) -> dict:
    """Return valid arguments of `sample`, the first row greedy."""
    values = {
        "logits": torch.linspace(0, 1, 60).view(3, 20),
        "temperature": torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64),
        "top_k": torch.tensor([0, 5, 30]),
        "top_p": torch.tensor([1.0, 1.0, 0.9], dtype=torch.float64),
        "min_p": torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64),
        "seeds": torch.tensor([-5, 7, 1 << 62]),
        "indices": torch.arange(3),
        "positions": torch.arange(3),
    }
    return values | changes


BAD = {
    "rank": ({"logits": torch.randn(20)}, "logits must have 2 dimensions"),
    "dtype": ({"logits": torch.randn(3, 20).double()}, "logits must be torch.float32 or torch.float16 or"),
    "strides": ({"logits": torch.randn(20, 3).T}, r"logits must be contiguous.*pass logits.contiguous\(\)"),
    "no tokens": ({"logits": torch.randn(3, 0)}, "logits must be .* with at least one token, got V = 0"),
    "temperature": ({"temperature": torch.ones(2).double()}, r"temperature must be \[N\] with N = 3"),
    "float": ({"temperature": torch.ones(3)}, "temperature must be torch.float64, got torch.float32"),
    "number": ({"top_p": torch.tensor(1.0).double()}, "top_p must have 1 dimension"),
    "every second": ({"min_p": torch.ones(6).double()[::2]}, "min_p must be contiguous"),
    "top_k": (
        {"top_k": torch.ones(3).int()},
        r"top_k must be torch.int64.*pass top_k.long\(\)",
    ),
    "seeds": ({"seeds": torch.zeros(4).long()}, "seeds must be .* with N = 3"),
    "indices": ({"indices": torch.zeros(3)}, "indices must be torch.int64"),
    "device": ({"positions": torch.empty(3, dtype=torch.int64, device="meta")}, "positions must be on cpu"),
    "out": ({"out": torch.empty(4).long()}, "out must be .* with N = 3"),
    "out dtype": ({"out": torch.empty(3).int()}, "out must be torch.int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        cupaged.sample(**arguments(**changes))


def test_torch_library():
    """Fake tensors, a mode that watches, what the schema says, no break in a graph."""
    tokens = cupaged.sample(**arguments())
    assert tokens[0] == 19
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in arguments().items()}
        assert cupaged.sample(**fake).shape == (3,)
    with torch.no_grad(), Seen() as seen:
        cupaged.sample(**arguments())
    assert seen.names == ["sample"]
    opcheck(torch.ops.cupaged.sample.default, (*arguments().values(), torch.zeros(3).long()))
    compiled = torch.compile(cupaged.sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments()), tokens)
