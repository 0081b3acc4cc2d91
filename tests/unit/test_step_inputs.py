"""The batch of a step, built from its plan and copied to the device at once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from cupaged.engine import SamplingParams
from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.model.attention import ATTENTION_NAME, register_attention
from cupaged.engine.model.decode_buffers import DecodeBuffers
from cupaged.engine.model.kv_cache import KVCache
from cupaged.engine.model.model_runner import ModelRunner
from cupaged.engine.model.step_inputs import StepInputs
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.scheduling.request import Sequence, SequenceGroup
from cupaged.engine.scheduling.step_plan import ScheduledSequence
from cupaged.engine.transfer import Staging, pack, to_device, unpack
from tests.graph_tape import WAITING
from tests.tiny_models import CONFIGS

META = torch.device("meta")  # stands for a device: what is copied to it goes over the link


class Transfers(TorchDispatchMode):
    """Count copies between devices, and note what else makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.back = 0  # to the device, and from it
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.back += 1
            return args[0]  # there is nothing to copy
        result = func(*args, **(kwargs or {}))
        devices = {value.device for value in (*args, result) if isinstance(value, torch.Tensor)}
        self.count += len(devices) > 1
        self.names.append(func.overloadpacket.__name__)
        assert self.names[-1] not in WAITING, "the host waits for a number"
        return result


def draw_plan(rng: np.random.Generator, blocks: BlockManager) -> tuple[ScheduledSequence, ...]:
    """Draw the sequences of a step: in prompts, at their ends, and decoding."""
    scheduled = []
    for seq_id in range(int(rng.integers(1, 6))):
        tokens = rng.integers(0, 1000, int(rng.integers(1, 60))).tolist()
        prompt_len = int(rng.integers(1, len(tokens) + 1))
        params = SamplingParams(prompt_logprobs=1) if rng.random() < 0.2 else SamplingParams()
        group = SequenceGroup(str(seq_id), None, tokens[:prompt_len], params, 100, seq_id)
        seq = Sequence(seq_id, 0, tokens, prompt_len, 0)
        decodes = rng.random() < 0.5
        start = len(tokens) - 1 if decodes else int(rng.integers(0, len(tokens)))
        count = 1 if decodes else int(rng.integers(1, len(tokens) - start + 1))
        blocks.append(seq_id, 0, start + count, [])
        num_samples = int(start + count == len(tokens))
        num_stored = int(rng.integers(0, count)) if rng.random() < 0.3 else 0
        scheduled.append(ScheduledSequence(group, seq, start, count, num_samples, num_stored))
    return tuple(scheduled)


def test_every_token_of_a_step_is_where_it_belongs(seed):
    rng = np.random.default_rng(seed)
    blocks = BlockManager(300, 0, block_size=int(rng.choice([1, 4, 16])))
    scheduled = draw_plan(rng, blocks)
    inputs = StepInputs.of(scheduled, blocks)
    token = 0
    kept = []
    for row, item in enumerate(scheduled):
        table = blocks.table(item.seq.seq_id)
        assert list(inputs.block_tables[row][: len(table)]) == list(table)
        assert inputs.query_start_loc[row] == token
        assert inputs.seq_lens[row] == item.start + item.num_tokens
        for position in range(item.start, item.start + item.num_tokens):
            slot = table[position // blocks.block_size] * blocks.block_size + position % blocks.block_size
            is_stored = position < item.start + item.num_stored
            assert inputs.token_ids[token] == item.seq.token_ids[position]
            assert inputs.positions[token] == position
            assert inputs.slots[token] == (-1 if is_stored else slot)
            is_last = position == item.start + item.num_tokens - 1
            if (item.num_samples and is_last) or position < item.start + item.num_prompt_logits:
                kept.append(token)
            token += 1
    assert inputs.query_start_loc[-1] == len(inputs.token_ids) == token
    assert inputs.kept_rows.tolist() == kept
    assert inputs.is_decode == all(item.num_tokens == 1 for item in scheduled)


def test_packed_arrays_are_as_before(seed):
    rng = np.random.default_rng(seed)
    arrays = []
    for _ in range(int(rng.integers(1, 8))):
        shape = tuple(rng.integers(0, 9, int(rng.integers(1, 3))))
        arrays.append(
            rng.integers(-(2**31), 2**31, shape).astype(rng.choice([np.int32, np.int64, np.float64]))
        )
    arrays.append(np.arange(12, dtype=np.int32).reshape(3, 4)[:, :2])  # not contiguous
    packed = pack(arrays)
    for array, tensor in zip(arrays, unpack(packed.clone(), arrays)):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_step_is_one_transfer(num_tokens):
    """With a model on a device that the host cannot read; decode and prefill."""
    register_attention()
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation=ATTENTION_NAME)
    runner = ModelRunner(model)
    blocks = BlockManager(8, 0, block_size=16)
    blocks.append(0, 0, num_tokens, [])
    group = SequenceGroup("0", None, [1] * num_tokens, SamplingParams(), 10, 0)
    item = ScheduledSequence(group, Sequence(0, 0, [1] * num_tokens, num_tokens, 0), 0, num_tokens, 1)
    cache = KVCache(runner.kv_shape(16), 8, 0, META)
    given = {}

    def noted(**inputs):
        given.update(inputs)
        return SimpleNamespace(logits=torch.empty(1, 1, 100, device=META))

    runner.device, runner._model = META, noted
    with Transfers() as transfers:
        logits = runner.run((item,), blocks, cache)
    assert transfers.count == 1
    assert logits.shape == (1, 100)
    metadata = given["paged"]
    tensors = [given["input_ids"], given["position_ids"], given["logits_to_keep"], metadata.slot_mapping]
    tensors += [metadata.block_tables, metadata.seq_lens]
    assert {tensor.device for tensor in tensors} == {META}
    assert [tuple(tensor.shape) for tensor in tensors[:4]] == [(1, num_tokens)] * 2 + [(1,), (num_tokens,)]
    assert (metadata.query_start_loc is None) == (num_tokens == 1)
    assert to_device([np.arange(3)], torch.device("cpu"))[0].tolist() == [0, 1, 2]


