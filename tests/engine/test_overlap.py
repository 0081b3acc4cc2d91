"""The engine over a device that delivers late: outputs are those of an engine that waits for every step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cupaged.engine import LLMEngine, RequestOutput, SamplingParams, StructuredOutputsParams
from cupaged.engine.sampling import readback
from cupaged.engine.sampling.readback import Readback, pack, unpack
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.sampling.samples import SamplerOutput
from tests import tiny_models
from tests.unit.test_sampler import scheduled

from .harness import Reference, assert_clean, small_engine


class PlantedError(RuntimeError):
    """Makes a step fail."""


UNKNOWN = -(10**9)  # what the host sees in place of tokens that it does not know


class LateSamples:
    """Hold the samples of a step, for the host to read once; what it sees of them before is no token."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples
        self.known = False
        self.on_device = samples.tokens
        self.tokens = None if samples.tokens is None else torch.full_like(samples.tokens, UNKNOWN)

    def result(self) -> SamplerOutput:
        assert not self.known, "the samples are waited for twice"
        self.known = True
        return self._samples.result()


class LateDevice:
    """Stands between an engine and its model and sampler, which see the tokens that the host does not know.

    Logits are replaced by those of the reference, to which the engine's own have to be close: so a token
    depends on nothing but those before it.

    Args:
        failures: how likely the model or the sampler fail in a step.
    """

    def __init__(
        self, engine: LLMEngine, reference: Reference, rng: random.Random, failures: float = 0.0
    ) -> None:
        self._reference, self._rng, self._failures = reference, rng, failures
        self._run, self._launch = engine._runner.run, engine._sampler.launch
        self._last: LateSamples | None = None
        self.num_ahead = self.num_failed = 0
        engine._runner.run = self.run  # type: ignore[method-assign]
        engine._sampler.launch = self.launch  # type: ignore[method-assign, assignment]

    def _may_fail(self) -> None:
        if self._rng.random() < self._failures:
            self.num_failed += 1
            raise PlantedError

    def run(self, scheduled, blocks, cache, sampled=None):
        self._may_fail()
        on_device = None
        if sampled is not None:
            assert self._last is not None
            assert sampled is self._last.tokens
            assert not self._last.known
            on_device = self._last.on_device
            self.num_ahead += 1
        logits = self._run(scheduled, blocks, cache, on_device)
        expected = []
        for item in scheduled:
            tokens = item.seq.token_ids[: item.start + item.num_tokens]
            if tokens[-1] < 0:
                tokens[-1] = int(on_device[-1 - tokens[-1]])
            ends = range(item.start + 1, item.start + 1 + item.num_prompt_logits)
            expected += [self._reference.logits(tokens[:end]) for end in ends]
            if item.num_samples:
                expected.append(self._reference.logits(tokens))
        if expected:
            torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-3, atol=1e-3)
            logits = torch.stack(expected)
        return logits

    def launch(self, logits, scheduled, sampled=None):
        self._may_fail()
        on_device = None if sampled is None else self._last.on_device
        samples = LateSamples(self._launch(logits, scheduled, on_device))
        self._may_fail()
        self._last = samples
        return samples


@pytest.fixture(scope="module")
def mistral_dir(tmp_path_factory) -> str:
    return str(tiny_models.save("mistral", tmp_path_factory.mktemp("mistral")))


@pytest.fixture(scope="module")
def references(llama_dir, mistral_dir) -> dict[str, Reference]:
    return {directory: Reference(directory) for directory in (llama_dir, mistral_dir)}


def draw_params(rng: random.Random) -> SamplingParams:
    """Draw one of all ways in which an output is sampled and ends."""
    settings: dict[str, Any] = {"seed": rng.getrandbits(32), "max_tokens": rng.choice([1, 2, 5, 9, 14])}
    letters = rng.sample(range(97, 123), 4)
    kind = rng.choice([*["plain"] * 4, *["stop"] * 3, "n", "n", "beams", "host", "logprobs", "prompt"])
    if kind != "beams" and rng.random() < 0.6:
        settings |= rng.choice([{"temperature": 0.8}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}])
    else:
        settings["temperature"] = 1.0 if kind == "beams" else 0.0
    if kind == "stop":
        settings |= rng.choice(
            [
                {"stop_token_ids": rng.sample(range(256), 60)},
                {"stop": [chr(letter) for letter in letters], "allowed_token_ids": [*range(64, 96)]},
                {"stop": ["a", "b", "1"], "include_stop_str_in_output": True},
                {
                    "stop_token_ids": rng.sample(range(256), 100),
                    "min_tokens": rng.randint(0, settings["max_tokens"]),
                },
            ]
        )
    elif kind == "n":
        settings |= rng.choice([{"n": 2}, {"n": 3}, {"n": 1, "best_of": 2, "temperature": 1.0}])
        settings |= {"stop_token_ids": rng.sample(range(256), 40)}
    elif kind == "beams":
        settings |= {"n": 2, "beam_width": 2, "stop_token_ids": rng.sample(range(256), 20)}
    elif kind == "host":
        settings |= rng.choice(
            [
                {"bad_words": ["a", "bc"]},
                {"repetition_penalty": 1.3},
                {"presence_penalty": 0.5, "frequency_penalty": -0.2},
                {"structured_outputs": StructuredOutputsParams(regex="[a-c]{2,8}")},
                {"logit_bias": {5: 3.0, 6: -2.0}},
            ]
        )
    elif kind == "logprobs":
        settings |= {"logprobs": rng.choice([0, 1, 3, -1]), "n": rng.choice([1, 2])}
    elif kind == "prompt":
        settings |= {"prompt_logprobs": 2, "max_tokens": rng.choice([0, 3])}
    if kind in ("plain", "logprobs") and rng.random() < 0.3:
        settings["ignore_eos"] = True
    return SamplingParams(**settings)


