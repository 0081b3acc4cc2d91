"""Checkpoints that are not whole are refused by what they lack, and those that are whole are not."""

from __future__ import annotations

import random

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cupaged.engine.model import loader
from tests import tiny_models

MIXTRAL = transformers.MixtralConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    max_position_embeddings=64,
)


def load(model):
    return loader.load_model(str(model), dtype="float32", device="cpu", attn_implementation="eager")[0]


def save(architecture, directory):
    if architecture != "mixtral":
        return tiny_models.save(architecture, directory)
    transformers.MixtralForCausalLM(MIXTRAL).save_pretrained(directory)
    tiny_models.tokenizer().save_pretrained(directory)
    return directory


def change(directory, edit):
    """Rewrite the weights as ``edit`` leaves them."""
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", [*tiny_models.CONFIGS, "mixtral"])
def test_any_tensor_that_is_missing_is_named(tmp_path, seed, architecture):
    directory = save(architecture, tmp_path)
    load(directory)  # whole: nothing is wrong, also where the output is tied to the embedding
    names = list(load_file(directory / "model.safetensors"))
    lost = random.Random(seed).choice(names)
    change(directory, lambda weights: weights.pop(lost))
    with pytest.raises(ValueError, match=r"it lacks [12] of|other shapes") as caught:
        load(directory)
    named = lost.split(".block_sparse_moe.")[0]  # transformers has other names below, and fewer tensors
    assert named in str(caught.value)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_many_tensors_the_first_are_named(tmp_path, capfd, caplog):
    directory = tiny_models.save("llama", tmp_path)
    change(directory, lambda weights: [weights.pop(n) for n in list(weights) if "layers.1" in n])
    with pytest.raises(ValueError, match=r"lacks 9 of its tensors: model\.layers\.1\..* and 4 more; d"):
        load(directory)
    said = caplog.text + "".join(capfd.readouterr())
    assert "newly initialized" not in said  # by transformers, before


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_another_shape_is_named(tmp_path, seed, architecture):
    directory = tiny_models.save(architecture, tmp_path)
    name = random.Random(seed).choice(sorted(load_file(directory / "model.safetensors")))
    change(directory, lambda weights: weights.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match=r"other shapes than its config\.json says: .* is \[3, 5\], not \["):
        load(directory)


def test_tensors_too_many_are_no_error(tmp_path, caplog):
    """As buffers of older releases."""
    directory = tiny_models.save("llama", tmp_path)
    change(directory, lambda weights: weights.update({"model.layers.0.extra": torch.zeros(2)}))
    load(directory)
    assert "1 tensors of the checkpoint are not used: model.layers.0.extra" in caplog.text


def test_what_transformers_computes_itself_need_not_be_there(tmp_path):
    """Tables of rotary frequencies and of positions were part of older checkpoints."""
    directory = tiny_models.save("llama", tmp_path)
    change(
        directory,
        lambda weights: weights.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)},
        ),
    )
    load(directory)


def test_a_tied_output_that_is_kept_twice(tmp_path):
    directory = tiny_models.save("gemma3", tmp_path)
    whole = load(directory)
    change(directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load(directory).lm_head.weight, whole.lm_head.weight)


@pytest.fixture
def sharded(tmp_path):
    directory = tiny_models.save("llama", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="100KB")
    load(directory)
    return directory


def test_shards_that_are_missing_are_named(sharded, seed):
    shards = sorted(sharded.glob("model-*.safetensors"))
    lost = random.Random(seed).sample(shards, 2)
    for shard in lost:
        shard.unlink()
    with pytest.raises(ValueError, match=f"lacks 2 of the {len(shards)} files that model") as caught:
        load(sharded)
    for shard in lost:
        assert shard.name in str(caught.value)


def test_a_shard_that_is_cut_short_is_named(sharded, seed):
    draw = random.Random(seed)
    shard = draw.choice(sorted(sharded.glob("model-*.safetensors")))
    content = shard.read_bytes()
    shard.write_bytes(content[: draw.randrange(len(content))])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or cut short: download it again"):
        load(sharded)


def write_gguf(path, lost=()):
    """A Llama with a layer as a GGUF file, without some of its tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<e>", "a", "b", "c", "ab", "bc", "Ġ", "d"])
    writer.add_token_types([3] + 7 * [1])
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (8, 32),
        "output": (8, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    for name, shape in shapes.items():
        if name not in lost:
            writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("token_embd", "embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk.0.attn_v", "layers.0.self_attn.v_proj"),
        ("blk.0.ffn_down", "layers.0.mlp.down_proj"),
    ],
)
def test_a_gguf_file_that_lacks_a_tensor(tmp_path, lost, named):
    with pytest.raises(ValueError, match=rf"m\.gguf cannot be loaded.*lacks .*{named}"):
        load(write_gguf(tmp_path / "m.gguf", [lost]))


def test_a_gguf_file_says_one_thing_about_its_weights(tmp_path, caplog, capfd):
    caplog.set_level("INFO", "cupaged")
    load(write_gguf(tmp_path / "m.gguf"))
    said = caplog.text + "".join(capfd.readouterr())
    assert "the weights of m.gguf are dequantised to float32" in said
    assert "stay quantized" not in said
    assert "Loading a GGUF checkpoint" not in said


def test_a_gguf_file_without_an_output_is_tied(tmp_path):
    model = load(write_gguf(tmp_path / "m.gguf", ["output"]))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_gguf_file_is_not_loaded_for_more_tokens_than_its_model_takes(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf")
    options = {"dtype": "auto", "device": "cpu", "attn_implementation": "eager"}
    assert loader.load_model(str(path), max_model_len=64, **options)
    monkeypatch.setattr("cupaged.engine.model.gguf_model.load_weights", None)
    with pytest.raises(ValueError, match="max_model_len is 65, and the model was made for 64 tokens"):
        loader.load_model(str(path), max_model_len=65, **options)


def test_a_gguf_file_that_is_cut_short(tmp_path, seed):
    path = write_gguf(tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(len(content) - 40)])
    with pytest.raises(ValueError, match=r"m\.gguf"):
        load(path)
