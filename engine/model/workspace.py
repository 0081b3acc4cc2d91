"""Keep the tensors of decode steps of one size where they are, so that what ran once can be repeated.

On a CPU a fused layer is a list of native calls, and what Python does between them takes as long as a few
sequences' arithmetic. Steps of as many sequences, with block tables as wide, make the same calls with the
same addresses if their tensors stay in place: the first such step records them (`Tape`), the next ones replay
them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch

from cupaged.backends.cpu.tape import Tape

from .attention import AttentionMetadata
from .kv_cache import KVCache

MAX_SEQS = 64  # maximum number of sequences: from there on arithmetic takes almost all of the time
_MAX_WORKSPACES = 64
Halves = tuple[torch.Tensor, torch.Tensor]
# Returns where to write the intermediate result of a name, ``[T, columns]``.
Buffer = Callable[[str, int], torch.Tensor]


class Buffers:
    """Keep the memory of intermediate results: pages of new memory are mapped one by one when written.

    Args:
        dtype: dtype of the results.
        num_rows: number of rows for which memory is taken at first; it grows with the steps.
    """

    def __init__(self, dtype: torch.dtype, num_rows: int = 0) -> None:
        self._dtype, self._num_rows = dtype, num_rows
        self._memory: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, num_rows: int) -> Buffer:
        """Return the buffer of a step of so many tokens. The buffers of all steps share their memory."""
        self._num_rows = max(self._num_rows, num_rows)

        def buffer(name: str, columns: int) -> torch.Tensor:
            memory = self._memory.get((name, columns))
            if memory is None or memory.numel() < num_rows * columns:
                memory = torch.empty(self._num_rows * columns, dtype=self._dtype)
                self._memory[name, columns] = memory
            return memory[: num_rows * columns].view(num_rows, columns)

        return buffer


class Workspace:
    """Hold the inputs and intermediate results of decode steps of one size, and their tapes.

    Args:
        cache: the KV cache that the steps use.
        windows: sliding window of each layer.
        num_seqs: number of sequences, with one token each.
        width: number of columns of the block tables.
        buffer: where intermediate results are written.

    Attributes:
        tapes: by module, its calls and its result.
    """

    def __init__(
        self,
        cache: KVCache,
        windows: tuple[int | None, ...],
        num_seqs: int,
        width: int,
        buffer: Buffer,
    ) -> None:
        self.buffer = buffer
        self.tapes: dict[torch.nn.Module, tuple[Tape, torch.Tensor]] = {}
        self._slots = np.full(num_seqs, -1, dtype=np.int64)
        self._tables = np.zeros((num_seqs, width), dtype=np.int32)
        self._lens = np.zeros(num_seqs, dtype=np.int32)
        self._halves: list[Halves] = []
        self.paged = AttentionMetadata(
            kv_caches=cache.layers,
            kv_scales=cache.scales,
            slot_mapping=torch.from_numpy(self._slots),
            block_tables=torch.from_numpy(self._tables),
            seq_lens=torch.from_numpy(self._lens),
            query_start_loc=None,
            windows=windows,
            workspace=self,
        )

    def begin_step(self, slots: np.ndarray, block_tables: np.ndarray, seq_lens: np.ndarray) -> None:
        """Take over the inputs of a step."""
        self._slots[:] = slots
        self._tables[:, : block_tables.shape[1]] = block_tables
        self._lens[:] = seq_lens
        self.paged.rotary_halves.clear()

    def keep_halves(self, index: int, halves: Halves) -> Halves:
        """Copy the cosines and sines of a step to where they always are; return those.

        Args:
            index: which of the step's it is, in the order in which layers ask for them.
        """
        if index == len(self._halves):
            self._halves.append((torch.empty_like(halves[0]), torch.empty_like(halves[1])))
        for kept, half in zip(self._halves[index], halves):
            kept.copy_(half)
        return self._halves[index]


class Workspaces:
    """Find the workspace of a step.

    Args:
        windows: sliding window of each layer.
        dtype: dtype of the intermediate results.
    """

    def __init__(self, windows: tuple[int | None, ...], dtype: torch.dtype) -> None:
        self._windows, self._dtype = windows, dtype
        self._cache: KVCache | None = None
        self._workspaces: OrderedDict[tuple[int, ...], Workspace] = OrderedDict()
        self._buffers = Buffers(dtype, MAX_SEQS)  # of all workspaces; they stay in place
        self._any_size = Buffers(dtype)

    def get(self, cache: KVCache, num_seqs: int, width: int) -> Workspace | None:
        """Return the workspace for decode steps of a size; None for more sequences than `MAX_SEQS`.

        Args:
            width: number of columns that the block tables need.
        """
        if num_seqs > MAX_SEQS:
            return None
        if cache is not self._cache:
            self._workspaces.clear()
            self._cache = cache
        width = 1 << (width - 1).bit_length()  # a power of two, so that sequences may grow
        key = num_seqs, width, torch.get_num_threads()
        workspace = self._workspaces.get(key)
        if workspace is None:
            if len(self._workspaces) == _MAX_WORKSPACES:
                self._workspaces.popitem(last=False)
            workspace = Workspace(cache, self._windows, num_seqs, width, self._buffers.of(num_seqs))
            self._workspaces[key] = workspace
        self._workspaces.move_to_end(key)
        return workspace

    def buffer(self, num_tokens: int) -> Buffer:
        """Return where a step that has no workspace writes its intermediate results."""
        return self._any_size.of(num_tokens)
