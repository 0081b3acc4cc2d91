"""Hold the state of requests: sequence groups of one or more sequences. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ..sampling_params import SamplingParams


class Status(Enum):
    WAITING = "waiting"  # never admitted
    RUNNING = "running"
    PREEMPTED = "preempted"  # its blocks are gone; to be computed again
    SWAPPED = "swapped"  # its blocks are in the swap space
    PINNED = "pinned"  # a prefix that is computed and keeps its blocks
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One output of a request: the prompt and the tokens sampled after it.

    The first ``num_computed`` tokens have their keys and values in the cache, or get them by steps that were
    launched. While decoding that is all but the last token.

    A token that a launched step samples, and that the host does not know yet, stands in ``token_ids`` as
    ``-1 - row``: ``row`` is its row in that step's tensor of sampled tokens, which the device has.
    """

    seq_id: int
    index: int
    token_ids: list[int]
    prompt_len: int
    seed: int
    num_computed: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    keys: list[bytes] = field(
        default_factory=list
    )  # prefix hashes of its first full blocks, as far as they were needed

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_pending(self) -> int:
        """Return the number of tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_known(self) -> int:
        """Return the number of tokens, without those at the end that launched steps sample."""
        token_ids = self.token_ids
        count = len(token_ids)
        while token_ids[count - 1] < 0:
            count -= 1
        return count

    @property
    def output_token_ids(self) -> list[int]:
        """Return the output's tokens, as far as they are known."""
        return self.token_ids[self.prompt_len : self.num_known]

    @property
    def num_output_tokens(self) -> int:
        """Return the number of the output's tokens, as far as they are known."""
        return self.num_known - self.prompt_len


@dataclass(frozen=True)
class Candidates:
    """The most likely next tokens of a beam, in descending order."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam; its score is its log probability divided by its length to the ``length_penalty``."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: str
    stop_reason: int | None


@dataclass
class Beams:
    """The state of a group's beam search."""

    scores: dict[int, float] = field(default_factory=dict)  # log probabilities of the beams, by sequence ID
    candidates: dict[int, Candidates] = field(default_factory=dict)  # of the beams that are computed
    hypotheses: list[Hypothesis] = field(
        default_factory=list
    )  # at most beam_width, in descending order of score


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
    priority: int = 0  # lower comes first, where the engine schedules by priority
    cache_salt: str | None = None  # requests share blocks with those of the same salt only
    skip_reading_prefix_cache: bool = False  # every token of the prompt has to be computed
    bad_words: tuple[tuple[int, ...], ...] = ()  # the bad words of `params`, as tokens
    is_prefix: bool = False  # a prefix to be pinned, from which nothing is sampled

    # Set by the scheduler.
    first_scheduled: float | None = None  # when it was first admitted, on the clock of `time.monotonic`
    num_cached_tokens: int = 0  # number of its prompt's tokens that were in the prefix cache then
    live: list[Sequence] = field(default_factory=list)  # the unfinished ones of `seqs`
    rank: tuple[float, int] = (0, 0)  # lower ranks come first
    root_key: bytes = b""  # the prefix hash before its first block
    stop_ids: frozenset[int] = frozenset()  # tokens that end a sequence
    needs_host: str | None = None  # why its tokens have to be known before the next step; see `Overlap`
    forked: bool = False  # the first tokens are sampled; before, `seqs` has the first sequence only
    prefilling: bool = True  # a sequence has more to compute than its last token
    beams: Beams | None = None  # the state of its beam search
    width: int = field(init=False)  # maximum number of sequences of the group in a step
    num_seats: int = field(init=False)  # number of sequences that run, or will when the prompt is computed

    def __post_init__(self) -> None:
        self.width = self.num_seats = self.params.num_sequences

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED
