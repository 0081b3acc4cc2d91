"""Decode steps over a model whose graphs a stand-in captures."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from cupaged.engine import SamplingParams
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.model import model_runner
from cupaged.engine.model.decode_graphs import DecodeGraphs
from cupaged.engine.model.kv_cache import KVCache
from cupaged.engine.model.model_runner import ModelRunner
from cupaged.engine.scheduling.request import Sequence, SequenceGroup
from cupaged.engine.scheduling.step_plan import ScheduledSequence
from tests.graph_tape import TapeGraphs, poison

BLOCK_SIZE = 8
MAX_SEQS = 4
MAX_MODEL_LEN = 200


class Graphed:
    """Return a runner with graphs, a cache and the blocks of sequences."""

    def __init__(
        self,
        model: torch.nn.Module,
        monkeypatch: pytest.MonkeyPatch,
        max_model_len: int = MAX_MODEL_LEN,
        num_blocks: int = 64,
    ) -> None:
        # On a GPU linear layers are not packed; those of the CPU are no operations that could be recorded.
        monkeypatch.setattr(model_runner, "pack_linears", lambda model: 0)
        self.runner = ModelRunner(model)
        self.runner.rewrite(BLOCK_SIZE)
        self.blocks = BlockManager(num_blocks, 0, BLOCK_SIZE)
        self.cache = KVCache(self.runner.kv_shape(BLOCK_SIZE), num_blocks, 0, torch.device("cpu"))
        self.constants = constants(model)
        self.make = TapeGraphs(self.declared)
        self.graphs: DecodeGraphs = self.runner._new_graphs(self.cache, MAX_SEQS, max_model_len, self.make)

    def replays(self) -> int:
        return sum(graph.replays for graph in self.make.made)

    def declared(self) -> list[torch.Tensor]:
        model, graphs = self.runner._model, self.graphs
        tensors = [*model.parameters(), *model.buffers(), *self.constants]
        tensors += [self.cache.blocks, graphs._buffers.memory, graphs._buffers.sampled]
        return tensors + ([] if graphs._logits is None else [graphs._logits])


def constants(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the tensors that fused modules have made of parameters, once."""
    found, seen = [], set()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif callable(value) and getattr(value, "__closure__", None) and id(value) not in seen:
            seen.add(id(value))
            for cell in value.__closure__:
                walk(cell.cell_contents)

    for module in model.modules():
        walk(vars(module).get("forward"))
    return found


class Load:
    """Draw sequences that come, grow by a token a step, and go."""

    def __init__(self, seed: int, graphed: Graphed, vocabulary: int) -> None:
        self.rng, self.graphed, self.vocabulary = random.Random(seed), graphed, vocabulary
        self.live: list[tuple[SequenceGroup, Sequence]] = []
        self.count = 0

    def token(self) -> int:
        return self.rng.randrange(2, self.vocabulary)

    def step(self, num_seqs: int) -> tuple[ScheduledSequence, ...]:
        """Return a step of so many sequences, whose tokens so far are in the cache (whatever they are)."""
        blocks = self.graphed.blocks
        while len(self.live) > num_seqs or (self.live and self.rng.random() < 0.1):
            _, seq = self.live.pop(self.rng.randrange(len(self.live)))
            blocks.free(seq.seq_id)
        while len(self.live) < num_seqs:
            tokens = [self.token() for _ in range(self.rng.choice([1, 7, 8, 30, 60]))]
            group = SequenceGroup(str(self.count), None, tokens, SamplingParams(), 100, self.count)
            seq = Sequence(self.count, 0, list(tokens), len(tokens), 0)
            self.live.append((group, seq))
            self.count += 1
        self.rng.shuffle(self.live)
        items = []
        for group, seq in self.live:
            seq.token_ids.append(self.token())
            blocks.append(seq.seq_id, 0, len(seq.token_ids), [])
            items.append(ScheduledSequence(group, seq, len(seq.token_ids) - 1, 1, 1))
        return tuple(items)


def poison_inputs(graphs: DecodeGraphs) -> None:
    """Fill all that a step does not have to be able to read."""
    for tensor in (graphs._buffers.memory, graphs._buffers.sampled, graphs._logits):
        poison(tensor)
    for buffer in graphs._buffers._staging.buffers:
        poison(buffer)
