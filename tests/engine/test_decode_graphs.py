"""Decode steps as graphs: a replay has the bits of the step, whatever is in the memory around it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from cupaged.engine import SamplingParams
from cupaged.engine.model import graph_buckets, model_runner
from cupaged.engine.model.kv_cache import KVCache
from cupaged.engine.model.model_runner import ModelRunner
from cupaged.engine.model.step_inputs import StepInputs
from cupaged.engine.scheduling.request import Sequence, SequenceGroup
from cupaged.engine.scheduling.step_plan import ScheduledSequence
from tests import tiny_configs
from tests.graph_tape import GraphError, TapeGraphs

from . import sweep
from .decode_load import BLOCK_SIZE, MAX_MODEL_LEN, MAX_SEQS, Graphed, Load, poison_inputs
from .harness import Reference, run, small_engine
from .test_fusion import built, tiny

EVERY_DAY = {"llama", "gemma2"}
TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
# Models whose code waits for the device, to call each expert with the tokens that it has.
NOT_CAPTURED = {"dbrx": "the host waits", "jetmoe": "logits differ", "longcat_flash": "the host waits"}
SERVED = [
    pytest.param(kind, marks=() if kind in EVERY_DAY else pytest.mark.matrix)
    for kind in tiny_configs.MODEL_TYPES
    if sweep.row(kind, None) in TABLE.splitlines()
]


def unknown(rng: random.Random, items: tuple[ScheduledSequence, ...]) -> torch.Tensor:
    """Hide some of the last tokens behind their rows of a tensor, and return it."""
    sampled = torch.full((rng.randint(len(items), MAX_SEQS),), -(2**40))
    rows = rng.sample(range(len(sampled)), len(items))
    for row, item in zip(rows, items):
        if rng.random() < 0.5:
            sampled[row] = item.seq.token_ids[-1]
            item.seq.token_ids[-1] = -1 - row
    return sampled


@pytest.mark.parametrize("model_type", SERVED)
def test_a_replay_has_the_bits_of_the_step(model_type, seed, monkeypatch):
    """Batches change, tables grow beyond their bucket; all memory that is not part of the step is poison."""
    monkeypatch.setattr(graph_buckets, "_NARROWEST", 16)  # tokens: widths of 2, 4, 8, 16, 25
    model = tiny(model_type, seed)
    graphed = Graphed(model, monkeypatch)
    graphs, runner, cache = graphed.graphs, graphed.runner, graphed.cache
    if model_type in NOT_CAPTURED:
        with pytest.raises(RuntimeError, match=NOT_CAPTURED[model_type]):
            graphs.capture()
        return
    graphs.capture()
    load = Load(seed, graphed, runner.config.vocab_size)
    buckets = set()
    for _ in range(16):
        items = load.step(load.rng.randint(1, MAX_SEQS))
        sampled = unknown(load.rng, items)
        poison_inputs(graphs)
        inputs = StepInputs.of(items, graphed.blocks)
        bucket = graphs.buckets.find(*inputs.block_tables.shape, False)
        runner._graphs = graphs
        before = graphed.replays()
        replayed = runner.run(items, graphed.blocks, cache, sampled).clone()
        assert graphed.replays() == before + 1
        with torch.inference_mode():
            assert replayed.equal(graphs._run(bucket)[: len(items)])
        runner._graphs = None
        plain = runner.run(items, graphed.blocks, cache, sampled)
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-4)
        for item, token in zip(items, inputs.token_ids.tolist()):
            item.seq.token_ids[-1] = token if token >= 0 else int(sampled[-1 - token])
        buckets.add(bucket)
    assert len(buckets) > 2


def alter(model: torch.nn.Module, change) -> None:
    """Let the model do something more with its hidden states before the head."""
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(change(hidden))


def kept_from_before(kept: dict):
    """Use a tensor that an earlier step has made, as a cache of a model's own would."""

    def change(hidden: torch.Tensor) -> torch.Tensor:
        return hidden + kept.setdefault(hidden.shape, hidden.abs().mean(-1, keepdim=True))

    return change


