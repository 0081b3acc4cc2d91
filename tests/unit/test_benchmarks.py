"""The benchmarks run, and print no time for a result that is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import kernels, throughput
from tests import tiny_models


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_kernels_are_checked_and_timed(tmp_path, capsys):
    assert kernels.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert len(written["results"]["cases"]) == len(kernels.cases(torch.device("cpu"), quick=True))
    assert all(case["paged_s"] > 0 for case in written["results"]["cases"])
    assert written["environment"]["versions"]["torch"]
    assert str(tmp_path.home()) not in json.dumps(written)
    assert capsys.readouterr().out.count("x\n") == len(written["results"]["cases"])


def test_a_wrong_kernel_gets_no_time(monkeypatch, capsys, tmp_path):
    right = kernels.cupaged.paged_attention

    def wrong(query, *args, out, **options):
        right(query, *args, out=out, **options)
        out[0, 0, 0] += 0.5

    monkeypatch.setattr(kernels.cupaged, "paged_attention", wrong)
    assert kernels.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "x\n" not in out
    assert json.loads((tmp_path / "kernels-cpu.json").read_text())["results"]["cases"] == []


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
