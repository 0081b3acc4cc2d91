"""What rank 0 sends is what the others read, and models that do not divide are refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import transformers as tf

from benchmarks import tensor_parallel
from cupaged.engine.distributed.packet import (
    HEADER_BYTES,
    Kind,
    OutOfStep,
    Step,
    frame,
    payload_bytes,
    read_frame,
    read_step,
    write_step,
)
from cupaged.engine.distributed.plan import check_sizes
from cupaged.engine.model.step_inputs import StepInputs
from cupaged.engine.scheduling.step_plan import Plan


def draw_step(seed: int) -> Step:
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    num_seqs, width = rng.randint(1, 9), rng.randint(1, 20)
    num_tokens, kept = num_seqs + rng.randint(0, 30), rng.randint(0, num_seqs)

    def pairs() -> tuple[tuple[int, int], ...]:
        return tuple((rng.randrange(99), rng.randrange(99)) for _ in range(rng.choice([0, 0, 1, 5])))

    inputs = StepInputs(
        token_ids=draw.integers(-5, 2**40, num_tokens),
        positions=draw.integers(0, 2**40, num_tokens),
        slots=draw.integers(-1, 2**40, num_tokens),
        kept_rows=draw.integers(0, num_tokens, kept),
        seq_lens=draw.integers(1, 2**31 - 1, num_seqs, dtype=np.int32),
        query_start_loc=draw.integers(0, 2**31 - 1, num_seqs + 1, dtype=np.int32),
        block_tables=draw.integers(-(2**31), 2**31 - 1, (num_seqs, width), dtype=np.int32),
        is_decode=num_tokens == num_seqs,
    )
    return Step(inputs, Plan(swap_out=pairs(), swap_in=pairs(), copies=pairs()), rng.randint(0, 5))


def test_a_step_is_read_as_it_was_written(seed):
    step, number = draw_step(seed), random.Random(seed).randrange(2**40)
    buffer = write_step(number, step)
    kind, fields, payload = read_frame(buffer + b"\0" * 7, number)
    assert kind is Kind.STEP
    assert HEADER_BYTES + payload_bytes(buffer) == len(buffer)
    found = read_step(fields, payload)
    assert found.num_sampled == step.num_sampled
    assert (found.moves.swap_out, found.moves.swap_in, found.moves.copies) == (
        step.moves.swap_out,
        step.moves.swap_in,
        step.moves.copies,
    )
    for name, value in vars(step.inputs).items():
        read = getattr(found.inputs, name)
        if isinstance(value, np.ndarray):
            assert read.dtype == value.dtype
            assert read.shape == value.shape
        assert np.array_equal(read, value), name


def test_a_buffer_that_is_not_the_next_or_not_whole_is_noticed(seed):
    rng, buffer = random.Random(seed), bytearray(write_step(7, draw_step(seed)))
    with pytest.raises(OutOfStep, match="sent number 7, and number 8 is next"):
        read_frame(bytes(buffer), 8)
    place = rng.randrange(HEADER_BYTES, len(buffer))
    buffer[place] ^= 1 << rng.randrange(8)
    with pytest.raises(OutOfStep, match="checksum"):
        read_frame(bytes(buffer), 7)
    with pytest.raises(OutOfStep, match="header"):
        payload_bytes(bytes(HEADER_BYTES))
    assert read_frame(frame(Kind.EXIT, 3), 3) == (Kind.EXIT, [0] * 9, b"")


def llama(heads: int, kv_heads: int, width: int) -> tf.LlamaConfig:
    return tf.LlamaConfig(
        hidden_size=64 * heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=width,
    )


@pytest.mark.parametrize(
    ("config", "size", "reason"),
    [
        (
            llama(9, 3, 1536),
            2,
            "2 does not divide the llama model, which has 9 attention heads, 3 KV heads, an MLP of 1536: it "
            "can be 3$",
        ),
        (
            llama(32, 8, 14336),
            16,
            "8 KV heads, .*: it can be 2 or 4 or 8$",
        ),
        (
            llama(7, 7, 96),
            7,
            "an MLP of 96: it can only be 1$",
        ),
        (tf.GPT2Config(), 2, "transformers has no tensor parallel plan for gpt2; it can only be 1$"),
        (tf.OPTConfig(), 2, "transformers has no tensor parallel plan for opt"),
    ],
    ids=["heads", "kv_heads", "mlp", "gpt2", "opt"],
)
def test_a_model_that_does_not_divide_is_refused(config, size, reason):
    with pytest.raises(ValueError, match=reason):
        check_sizes(config, size)


def test_sizes_that_divide_are_taken():
    config = llama(9, 3, 1536)
    check_sizes(config, 3)
    check_sizes(
        tf.Phi3Config(num_attention_heads=5, num_key_value_heads=5, hidden_size=80), 2
    )  # has all heads on each rank


def test_the_predictions_are_those_of_the_formula():
    document = (Path(__file__).parents[2] / "docs" / "tensor_parallel.md").read_text()
    assert "\n".join(tensor_parallel.table()) in document
