"""The sampling settings of a model's generation_config.json are those of requests that leave them out."""

from __future__ import annotations

import json

import pytest

from cupaged import serve
from cupaged.engine import LLM, LLMEngine, SamplingParams
from tests import tiny_models
from tests.server.conftest import Running

SETTINGS = {"device": "cpu", "num_gpu_blocks_override": 64}
GIVEN = {
    "temperature": 0.6,
    "top_k": 1,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 7,
}
DEFAULTS = {
    "temperature": 0.6,
    "top_k": 1,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_tokens": 7,
}


def save(directory, **generation):
    tiny_models.save("llama", directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, **generation}))
    return directory


def test_the_defaults_are_the_models(tmp_path):
    llm = LLM(save(tmp_path, **GIVEN), **SETTINGS)
    assert llm.get_default_sampling_params() == SamplingParams(**DEFAULTS)
    for call in (lambda: llm.generate("text", use_tqdm=False)[0], lambda: run_engine(llm.engine)):
        output = call().outputs[0]
        assert len(output.token_ids) <= 7
        greedy = SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=7)
        assert output.token_ids == llm.generate("text", greedy, use_tqdm=False)[0].outputs[0].token_ids


def run_engine(engine: LLMEngine):
    engine.add_request("0", "text")
    while engine.has_unfinished():
        outputs = engine.step()
    return outputs[0]


def test_params_that_are_given_are_taken_as_they_are(tmp_path):
    llm = LLM(save(tmp_path, **GIVEN), **SETTINGS)
    plain = LLM(tiny_models.save("llama", tmp_path / "plain"), **SETTINGS)
    params = SamplingParams(seed=5, max_tokens=30, ignore_eos=True)
    outputs = [one.generate("text", params, use_tqdm=False)[0].outputs[0] for one in (llm, plain)]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("generation", [{}, {"temperature": None, "top_k": None}, {"top_k": 0}])
def test_what_is_not_set_is_as_always(tmp_path, generation):
    assert LLM(save(tmp_path, **generation), **SETTINGS).get_default_sampling_params() == SamplingParams()


def test_vllm_leaves_them_out_and_keeps_the_ends(tmp_path):
    directory = save(tmp_path, **GIVEN, eos_token_id=[5, 6])
    llm = LLM(directory, generation_config="vllm", **SETTINGS)
    assert llm.get_default_sampling_params() == SamplingParams()
    assert llm.engine._scheduler._eos_token_ids == {5, 6, tiny_models.EOS}


def test_another_directory(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "eos_token_id": [9]}))
    llm = LLM(save(tmp_path / "model", **GIVEN), generation_config=str(other), **SETTINGS)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25)
    assert 9 in llm.engine._scheduler._eos_token_ids


@pytest.mark.parametrize("flag", ["nothing", "empty", "damaged"])
def test_a_directory_without_one_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, flag):
    directory = tmp_path / flag
    if flag != "nothing":
        directory.mkdir()
    if flag == "damaged":
        (directory / "generation_config.json").write_text("{")
    monkeypatch.setattr("cupaged.engine.model.worker.load_model", None)
    with pytest.raises(ValueError, match=r"generation_config.*must be|damaged"):
        LLM(save(tmp_path / "model"), generation_config=str(directory), **SETTINGS)
    arguments = ["--model", str(tmp_path / "model"), "--port", "0", "--generation-config", str(directory)]
    assert serve.main(arguments) == 1
    assert str(directory) in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": "much"}, {"min_p": 2}])
def test_settings_out_of_range_are_refused_with_the_way_round(tmp_path, wrong):
    directory = save(tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"generation_config\.json.*must be.*--generation-config vllm"):
        LLM(directory, **SETTINGS)
    assert LLM(directory, generation_config="vllm", **SETTINGS).get_default_sampling_params()


def test_a_damaged_file_is_not_passed_over(tmp_path):
    directory = save(tmp_path)
    (directory / "generation_config.json").write_text("{'temperature': 0.6")
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged"):
        LLM(directory, **SETTINGS)


def test_nothing_says_that_they_may_be_ignored(tmp_path, capfd, caplog):
    LLM(save(tmp_path, do_sample=False, temperature=0.6, top_p=0.5), **SETTINGS)
    assert "may be ignored" not in caplog.text + "".join(capfd.readouterr())


class Requests:
    """Both endpoints of a server, with what reaches the engine."""

    def __init__(self, running: Running, monkeypatch) -> None:
        self.client = running.client()
        self.seen: list[SamplingParams] = []
        add = running.engine.add_request

        def record(request_id, prompt, params, **more):
            self.seen.append(params)
            add(request_id, prompt, params, **more)

        monkeypatch.setattr(running.engine, "add_request", record)

    def chat(self, **fields) -> SamplingParams:
        extra = {name: fields.pop(name) for name in list(fields) if name not in ("temperature", "top_p")}
        message = {"role": "user", "content": "hello"}
        self.client.chat.completions.create(
            model="tiny-llama", messages=[message], extra_body=extra, **fields
        )
        return self.seen[-1]

    def complete(self, **fields) -> SamplingParams:
        self.client.completions.create(model="tiny-llama", prompt="hello", extra_body=fields)
        return self.seen[-1]


@pytest.fixture
def requests(tmp_path, monkeypatch):
    with Running(str(save(tmp_path, **GIVEN))) as running:
        yield Requests(running, monkeypatch)


def test_requests_over_http(requests):
    assert requests.chat() == SamplingParams(**DEFAULTS)
    # 16 tokens are the endpoint's own default.
    assert requests.complete() == SamplingParams(**{**DEFAULTS, "max_tokens": 16})
    assert requests.chat(temperature=None, top_k=None, min_p=None) == SamplingParams(**DEFAULTS)
    own = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    for ask in (requests.chat, requests.complete):
        for name, value in own.items():
            params = ask(**{name: value})
            assert getattr(params, name) == value
            others = {n: v for n, v in DEFAULTS.items() if n not in (name, "max_tokens")}
            assert {n: getattr(params, n) for n in others} == others
        assert ask(max_tokens=9).max_tokens == 9
    assert requests.chat(max_completion_tokens=9).max_tokens == 9
    assert requests.complete(max_tokens=0, echo=True).max_tokens == 0
    beams = requests.chat(use_beam_search=True, n=2)  # draws nothing, and takes the length alone
    assert beams == SamplingParams(n=2, beam_width=2, max_tokens=7)


def test_clients_can_see_them(requests):
    """As the chat page, which has settings of its own for models without."""
    assert requests.client.models.list().data[0].default_sampling_params == DEFAULTS


def test_requests_without_settings_agree(requests):
    """top_k is 1: three requests that leave everything out get one answer."""
    create, message = requests.client.chat.completions.create, {"role": "user", "content": "hello"}
    answers = [create(model="tiny-llama", messages=[message]) for _ in range(3)]
    assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_the_start_says_what_applies(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cupaged.engine.server.http_server.Server.run", lambda *_, **__: None)
    directory = str(save(tmp_path, temperature=0.6, top_k=20))
    arguments = ["--model", directory, "--port", "0", "--device", "cpu", "--num-gpu-blocks-override", "8"]
    assert serve.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("generation_config.json") == 1
    assert "temperature=0.6, top_k=20 for requests that do not say" in printed
    assert "--generation-config vllm" in printed
    assert serve.main([*arguments, "--generation-config", "vllm"]) == 0
    assert "generation_config" not in capsys.readouterr().out
