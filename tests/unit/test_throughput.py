"""The benchmark of the engine notices wrong answers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import throughput
from tests import tiny_models


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_answers_that_the_model_would_not_give_are_noticed(tmp_path):
    model, _ = throughput.load_model(
        str(tiny_models.save("llama", tmp_path)),
        dtype="float32",
        device="cpu",
        attn_implementation="sdpa",
    )
    prompts = [[1, 2, 3], [4, 5]]
    right = [
        model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(p) :]
        for p in prompts
    ]
    answers = [answer.tolist() for answer in right]
    assert throughput.complaint(model, prompts, answers, 6, slack=0.05) is None
    assert "tokens" in throughput.complaint(model, prompts, [answers[0], answers[1][:5]], 6, slack=0.05)
    answers[1][3] = (answers[1][3] + 1) % 300
    assert "below" in throughput.complaint(model, prompts, answers, 6, slack=0.05)
