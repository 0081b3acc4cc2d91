"""Keep the sampling settings of a batch on the device for as long as the batch stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..transfer import to_device


class KeptSettings:
    """Hold the settings of the batch of the last step.

    Sequences that decode are mostly those of the step before, one token longer. Then nothing is copied: the
    positions are those that the device has, and what has been added since.
    """

    def __init__(self) -> None:
        self._key: bytes | None = None
        self._lengths = np.zeros(0, dtype=np.int64)
        self._tensors: list[torch.Tensor] = []

    def forget(self) -> None:
        """Let the next batch be copied, whatever its key: the settings of a key have changed."""
        self._key = None

    def of(
        self, key: bytes, make: Callable[[], Sequence[np.ndarray]], lengths: np.ndarray, device: torch.device
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return settings and lengths of a batch on the device.

        Args:
            key: batches with equal keys have equal settings.
            make: returns the settings as arrays, which are not written to afterwards.
            lengths: int64 ``[N]``, likewise.
        """
        if key == self._key:
            added = lengths - self._lengths
            if (added == added[0]).all():
                *settings, positions = self._tensors
                return settings, positions + int(added[0]) if added[0] else positions
        self._tensors = to_device([*make(), lengths], device)
        self._key, self._lengths = key, lengths
        return self._tensors[:-1], self._tensors[-1]
