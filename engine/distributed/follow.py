"""Run what rank 0 says, on the other ranks."""

from __future__ import annotations

import gc
import pickle
from dataclasses import replace

import torch

from ..config import EngineConfig
from ..model.dry_run import probe
from ..model.worker import Worker
from .packet import Kind, Step, read_frame, read_step
from .ranks import Ranks


def follow(ranks: Ranks) -> None:
    """Load models and run steps until rank 0 ends."""
    worker: Worker | None = None
    number = 0
    while True:
        kind, fields, payload = read_frame(ranks.receive(), number)
        number += 1
        match kind:
            case Kind.LOAD:
                model, config = pickle.loads(payload)
                worker = Worker(model, _own(config, ranks), ranks.device, ranks)
            case Kind.STEP:
                assert worker is not None
                _run(worker, read_step(fields, payload), ranks)
            case Kind.MOVE:
                assert worker is not None
                worker.cache.move_blocks(pickle.loads(payload))
            case Kind.PROBE:
                assert worker is not None
                probe(worker.runner, worker.config.block_size)
            case Kind.DROP:
                worker = None
                gc.collect()
                if ranks.device.type == "cuda":
                    torch.cuda.empty_cache()
            case Kind.EXIT:
                return


def _own(config: EngineConfig, ranks: Ranks) -> EngineConfig:
    return replace(config, device=str(ranks.device))


def _run(worker: Worker, step: Step, ranks: Ranks) -> None:
    """Move blocks and compute a batch; rank 0 samples of the same logits."""
    worker.cache.move_blocks(step.moves)
    sampled = None
    if step.num_sampled:
        sampled = ranks.share(torch.empty(step.num_sampled, dtype=torch.int64, device=ranks.device))
    worker.runner.run_inputs(step.inputs, worker.cache, sampled)
