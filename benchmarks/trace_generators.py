"""Draw traces that match published statistics, where the data sets themselves are not at hand.

Only what a source publishes is matched: means or medians of the lengths, and how much of the prompts was in
an earlier one. The shapes of the distributions are ours: exponential where a mean is known, as the paper's
Figure 11 looks, log-normal where a median is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice

from .simulation import Request, Spans
from .traces import OWN_TOKENS, Arrivals

Draw = Callable[[random.Random], int]  # of a number of tokens
FEWEST, MOST_WIDTH = 1, 64


def exponential(mean: float, most: int | None = None) -> Draw:
    """Return a function that draws lengths of this mean; longer ones than ``most`` are cut."""

    def draw(rng: random.Random) -> int:
        return _within(rng.expovariate(1 / mean), most)

    return draw


def lognormal(median: float, sigma: float = 1.0, most: int | None = None) -> Draw:
    """Return a function that draws lengths of this median; longer ones than ``most`` are cut.

    Args:
        sigma: standard deviation of the logarithm.
    """

    def draw(rng: random.Random) -> int:
        return _within(rng.lognormvariate(math.log(median), sigma), most)

    return draw


def _within(length: float, most: int | None) -> int:
    length = max(FEWEST, round(length))
    return length if most is None else min(length, most)


def independent(
    count: int,
    arrivals: Arrivals,
    prompt: Draw,
    output: Draw,
    seed: int = 0,
    n: int = 1,
    beam_width: int | None = None,
) -> list[Request]:
    """Return requests that share nothing."""
    rng = random.Random(seed)
    lengths = [(prompt(rng), output(rng)) for _ in range(count)]  # the same at every rate
    return [
        Request(time, Spans((OWN_TOKENS + i, tokens)), answer, n, beam_width=beam_width)
        for i, (time, (tokens, answer)) in enumerate(zip(arrivals.times(rng), lengths))
    ]


def shared_prefixes(
    count: int,
    arrivals: Arrivals,
    prefix: Draw,
    own: Draw,
    output: Draw,
    seed: int = 0,
    num_prefixes: int = 1,
    skew: float = 1.0,
) -> list[Request]:
    """Return requests that each begin with one of some prefixes, as prompts of tools and agents do.

    Args:
        prefix: draws the length of a prefix, ``own`` that of what follows it in a prompt.
        skew: exponent of Zipf's law: the k-th prefix is chosen in proportion to ``k**-skew``.
    """
    rng = random.Random(seed)
    lengths = [prefix(rng) for _ in range(num_prefixes)]
    weights = [(k + 1) ** -skew for k in range(num_prefixes)]
    chosen = rng.choices(range(num_prefixes), weights, k=count)
    drawn = [(own(rng), output(rng)) for _ in range(count)]
    return [
        Request(time, Spans((k, lengths[k]), (OWN_TOKENS + i, tokens)), answer)
        for i, (time, k, (tokens, answer)) in enumerate(zip(arrivals.times(rng), chosen, drawn))
    ]


@dataclass(frozen=True)
class Sessions:
    """Conversations, each turn of which sends all turns before it again.

    Args:
        first, message, output: draw the length of a first message, of a later one, and of an answer.
        another: probability that an answer is followed by another message.
        think: mean number of seconds from an answer to the next message.
        system: number of tokens that all conversations begin with.
        longest: maximum number of tokens of a prompt: of longer conversations the beginning is cut off, the
            system prompt too, so that nothing before is found in a cache; None: conversations that reach it
            end.
    """

    first: Draw
    message: Draw
    output: Draw
    another: float
    think: float = 30.0
    system: int = 0
    longest: int | None = None

    def draw(self, count: int, arrivals: Arrivals, seed: int = 0) -> list[Request]:
        """Return ``count`` requests in conversations that begin at the times of ``arrivals``."""
        rng = random.Random(seed)
        requests: list[Request] = []
        for session, time in enumerate(arrivals.times(rng)):
            base = OWN_TOKENS + (session << 20)
            spans: tuple[tuple[int, int], ...] = ((0, self.system),) if self.system else ()
            before: Request | None = None
            for turn in range(1 << 10):
                length = self.message(rng) if turn else self.first(rng)
                spans = (*spans, (base + 2 * MOST_WIDTH * turn, length))
                if self.longest is not None:
                    spans = cut(spans, self.longest)
                answer, token = self.output(rng), base + 2 * MOST_WIDTH * turn + MOST_WIDTH
                time = time if before is None else rng.expovariate(1 / self.think)
                before = Request(time, Spans(*spans), answer, follows=before, output_token=token)
                requests.append(before)
                spans = (*spans, (token, answer))
                if len(requests) == count:
                    return requests
                if rng.random() >= self.another:
                    break
        raise AssertionError("arrivals end")


def cut(spans: Iterable[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    """Return the last ``length`` tokens."""
    kept: list[tuple[int, int]] = []
    for token, count in reversed(list(spans)):
        if length > 0:
            kept.append((token, min(count, length)))
        length -= count
    return tuple(reversed(kept))


def ideal_hits(requests: Iterable[Request]) -> float:
    """Return the share of the prompts' tokens that an unlimited prefix cache would have.

    That is if every request has ended before the next one. Prompts have to be `Spans`.
    """
    known: set[int] = set()  # hashes of a span and all before it
    hits = total = 0
    for request in requests:
        assert isinstance(request.prompt, Spans)
        total += len(request.prompt)
        key, found = 0, True
        for span in request.prompt.spans:
            key = hash((key, span))
            found = found and key in known
            hits += found * span[1]
            known.add(key)
        known.add(hash((key, (request.output_token, request.num_tokens))))
    return hits / total if total else 0.0


# The traces by name: a function of the number of requests, the arrivals and the seed.
Generator = Callable[..., list[Request]]
GENERATORS: dict[str, Generator] = {
    # PagedAttention, SOSP 2023, Figure 11: mean numbers of tokens of prompts and outputs. Lengths are cut at
    # half of OPT's 2048 positions each.
    "sharegpt": partial(
        independent, prompt=exponential(161.31, most=1023), output=exponential(337.99, most=1023)
    ),
    "alpaca": partial(
        independent, prompt=exponential(19.31, most=1023), output=exponential(58.45, most=1023)
    ),
    # Splitwise, ISCA 2024, section 3.2 and Figure 3: medians of Azure's services. The spread is ours.
    "azure-conv": partial(
        independent, prompt=lognormal(1020, most=14_000), output=lognormal(129, most=1_500)
    ),
    "azure-code": partial(independent, prompt=lognormal(1500, most=7_500), output=lognormal(13, most=2_000)),
    # Mooncake, FAST 2025, table of the released traces: mean numbers of tokens and the share of the prompts'
    # tokens that an unlimited cache holds: 12035, 343 and 40 % of conversations, 8596, 182 and 59 % of tools
    # and agents. How they share is ours.
    "mooncake-conversation": Sessions(
        exponential(11_305), exponential(800), exponential(343), another=0.39
    ).draw,
    "mooncake-toolagent": partial(
        shared_prefixes,
        num_prefixes=100,
        prefix=lambda rng: 5_072,
        own=exponential(3_524),
        output=exponential(182),
    ),
    # ShareGPT's lengths in conversations; the number of turns is ours.
    "chat": Sessions(exponential(161.31), exponential(161.31), exponential(337.99), another=0.75).draw,
}


def generate(name: str, count: int, arrivals: Arrivals, seed: int = 0) -> list[Request]:
    """Return ``count`` requests of a trace by its name.

    Raises:
        ValueError: there is no trace of this name.
    """
    if name not in GENERATORS:
        raise ValueError(f"there is no trace {name!r}; there are {', '.join(GENERATORS)}")
    return list(islice(GENERATORS[name](count, arrivals, seed=seed), count))