def of_the_host(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + torch.tensor([2.0])


def waiting(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * (1 + float(hidden.abs().max() > 1e9))


def sized_by_data(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + hidden[hidden > 0].mean()


FAULTS = {
    "a tensor of an earlier step": (kept_from_before({}), "a tensor [1, 4, 1] that was not there before"),
    "memory outside the pool": (of_the_host, "a tensor [1] that was not there before"),
    "a number that the host reads": (waiting, "the host waits for the device in a capture"),
    "a size that depends on data": (sized_by_data, "the host waits for the device in a capture"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_captured_runs_as_it_is(name, seed, monkeypatch, caplog):
    """And one line in the log says so."""
    change, message = FAULTS[name]
    graphed = Graphed(tiny("llama", seed), monkeypatch)
    alter(graphed.runner._model, change)
    monkeypatch.setattr(graphed.runner, "_new_graphs", lambda *_: graphed.graphs)
    graphed.runner.capture_graphs(graphed.cache, MAX_SEQS, MAX_MODEL_LEN, graphed.make)
    assert graphed.runner._graphs is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("decode steps run without CUDA graphs, as one could not be captured: GraphError: ")
    assert message in line


def test_a_replay_that_computes_something_else_is_noticed(seed, monkeypatch, caplog):
    """A number of Python's that changes with every step is fixed by the capture, and no graph says a word."""
    graphed, calls = Graphed(tiny("llama", seed), monkeypatch), itertools.count()
    alter(graphed.runner._model, lambda hidden: hidden + 0.1 * next(calls) * hidden.roll(1, -1))
    assert not graphed.graphs.try_capture()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "RuntimeError: a replay's logits differ from those of the step by " in line


def captured_graphs(seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Graphed, Load]:
    graphed = Graphed(tiny("llama", seed), monkeypatch)
    graphed.graphs.capture()
    graphed.runner._graphs = graphed.graphs
    return graphed, Load(seed, graphed, graphed.runner.config.vocab_size)


def test_memory_that_has_moved_is_an_error(seed, monkeypatch):
    graphed, load = captured_graphs(seed, monkeypatch)
    runner, graphs = graphed.runner, graphed.graphs

    def run() -> None:
        runner.run(load.step(2), graphed.blocks, graphed.cache)

    run()
    for holder, name in ((graphs._buffers, "memory"), (graphs._buffers, "sampled"), (graphs, "_logits")):
        tensor = getattr(holder, name)
        setattr(holder, name, tensor.clone())
        with pytest.raises(RuntimeError, match="tensors that decode graphs read have been moved"):
            run()
        setattr(holder, name, tensor)
        run()
    head = runner._model.lm_head.weight
    weight, head.data = head.data, head.data.clone()
    del weight
    with pytest.raises(GraphError, match="memory that has"):  # what a GPU would read without a word
        run()


def test_steps_that_no_graph_is_made_for_run_as_they_are(seed, monkeypatch):
    graphed, load = captured_graphs(seed, monkeypatch)
    runner, blocks, cache = graphed.runner, graphed.blocks, graphed.cache
    items = load.step(3)
    other = KVCache(runner.kv_shape(BLOCK_SIZE), 64, 0, torch.device("cpu"))
    other.blocks.copy_(cache.blocks)
    first = ScheduledSequence(items[0].group, items[0].seq, items[0].start, 1, 0)  # it samples nothing
    group = SequenceGroup("prompt", None, [5, 6], SamplingParams(), 9, 99)
    blocks.append(99, 0, 2, [])
    prompt = ScheduledSequence(group, Sequence(99, 0, [5, 6], 2, 0), 0, 2, 1)
    for step, used in (((first, *items[1:]), cache), ((*items, prompt), cache), (items, other)):
        before = graphed.replays()
        assert len(runner.run(step, blocks, used)) == sum(item.num_samples for item in step)
        assert graphed.replays() == before
    while load.live:
        load.graphed.blocks.free(load.live.pop()[1].seq_id)
    wide = load.step(1)
    blocks.append(wide[0].seq.seq_id, 0, MAX_MODEL_LEN + 1, [])  # as a reservation may be
    before = graphed.replays()
    assert runner.run(wide, blocks, cache).shape[0] == 1
    assert graphed.replays() == before
    with pytest.raises(ValueError, match="does not fit into one of 1 with 25"):
        graphed.graphs._buffers.fill(1, 25, StepInputs.of(wide, blocks))


def test_frequencies_that_follow_the_longest_sequence_are_not_captured(seed, monkeypatch, caplog):
    config = tiny_configs.tiny_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with caplog.at_level("INFO", "cupaged.engine"):
        assert Graphed(built(config, seed), monkeypatch).graphs is None
    assert "rotary frequencies follow the longest sequence" in caplog.text


def drawn_requests(seed: int) -> list[tuple[dict, SamplingParams]]:
    rng = random.Random(seed)
    params = [
        SamplingParams(temperature=0, max_tokens=rng.randint(1, 40), n=rng.choice([1, 1, 2]), ignore_eos=True)
        for _ in range(5)
    ]
    prompts = [[rng.randrange(3, 250) for _ in range(rng.randint(1, 40))] for _ in params]
    return [({"prompt_token_ids": prompt}, each) for prompt, each in zip(prompts, params)]


@pytest.mark.parametrize(
    ("mode", "overlap"),
    [
        ("swap", True),
        pytest.param("swap", False, marks=pytest.mark.matrix),
        pytest.param("recompute", True, marks=pytest.mark.matrix),
    ],
)
def test_an_engine_with_graphs_gives_the_same_tokens(llama_dir, seed, monkeypatch, mode, overlap):
    """Blocks are short, so that requests are preempted; requests come and go."""
    monkeypatch.setattr(model_runner, "pack_linears", lambda model: 0)
    reference, outputs = Reference(llama_dir), []
    for graphs in (False, True):
        engine = small_engine(llama_dir, preemption_mode=mode, async_scheduling=graphs and overlap)
        make = TapeGraphs()
        if graphs:
            engine._runner.capture_graphs(engine._cache, 8, 128, make)
        reference.replace_logits(engine)
        requests = {str(i): request for i, request in enumerate(drawn_requests(seed))}
        found = run(engine, requests)
        outputs.append({name: [o.token_ids for o in of.outputs] for name, of in found.items()})
    assert sum(graph.replays for graph in make.made) > len(make.made)
    assert outputs[0] == outputs[1]


def test_eager_can_be_enforced(llama_dir, monkeypatch):
    calls = []
    monkeypatch.setattr(ModelRunner, "capture_graphs", lambda self, *arguments: calls.append(arguments))
    small_engine(llama_dir, enforce_eager=True)
    assert not calls
    engine = small_engine(llama_dir)
    assert calls == [(engine._cache, 8, 128)]