def draw_requests(rng: random.Random, count: int) -> dict[str, tuple[list[int], SamplingParams]]:
    common = [rng.randrange(256) for _ in range(24)]
    requests = {}
    for i in range(count):
        prompt = common[: rng.choice([0, 0, 8, 20, 24])] + [
            rng.randrange(256) for _ in range(rng.randint(1, 12))
        ]
        requests[str(i)] = prompt, draw_params(rng)
    return requests


def close(value: Any) -> Any:
    """Return what floats are compared by."""
    return pytest.approx(value, rel=1e-4, abs=1e-5)


def comparable(output: RequestOutput) -> list[Any]:
    """Return what has to be equal of two outputs of a request."""
    found: list[Any] = [output.prompt_token_ids, output.finished, logprobs(output.prompt_logprobs)]
    for one in output.outputs:
        found.append([one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason])
        found.append([logprobs(one.logprobs), one.cumulative_logprob, one.beam_score])
    return found


def logprobs(positions: Any) -> Any:
    return positions and [
        at and [(token, of.rank, of.decoded_token, of.logprob) for token, of in at.items()]
        for at in positions
    ]


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        found, expected = list(found.items()), list(expected.items())
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_equal(one, other)
    else:
        assert found == (close(expected) if isinstance(expected, float) else expected)


def serve(
    engine: LLMEngine,
    requests: dict[str, tuple[list[int], SamplingParams]],
    arrivals: dict[str, int],
    aborts: dict[str, int],
) -> tuple[dict[str, RequestOutput], int]:
    """Run requests that come and leave in certain steps; gives the last output of each, and the tokens."""
    outputs: dict[str, RequestOutput] = {}
    step = 0
    while engine.has_unfinished() or step <= max(arrivals.values()):
        for name, (prompt, params) in requests.items():
            if arrivals[name] == step:
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            if aborts.get(name) == step:
                engine.abort(name)
        try:
            for output in engine.step():
                assert output.request_id in engine._groups or output.finished
                assert not (output.request_id in outputs and outputs[output.request_id].finished)
                outputs[output.request_id] = output
        except PlantedError:
            assert engine.failed_requests
        engine._blocks.check_integrity()
        step += 1
        assert step < 3000, "requests do not finish"
    assert_clean(engine)
    return outputs, engine.stats().generation_tokens


def check_a_load(directory: str, reference: Reference, rng: random.Random, disturb: bool) -> LateDevice:
    requests = draw_requests(rng, 7)
    arrivals = {name: rng.randrange(8) for name in requests}
    settings: dict[str, Any] = {
        "num_gpu_blocks_override": rng.choice([16, 20, 40]),
        "preemption_mode": rng.choice(["swap", "recompute", "auto"]),
        "enable_prefix_caching": rng.random() < 0.7,
        "max_num_seqs": rng.choice([4, 8]),
        "batching": rng.choice(["continuous", "continuous", "static"]),
    }
    waiting = small_engine(directory, async_scheduling=False, **settings)
    assert LateDevice(waiting, reference, rng).num_ahead == 0
    expected, num_tokens = serve(waiting, requests, arrivals, {})
    engine = small_engine(directory, async_scheduling=True, **settings)
    device = LateDevice(engine, reference, rng, 0.1 if disturb else 0.0)
    aborts = {name: rng.randrange(20) for name in requests if disturb and rng.random() < 0.25}
    found, num_found = serve(engine, requests, arrivals, aborts)
    for name in requests:
        if name not in aborts or (name in found and found[name].finished):
            assert_equal(comparable(found[name]), comparable(expected[name]))
        elif name in found:
            for one, whole in zip(found[name].outputs, expected[name].outputs):
                if requests[name][1].best_of is None:
                    assert one.token_ids == whole.token_ids[: len(one.token_ids)]
                    assert whole.text.startswith(one.text.rstrip("�"))
    assert aborts or num_found == num_tokens
    return device


