"""Where tokens are in the text of an answer, and what they are called there, with every kind of tokenizer."""

from __future__ import annotations

import random

import pytest
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from cupaged.engine import SamplingParams
from cupaged.engine.outputs import CompletionOutput, Logprob, RequestOutput
from cupaged.engine.sampling.detokenizer import Detokenizer, token_text
from cupaged.engine.server.choices import CHAT, TEXT, Choice
from cupaged.engine.server.logprobs import TextLogprobs
from cupaged.engine.server.protocol import Wanted
from tests import tiny_models
from tests.unit.test_bad_words import KINDS, tokenizer_of
from tests.unit.test_detokenizer import TOKENIZERS


def tokenizers(rng: random.Random) -> dict:
    return {
        **{name: make() for name, make in TOKENIZERS.items()},
        **{kind: tokenizer_of(kind, rng.getrandbits(31)) for kind in KINDS},
    }


NAMES = (*TOKENIZERS, *KINDS)
TEXTS = (
    "a",
    "b",
    " ",
    "  ",
    "é",
    "€",
    "🙂",
    "漢",
    "\n",
    "!",
    "ab c",
    "<s>",
    "</s>",
    "<start>",
    "<end>",
    "\ufffd",
)


def drawn_text(rng: random.Random) -> str:
    return "".join(rng.choices(TEXTS, k=rng.randrange(1, 12)))


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def drawn_output(rng: random.Random, tokenizer) -> list[int]:
    """Tokens of texts, some of them cut short, and any tokens."""
    if rng.random() < 0.3:
        return [rng.randrange(len(tokenizer) + 3) for _ in range(rng.randrange(1, 20))]
    ids: list[int] = []
    for _ in range(rng.randrange(1, 5)):
        part = ids_of(tokenizer, drawn_text(rng))
        ids += part[: rng.randrange(1, len(part) + 1)] if part else []
        if rng.random() < 0.3:
            ids.append(rng.randrange(len(tokenizer)))
    return ids


def positions_of(rng: random.Random, tokenizer, ids: list[int], count: int) -> list[dict[int, Logprob]]:
    """Of each token and ``count`` drawn ones."""
    found = []
    for token in ids:
        others = rng.sample(range(len(tokenizer) + 3), count)
        ranks = {token: count + 1, **{other: i + 1 for i, other in enumerate(others)}}
        found.append({t: Logprob(-r, r, token_text(tokenizer, t)) for t, r in ranks.items()})
    return found


class Answer:
    """Return what is sent of one output, whole and in drawn pieces, which must be alike."""

    def __init__(self, rng, tokenizer, prompt, prompt_ids, ids, *, style=TEXT, echo=True, skip=True, count=5):
        self.tokenizer, self.skip = tokenizer, skip
        self.positions = positions_of(rng, tokenizer, ids, count)
        self.prompt_positions = [None, *positions_of(rng, tokenizer, prompt_ids, count)[1:]]
        self._wanted = Wanted(logprobs=count, echo=echo)
        self._request = ("x", prompt, prompt_ids)
        whole = self._choice(style).whole(self._output(ids, len(ids), True), self._one(ids, len(ids), True))
        self.logprobs = whole["logprobs"]
        self.text = whole["text"] if style is TEXT else whole["message"]["content"]
        choice, pieces = self._choice(style), []
        for size in sorted(rng.sample(range(1, len(ids) + 1), rng.randrange(len(ids) + 1))):
            pieces.append(choice.next(self._output(ids, size, False), self._one(ids, size, False)))
        pieces.append(choice.next(self._output(ids, len(ids), True), self._one(ids, len(ids), True)))
        pieces = [piece for piece in pieces if piece is not None]
        key = "text" if style is TEXT else "delta"
        assert "".join(p[key] if style is TEXT else p[key].get("content", "") for p in pieces) == self.text
        for name, values in self.logprobs.items():
            if values is not None:
                assert [one for piece in pieces for one in piece["logprobs"][name]] == values

    def _choice(self, style) -> Choice:
        params = SamplingParams(skip_special_tokens=self.skip)
        return Choice(style, 0, self.tokenizer, params, self._wanted)

    def _one(self, ids: list[int], size: int, finished: bool) -> CompletionOutput:
        detokenizer = Detokenizer(self.tokenizer, self._request[2], self.skip)
        text = detokenizer.append(ids[:size]) + (detokenizer.flush() if finished else "")
        reason = "length" if finished else None
        return CompletionOutput(0, text, ids[:size], reason, None, self.positions[:size])

    def _output(self, ids: list[int], size: int, finished: bool) -> RequestOutput:
        return RequestOutput(*self._request, [], finished, self.prompt_positions)


