"""The demo model: real weights and prompts through the paged engine, against transformers alone."""

from __future__ import annotations

import pytest
import torch

from cupaged.engine import LLM, SamplingParams
from cupaged.engine.model.loader import load_model

# The model is downloaded and converted first.
pytestmark = pytest.mark.matrix

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about memory.",
    "How many legs does a spider have? Answer with one number.",
    "Explain in one sentence what an operating system does with pages of memory, and why.",
    "Translate 'good morning' into Spanish.",
]
TOKENS = 12


def test_answers_equal_transformers_generate():
    model, tokenizer = load_model(None, dtype="float32", device="cpu", attn_implementation="sdpa")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]
    prompts.append(tokenizer("The year 2023 had 365 days, and")["input_ids"])
    expected = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert "Paris" in tokenizer.decode(expected[0])

    llm = LLM(
        dtype="float32",
        device="cpu",
        num_gpu_blocks_override=14,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        max_model_len=128,
        check_integrity=True,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=0, max_tokens=TOKENS),
        use_tqdm=False,
    )
    assert [out.outputs[0].token_ids for out in outputs] == expected
    assert outputs[0].outputs[0].finish_reason == "stop"


def test_numbers_are_cut_into_digits():
    _, tokenizer = load_model(None, dtype="auto", device="cpu", attn_implementation="sdpa")
    assert tokenizer.tokenize("2023") == ["2", "0", "2", "3"]


def test_smollm2_runs_on_three_ranks_and_not_on_two():
    """It has 9 heads and 3 KV heads."""
    settings = {"device": "cpu", "dtype": "float32", "num_gpu_blocks_override": 16, "max_model_len": 128}
    prompt = "The capital of France is Paris. The capital of Italy is"
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)
    outputs = []
    with pytest.raises(ValueError, match=r"9 attention heads, 3 KV heads, an MLP of 1536: it can be 3$"):
        LLM(tensor_parallel_size=2, **settings)
    for size in (3, 1):
        with LLM(tensor_parallel_size=size, **settings) as llm:
            outputs.append(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0])
    divided, whole = outputs
    assert divided.token_ids == whole.token_ids
    assert abs(divided.cumulative_logprob - whole.cumulative_logprob) < 1e-4
