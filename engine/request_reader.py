"""Read requests: prompts and settings, checked against the model and the engine's settings."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from .prompts import Prompt, PromptReader, cache_salt
from .sampling import bad_words
from .sampling.sampler import Sampler
from .sampling_params import SamplingParams
from .scheduling.request import SequenceGroup
from .validation import is_integer


class RequestReader:
    """Turn prompts and settings into sequence groups.

    Args:
        tokenizer: the model's tokenizer.
        prompts: reads the prompts.
        sampler: checks that a request always leaves tokens to sample.
        num_samplable: number of tokens that the model can sample.
        max_model_len: maximum number of tokens of a sequence.
        by_priority: whether the scheduling policy is "priority".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptReader,
        sampler: Sampler,
        num_samplable: int,
        max_model_len: int,
        by_priority: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._sampler = sampler
        self._num_samplable = num_samplable
        self._max_model_len = max_model_len
        self._by_priority = by_priority

    def read(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int, arrival: int
    ) -> SequenceGroup:
        """Return the sequence group of a request.

        Args:
            arrival: order of arrival.

        Raises:
            ValueError: the request is malformed, or asks for what the model cannot do.
        """
        if not is_integer(priority):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        if priority and not self._by_priority:
            raise ValueError(
                f"priority is {priority}, and requests run in the order of their arrival: leave it out, or "
                "set scheduling_policy='priority'"
            )
        params.check_vocabulary(self._num_samplable)
        self._sampler.check(params, self._num_samplable)
        self._prompts.check_length(prompt)
        text, token_ids = self._prompts.read(prompt)
        if params.needs_whole_prompt and (beyond := max(token_ids)) >= self._num_samplable:
            raise ValueError(
                f"prompt_logprobs is asked for, and the model gives token {beyond} of the prompt no "
                "probability: leave it out"
            )
        available = self._max_model_len - len(token_ids)
        max_tokens = available if params.max_tokens is None else min(params.max_tokens, available)
        if params.only_prompt:
            max_tokens = 1  # the last step of a prompt samples; that token is not shown, and never an input
        longest_word = max_tokens * self._prompts.longest_token
        words = bad_words.tokenize(
            self._tokenizer,
            [word for word in params.bad_words if len(word.lstrip()) <= longest_word],
            max_tokens,
        )
        return SequenceGroup(
            request_id,
            text,
            token_ids,
            params,
            max_tokens,
            arrival,
            priority=priority,
            cache_salt=cache_salt(prompt),
            skip_reading_prefix_cache=params.needs_whole_prompt,
            # One with a token that the model cannot sample is never complete.
            bad_words=tuple(word for word in words if max(word) < self._num_samplable),
        )

    def read_prefix(self, prefix_id: str, prompt: Prompt, block_size: int, arrival: int) -> SequenceGroup:
        """Return the sequence group of a prefix: the full blocks of a prompt.

        Raises:
            ValueError: the prompt is malformed, or has not one full block.
        """
        text, token_ids = self._prompts.read(prompt)
        kept = token_ids[: len(token_ids) // block_size * block_size]
        if not kept:
            raise ValueError(
                f"the prefix has {len(token_ids)} tokens, and only full blocks of {block_size} tokens are "
                "kept"
            )
        salt = cache_salt(prompt)
        return SequenceGroup(prefix_id, text, kept, SamplingParams(), 1, arrival, cache_salt=salt)
