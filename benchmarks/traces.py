"""Read traces of requests from files that others publish; no data set comes with this project.

| format | file |
|---|---|
| "sharegpt" | ShareGPT's JSON: ``[{"conversations": [{"from": "human", "value": ...}, ...]}, ...]`` |
| "alpaca" | Alpaca's JSON: ``[{"instruction": ..., "input": ..., "output": ...}, ...]`` |
| "azure" | Azure's LLM inference CSV: ``TIMESTAMP,ContextTokens,GeneratedTokens`` |
| "mooncake" | Mooncake's JSONL: ``timestamp`` in ms, ``input_length``, ``output_length``, ``hash_ids`` |
| "csv" | a CSV with ``arrival`` in seconds, ``prompt_tokens``, ``output_tokens``; and, if need be, |
| | ``prefix`` and ``prefix_tokens``: a name, and how many first tokens prompts of that name share; and |
| | ``priority``, an integer, lower ones first |

Times are seconds since the first request. "sharegpt" and "alpaca" have none: see `Arrivals`.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from .simulation import Request, Spans

HASHED_TOKENS = 512  # Mooncake's hash IDs are of so many tokens each, and of all tokens before them
CHARACTERS = 4  # of a token of English text, roughly; for texts without a tokenizer
OWN_TOKENS = 1 << 40  # tokens from here on belong to one request; hash IDs and prefixes are below

Count = Callable[[str], int]  # number of tokens of a text


@dataclass(frozen=True)
class Entry:
    """A line of a trace.

    Args:
        time: seconds.
        shared: the prompt's first tokens, which others may have too, as arguments of `Spans`.
        own: number of tokens of the prompt after those, which no other request has.
        output: number of output tokens.
        priority: lower ones come first, where the engine schedules by priority.
    """

    time: float
    shared: tuple[tuple[int, int], ...]
    own: int
    output: int
    priority: int = 0


@dataclass(frozen=True)
class Arrivals:
    """Draw times of arrival.

    Args:
        rate: requests per second.
        burstiness: squared coefficient of variation of the time between arrivals, which are gamma
            distributed: 1 is a Poisson process, more comes in bursts, 0 at regular intervals.
    """

    rate: float
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ValueError(f"rate must be a positive number of requests per second, got {self.rate}")
        if not (self.burstiness >= 0 and math.isfinite(self.burstiness)):
            raise ValueError(f"burstiness must be a number of at least 0, got {self.burstiness}")

    def times(self, rng: random.Random) -> Iterator[float]:
        """Yield times in ascending order, without end."""
        time = 0.0
        while True:
            if self.burstiness:
                time += rng.gammavariate(1 / self.burstiness, self.burstiness / self.rate)
            else:
                time += 1 / self.rate
            yield time


def spread(requests: Iterable[Request], arrivals: Arrivals, seed: int = 0) -> list[Request]:
    """Return the requests with drawn times of arrival instead of their own."""
    times = arrivals.times(random.Random(seed))
    return [replace(request, time=next(times)) for request in _unfollowed(requests)]


def scaled(requests: Iterable[Request], rate: float) -> list[Request]:
    """Return the requests with all times stretched or compressed to a mean rate of requests per second.

    Raises:
        ValueError: all arrive at once, or there are none.
    """
    requests = _unfollowed(requests)
    last = max((r.time for r in requests), default=0.0)
    if not last:
        raise ValueError("all requests of the trace arrive at once: give them times with `spread`")
    factor = len(requests) / rate / last
    return [replace(r, time=r.time * factor) for r in requests]


def read(
    path: Path, format: str | None = None, limit: int | None = None, count: Count | None = None
) -> list[Request]:
    """Read a trace.

    Args:
        format: one of the formats above; None: by the file's name and first line.
        limit: maximum number of requests, from the first.
        count: returns the number of tokens of a text; None: a quarter of its characters.

    Raises:
        ValueError: the file is not of the format; the message names the file and the entry.
    """
    format = guess(path) if format is None else format
    if format not in READERS:
        raise ValueError(f"format must be one of {', '.join(READERS)}, got {format!r}")
    entries: list[Entry] = []
    reading = READERS[format](path, count or _quarter)
    try:
        for entry in islice(reading, limit):
            entries.append(entry)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        place = f"entry {len(entries) + 1} or one that is left out before it"
        raise ValueError(f"{path} is not a {format} trace: {place}: {error!r}") from error
    if not entries:
        raise ValueError(f"{path} has no requests with a prompt and an output")
    first = min(entry.time for entry in entries)
    requests = [
        Request(e.time - first, Spans(*e.shared, (OWN_TOKENS + i, e.own)), e.output, priority=e.priority)
        for i, e in enumerate(entries)
    ]
    return sorted(requests, key=lambda request: request.time)


def guess(path: Path) -> str:
    """Return the format of a file by its name's ending and its beginning."""
    with path.open(encoding="utf-8-sig") as file:
        beginning = file.read(4096)
    if path.suffix == ".csv":
        return "azure" if beginning.upper().startswith("TIMESTAMP") else "csv"
    if path.suffix == ".jsonl" or beginning.lstrip().startswith("{"):
        return "mooncake"
    return "alpaca" if '"instruction"' in beginning else "sharegpt"


