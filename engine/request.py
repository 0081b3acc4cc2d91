"""A request while the engine works on it: a sequence group of one or more sequences. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .sampling_params import SamplingParams


class Status(Enum):
    WAITING = "waiting"  # never admitted
    RUNNING = "running"
    PREEMPTED = "preempted"  # its blocks are gone; to be computed again
    SWAPPED = "swapped"  # its blocks are in the swap space
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One output of a request: the prompt and the tokens sampled after it.

    The first ``num_computed`` tokens have their keys and values in the cache. While decoding that is all but
    the last token.
    """

    seq_id: int
    index: int
    token_ids: list[int]
    prompt_len: int
    seed: int
    num_computed: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """A request: sequences over one prompt that are scheduled and preempted together (paper, section 4.5).

    The first sequence computes the prompt; the others are forked from it when that is done.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int  # of an output, as allowed by max_model_len
    arrival: int  # order of arrival
    seqs: list[Sequence] = field(default_factory=list)
    status: Status = Status.WAITING

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.seqs if seq.finish_reason is None]
