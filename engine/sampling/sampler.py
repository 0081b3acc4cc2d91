"""Sample the next tokens of a batch from its logits.

A token is drawn by inverting the cumulative distribution at a number that is a hash of the request's seed,
the index of the output and the position of the token. So a request with a seed gets the same tokens in any
batch, as long as its logits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch

from cupaged import sample

from ..sampling_params import SamplingParams
from ..scheduling.beam_search import num_candidates
from ..scheduling.request import Candidates, Sequence, SequenceGroup
from ..scheduling.step_plan import ScheduledSequence
from ..transfer import to_device
from .bad_words import BadWords
from .grammar import Grammar
from .kept_settings import KeptSettings
from .logits_processors import Penalties, TokenTable, Users
from .logprobs import LogprobPlan, LogprobTensors, take_prompt
from .samples import LaunchedSamples, SamplerOutput
from .structured import StructuredOutputs

_MAX_INT = 2**62  # requests may contain any integer; the arrays hold 64 bits


class _Use(IntFlag):
    """Name the features of the sampler that a sequence uses."""

    LOGPROBS = 1
    ALLOWED = 2
    MIN_TOKENS = 4
    BAD_WORDS = 8
    BIAS = 16
    PENALTIES = 32
    GRAMMAR = 64
    CHANGE = GRAMMAR | ALLOWED | MIN_TOKENS | BAD_WORDS | BIAS | PENALTIES  # of the logits


_SETTINGS = np.dtype(
    [
        ("uses", np.int64),
        ("temperature", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("seed", np.uint64),
        ("index", np.uint64),
        ("min_length", np.int64),  # in tokens, including the prompt
        ("logprobs", np.int64),
    ]
)


@dataclass(frozen=True)
class _Batch:
    """Hold the N sequences that sample in a step."""

    items: list[ScheduledSequence]
    rows: np.ndarray  # int64 [N]
    settings: np.ndarray  # _SETTINGS [N]
    lengths: np.ndarray  # int64 [N], tokens so far
    num_samples: np.ndarray  # int64 [N]
    sampled: torch.Tensor | None  # of the step before

    def users(self, which: np.ndarray) -> Users:
        """Return the sequences that a bool ``[N]`` array selects."""
        positions = np.flatnonzero(which)
        seqs = [self.items[i].seq for i in positions]
        return Users(positions, self.rows[positions], self.lengths[positions], seqs, self.sampled)


@dataclass(frozen=True)
class _Kept:
    """Hold what `sample` and log probabilities need on the device: the columns of D samples."""

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seeds: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor | None  # int64 [D], of the logits; None: each row has one sample
    logprobs: list[torch.Tensor]  # as in `LogprobPlan.arrays`


class Sampler:
    """Sample tokens for sequences, whose settings and logits processors it keeps in arrays.

    Args:
        eos_token_ids: tokens that end a sequence unless its request ignores them; the model can sample them.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._row_of: dict[int, int] = {}  # by sequence ID
        self._free: list[int] = []
        self._settings = np.zeros(0, dtype=_SETTINGS)
        self._allowed, self._ending, self._biases = TokenTable(), TokenTable(), TokenTable()
        self._bad_words, self._penalties = BadWords(), Penalties()
        self._grammars: dict[SequenceGroup, Grammar] = {}
        self._kept_settings = KeptSettings()
        self._structured = StructuredOutputs(eos_token_ids)
        self._processors: tuple[tuple[_Use, TokenTable | BadWords | Penalties | StructuredOutputs], ...] = (
            (_Use.GRAMMAR, self._structured),
            (_Use.ALLOWED, self._allowed),
            (_Use.MIN_TOKENS, self._ending),
            (_Use.BAD_WORDS, self._bad_words),
            (_Use.BIAS, self._biases),
            (_Use.PENALTIES, self._penalties),
        )

    def sample(self, logits: torch.Tensor, scheduled: SequenceABC[ScheduledSequence]) -> SamplerOutput:
        """Sample the tokens of a step and wait for them; see `launch`."""
        return self.launch(logits, scheduled).result()

    @torch.inference_mode()
    def launch(
        self,
        logits: torch.Tensor,
        scheduled: SequenceABC[ScheduledSequence],
        sampled: torch.Tensor | None = None,
    ) -> LaunchedSamples:
        """Sample the tokens of a step.

        The host waits only for what it has to know: candidates of beams, log probabilities of prompts. Of
        sequences whose last token it does not know yet it needs none (see `Overlap`).

        Args:
            logits: ``[N, vocabulary]``: for each scheduled sequence, in order, ``num_prompt_logits`` rows
                and one more if it samples. They may be changed in place.
            scheduled: the step's sequences.
            sampled: as in `ModelRunner.run`.
        """
        output = SamplerOutput([[] for _ in scheduled])
        if any(item.group.params.needs_whole_prompt for item in scheduled):
            logits = take_prompt(logits, scheduled, output.prompt_logprobs)
        planned = [position for position, item in enumerate(scheduled) if item.num_samples]
        if any(scheduled[position].group.params.beam_width for position in planned):
            logits, planned = _take_beams(logits, scheduled, planned, output)
        if not planned:
            return LaunchedSamples(output)
        batch = self._batch([scheduled[position] for position in planned], sampled)
        uses = batch.settings["uses"]
        used = int(np.bitwise_or.reduce(uses))
        plan: LogprobPlan | None = None
        if used & _Use.LOGPROBS:
            numbers = batch.settings["logprobs"]
            plan = LogprobPlan.of(
                np.flatnonzero(uses & _Use.LOGPROBS), batch.num_samples, numbers, logits.shape[-1]
            )
        kept = self._kept(batch, plan, logits.device)
        if plan is not None:  # a copy, taken before the processors change the logits
            original = logits[kept.logprobs[0]]
        if used & _Use.CHANGE:
            logits = logits.float()
            self._change(logits, batch, used)
        tokens = self._choose(logits, kept)
        if plan is None:
            return LaunchedSamples(output, planned, batch.num_samples, tokens)
        _, rows, samples, *tops = kept.logprobs
        logprobs = LogprobTensors(original, rows, tokens[samples], plan.tops, tops)
        return LaunchedSamples(output, planned, batch.num_samples, tokens, plan.sequences, logprobs)

    def check(self, params: SamplingParams, vocab_size: int) -> None:
        """Check that a request always leaves tokens to sample.

        Args:
            vocab_size: number of tokens that the model can sample.

        Raises:
            ValueError: no token is left before ``min_tokens``, there are fewer tokens than beams, or no token
                ends an output that has a grammar.
        """
        allowed, ending = params.allowed_token_ids, params.ending_tokens(self._eos_token_ids)
        if params.structured_outputs is not None and not ending:
            raise ValueError(
                "structured_outputs needs a token that ends an output, and the model has no end-of-sequence "
                "token: give stop_token_ids"
            )
        # After the prompt every beam takes a different token.
        left = vocab_size - len(ending)
        if params.beam_width is not None and params.beam_width > left:
            raise ValueError(
                f"beam_width is {params.beam_width}, and of the model's {vocab_size} tokens {left} do not "
                "end an output: lower it to at most that, or give fewer stop_token_ids"
            )
        if params.min_tokens and allowed is not None and set(allowed) <= ending:
            raise ValueError(
                "allowed_token_ids are all tokens that end an output, and min_tokens rules those out: allow "
                "another token, or leave min_tokens out"
            )
        if params.min_tokens and left <= 0:
            raise ValueError(
                "stop_token_ids are all tokens there are, and min_tokens rules those out: give fewer, or "
                "leave min_tokens out"
            )

    def add_grammar(self, group: SequenceGroup, grammar: Grammar) -> None:
        """Set the grammar of a request's outputs, before the first of them is sampled."""
        self._grammars[group] = grammar

    def prepare(self) -> None:
        """Begin to compute what the grammars permit next, when the sampled tokens are in the sequences."""
        self._structured.prepare()

    def release(self, group: SequenceGroup) -> None:
        """Forget the sequences of a request."""
        self._grammars.pop(group, None)
        for seq in group.seqs:
            row = self._row_of.pop(seq.seq_id, None)
            if row is None:
                continue
            uses = int(self._settings["uses"][row])
            for use, processor in self._processors:
                if uses & use:
                    processor.remove(row)
            self._free.append(row)

    # -- rows ----------------------------------------------------------------------------------------

    def _batch(self, items: list[ScheduledSequence], sampled: torch.Tensor | None) -> _Batch:
        """Gather the rows, lengths and numbers of samples of the sequences."""
        known = self._row_of
        rows = np.array([known.get(item.seq.seq_id, -1) for item in items], dtype=np.int64)
        for i in np.flatnonzero(rows < 0):
            rows[i] = self._add(items[i].group, items[i].seq)
        lengths = np.array([len(item.seq.token_ids) for item in items], dtype=np.int64)
        num_samples = np.array([item.num_samples for item in items], dtype=np.int64)
        return _Batch(items, rows, self._settings[rows], lengths, num_samples, sampled)

    def _add(self, group: SequenceGroup, seq: Sequence) -> int:
        """Add a sequence's parameters to the arrays and return its row."""
        params = group.params
        if not self._free:
            old, new = len(self._settings), max(64, 2 * len(self._settings))
            self._settings = np.append(self._settings, np.zeros(new - old, dtype=_SETTINGS))
            self._free = list(range(new - 1, old - 1, -1))
        row = self._free.pop()
        self._kept_settings.forget()
        uses = _Use(0)
        if params.needs_logprobs:
            uses |= _Use.LOGPROBS
        if params.allowed_token_ids is not None:
            uses |= _Use.ALLOWED
            self._allowed.add(row, sorted(set(params.allowed_token_ids)))
        ending = sorted(params.ending_tokens(self._eos_token_ids))
        min_tokens = min(params.min_tokens, group.max_tokens)
        if grammar := self._grammars.get(group):
            uses |= _Use.GRAMMAR
            self._structured.add(row, seq, grammar, ending)
            if params.ignore_eos and not params.stop_token_ids:
                min_tokens = group.max_tokens  # an end-of-sequence token comes where no other may
        if min_tokens and ending:
            uses |= _Use.MIN_TOKENS
            self._ending.add(row, ending)
        if group.bad_words:
            uses |= _Use.BAD_WORDS
            self._bad_words.add(row, group.bad_words)
        if params.logit_bias:
            uses |= _Use.BIAS
            self._biases.add(row, list(params.logit_bias), list(params.logit_bias.values()))
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        if penalties != (1, 0, 0):
            uses |= _Use.PENALTIES
            self._penalties.add(row, *penalties)
        self._settings[row] = (
            uses,
            0.0 if params.greedy else params.temperature,
            params.min_p,
            min(params.top_k, _MAX_INT),
            params.top_p,
            seq.seed,
            seq.index,
            seq.prompt_len + min_tokens,
            min(params.logprobs or 0, _MAX_INT),
        )
        self._row_of[seq.seq_id] = row  # last, so that after an error above the sequence is added again
        return row

    # -- one step ------------------------------------------------------------------------------------

    def _change(self, logits: torch.Tensor, batch: _Batch, used: int) -> None:
        """Apply the logits processors to the float32 logits in place."""
        uses = batch.settings["uses"]
        if used & _Use.GRAMMAR:
            structured = uses & _Use.GRAMMAR > 0
            self._structured.apply(logits, batch.users(structured))
            limited = np.flatnonzero(structured & (uses & (_Use.ALLOWED | _Use.MIN_TOKENS) > 0))
            permitted = logits[_on(logits, limited)]
        if used & _Use.ALLOWED:
            self._allowed.rule_out_others(logits, batch.users(uses & _Use.ALLOWED > 0))
        if used & _Use.MIN_TOKENS:
            short = (uses & _Use.MIN_TOKENS > 0) & (batch.lengths < batch.settings["min_length"])
            if short.any():
                self._ending.rule_out(logits, batch.users(short))
        if used & _Use.GRAMMAR and len(limited):  # the grammar prevails where no token is left
            left = logits[_on(logits, limited)]
            left = torch.where(left.amax(-1, keepdim=True) > -torch.inf, left, permitted)
            logits[_on(logits, limited)] = left
        if used & _Use.BAD_WORDS:
            self._bad_words.apply(logits, batch.users(uses & _Use.BAD_WORDS > 0))
        if used & _Use.BIAS:
            self._biases.add_to(logits, batch.users(uses & _Use.BIAS > 0))
        if used & _Use.PENALTIES:
            self._penalties.apply(logits, batch.users(uses & _Use.PENALTIES > 0))

    def _kept(self, batch: _Batch, plan: LogprobPlan | None, device: torch.device) -> _Kept:
        """Return what the device needs to know of the batch, copied at once unless it is there already."""
        settings, lengths, counts = batch.settings, batch.lengths, batch.num_samples
        index = settings["index"]
        row_of = np.zeros(0, dtype=np.int64)
        if (counts > 1).any():
            # Of several outputs drawn at once, output i has index i; otherwise the index is the sequence's.
            row_of = np.repeat(np.arange(len(counts)), counts)
            order = np.arange(len(row_of)) - np.repeat(counts.cumsum() - counts, counts)
            index = np.where(counts[row_of] > 1, order.astype(np.uint64), index[row_of])
            settings, lengths = settings[row_of], lengths[row_of]

        def arrays() -> list[np.ndarray]:
            names = ("temperature", "min_p", "top_k", "top_p")
            columns = [np.ascontiguousarray(settings[name]) for name in names]
            numbers = [np.ascontiguousarray(of).view(np.int64) for of in (settings["seed"], index)]
            return [*columns, *numbers, row_of, *(plan.arrays if plan else ())]

        key = batch.rows.tobytes() + counts.tobytes()
        tensors, positions = self._kept_settings.of(key, arrays, lengths, device)
        temperature, min_p, top_k, top_p, seeds, indices, rows, *logprobs = tensors
        return _Kept(
            temperature=temperature,
            min_p=min_p,
            top_k=top_k,
            top_p=top_p,
            seeds=seeds,
            indices=indices,
            positions=positions,
            rows=rows if len(row_of) else None,
            logprobs=logprobs,
        )

    def _choose(self, logits: torch.Tensor, kept: _Kept) -> torch.Tensor:
        """Return the sampled tokens, int64 ``[sum of num_samples]``, in the order of the sequences."""
        return sample(
            logits if kept.rows is None else logits[kept.rows],
            temperature=kept.temperature,
            min_p=kept.min_p,
            top_k=kept.top_k,
            top_p=kept.top_p,
            seeds=kept.seeds,
            indices=kept.indices,
            positions=kept.positions,
        )


def _take_beams(
    logits: torch.Tensor,
    scheduled: SequenceABC[ScheduledSequence],
    planned: list[int],
    output: SamplerOutput,
) -> tuple[torch.Tensor, list[int]]:
    """Store the candidates of beams in ``output``; return the other rows and their positions in the plan."""
    is_beam = np.array([scheduled[position].group.params.beam_width is not None for position in planned])
    positions = np.array(planned)
    beams = positions[is_beam].tolist()
    counts = np.array([num_candidates(scheduled[position].group) for position in beams])
    rows = logits[_on(logits, np.flatnonzero(is_beam))].float().log_softmax(-1)
    for count in np.unique(counts):  # one top-k per count: ties must not depend on the other beams
        which = np.flatnonzero(counts == count)
        logprobs, tokens = rows[_on(logits, which)].topk(min(int(count), logits.shape[1]))
        for i, of_tokens, of_logprobs in zip(which, tokens.tolist(), logprobs.tolist()):
            output.candidates[beams[i]] = Candidates(of_tokens, of_logprobs)
    return logits[_on(logits, np.flatnonzero(~is_beam))], positions[~is_beam].tolist()


def _on(like: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    return to_device([array], like.device)[0]
