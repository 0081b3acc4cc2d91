"""Bad words with every kind of tokenizer: no output has the tokens of one, with or without a space."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from cupaged.engine import SamplingParams
from cupaged.engine.sampling import bad_words
from cupaged.engine.sampling.sampler import Sampler

from .test_logits_processors import sequence

LETTERS = "abcé!"


def drawn_merges(rng: random.Random, symbols: list[str]) -> list[tuple[str, str]]:
    """Pairs of what there is already; a space stands in front only."""
    merges: dict[tuple[str, str], None] = {}
    symbols = list(symbols)
    for _ in range(30):
        left, right = rng.choice(symbols), rng.choice(symbols)
        if right[0] not in "▁Ġ" and len(left + right) < 8 and left + right not in symbols:
            merges[left, right] = None
            symbols.append(left + right)
    return list(merges)


def sentencepiece(rng: random.Random, plain: bool, how: str) -> Tokenizer:
    merges = drawn_merges(rng, ["▁", *LETTERS])
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS, *map("".join, merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if how == "unigram":
        core = Tokenizer(models.Unigram([(p, -rng.random()) for p in pieces], unk_id=0, byte_fallback=True))
    else:
        core = Tokenizer(
            models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
    own = [] if plain else [normalizers.Prepend("▁")]
    if how == "normalizers":
        core.normalizer = normalizers.Sequence([*own, normalizers.Replace(" ", "▁")])
    else:
        scheme = "never" if plain else "first" if how == "first" else "always"
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=how != "first")
    strip = [] if plain else [decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core


def byte_level(rng: random.Random, plain: bool, how: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = drawn_merges(rng, ["Ġ", "a", "b", "c", "!", "Ã", "©"])
    vocab = {piece: i for i, piece in enumerate([*alphabet, *map("".join, merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=how == "prefix" and not plain)
    core.decoder = decoders.ByteLevel()
    return core


KINDS = {
    "Llama 2": (sentencepiece, "normalizers"),
    "Metaspace": (sentencepiece, "always"),
    "Metaspace, first": (sentencepiece, "first"),
    "Unigram": (sentencepiece, "unigram"),
    "byte level": (byte_level, ""),
    "byte level with a prefix space": (byte_level, "prefix"),
}


def tokenizer_of(kind: str, seed: int, plain: bool = False) -> tf.PreTrainedTokenizerFast:
    """One with drawn merges; ``plain``: it puts no space of its own before a text."""
    build, how = KINDS[kind]
    return tf.PreTrainedTokenizerFast(tokenizer_object=build(random.Random(seed), plain, how))


def ids_of(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_has_the_tokens_of_a_word(kind, seed):
    """Those of the same tokenizer without a space of its own. Parts of the words are all that is sampled."""
    tokenizer, plain = tokenizer_of(kind, seed), tokenizer_of(kind, seed, plain=True)
    rng = random.Random(seed)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 4))) for _ in range(3)]
    forbidden = {ids_of(plain, text) for word in words for text in (word, f" {word}")}
    found = bad_words.tokenize(tokenizer, words, 99)
    # Shorter ones, that another one ends in, forbid it too.
    assert all(any(ids[-len(one) :] == one for one in found) for ids in forbidden), (words, forbidden, found)
    parts = sorted({token for ids in forbidden for token in ids} | {len(tokenizer) - 1, len(tokenizer) - 2})
    params = SamplingParams(allowed_token_ids=parts, bad_words=words, ignore_eos=True)
    items = [sequence(params, found, [1], []) for _ in range(8)]
    sampler = Sampler(frozenset())
    torch.manual_seed(seed)
    for _ in range(40):
        for item, (token,) in zip(items, sampler.sample(torch.randn(8, len(tokenizer)), items).token_ids):
            item.seq.token_ids.append(token)
    free = [token for token in parts if (token,) not in forbidden]
    for item in items if free else ():
        output = tuple(item.seq.output_token_ids)
        for ids in forbidden:
            assert not any(output[i : i + len(ids)] == ids for i in range(len(output))), ids


def test_a_word_within_a_text_is_one_too():
    pieces = ["<unk>", "▁", *"thecat!", "th", "the", "ca", "cat", "▁the", "▁cat"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("▁", "the"), ("▁", "cat")]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.tokenize("the!cat") == ["▁the", "!", "cat"]
    found = bad_words.tokenize(tokenizer, ["cat"], 9)
    assert set(found) >= {(vocab["▁cat"],), (vocab["cat"],)}
    assert bad_words.tokenize(tokenizer, [" cat"], 9) == found