# -- formats -----------------------------------------------------------------------------------------


def _sharegpt(path: Path, count: Count) -> Iterator[Entry]:
    """Yield the first exchange of each conversation, as vLLM's benchmarks do; others are left out."""
    for conversation in _json_list(path):
        turns = conversation["conversations"]
        if len(turns) >= 2 and turns[0]["value"] and turns[1]["value"]:
            yield _text_entry(turns[0]["value"], turns[1]["value"], count)


def _alpaca(path: Path, count: Count) -> Iterator[Entry]:
    for entry in _json_list(path):
        prompt = "\n".join(filter(None, [entry["instruction"], entry.get("input", "")]))
        if prompt and entry["output"]:
            yield _text_entry(prompt, entry["output"], count)


def _azure(path: Path, _: Count) -> Iterator[Entry]:
    for row in _rows(path):
        time = _seconds(row["TIMESTAMP"])
        if lengths := _lengths(row["ContextTokens"], row["GeneratedTokens"]):
            yield Entry(time, (), *lengths)


def _mooncake(path: Path, _: Count) -> Iterator[Entry]:
    with path.open(encoding="utf-8") as file:
        for line in filter(str.strip, file):
            entry = json.loads(line)
            if lengths := _lengths(entry["input_length"], entry["output_length"]):
                spans = hashed(entry["hash_ids"], lengths[0])
                yield Entry(float(entry["timestamp"]) / 1e3, spans, 0, lengths[1])


def _csv(path: Path, _: Count) -> Iterator[Entry]:
    prefixes: dict[str, int] = {}
    for row in _rows(path):
        lengths = _lengths(row["prompt_tokens"], row["output_tokens"])
        time = float(row["arrival"])
        if not math.isfinite(time):
            raise ValueError(f"arrival is {row['arrival']!r}")
        if not lengths:
            continue
        shared, name = int(row.get("prefix_tokens") or 0), row.get("prefix") or ""
        if not 0 <= shared <= lengths[0]:
            raise ValueError(f"prefix_tokens is {shared} of {lengths[0]} prompt_tokens")
        if not name:
            shared = 0
        prefix = prefixes.setdefault(name, len(prefixes))
        priority = int(row.get("priority") or 0)
        yield Entry(time, ((prefix, shared),), lengths[0] - shared, lengths[1], priority)


READERS: Mapping[str, Callable[[Path, Count], Iterator[Entry]]] = {
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "azure": _azure,
    "mooncake": _mooncake,
    "csv": _csv,
}


def hashed(hash_ids: Iterable[int], length: int) -> tuple[tuple[int, int], ...]:
    """Return the spans of a prompt that shares as much with others as their hash IDs begin alike.

    Args:
        hash_ids: of each `HASHED_TOKENS` tokens; the last may have fewer.
        length: number of tokens.

    Raises:
        ValueError: the number of hash IDs is not that of the length, or one is negative.
    """
    hash_ids = [int(hash_id) for hash_id in hash_ids]
    if len(hash_ids) != -(-length // HASHED_TOKENS):
        raise ValueError(
            f"input_length is {length}, and there are {len(hash_ids)} hash_ids of {HASHED_TOKENS}"
        )
    if hash_ids and not 0 <= min(hash_ids) <= max(hash_ids) < OWN_TOKENS:
        raise ValueError(f"hash_ids must be from 0 to 2**40 - 1, got {hash_ids}")
    counts = [HASHED_TOKENS] * (len(hash_ids) - 1) + [length - HASHED_TOKENS * (len(hash_ids) - 1)]
    return tuple(zip(hash_ids, counts))


def _quarter(text: str) -> int:
    return -(-len(text) // CHARACTERS)


def _text_entry(prompt: str, output: str, count: Count) -> Entry:
    return Entry(0.0, (), max(1, count(prompt)), max(1, count(output)))


def _lengths(prompt: Any, output: Any) -> tuple[int, int] | None:
    """Return the lengths of a request; None where it has no prompt or no output."""
    lengths = int(prompt), int(output)
    if min(lengths) < 0:
        raise ValueError(f"a number of tokens is negative: {lengths}")
    return lengths if min(lengths) else None


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def _json_list(path: Path) -> list[Any]:
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list):
        raise ValueError("the file is not a list")
    return entries


def _seconds(timestamp: str) -> float:
    """Return the seconds of a timestamp, whose fraction may have more digits than Python reads."""
    whole, _, fraction = timestamp.partition(".")
    zone = fraction.lstrip("0123456789")
    digits = fraction[: len(fraction) - len(zone)]
    parsed = datetime.fromisoformat(whole + zone)
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=timezone.utc)
    return parsed.timestamp() + float(f"0.{digits or 0}")


def _unfollowed(requests: Iterable[Request]) -> list[Request]:
    """Return requests that form no sessions.

    Raises:
        ValueError: one follows another: its time is relative to that one's end, and its identity matters.
    """
    requests = list(requests)
    if any(request.follows is not None for request in requests):
        raise ValueError("a session's turns arrive after each other: draw the trace at the rate you want")
    return requests
