"""The work that every contender gets: prompts as token IDs, and the number of tokens to generate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers as tf

TOPICS = ("paging", "caches", "a lighthouse", "the sea", "prime numbers", "bread", "trains", "an old map")
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Case:
    """Requests that are sent together.

    Args:
        kind: ``requests``; ``prefill``, one token after a long prompt; or ``decode``, whose time is that of
            the tokens after the first one.
        prompts: token IDs of each request.
        tokens: number of tokens to generate for each request.
    """

    name: str
    kind: str
    prompts: list[list[int]]
    tokens: int


@dataclass(frozen=True)
class Job:
    """All that a contender has to know.

    Args:
        repeats: number of times that each case runs in a process; the fastest counts.
    """

    model: str
    dtype: str
    device: str
    threads: int
    max_model_len: int
    max_num_seqs: int
    repeats: int
    cases: list[Case]


def cases(
    tokenizer: tf.PreTrainedTokenizerBase, requests: Sequence[int], tokens: int, long_prompt: int
) -> list[Case]:
    """Return a case for each number of requests, and prefill and decode of a long prompt.

    Args:
        tokens: number of tokens to generate for each request.
        long_prompt: number of tokens of the long prompt; 0 for none.
    """
    made = [Case(f"{n} request{'s' * (n != 1)}", "requests", prompts(tokenizer, n), tokens) for n in requests]
    if long_prompt:
        long = [random_prompt(tokenizer, long_prompt)]
        made.append(Case(f"prefill of {long_prompt:,} tokens", PREFILL, long, 1))
        made.append(Case(f"decode after {long_prompt:,} tokens", DECODE, long, tokens + 1))
    return made


def prompts(tokenizer: tf.PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Return questions of different lengths in the model's chat template, as token IDs."""
    token_ids = []
    for i in range(count):
        question = " ".join(
            ["Tell me a story about", *(TOPICS[(i + j) % len(TOPICS)] + "," for j in range(i % 7 + 1))]
        )
        text = question
        if tokenizer.chat_template:
            message = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        token_ids.append(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])
    return token_ids


def random_prompt(tokenizer: tf.PreTrainedTokenizerBase, length: int) -> list[int]:
    """Return a prompt of ordinary tokens, the same one in every run."""
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in special]
    return random.Random(length).choices(ordinary, k=length)
