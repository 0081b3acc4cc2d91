"""Streamed text: deltas add up to the whole, and none shows half a character."""

from __future__ import annotations

import pytest
import transformers as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cupaged.engine.sampling.detokenizer import Detokenizer
from tests import tiny_models

TEXT = st.text(st.sampled_from("ab ✓é€漢字🙂🏳️‍🌈\n"), max_size=12)


def byte_fallback_tokenizer() -> tf.PreTrainedTokenizerFast:
    """As Llama 2's and Gemma's: a space before a word, which a text's start loses, and bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(
        models.BPE(
            vocab=vocab, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def metaspace_tokenizer() -> tf.PreTrainedTokenizerFast:
    """As T5's and XLNet's: pieces with their space in front, and no bytes: what has no piece is lost."""
    characters = "ab ✓é€漢字🙂🏳\ufe0f\u200d🌈\nprompt"
    pieces = [*("<unk>", "<s>", "</s>"), "▁", "▁a", "▁b", "ab", *dict.fromkeys(characters.replace(" ", ""))]
    vocab = [(piece, -float(len(pieces) - i) / 9) for i, piece in enumerate(pieces)]
    core = Tokenizer(models.Unigram(vocab, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "byte_level": tiny_models.tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
    "metaspace": metaspace_tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request) -> tf.PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def deltas(tokenizer, prompt: list[int], output: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens)
    return [*(detokenizer.append([token]) for token in output), detokenizer.flush()]


@given(TEXT, TEXT)
@example("🙂🙂", "🙂a")
@example("", " a b")
@settings(max_examples=150)
def test_deltas_are_whole_characters_and_add_up(tokenizer, prompt, output):
    """What streams out is what the whole, prompt included, decodes to beyond the prompt."""
    before = ids_of(tokenizer, prompt)
    after = ids_of(tokenizer, prompt + output)
    if after[: len(before)] != before:
        return  # the tokenizer joins the two texts
    parts = deltas(tokenizer, before, after[len(before) :])
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == decode(tokenizer, after)[len(decode(tokenizer, before)) :]
    assert parts[-1] == ""  # nothing was held back longer than needed


def test_a_character_comes_with_its_last_token():
    tokenizer = tiny_models.tokenizer()
    assert deltas(tokenizer, ids_of(tokenizer, "x"), ids_of(tokenizer, "é€🙂a")) == [
        *["", "é"],
        *["", "", "€"],
        *["", "", "", "🙂"],
        *["a", ""],
    ]


@pytest.mark.parametrize("size", [2, 5, 99])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_several_tokens_at_once_are_as_one_by_one(tokenizer, size, cut):
    """A beam's text is read at its end, which may be within a character; those before it stay."""
    prompt, output = ids_of(tokenizer, "prompt"), ids_of(tokenizer, "漢字🙂é€漢字🙂")[:-cut]
    detokenizer = Detokenizer(tokenizer, prompt, True)
    parts = [detokenizer.append(output[i : i + size]) for i in range(0, len(output), size)]
    whole = "".join(deltas(tokenizer, prompt, output))
    assert "".join([*parts, detokenizer.flush()]) == whole
    assert "漢字🙂é€" in whole


@given(st.lists(st.integers(0, 319), max_size=30))
@settings(max_examples=150)
def test_any_bytes_add_up(output):
    """Bytes that are no UTF-8 come out as U+FFFD, and nothing around them is lost."""
    tokenizer = tiny_models.tokenizer()
    parts = deltas(tokenizer, ids_of(tokenizer, "prompt"), output)
    assert "".join(parts) == decode(tokenizer, output)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("prompt", ["", "ab", "🙂🙂"])
def test_a_prompt_that_ends_within_a_character_spoils_only_that_one(tokenizer, prompt, size):
    broken = ids_of(tokenizer, "🙂")[-4:][:size]
    text = "".join(deltas(tokenizer, ids_of(tokenizer, prompt)[-9:] + broken, ids_of(tokenizer, "ab🙂ab")))
    assert "".join(text).strip("\ufffd ") == "ab🙂ab"


def test_several_tokens_at_once():
    tokenizer = tiny_models.tokenizer()
    ids = ids_of(tokenizer, "a€b🙂")
    detokenizer = Detokenizer(tokenizer, [], True)
    assert detokenizer.append(ids[:3]) == "a"  # what comes after it is held back
    assert detokenizer.append(ids[3:7]) == "€b"
    assert detokenizer.append(ids[7:]) == "🙂"


