"""Settings of a batch on the device: copied once, with positions that go on."""

from __future__ import annotations

import numpy as np
import torch

from cupaged.engine.sampling.kept_settings import KeptSettings

from .test_step_inputs import META, Transfers


def test_a_batch_that_stays_the_same_is_copied_once():
    kept, made = KeptSettings(), []

    def make() -> list[np.ndarray]:
        made.append(1)
        return [np.zeros(3), np.zeros(3, dtype=np.int64)]

    lengths = np.array([4, 9, 2])
    with Transfers() as transfers:
        for step in range(5):
            settings, positions = kept.of(b"batch", make, lengths + step, META)
            assert [tensor.shape for tensor in (*settings, positions)] == [(3,)] * 3
        assert (transfers.count, len(made)) == (1, 1)
        kept.of(b"batch", make, lengths + np.array([6, 6, 7]), META)  # one has grown by two
        kept.of(b"other", make, lengths, META)
        kept.forget()
        kept.of(b"other", make, lengths, META)
    assert transfers.count == 4


def test_positions_are_the_lengths(seed):
    rng, kept = np.random.default_rng(seed), KeptSettings()
    lengths = rng.integers(1, 50, 4)
    for _ in range(30):
        lengths = lengths + (rng.integers(-1, 3) if rng.random() < 0.8 else rng.integers(0, 2, 4))
        _, positions = kept.of(b"batch", lambda: [np.zeros(4)], lengths.copy(), torch.device("cpu"))
        assert positions.tolist() == lengths.tolist()