def test_two_buffers_are_written_in_turns(monkeypatch):
    """Each when the copy from it has ended, so that the host does not wait for the copy before."""
    target, notes = torch.zeros(64, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device.type)
    staging = Staging(target)
    staging._copied = [
        SimpleNamespace(
            synchronize=lambda i=i: notes.append(("wait", i)), record=lambda on, i=i: notes.append((on, i))
        )
        for i in range(2)
    ]
    for number in range(1, 5):
        turn = staging.begin()
        staging.buffers[turn].fill_(number)
        staging.send(32)
        assert target.tolist() == [number] * 32 + [0] * 32
    assert notes == [(what, turn) for turn in (1, 0, 1, 0) for what in ("wait", "cpu")]


def test_a_bucket_holds_a_step_and_padding(seed):
    rng = np.random.default_rng(seed)
    blocks = BlockManager(300, 0, block_size=4)
    buffers = DecodeBuffers(16, 20, torch.device("cpu"))
    scheduled = [item for item in draw_plan(rng, blocks) if len(item.seq.token_ids) <= 80]
    decoding = [ScheduledSequence(i.group, i.seq, i.start + i.num_tokens - 1, 1, 1) for i in scheduled]
    inputs = StepInputs.of(decoding, blocks) if decoding else StepInputs.padding()
    for num_seqs in (len(decoding), 16):
        for buffer in buffers._staging.buffers:
            buffer.fill_(0xFF)
        buffers.fill(num_seqs, 20, inputs)
        held = buffers.tensors(num_seqs, 20)
        count, width = inputs.block_tables.shape
        for tensor, given, padding in (
            (held.token_ids, inputs.token_ids, 0),
            (held.positions, inputs.positions, 0),
            (held.slots, inputs.slots, -1),
            (held.seq_lens, inputs.seq_lens, 0),
        ):
            assert tensor.tolist() == given.tolist() + [padding] * (num_seqs - count)
        assert held.block_tables[:count, :width].tolist() == inputs.block_tables.tolist()
        assert {tensor.untyped_storage().data_ptr() for tensor in held} == {buffers.memory.data_ptr()}


class NoGraph:
    def replay(self) -> None:
        pass


def graphed_runner() -> tuple[ModelRunner, KVCache]:
    """Return a runner over a device that the host cannot read, with graphs that do nothing."""
    register_attention()
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation=ATTENTION_NAME)
    runner = ModelRunner(model)
    cache = KVCache(runner.kv_shape(16), 8, 0, META)
    runner._graphs = graphs = runner._new_graphs(cache, 4, 100, NoGraph)
    graphs._graphs = dict.fromkeys(graphs.buckets.all(), NoGraph())
    graphs._logits = torch.empty(4, 100, device=META)
    graphs._addresses = graphs._current_addresses()
    return runner, cache


def decoding(count: int, blocks: BlockManager, params: SamplingParams) -> list[ScheduledSequence]:
    items = []
    for seq_id in range(count):
        blocks.append(seq_id, 0, 5, [])
        group = SequenceGroup("0", None, [1] * 5, params, 10, 0)
        items.append(ScheduledSequence(group, Sequence(seq_id, 0, [1] * 5, 5, 0), 4, 1, 1))
    return items


def test_a_replayed_step_is_one_copy_and_one_launch():
    """Nothing is allocated, and nothing waited for. Without a token that only the device knows."""
    runner, cache = graphed_runner()
    blocks = BlockManager(8, 0, block_size=16)
    items = decoding(3, blocks, SamplingParams())
    sampled = torch.zeros(3, dtype=torch.int64, device=META)
    runner.run(tuple(items), blocks, cache, sampled)  # the first of its size looks up where its inputs are
    for unknown, expected in (([], ["copy_"]), ([0, 2], ["copy_", "copy_"])):
        for row in unknown:
            items[row].seq.token_ids[-1] = -1 - row
        with Transfers() as transfers:
            logits = runner.run(tuple(items), blocks, cache, sampled)
        assert transfers.count == 1  # the other copy is on the device
        assert [name for name in transfers.names if name != "slice"] == expected
        assert logits.shape == (3, 100)


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {"top_p": 0.9}, {"temperature": 0, "logprobs": 3}, {"seed": 1, "logprobs": 0}],
)
def test_a_decode_step_is_one_copy_there_and_one_back(monkeypatch, params):
    """With the sampler, while the batch stays the same; as on a GPU, over a device that is none."""
    runner, cache = graphed_runner()
    empty = torch.empty
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "Event", lambda: SimpleNamespace(record=lambda *_: None, synchronize=lambda: None)
    )
    blocks, sampler = BlockManager(8, 0, block_size=16), Sampler(frozenset())
    items = decoding(3, blocks, SamplingParams(**params))
    samples, copies = None, []
    for _ in range(4):
        with Transfers() as transfers:
            logits = runner.run(tuple(items), blocks, cache, samples and samples.tokens)
            samples = sampler.launch(logits, items)
        copies.append((transfers.count, transfers.back))
        for row, item in enumerate(items):
            item.seq.token_ids.append(-1 - row)
            item.start += 1
    assert copies[1:] == [(1, 1)] * 3
