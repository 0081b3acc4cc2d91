"""A decode step's launches of our kernels, recorded and repeated under the emulation, without planning."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from cupaged import backends
from cupaged.backends.cuda.kernels import Kernels
from cupaged.engine.model.graph_buckets import Bucket
from cupaged.engine.model.graph_check import draw_step
from tests.engine.decode_load import BLOCK_SIZE, Graphed, poison_inputs
from tests.engine.test_fusion import tiny
from tests.graph_tape import Launches, RecordingLauncher

from .emulator import HostLauncher

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation with")


@pytest.mark.parametrize(
    ("model_type", "dtype", "width", "shared"),
    [
        ("qwen3", torch.float32, 100, False),
        pytest.param("llama", torch.float32, 4, False, marks=pytest.mark.matrix),
        pytest.param("llama", torch.float16, 200, True, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_recorded_launches_have_the_bits_of_planned_ones(model_type, dtype, width, shared, seed, monkeypatch):
    graphed = Graphed(tiny(model_type, seed, dtype), monkeypatch, width * BLOCK_SIZE, num_blocks=2 * width)
    graphed.make.launcher = launcher = RecordingLauncher(HostLauncher(seed, arch="80"))
    kernels = Kernels(launcher)
    monkeypatch.setattr(backends, "for_device", lambda device_type: kernels)
    graphs, bucket = graphed.graphs, Bucket(2, width, shared)
    graphs.capture([bucket])
    (graph,) = graphed.make.made
    assert sum(isinstance(operation, Launches) for operation in graph.operations) == 11  # of two layers
    rng = np.random.default_rng(seed)
    for _ in range(2):
        inputs = draw_step(rng, bucket, graphed.cache, graphed.runner.config.vocab_size, width * BLOCK_SIZE)
        poison_inputs(graphs)
        graphs._fill(bucket, inputs, torch.arange(2))
        plans, prepared = dict(kernels._plans), launcher.num_prepared
        kernels._plans.clear()
        with torch.inference_mode():
            graph.replay()
            replayed = graphs._logits[:2].clone()
            assert (launcher.num_prepared, kernels._plans) == (prepared, {})
            kernels._plans.update(plans)
            assert replayed.equal(graphs._run(bucket))