@pytest.mark.parametrize("disturb", [False, True])
@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_outputs_are_those_of_an_engine_that_waits(llama_dir, mistral_dir, references, model, disturb, seed):
    directory = llama_dir if model == "llama" else mistral_dir
    device = check_a_load(directory, references[directory], random.Random(seed), disturb)
    assert device.num_failed == 0 or disturb


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_known(llama_dir, references, seed):
    """In all steps but the first; and none where the host has to know them."""
    for params, ahead in (
        (SamplingParams(max_tokens=9, ignore_eos=True), 8),
        (SamplingParams(max_tokens=9, ignore_eos=True, n=2, logprobs=2), 8),
        (SamplingParams(max_tokens=9, ignore_eos=True, n=2, presence_penalty=0.1), 8),
        (SamplingParams(max_tokens=9, ignore_eos=True, bad_words=["a"]), 0),
    ):
        engine = small_engine(llama_dir, async_scheduling=True)
        device = LateDevice(engine, references[llama_dir], random.Random(seed))
        serve(engine, {"x": ([1, 2, 3], params)}, {"x": 0}, {})
        assert device.num_ahead == ahead


def test_a_grammar_follows_known_tokens_only(llama_dir, references, seed):
    """Its request comes while another one's token is unknown, so that its first step is launched ahead."""
    digits = SamplingParams(structured_outputs=StructuredOutputsParams(regex="[0-9]{6}"), seed=seed)
    requests = {"a": ([1, 2], SamplingParams(max_tokens=12, ignore_eos=True)), "b": ([3, 4, 5], digits)}
    engine = small_engine(llama_dir, async_scheduling=True)
    device = LateDevice(engine, references[llama_dir], random.Random(seed))
    outputs, _ = serve(engine, requests, {"a": 0, "b": 2}, {})
    assert device.num_ahead > 2
    text = outputs["b"].outputs[0].text
    assert (len(text), text.isdigit()) == (6, True)


class HostReads(TorchDispatchMode):
    """Note operations for which a host waits for its device."""

    WAITS = ("aten::_local_scalar_dense", "aten::_to_copy", "aten::nonzero", "aten::is_nonzero", "aten::item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name in self.WAITS and (name != "aten::_to_copy" or kwargs.get("device") is not None):
            self.found.append(name)
        return function(*arguments, **kwargs)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.8, "logprobs": 2},
        {"temperature": 0, "logprobs": -1},
        {"temperature": 0, "repetition_penalty": 1.2, "logit_bias": {3: 1.0}, "allowed_token_ids": [3, 4]},
    ],
)
def test_launching_waits_for_nothing(params):
    sampler = Sampler(frozenset())
    items = [scheduled(SamplingParams(**params), seed) for seed in range(3)]
    with HostReads() as reads:
        samples = sampler.launch(torch.randn(3, 50), items)
    assert reads.found == []
    assert [len(tokens) for tokens in samples.result().token_ids] == [1, 1, 1]


def test_tensors_of_all_kinds_come_to_the_host_in_one_copy():
    tensors = [torch.arange(3), torch.rand(3, 2), torch.arange(5, dtype=torch.int32), torch.arange(2)]
    packed = pack(tensors)
    assert (packed.dtype, packed.dim()) == (torch.uint8, 1)
    for found, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    for found, tensor in zip(Readback(tensors).wait(), tensors, strict=True):
        assert torch.equal(found, tensor)


class OnSecondGPU(torch.Tensor):
    """Stand in for a tensor on the GPU that is not the current one."""

    is_cuda = True
    device = torch.device("cuda", 1)


class DriverOfEvents:
    """Stand in for `torch`, where a copy is only done once an event after it in its stream has come."""

    uint8 = torch.uint8

    def __init__(self) -> None:
        self.cuda = self
        self.cat = torch.cat
        self.recorded: list[object] = []

    def empty(self, *shape: int, pin_memory: bool, **kind: Any) -> torch.Tensor:
        assert pin_memory
        return torch.empty(*shape, **kind)

    def current_stream(self, device: torch.device | None = None) -> str:
        return f"stream of {device or 'cuda:0'}"

    def Event(self) -> DriverOfEvents:
        return self

    def record(self, stream: str | None = None) -> None:
        self.recorded.append(stream or self.current_stream())

    def synchronize(self) -> None:
        assert self.recorded == ["stream of cuda:1"], "it would not wait for the copy"


def test_the_host_waits_for_the_device_of_the_tensors(monkeypatch):
    """Name a GPU that is not the current one: `LLM(device="cuda:1")` does not change that."""
    monkeypatch.setattr(readback, "torch", driver := DriverOfEvents())
    tensors = [torch.arange(3), torch.rand(3, 2)]
    copies = Readback([tensor.as_subclass(OnSecondGPU) for tensor in tensors]).wait()
    assert driver.recorded
    for found, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(found, tensor)
