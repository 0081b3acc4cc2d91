"""Tell the other ranks what to do, from rank 0."""

from __future__ import annotations

import pickle
from dataclasses import replace

import torch

from ..config import EngineConfig
from ..model.step_inputs import StepInputs
from ..scheduling.step_plan import Plan
from .packet import Kind, Step, frame, write_step
from .ranks import Ranks


class Leader:
    """Send each step to the other ranks, as one buffer.

    Attributes:
        num_sent: number of buffers so far, by which the others notice that one is missing.
        bytes_sent: their bytes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.num_sent = self.bytes_sent = 0
        self._num_loaded = 0
        self._moves = Plan()  # of blocks, that the others have not been told

    def load(self, model: str | None, config: EngineConfig) -> int:
        """Let the other ranks load a model, as this one does next; return its number, for `drop`."""
        self._moves = Plan()
        self._num_loaded += 1
        # Policies may be functions, and are rank 0's business, but for whether there is a swap space.
        mode = config.preemption_mode if isinstance(config.preemption_mode, str) else "swap"
        named = replace(
            config,
            eviction_policy="lru",
            scheduling_policy="fcfs",
            admission_policy="watermark",
            preemption_mode=mode,
        )
        self._send(Kind.LOAD, pickle.dumps((model, named)))
        return self._num_loaded

    def moved(self, plan: Plan) -> None:
        """Let the other ranks move blocks as this one did, before the next step."""
        if not (plan.swap_out or plan.swap_in or plan.copies):
            return
        if self._moves.swap_out or self._moves.swap_in or self._moves.copies:  # of a step that was not sent
            self._send(Kind.MOVE, pickle.dumps(self._moves))
        self._moves = Plan(swap_out=plan.swap_out, swap_in=plan.swap_in, copies=plan.copies)

    def step(self, inputs: StepInputs, sampled: torch.Tensor | None) -> None:
        """Let the other ranks compute a batch, as this one does next.

        Args:
            sampled: the tokens that the step before has sampled, on this rank's device.
        """
        unknown = sampled is not None and bool((inputs.token_ids < 0).any())
        num_sampled = len(sampled) if unknown else 0  # type: ignore[arg-type]
        self._post(write_step(self.num_sent, Step(inputs, self._moves, num_sampled)))
        self._moves = Plan()
        if unknown:
            self.ranks.share(sampled)  # type: ignore[arg-type]

    def probe(self) -> None:
        """Let the other ranks compute a token in a cache of its own, as this one does next."""
        self._send(Kind.PROBE)

    def drop(self, number: int) -> None:
        """Let the other ranks forget a model, unless they have loaded another one since."""
        if number == self._num_loaded:
            self._send(Kind.DROP)

    def exit(self) -> None:
        """Let the other ranks end."""
        self._send(Kind.EXIT)

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        self._post(frame(kind, self.num_sent, payload))

    def _post(self, buffer: bytes) -> None:
        self.ranks.send(buffer)
        self.num_sent += 1
        self.bytes_sent += len(buffer)