def test_an_incomplete_end_is_flushed_once():
    tokenizer = tiny_models.tokenizer()
    detokenizer = Detokenizer(tokenizer, [], True)
    assert detokenizer.append(ids_of(tokenizer, "€")[:2]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens_are_skipped_or_shown():
    tokenizer = tiny_models.tokenizer()
    output = [*ids_of(tokenizer, "a"), tiny_models.START, *ids_of(tokenizer, "b"), tiny_models.EOS]
    assert "".join(deltas(tokenizer, [tiny_models.START], output)) == "ab"
    assert "".join(deltas(tokenizer, [], output, skip_special_tokens=False)) == "a<start>b<eos>"


class Counted:
    """A tokenizer that counts what it decodes."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.sizes: list[int] = []

    def decode(self, ids: list[int], **options) -> str:
        self.sizes.append(len(ids))
        return self._tokenizer.decode(ids, **options)


def streams(tokenizer) -> dict[str, list[int]]:
    """Tokens that a decoder could wait on for ever, by name; each to be repeated."""
    euro, start = ids_of(tokenizer, "\n€")[-3:], ids_of(tokenizer, "\n🙂")[-4:-1]
    return {
        "text": ids_of(tokenizer, "ab ✓é漢🙂 "),
        "continuation bytes": euro[1:],
        "starts of characters": start[:1],
        "characters cut short": start,
        "special tokens": [tokenizer.eos_token_id],
        "no text": [len(tokenizer) + 5],
        "special tokens within a character": [euro[0], *[tokenizer.eos_token_id] * 20, *euro[1:]],
    }


@pytest.mark.parametrize("name", list(streams(tiny_models.tokenizer())))
def test_a_token_costs_the_same_however_long_the_output_is(tokenizer, name):
    """No timing: how often the tokenizer is called, and with how many tokens."""
    stream = streams(tokenizer)[name]
    totals = []
    for length in (300, 3000):
        counted = Counted(tokenizer)
        detokenizer = Detokenizer(counted, ids_of(tokenizer, "prompt"), True)
        for i in range(length):
            detokenizer.append([stream[i % len(stream)]])
        assert max(counted.sizes) <= 20
        assert len(counted.sizes) <= 7 * length
        totals.append(sum(counted.sizes))
    assert totals[1] <= 11 * totals[0]


def test_a_long_prompt_costs_no_more_than_a_short_one():
    tokenizer = tiny_models.tokenizer()
    for length in (10, 10000):
        counted = Counted(tokenizer)
        Detokenizer(counted, ids_of(tokenizer, "x") * length, True)
        assert sum(counted.sizes) <= 20


@pytest.mark.parametrize("end", [[], [2], [2] * 40])  # </s>, which has no text
def test_a_space_after_special_tokens_is_kept(end):
    """The decoder drops the space at the start of a text, and this is not the start."""
    tokenizer = byte_fallback_tokenizer()
    prompt, output = ids_of(tokenizer, "a") + end, ids_of(tokenizer, "b a")
    assert "".join(deltas(tokenizer, prompt, [2] * 9 + output)) == " b a"
    assert "".join(deltas(tokenizer, [1], output)) == "b a"


EURO = [0xE2, 0x82, 0xAC]


@given(
    st.lists(
        st.sampled_from([EURO, *([b] for b in (0xE2, 0x82, 0xAC, 0xF0, 0x41, 256, 257, 300))]), max_size=40
    ),
    st.integers(1, 14),
)
@example([[0xFF]] * 7 + [EURO, [0xFF], [0xFF]], 12)
@example([[0xE2], [0xE2], [0x82], [256], [256], [256], [0x82], [0xE2], EURO], 5)
@settings(max_examples=300)
def test_bytes_that_nearly_are_characters_add_up(output, at_once):
    """Held back or given up, with special tokens and tokens without a text between them."""
    tokenizer = tiny_models.tokenizer()
    vocabulary, character = tokenizer.get_vocab(), bytes_to_unicode()
    ids = [vocabulary[character[i]] if i < 256 else i for part in output for i in part]
    detokenizer = Detokenizer(tokenizer, ids_of(tokenizer, "prompt"), True)
    parts = [detokenizer.append(ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
    assert "".join([*parts, detokenizer.flush()]) == decode(tokenizer, ids)


def test_a_wrong_byte_spoils_no_text_that_is_out():
    """This decoder turns the whole run of bytes around a wrong one into U+FFFD."""
    tokenizer = byte_fallback_tokenizer()
    euro, wrong, word = ids_of(tokenizer, "€")[-3:], 3 + 0xFF, ids_of(tokenizer, "b a")[-1]
    assert decode(tokenizer, [*euro, wrong]) == "\ufffd" * 4
    assert deltas(tokenizer, ids_of(tokenizer, "a"), [*euro, wrong, word])[2:] == ["€", "", "\ufffd a", ""]
