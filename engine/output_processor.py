"""Sampled tokens to `RequestOutput`s: text, stop strings, what may be shown already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .detokenizer import Detokenizer
from .outputs import CompletionOutput, RequestOutput
from .request import Sequence, SequenceGroup
from .scheduler import Scheduler


@dataclass(slots=True)
class _State:
    """Of one sequence."""

    detokenizer: Detokenizer
    num_tokens: int = 0  # seen so far
    text: str = ""


class OutputProcessor:
    """Keeps the text of every running sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, scheduler: Scheduler) -> None:
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._states: dict[int, _State] = {}

    def process(self, groups: Iterable[SequenceGroup]) -> list[RequestOutput]:
        """Read the groups' new tokens, end the sequences that reached a stop string."""
        outputs = []
        for group in groups:
            for seq in group.seqs:
                self._read(group, seq)
            outputs.append(self._output(group))
            if group.finished:
                self.forget(group)
        return outputs

    def forget(self, group: SequenceGroup) -> None:
        for seq in group.seqs:
            self._states.pop(seq.seq_id, None)

    def _read(self, group: SequenceGroup, seq: Sequence) -> None:
        state = self._states.get(seq.seq_id)
        if state is None:
            params = group.params
            detokenizer = Detokenizer(self._tokenizer, group.prompt_token_ids, params.skip_special_tokens)
            state = self._states[seq.seq_id] = _State(detokenizer)
        if state.num_tokens == seq.num_output_tokens:
            return
        new = seq.token_ids[seq.prompt_len + state.num_tokens :]
        state.num_tokens += len(new)
        if seq.finish_reason == "stop":
            new = new[:-1]  # the token that ended it is not part of the text
        before = len(state.text)
        state.text += state.detokenizer.append(new)
        if seq.finished:
            state.text += state.detokenizer.flush()
        end = _find_stop(state.text, before, group.params.stop)
        if end is None:
            return
        position, stop = end
        state.text = state.text[:position]
        if seq.finished:
            seq.finish_reason, seq.stop_reason = "stop", stop
        else:
            self._scheduler.finish(group, seq, "stop", stop)

    def _output(self, group: SequenceGroup) -> RequestOutput:
        # Text that may be the start of a stop string is not shown until it is known not to be.
        held_back = max((len(stop) - 1 for stop in group.params.stop), default=0)
        outputs = []
        for seq in group.seqs:
            text = self._states[seq.seq_id].text
            if held_back and not seq.finished:
                text = text[:-held_back]
            outputs.append(
                CompletionOutput(seq.index, text, seq.output_token_ids, seq.finish_reason, seq.stop_reason)
            )
        return RequestOutput(group.request_id, group.prompt, group.prompt_token_ids, outputs, group.finished)


def _find_stop(text: str, before: int, stops: Iterable[str]) -> tuple[int, str] | None:
    """The first stop string in ``text`` and its position; the first ``before`` characters hold none whole."""
    found = [(text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in stops]
    return min((hit for hit in found if hit[0] >= 0), default=None)
