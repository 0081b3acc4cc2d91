"""Sampled tokens to `RequestOutput`s: text, stop strings, log probabilities, what may be shown already."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from .outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput
from .sampling.detokenizer import Detokenizer, token_text
from .sampling.logprobs import TokenLogprobs
from .sampling.sampler import SamplerOutput
from .scheduling.request import Sequence, SequenceGroup
from .scheduling.scheduler import Scheduler
from .scheduling.step_plan import ScheduledSequence


@dataclass(slots=True)
class _State:
    """Of one sequence."""

    detokenizer: Detokenizer
    num_tokens: int = 0  # seen so far
    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0


class OutputProcessor:
    """Keeps the text of every running sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, scheduler: Scheduler) -> None:
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._states: dict[int, _State] = {}  # by the sequence's id
        self._prompts: dict[SequenceGroup, list[PositionLogprobs | None]] = {}
        self._texts: dict[int, str] = {}  # of single tokens, within a text

    def process(
        self, scheduled: SequenceABC[ScheduledSequence], samples: SamplerOutput
    ) -> list[RequestOutput]:
        """Read what a step gave, after the scheduler did; end the sequences that reached a stop string.

        Returns:
            The outputs of every request that got a token, in order. Those that are finished are to be
            forgotten.
        """
        for position, found in samples.prompt_logprobs.items():
            self._read_prompt(scheduled[position], found)
        for position, found in samples.logprobs.items():
            for seq, one in zip(scheduled[position].receivers, found):
                state = self._state(scheduled[position].group, seq)
                state.logprobs.append(self._named(one))
                state.cumulative_logprob += one.logprobs[0]
        outputs = []
        for group in dict.fromkeys(item.group for item in scheduled if item.num_samples):
            if group.params.only_prompt:
                outputs.append(self._empty_output(group))
                continue
            if group.params.beam_width is not None:
                if group.finished:  # which beams are best is not known before
                    outputs.append(self._beam_output(group))
                continue
            for seq in group.seqs:
                self._read(group, seq)
            outputs.append(self._output(group))
        return outputs

    def forget(self, group: SequenceGroup) -> None:
        self._prompts.pop(group, None)
        for seq in group.seqs:
            self._states.pop(seq.seq_id, None)

    def _state(self, group: SequenceGroup, seq: Sequence) -> _State:
        state = self._states.get(seq.seq_id)
        if state is None:
            skip = group.params.skip_special_tokens
            state = _State(Detokenizer(self._tokenizer, group.prompt_token_ids, skip))
            self._states[seq.seq_id] = state
        return state

    def _read_prompt(self, item: ScheduledSequence, found: list[TokenLogprobs]) -> None:
        logprobs = self._prompts.setdefault(item.group, [None])
        # Positions that a preempted request computes again are known.
        logprobs += map(self._named, found[len(logprobs) - 1 - item.start :])

    def _named(self, found: TokenLogprobs) -> PositionLogprobs:
        ranks = (found.rank, *range(1, len(found.token_ids)))
        named: PositionLogprobs = {}
        for token, logprob, rank in zip(found.token_ids, found.logprobs, ranks):
            if token not in self._texts:
                self._texts[token] = token_text(self._tokenizer, token)
            named.setdefault(token, Logprob(logprob, rank, self._texts[token]))
        return named

    def _read(self, group: SequenceGroup, seq: Sequence) -> None:
        params, state = group.params, self._state(group, seq)
        if state.num_tokens == seq.num_output_tokens:
            return
        new = seq.token_ids[seq.prompt_len + state.num_tokens :]
        state.num_tokens += len(new)
        if seq.finish_reason == "stop" and not params.include_stop_str_in_output:
            new = new[:-1]  # the token that ended it is not part of the text
        before = len(state.text)
        state.text += state.detokenizer.append(new)
        if seq.finished:
            state.text += state.detokenizer.flush()
        if state.num_tokens < params.min_tokens:
            return
        end = _find_stop(state.text, before, params.stop)
        if end is None:
            return
        position, stop = end
        state.text = state.text[: position + len(stop) * params.include_stop_str_in_output]
        if seq.finished:
            seq.finish_reason, seq.stop_reason = "stop", stop
        else:
            self._scheduler.finish(group, seq, "stop", stop)

    def _output(self, group: SequenceGroup) -> RequestOutput:
        params, seqs = group.params, group.seqs
        if params.num_sequences > params.n:
            seqs = sorted(seqs, key=lambda seq: -self._states[seq.seq_id].cumulative_logprob)[: params.n]
        return RequestOutput(
            group.request_id,
            group.prompt,
            group.prompt_token_ids,
            [self._completion(group, index, seq) for index, seq in enumerate(seqs)],
            group.finished,
            self._prompt_logprobs(group),
        )

    def _empty_output(self, group: SequenceGroup) -> RequestOutput:
        logprobs = None if group.params.logprobs is None else list[PositionLogprobs]()
        return RequestOutput(
            group.request_id,
            group.prompt,
            group.prompt_token_ids,
            [CompletionOutput(i, "", [], "length", logprobs=logprobs) for i in range(group.params.n)],
            group.finished,
            self._prompt_logprobs(group),
        )

    def _beam_output(self, group: SequenceGroup) -> RequestOutput:
        params, completions = group.params, []
        assert group.beams is not None
        for index, found in enumerate(group.beams.hypotheses[: params.n]):
            hidden = found.finish_reason == "stop" and not params.include_stop_str_in_output
            shown = found.token_ids[: len(found.token_ids) - hidden]
            detokenizer = Detokenizer(self._tokenizer, group.prompt_token_ids, params.skip_special_tokens)
            completions.append(
                CompletionOutput(
                    index,
                    detokenizer.append(shown) + detokenizer.flush(),
                    found.token_ids,
                    found.finish_reason,
                    found.stop_reason,
                    cumulative_logprob=found.cumulative_logprob,
                    beam_score=found.score,
                )
            )
        return RequestOutput(group.request_id, group.prompt, group.prompt_token_ids, completions, True)

    def _completion(self, group: SequenceGroup, index: int, seq: Sequence) -> CompletionOutput:
        params, state = group.params, self._states[seq.seq_id]
        text = state.text
        if params.stop and not (seq.finished or params.include_stop_str_in_output):
            # Text that may be the start of a stop string is not shown until it is known not to be.
            held_back = max(len(stop) - 1 for stop in params.stop)
            text = text[: max(len(text) - held_back, 0)]
        return CompletionOutput(
            index,
            text,
            seq.output_token_ids,
            seq.finish_reason,
            seq.stop_reason,
            None if params.logprobs is None else list(state.logprobs),
            state.cumulative_logprob if params.needs_logprobs else None,
        )

    def _prompt_logprobs(self, group: SequenceGroup) -> list[PositionLogprobs | None] | None:
        if not group.params.needs_whole_prompt:
            return None
        found = self._prompts.setdefault(group, [None])
        if len(found) != group.prompt_len:
            raise RuntimeError(
                f"request {group.request_id!r} has log probabilities of {len(found)} of its "
                f"{group.prompt_len} prompt tokens; please report this"
            )
        return found


def _find_stop(text: str, before: int, stops: Iterable[str]) -> tuple[int, str] | None:
    """The first stop string in ``text`` and its position; the first ``before`` characters hold none whole."""
    found = [(text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in stops]
    return min((hit for hit in found if hit[0] >= 0), default=None)
