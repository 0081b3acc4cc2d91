"""Streamed text: deltas add up to the whole, and none shows half a character."""

from __future__ import annotations

import pytest
import transformers as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from cupaged.engine.detokenizer import Detokenizer
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


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request) -> tf.PreTrainedTokenizerFast:
    return tiny_models.tokenizer() if request.param == "byte_level" else byte_fallback_tokenizer()


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
@settings(max_examples=150, deadline=None)
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


@given(st.lists(st.integers(0, 319), max_size=30))
@settings(max_examples=150, deadline=None)
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
    assert detokenizer.append(ids[:3]) == ""  # held back with the incomplete character after it
    assert detokenizer.append(ids[3:7]) == ""
    assert detokenizer.append(ids[7:]) == "a€b🙂"


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