def is_special(tokenizer, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special


def may_be_hidden(tokenizer, token: int, skip: bool, in_prompt: bool) -> bool:
    """Whether the text may lack it: specials that are skipped, and in a prompt what has no token (<unk>)."""
    return is_special(tokenizer, token) and (skip or (in_prompt and "unk" in tokenizer.decode([token])))


def joined(tokens: list[str]) -> bytes:
    data = b""
    for token in tokens:
        if token.startswith("bytes:"):
            data += bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        else:
            data += token.encode()
    return data


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_at_its_place(name, skip, seed):
    """After a prompt that is a text, and one that is tokens, and without it; whole and streamed."""
    rng = random.Random(seed)
    tokenizer = tokenizers(rng)[name]
    for _ in range(12):
        text = drawn_text(rng)
        prompt_ids, ids = ids_of(tokenizer, text), drawn_output(rng, tokenizer)
        if not prompt_ids or not ids:
            continue
        shown, echo = rng.choice([text, None]), rng.random() < 0.7
        answer = Answer(rng, tokenizer, shown, prompt_ids, ids, echo=echo, skip=skip)
        found, before = answer.logprobs, prompt_ids if echo else []
        tokens = zip([*before, *ids], found["tokens"], found["text_offset"], strict=True)
        for i, (token, written, offset) in enumerate(tokens):
            told = (shown, prompt_ids, ids, answer.text, i, written, offset)
            assert 0 <= offset <= len(answer.text), told
            if not (written.startswith("bytes:") or may_be_hidden(tokenizer, token, skip, i < len(before))):
                assert answer.text[offset : offset + len(written)] == written, told
        positions = [*(answer.prompt_positions if echo else ()), *answer.positions]
        for position, likely in zip(positions, found["top_logprobs"], strict=True):
            assert likely is None if position is None else len(likely) == len(position)
        valid = "\ufffd" not in answer.text and not any(is_special(tokenizer, token) for token in ids)
        if valid and not echo:
            assert joined(found["tokens"]).decode() == answer.text


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_an_answer_are_its_text(name, seed):
    """Of a conversation, whose entries are one for each token, with tokens of the same text among them."""
    rng = random.Random(seed)
    tokenizer = tokenizers(rng)[name]
    for _ in range(12):
        prompt_ids = ids_of(tokenizer, drawn_text(rng)) if rng.random() < 0.8 else []
        ids = [token for token in drawn_output(rng, tokenizer) if not is_special(tokenizer, token)]
        if not ids:
            continue
        answer = Answer(rng, tokenizer, "", prompt_ids, ids, style=CHAT, echo=False, count=20)
        content = answer.logprobs["content"]
        assert [len(entry["top_logprobs"]) for entry in content] == [20] * len(ids)
        if "\ufffd" not in answer.text:
            assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == answer.text
        if not any("\ufffd" in entry["token"] for entry in content):
            assert "".join(entry["token"] for entry in content) == answer.text


def sat_tokenizer() -> tf.PreTrainedTokenizerFast:
    """As Llama 2's; words with and without a space."""
    words = ("sat", "cat", "the", "▁sat", "▁cat", "▁the")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *"satche▁"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def test_a_space_belongs_to_its_token():
    rng, tokenizer = random.Random(0), sat_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁sat", "▁cat", "the", "the", "cat"])
    prompt = tokenizer.convert_tokens_to_ids(["<s>", "▁the", "▁cat"])
    text = Answer(rng, tokenizer, "the cat", prompt, ids)
    assert text.text == "the cat sat catthethecat"
    assert text.logprobs["tokens"] == ["<s>", "the", " cat", " sat", " cat", "the", "the", "cat"]
    assert text.logprobs["text_offset"] == [0, 0, 3, 7, 11, 15, 18, 21]
    chat = Answer(rng, tokenizer, "the cat", prompt, ids, style=CHAT, echo=False).logprobs["content"]
    assert [entry["token"] for entry in chat] == [" sat", " cat", "the", "the", "cat"]
    assert [bytes(entry["bytes"]) for entry in chat] == [b" sat", b" cat", b"the", b"the", b"cat"]
    start = Answer(rng, tokenizer, "", prompt[:1], ids, style=CHAT, echo=False).logprobs["content"]
    assert start[0]["token"] == "sat"  # nothing before it has a text, and so the text has no space


def test_tokens_of_one_text_have_a_key_each():
    """The one that is there has its text, and the likelier one the vLLM's name of a token id."""
    tokenizer = sat_tokenizer()
    byte, letter = tokenizer.convert_tokens_to_ids(["<0x61>", "a"])
    position = {letter: Logprob(-2.0, 2, "a"), byte: Logprob(-1.0, 1, "a")}
    found = TextLogprobs(tokenizer, 2, tokenizer.convert_tokens_to_ids(["the"])).of([letter], [position])
    assert found["tokens"] == ["a"]
    assert found["top_logprobs"] == [{"a": -2.0, f"token_id:{byte}": -1.0}]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_of_a_prompt_that_is_a_text_are_in_the_answer(skip):
    rng, tokenizer = random.Random(0), tiny_models.tokenizer()
    prompt = "<start>a<end>b"
    found = Answer(rng, tokenizer, prompt, ids_of(tokenizer, prompt), ids_of(tokenizer, "cd"), skip=skip)
    assert found.text == "<start>a<end>bcd"
    assert found.logprobs["tokens"] == ["<start>", "a", "<end>", "b", "c", "d"]
    assert found.logprobs["text_offset"] == [0, 7, 8, 13, 14, 15]
    as_tokens = Answer(rng, tokenizer, None, ids_of(tokenizer, prompt), ids_of(tokenizer, "cd"), skip=skip)
    assert as_tokens.text == ("abcd" if skip else "<start>a<end>bcd")
    assert as_tokens.logprobs["text_offset"] == ([0, 0, 1, 1, 2, 3] if skip else [0, 7, 8, 13, 14, 15])


def test_what_follows_a_byte_that_is_no_text_is_after_it():
    tokenizer = tiny_models.tokenizer()
    wrong, euro = tokenizer.convert_tokens_to_ids("ÿ"), ids_of(tokenizer, "€")
    ids = [*ids_of(tokenizer, "a"), wrong, *ids_of(tokenizer, "b"), wrong, *euro, *ids_of(tokenizer, "c")]
    found = Answer(random.Random(0), tokenizer, None, ids_of(tokenizer, "x"), ids)
    assert found.text == "xa\ufffdb\ufffd€c"
    assert found.logprobs["text_offset"] == [0, 1, 2, 3, 4, 5, 5, 5, 6]
