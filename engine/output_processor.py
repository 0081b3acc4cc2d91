"""Turn sampled tokens into `RequestOutput`s: decode text, find stop strings, collect log probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from .outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput
from .sampling.detokenizer import Detokenizer, token_text
from .sampling.logprobs import TokenLogprobs
from .sampling.samples import SamplerOutput
from .scheduling.request import Sequence, SequenceGroup
from .scheduling.scheduler import Scheduler
from .scheduling.step_plan import ScheduledSequence


@dataclass(slots=True)
class _State:
    """Hold the text and log probabilities of one sequence so far."""

    detokenizer: Detokenizer
    num_tokens: int = 0  # number of output tokens processed so far
    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0


class OutputProcessor:
    """Build the outputs of requests, keeping the text of every running sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, scheduler: Scheduler) -> None:
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._states: dict[int, _State] = {}  # by sequence ID
        self._prompts: dict[SequenceGroup, list[PositionLogprobs | None]] = {}
        self._texts: dict[int, str] = {}  # token ID -> its text within a text

    def process(
        self, scheduled: SequenceABC[ScheduledSequence], samples: SamplerOutput
    ) -> list[RequestOutput]:
        """Process the samples of a step, after the scheduler has; finish sequences that reach a stop string.

        Returns:
            The outputs of every request that got a token, in the order of the plan. Call `forget` for those
            that are finished.
        """
        for position, prompt_logprobs in samples.prompt_logprobs.items():
            self._add_prompt_logprobs(scheduled[position], prompt_logprobs)
        for position, logprobs in samples.logprobs.items():
            for seq, token_logprobs in zip(scheduled[position].receivers, logprobs):
                state = self._state(scheduled[position].group, seq)
                state.logprobs.append(self._decoded(token_logprobs))
                state.cumulative_logprob += token_logprobs.logprobs[0]
        outputs = []
        sampled = dict.fromkeys(
            item.group
            for position, (item, tokens) in enumerate(zip(scheduled, samples.token_ids))
            if tokens or position in samples.candidates
        )
        for group in sampled:
            if group.params.only_prompt:
                outputs.append(self._empty_output(group))
                continue
            if group.params.beam_width is not None:
                if group.finished:  # the best beams are only known at the end
                    outputs.append(self._beam_output(group))
                continue
            for seq in group.seqs:
                self._add_tokens(group, seq)
            outputs.append(self._output(group))
        return outputs

    def forget(self, group: SequenceGroup) -> None:
        """Drop the state of a request."""
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

    def _add_prompt_logprobs(self, item: ScheduledSequence, new: list[TokenLogprobs]) -> None:
        logprobs = self._prompts.setdefault(item.group, [None])
        # A preempted request recomputes positions that are already in the list.
        logprobs += map(self._decoded, new[len(logprobs) - 1 - item.start :])

    def _decoded(self, logprobs: TokenLogprobs) -> PositionLogprobs:
        ranks = (logprobs.rank, *range(1, len(logprobs.token_ids)))
        decoded: PositionLogprobs = {}
        for token, logprob, rank in zip(logprobs.token_ids, logprobs.logprobs, ranks):
            if token not in self._texts:
                self._texts[token] = token_text(self._tokenizer, token)
            decoded.setdefault(token, Logprob(logprob, rank, self._texts[token]))
        return decoded

    def _add_tokens(self, group: SequenceGroup, seq: Sequence) -> None:
        """Append the text of a sequence's new tokens and finish the sequence at a stop string."""
        params, state = group.params, self._state(group, seq)
        new = seq.token_ids[seq.prompt_len + state.num_tokens : seq.num_known]
        if not new:
            return
        state.num_tokens += len(new)
        if seq.finish_reason == "stop" and not params.include_stop_str_in_output:
            new = new[:-1]  # the token that ended it is not part of the text
        old_length = len(state.text)
        state.text += state.detokenizer.append(new)
        if seq.finished:
            state.text += state.detokenizer.flush()
        if state.num_tokens < params.min_tokens:
            return
        match = _find_stop(state.text, old_length, params.stop)
        if match is None:
            return
        position, stop = match
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
            group.num_cached_tokens,
            group.first_scheduled,
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
            group.num_cached_tokens,
            group.first_scheduled,
        )

    def _beam_output(self, group: SequenceGroup) -> RequestOutput:
        params, completions = group.params, []
        assert group.beams is not None
        for index, beam in enumerate(group.beams.hypotheses[: params.n]):
            hide_last = beam.finish_reason == "stop" and not params.include_stop_str_in_output
            shown = beam.token_ids[: len(beam.token_ids) - hide_last]
            detokenizer = Detokenizer(self._tokenizer, group.prompt_token_ids, params.skip_special_tokens)
            completions.append(
                CompletionOutput(
                    index,
                    detokenizer.append(shown) + detokenizer.flush(),
                    beam.token_ids,
                    beam.finish_reason,
                    beam.stop_reason,
                    cumulative_logprob=beam.cumulative_logprob,
                    beam_score=beam.score,
                )
            )
        return RequestOutput(
            group.request_id,
            group.prompt,
            group.prompt_token_ids,
            completions,
            True,
            num_cached_tokens=group.num_cached_tokens,
            first_scheduled=group.first_scheduled,
        )

    def _completion(self, group: SequenceGroup, index: int, seq: Sequence) -> CompletionOutput:
        params, state = group.params, self._states[seq.seq_id]
        text = state.text
        if params.stop and not (seq.finished or params.include_stop_str_in_output):
            # Hold back text that may be the start of a stop string.
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
        logprobs = self._prompts.setdefault(group, [None])
        if len(logprobs) != group.prompt_len:
            raise RuntimeError(
                f"request {group.request_id!r} has log probabilities of {len(logprobs)} of its "
                f"{group.prompt_len} prompt tokens; please report this"
            )
        return logprobs


def _find_stop(text: str, old_length: int, stops: Iterable[str]) -> tuple[int, str] | None:
    """Return (position, stop string) of the first stop string in a text, or None.

    Args:
        old_length: number of characters, from the first, that are known to contain no stop string.
    """
    matches = [(text.find(stop, max(0, old_length - len(stop) + 1)), stop) for stop in stops]
    return min((match for match in matches if match[0] >= 0), default=None)
