"""Which replica gets a prompt: the longest beginning, the bound on imbalance, and the memory for both."""

from __future__ import annotations

import json
import random

import pytest

from cupaged.engine.replicas.prefix_index import PrefixIndex, ReplicaChoice
from cupaged.engine.replicas.prompt_key import CHUNK_SIZE, MAX_CHUNKS, prompt_hashes


def drawn_prompts(rng: random.Random, count: int) -> list[list[bytes]]:
    """Return prompts as chained hashes, many of which have beginnings in common."""
    prompts: list[list[bytes]] = [[]]
    for _ in range(count):
        beginning = rng.choice(prompts)
        beginning = beginning[: rng.randrange(len(beginning) + 1)]
        prompts.append(beginning + [rng.randbytes(8) for _ in range(rng.randrange(1, 9))])
    return prompts[1:]


def common(one: list[bytes], other: list[bytes]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def test_the_longest_beginning_wins_unless_its_replica_is_too_busy(seed):
    rng = random.Random(seed)
    replicas, bound = range(rng.randrange(1, 6)), rng.randrange(4)
    choice = ReplicaChoice[int](bound, 10_000)
    choice.update(set(replicas))
    sent: dict[int, list[list[bytes]]] = {each: [] for each in replicas}
    running: list[int] = []
    for prompt in drawn_prompts(rng, 200):
        loads = {each: running.count(each) for each in replicas}
        assert dict(choice.loads) == loads
        lengths = {
            each: max((common(prompt[:-1], other) for other in sent[each]), default=0) for each in replicas
        }
        best, least = max(lengths.values()), min(loads.values())
        chosen = choice.choose(prompt, list(replicas))
        choice.begin(prompt, chosen)
        favoured = min(loads[each] for each in replicas if lengths[each] == best)
        if favoured - least <= bound:
            assert (lengths[chosen], loads[chosen]) == (best, favoured)
        else:
            assert loads[chosen] == least
            assert lengths[chosen] == max(lengths[each] for each in replicas if loads[each] == least)
        sent[chosen].append(prompt)
        running.append(chosen)
        while running and rng.random() < 0.5:
            choice.end(running.pop(rng.randrange(len(running))))


def test_load_stays_balanced_whatever_the_prompts_have_in_common(seed):
    """No replica gets more requests than the least loaded one and the bound, and one."""
    rng = random.Random(seed)
    replicas, bound = list(range(rng.randrange(2, 6))), rng.randrange(5)
    choice = ReplicaChoice[int](bound, 10_000)
    choice.update(set(replicas))
    system = [rng.randbytes(8) for _ in range(5)]
    for _ in range(100):
        prompt = [*system, rng.randbytes(8)]
        choice.begin(prompt, choice.choose(prompt, replicas))
        assert max(choice.loads.values()) - min(choice.loads.values()) <= bound + 1


def test_prompts_with_nothing_in_common_take_turns(seed):
    """Also where each has ended before the next one comes, so that all caches are used."""
    rng = random.Random(seed)
    replicas = list(range(rng.randrange(1, 6)))
    choice = ReplicaChoice[int](8, 10_000)
    choice.update(set(replicas))
    counts = dict.fromkeys(replicas, 0)
    for _ in range(10 * len(replicas)):
        chosen = choice.choose(prompt := [rng.randbytes(8)], replicas)
        choice.begin(prompt, chosen)
        choice.end(chosen)
        counts[chosen] += 1
    assert set(counts.values()) == {10}


def test_memory_is_bounded_and_beginnings_are_dropped_from_their_ends(seed):
    """So a replica that has a beginning has all shorter ones."""
    rng = random.Random(seed)
    index = PrefixIndex[int](limit := rng.randrange(1, 60))
    prompts = drawn_prompts(rng, 100)
    for prompt in prompts:
        index.add(prompt, rng.randrange(3))
        assert len(index) <= limit
        assert max(index.matches(prompt).values()) == min(len(prompt), limit)
    for prompt in prompts:
        for length in range(1, len(prompt)):
            longer = index.matches(prompt[: length + 1])
            held = {each for each, found in longer.items() if found == length + 1}
            assert held <= {each for each, found in index.matches(prompt[:length]).items() if found == length}


def test_replicas_that_are_gone_are_forgotten():
    choice = ReplicaChoice[str](2, 100)
    choice.update({"a", "b"})
    prompt = [b"1", b"2"]
    choice.begin(prompt, "a")
    choice.update({"b", "c"})
    assert dict(choice.loads) == {"b": 0, "c": 0}
    choice.end("a")
    choice.begin(prompt, "b")
    choice.update({"a", "b"})  # a new one with an old name
    assert choice.choose(prompt, ["a", "b"]) == "b"
    assert choice.choose([b"3"], ["a", "b"]) == "a"


@pytest.mark.parametrize(("imbalance", "entries"), [(-1, 10), (1, 0)])
def test_settings_that_are_wrong(imbalance, entries):
    with pytest.raises(ValueError, match="must be at least"):
        ReplicaChoice(imbalance, entries)


def body(**fields) -> bytes:
    return json.dumps(fields).encode()


def test_a_conversation_that_goes_on_begins_as_it_did(seed):
    """In each API, and whatever the order of a message's fields."""
    rng = random.Random(seed)
    messages = []
    for role in ("system", "user", "assistant", "user", "assistant", "user"):
        text = "".join(rng.choices("aé {}[]\"',\n", k=rng.randrange(300)))
        messages.append({"role": role, "content": rng.choice([text, [{"type": "text", "text": text}]])})
    for field in ("messages", "input"):
        before: list[bytes] = []
        for count in range(1, len(messages) + 1):
            hashes = prompt_hashes(body(model="x", **{field: messages[:count]}))
            assert hashes[: len(before)] == before
            before = hashes
        turned = [dict(reversed(message.items())) for message in messages]
        assert prompt_hashes(body(**{field: turned}, temperature=1)) == before
        assert len(set(before)) == len(before)
        salted = prompt_hashes(body(**{field: messages}, cache_salt="s"))
        assert not set(salted) & set(before)


def test_a_first_turn_is_a_beginning_of_the_second(seed):
    """Find it however short it is: its replica has written the answer, which may be long."""
    rng = random.Random(seed)
    first = "".join(rng.choices("ab \n", k=rng.randrange(1, 10)))
    turns: list[dict[str, object]] = [{"role": "user", "content": first}]
    turns += [{"role": "assistant", "content": "x" * 5000}, {"role": "user", "content": "y"}]
    for field in ("messages", "input"):
        before = prompt_hashes(body(**{field: turns[:1]}))
        assert before
        assert prompt_hashes(body(**{field: turns}))[: len(before)] == before
    assert prompt_hashes(body(input=first)) == prompt_hashes(body(input=turns[:1]))


def test_who_says_the_same_as_another_at_first_finds_no_beginning(seed):
    """A whole prompt is that of many if it is short. Not even the salt that they have in common is one."""
    hashes = prompt_hashes(body(cache_salt="of all" * 20, messages=[{"role": "user", "content": "Hi"}]))
    assert len(hashes) == 1
    choice = ReplicaChoice[int](8, 100)
    choice.update({0, 1})
    for number in range(9):
        chosen = choice.choose(hashes, [0, 1])
        choice.begin(hashes, chosen)
        assert sorted(choice.loads.values()) == [(number + 1) // 2, (number + 2) // 2]


def test_token_ids_and_texts_are_prompts():
    assert len(prompt_hashes(body(prompt="x" * 5 * CHUNK_SIZE))) == 6
    tokens = list(range(1000, 1100))
    assert prompt_hashes(body(prompt=[*tokens, 7]))[:5] == prompt_hashes(body(prompt=tokens))[:5]
    assert len(prompt_hashes(body(prompt="x" * 10 * MAX_CHUNKS * CHUNK_SIZE))) == MAX_CHUNKS
    assert len(prompt_hashes(body(messages=[{"role": "user"}] * 10 * MAX_CHUNKS))) == MAX_CHUNKS


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"7", b"{}", b'{"prompt": null}', b"[" * 100_000, b'{"messages": []}'],
)
def test_a_body_without_a_prompt_has_no_beginning(content):
    assert prompt_hashes(content) == []


def test_a_deep_body_is_for_a_replica_to_refuse():
    assert prompt_hashes(b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}") == []
