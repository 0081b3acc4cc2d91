"""Outputs are what they have to be: by drawn schemas, expressions and choices, in batches with others."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from cupaged.engine import SamplingParams, StructuredOutputsParams
from cupaged.engine.sampling.structured import GrammarError
from tests import tiny_models
from tests.schemas import draw_regex, draw_schema

from .harness import Reference, finish, run, small_engine

BYTES = 256
MAX_LEN = 512
Checks = dict[str, Any]


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory) -> str:
    """A model that writes longer texts than the others."""
    directory = tmp_path_factory.mktemp("long")
    return str(tiny_models.save("llama", directory, max_position_embeddings=MAX_LEN))


@pytest.fixture(scope="module")
def reference(long_dir) -> Reference:
    return Reference(long_dir)


def engine_of(directory: str, **settings: Any):
    return small_engine(directory, max_model_len=MAX_LEN, **{"num_gpu_blocks_override": 200, **settings})


def drawn_structure(rng: random.Random) -> tuple[StructuredOutputsParams, Any]:
    """Draw what an output has to be, with a check of its text."""
    kind = rng.choice(["json", "json", "json", "regex", "choice", "grammar"])
    if kind == "json":
        schema = draw_schema(rng)
        space = rng.choice([{"disable_any_whitespace": True}, {"whitespace_pattern": r"[ \n]{1,2}"}])
        return StructuredOutputsParams(json=schema, **space), lambda text: jsonschema.validate(
            json.loads(text), schema
        )
    if kind == "regex":
        regex = draw_regex(rng)

        def matches(text: str) -> None:
            assert re.fullmatch(regex, text), (regex, text)

        return StructuredOutputsParams(regex=regex), matches
    words = ["yes", "yesterday", "no", "\n", '"quoted"', "Größe", "a b"]
    choices = rng.sample(words, rng.randint(1, len(words)))
    if kind == "grammar":
        quoted = " | ".join(json.dumps(word) for word in choices)
        written = rng.choice([f"start: list\nlist: ({quoted}){{2}}", f"root ::= ({quoted}) ({quoted})"])
        possible = {first + second for first in choices for second in choices}
        params = StructuredOutputsParams(grammar=written)
    else:
        params, possible = StructuredOutputsParams(choice=choices), set(choices)

    def is_one(text: str) -> None:
        assert text in possible

    return params, is_one


def draw_prompt(rng: random.Random, common: list[int]) -> dict[str, list[int]]:
    tokens = [rng.randrange(BYTES) for _ in range(rng.randint(1, 20))]
    return {"prompt_token_ids": common[: rng.choice([0, len(common)])] + tokens}


def draw_params(rng: random.Random, **more: Any) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0, 1, 1, 1.5]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1, 1, 0.8]),
        n=rng.choice([1, 1, 2, 3]),
        seed=rng.getrandbits(32),
        presence_penalty=rng.choice([0, 0, 1.5]),
        **more,
    )


def completions(outputs, names):
    return {name: [(c.token_ids, c.text, c.finish_reason) for c in outputs[name].outputs] for name in names}


def check_drawn_batch(directory: str, reference: Reference, seed: int, num_structured: int) -> None:
    """Outputs are complete; they and those of free requests do not depend on who else runs, or waits."""
    rng = random.Random(seed)
    common = [rng.randrange(BYTES) for _ in range(24)]
    checks: Checks = {}
    requests, free = {}, {}
    for i in range(num_structured):
        structure, checks[f"s{i}"] = drawn_structure(rng)
        params = draw_params(rng, max_tokens=400, structured_outputs=structure)
        requests[f"s{i}"] = draw_prompt(rng, common), params
    for i in range(max(3, num_structured // 4)):
        free[f"f{i}"] = draw_prompt(rng, common), draw_params(rng, max_tokens=rng.randint(1, 40))
    everyone = list({**requests, **free}.items())
    rng.shuffle(everyone)
    tight = engine_of(
        directory,
        preemption_mode=rng.choice(["swap", "recompute"]),
        enable_prefix_caching=rng.random() < 0.5,
        max_num_batched_tokens=rng.choice([32, 64]),
    )
    reference.replace_logits(tight)
    preempt_often(tight, rng)
    mixed = run(tight, dict(everyone))
    assert tight.stats().num_preemptions > 0
    for name, check in checks.items():
        for completion in mixed[name].outputs:
            assert completion.finish_reason == "stop", (requests[name], completion)
            check(completion.text)
    roomy = engine_of(directory, max_num_batched_tokens=512)
    reference.replace_logits(roomy)
    assert completions(run(roomy, free), free) == completions(mixed, free)
    alone = dict(rng.sample(list(requests.items()), min(3, len(requests))))
    assert completions(run(roomy, alone), alone) == completions(mixed, alone)


def preempt_often(engine, rng: random.Random) -> None:
    """Let the scheduler lose the last group every few steps, however much memory there is."""
    schedule = engine._scheduler._schedule_running

    def losing(draft):
        running = engine._scheduler.running
        if len(running) > 1 and rng.random() < 0.2:
            engine._scheduler._preempt(running.pop(), draft)
        schedule(draft)

    engine._scheduler._schedule_running = losing


def test_drawn_outputs_are_complete_under_preemption(long_dir, reference, seed):
    check_drawn_batch(long_dir, reference, seed, 12)


@pytest.mark.matrix
@pytest.mark.parametrize("part", range(25))
def test_a_thousand_drawn_outputs_are_complete(part, long_dir, reference, seed):
    check_drawn_batch(long_dir, reference, seed, 40)


def texts(engine, structure: StructuredOutputsParams, num: int = 6, **settings: Any) -> list[tuple]:
    """The texts and finish reasons of some outputs."""
    params = SamplingParams(**{"max_tokens": 40, "seed": 1, "structured_outputs": structure, **settings})
    outputs = run(engine, {str(i): ({"prompt_token_ids": [i, 2, 3]}, params) for i in range(num)})
    return [(c.text, c.finish_reason) for i in range(num) for c in outputs[str(i)].outputs]


@pytest.fixture(scope="module")
def engine(long_dir):
    return engine_of(long_dir)


def token(text: str) -> int:
    return tiny_models.tokenizer()(text)["input_ids"][0]


YES_NO = StructuredOutputsParams(choice=["yes", "no"])
SOME_A = StructuredOutputsParams(regex="a*")


@pytest.mark.parametrize("temperature", [0, 1])
def test_settings_that_leave_no_token_give_way_to_the_grammar(engine, temperature):
    """So no output waits for a token that cannot come, and all are complete."""
    for settings in (
        {"min_tokens": 9},
        {"ignore_eos": True},
        {"allowed_token_ids": [1, 2]},
        {"allowed_token_ids": [token("y"), token("e"), token("s")]},
        {"bad_words": ["yes", "no"]},
        {"logit_bias": {token("q"): 100, tiny_models.EOS: -100}},
        {"repetition_penalty": 50, "min_p": 1},
    ):
        found = texts(engine, YES_NO, temperature=temperature, **settings)
        assert set(found) <= {("yes", "stop"), ("no", "stop")}, settings


def test_settings_that_leave_tokens_choose_among_those_of_the_grammar(engine):
    assert set(texts(engine, YES_NO, allowed_token_ids=[token(c) for c in "yes"])) == {("yes", "stop")}
    assert set(texts(engine, YES_NO, bad_words=["n"])) == {("yes", "stop")}
    assert set(texts(engine, YES_NO, logit_bias={token("n"): 100})) == {("no", "stop")}
    for text, reason in texts(engine, SOME_A, min_tokens=20, max_tokens=None):
        assert len(text) >= 20
        assert reason == "stop"
    # Nothing has to end such a text.
    assert set(texts(engine, SOME_A, ignore_eos=True)) == {("a" * 40, "length")}


def test_stop_tokens_come_where_the_grammar_may_end(engine):
    pairs = StructuredOutputsParams(regex="(ab)*")
    for settings in ({"stop_token_ids": [token("b"), token("q")]}, {"stop_token_ids": [token("q")]}):
        for ignore_eos in (False, True):
            params = {**settings, "ignore_eos": ignore_eos, "max_tokens": None}
            found = run(
                engine,
                {str(i): (f"{i}", SamplingParams(structured_outputs=pairs, **params)) for i in range(6)},
            )
            for output in (found[str(i)].outputs[0] for i in range(6)):
                assert output.finish_reason == "stop"
                assert output.stop_reason in {None, *settings["stop_token_ids"]}
                assert ignore_eos <= (output.stop_reason is not None)
                # A stop token that the grammar needs cuts, as stop strings do.
                assert re.fullmatch("a?" if output.stop_reason == token("b") else "(ab)*", output.text)


def test_limits_cut_texts_to_beginnings(engine):
    word = StructuredOutputsParams(choice=["abcdefgh"])
    assert set(texts(engine, word, max_tokens=3)) == {("abc", "length")}
    assert set(texts(engine, word, stop=["de"])) == {("abc", "stop")}
    assert set(texts(engine, word, max_tokens=8)) == {("abcdefgh", "length")}
    assert set(texts(engine, word, max_tokens=9)) == {("abcdefgh", "stop")}


def test_special_tokens_of_a_lark_grammar(engine):
    grammar = StructuredOutputsParams(grammar='start: <start> "name" <end>')
    assert set(texts(engine, grammar)) == {("name", "stop")}
    assert set(texts(engine, grammar, skip_special_tokens=False)) == {("<start>name<end>", "stop")}


def test_any_object(engine):
    for text, reason in texts(engine, StructuredOutputsParams(json_object=True), max_tokens=200):
        assert text.startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_the_best_of_several_is_complete(engine):
    found = texts(engine, YES_NO, n=2, best_of=4, logprobs=1)
    assert set(found) <= {("yes", "stop"), ("no", "stop")}


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ({"json": {"type": "strnig"}}, "json cannot be compiled: Invalid type: strnig"),
        ({"regex": "(a"}, "regex cannot be compiled: (.|\n)*unclosed group"),
        ({"grammar": "start: b"}, 'grammar cannot be compiled: (.|\n)*unknown name: "b"'),
        ({"grammar": "root ::= b"}, "grammar cannot be compiled: Rule 'b' not found"),
        ({"choice": ["\ud800"]}, "choice cannot be compiled: .*surrogate"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "json cannot .*: Unsatisfiable schema"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(engine, structure, reason):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**structure))
    with pytest.raises(ValueError, match=rf"^structured_outputs: {reason}"):
        engine.add_request("r", "prompt", params)
    assert not engine.has_unfinished()


def test_a_step_that_fails_takes_no_output_further(long_dir, reference, seed):
    rng = random.Random(seed)
    number = StructuredOutputsParams(regex="[0-9]{20}")
    params = SamplingParams(structured_outputs=number, max_tokens=50, n=2, seed=seed)
    requests = {str(i): (draw_prompt(rng, []), params) for i in range(4)}
    engine = engine_of(long_dir)
    reference.replace_logits(engine)
    expected = run(engine, requests)
    launch, choose = engine._sampler.launch, engine._sampler._choose
    places = iter([(rng.randrange(2, 9), rng.choice([launch, choose])) for _ in range(3)])
    for request_id, (prompt, its_params) in requests.items():
        engine.add_request(request_id, prompt, its_params)
    steps, where = next(places)
    found = {}
    while engine.has_unfinished():
        steps -= 1
        if steps == 0:

            def fail(*arguments):
                raise RuntimeError("a fault")

            name = "launch" if where is launch else "_choose"
            setattr(engine._sampler, name, fail)
            with pytest.raises(RuntimeError, match="a fault"):
                engine.step()
            delattr(engine._sampler, name)
            steps, where = next(places, (-1, launch))
        found |= {output.request_id: output for output in engine.step() if output.finished}
    assert completions(found, requests) == completions(expected, requests)


def test_an_output_is_dropped_in_the_middle(engine):
    params = SamplingParams(structured_outputs=SOME_A, ignore_eos=True, max_tokens=200)
    for i in range(6):
        engine.add_request(str(i), f"prompt {i}", params)
    for i in range(6):
        engine.step()
        engine.abort(str(i))
    finish(engine)


def test_tokens_that_the_model_lacks_are_no_way_on(tmp_path):
    """A tokenizer may have more tokens than the model, as here "é" and the end of a sequence."""
    rows = max(token(c) for c in "abc") + 1
    small = small_engine(str(tiny_models.save("llama", tmp_path, vocab_size=rows, pad_token_id=None)))
    with pytest.raises(ValueError, match=r"^structured_outputs needs a token that ends an output"):
        texts(small, StructuredOutputsParams(regex="ab"))
    stop = {"stop_token_ids": [token("c")]}
    with pytest.raises(ValueError, match="cannot be compiled: the model has no token to begin with"):
        texts(small, StructuredOutputsParams(choice=["éa"]), **stop)
    with pytest.raises(GrammarError, match="cannot be continued: the model has no token"):
        texts(small, StructuredOutputsParams(choice=["aé"]), num=1, **stop)
    for request_id in small.request_ids:
        small.abort(request_id)
    assert set(texts(small, StructuredOutputsParams(choice=["ab", "aéb"]), **stop)) == {("ab", "stop")}
