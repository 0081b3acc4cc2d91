"""Grammars of outputs: compiled once, followed token by token, back and forth."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import transformers as tf
from tokenizers import Tokenizer, models

from cupaged.engine import StructuredOutputsParams
from cupaged.engine.sampling import grammar
from cupaged.engine.sampling.grammar import GrammarCompiler
from tests import tiny_models

TOKENIZER = tiny_models.tokenizer()


@pytest.fixture
def compiler():
    return GrammarCompiler(TOKENIZER, tiny_models.VOCAB, {tiny_models.EOS})


def tokens(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def permitted(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_the_first_tokens_are_those_of_the_grammar(compiler):
    """More rows of the model than the tokenizer has tokens are none of them."""
    first = compiler.compile(StructuredOutputsParams(regex="[ab]?|cd")).first_mask
    assert permitted(first) == {*tokens("abc"), tiny_models.EOS}
    anything = compiler.compile(StructuredOutputsParams(regex="(?s:.*)")).first_mask
    assert max(permitted(anything)) == tiny_models.EOS


def test_a_matcher_goes_back_and_forth(compiler, seed):
    """However it came to a place, what may follow there is the same."""
    rng = random.Random(seed)
    text = json.dumps({"a": [1, 2, {"b": "cé"}], "d": None}, ensure_ascii=False)
    matcher = compiler.compile(StructuredOutputsParams(json_object=True)).matcher()
    other = matcher.copy()
    whole, position = tokens(text), 0
    for _ in range(30):
        ahead = rng.randint(0, min(9, len(whole) - position))
        draft = whole[position : position + ahead]
        assert matcher.num_permitted(draft) == ahead
        assert matcher.num_permitted([*draft, *tokens("\0")]) == ahead  # JSON escapes it
        matcher.advance(draft)
        back = rng.randint(0, position + ahead)
        position += ahead - back
        matcher.rollback(back)
        assert matcher.num_tokens == position
    straight = other.copy()
    straight.advance(whole[:position])
    assert matcher.raw.compute_bitmask() == straight.raw.compute_bitmask()
    assert matcher.forced_tokens() == straight.forced_tokens()
    assert other.num_tokens == 0
    matcher.advance(whole[position:])
    assert matcher.may_end
    assert matcher.error is None
    with pytest.raises(ValueError, match="num_tokens must be at most"):
        matcher.rollback(len(whole) + 1)


def test_forced_tokens_and_errors(compiler):
    matcher = compiler.compile(StructuredOutputsParams(choice=["only"])).matcher()
    assert matcher.forced_tokens() == tokens("only")
    matcher.advance(tokens("x"))
    assert "doesn't satisfy the grammar" in str(matcher.error)


def test_grammars_are_compiled_once_and_the_last_are_kept(compiler, monkeypatch):
    monkeypatch.setattr(grammar, "_KEPT", 3)
    first, *others = (StructuredOutputsParams(regex=f"a{i}") for i in range(4))
    of_first = compiler.compile(first)
    for params in others[:2]:
        compiler.compile(params)
    assert compiler.compile(StructuredOutputsParams(regex="a0")) is of_first
    of_second = compiler.compile(others[0])
    compiler.compile(others[2])  # drops others[1], which was used longest ago
    assert compiler.compile(first) is of_first
    assert compiler.compile(others[0]) is of_second
    assert len(compiler._compiled) == 3


def test_threads_may_compile_at_once(compiler, seed):
    rng = random.Random(seed)
    kinds = [StructuredOutputsParams(json={"enum": [f"word{i}", i]}) for i in range(6)]
    work = [rng.choice(kinds) for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(compiler.compile, work))
    for params, one in zip(work, found):
        assert permitted(one.first_mask) == permitted(compiler.compile(params).first_mask)


@pytest.mark.parametrize("written", ["Größe", r"Gr\u00f6\U000000dfe", r"\u0047r\u00F6\u00dfe"])
def test_gbnf_is_read_with_its_escapes(compiler, written):
    for text in ("", r"\\u00f6"):
        matcher = compiler.compile(StructuredOutputsParams(grammar=f'root ::= "{written}{text}"')).matcher()
        matcher.advance(tokens("Größe" + text.replace(r"\\", "\\")))
        assert matcher.error is None
        assert matcher.may_end


def test_whitespace_is_as_asked_for(compiler):
    def first_after(text: str, **fields) -> bool:
        matcher = compiler.compile(StructuredOutputsParams(json_object=True, **fields)).matcher()
        matcher.advance(tokens(text))
        return matcher.error is None

    assert first_after("{ \n\t  ")
    assert not first_after("{ ", disable_any_whitespace=True)
    assert first_after("{  ", whitespace_pattern=" {1,2}")
    assert not first_after("{   ", whitespace_pattern=" {1,2}")
    assert not first_after("{\n", whitespace_pattern=" {1,2}")


def test_a_tokenizer_without_bytes_is_refused():
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    words = GrammarCompiler(tf.PreTrainedTokenizerFast(tokenizer_object=core), 2, {1})
    with pytest.raises(ValueError, match=r"^structured_outputs: llguidance cannot use the model's tokenizer"):
        words.compile(StructuredOutputsParams(regex="a"))


def test_a_trial_finds_what_compiling_finds(compiler):
    for source in ("a", r"\w+é"):
        compiler.compile(StructuredOutputsParams(regex=source), trusted=False)
    with pytest.raises(ValueError, match=r"regex cannot be compiled: (.|\n)*unclosed group"):
        compiler.compile(StructuredOutputsParams(regex="(a"), trusted=False)
    assert len(compiler._compiled) == 2
