"""What cannot be a model is refused by its files, before anything is imported or loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from cupaged.engine import LLM
from cupaged.engine.model.model_files import check_files, check_length
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def directory(tmp_path):
    found = tiny_models.save("llama", tmp_path / "model")
    assert check_files(str(found), 256) == found
    return found


def refusal(model, max_model_len=None) -> str:
    with pytest.raises(ValueError) as caught:
        check_files(str(model), max_model_len)
    return str(caught.value)


def test_paths_that_are_no_models(tmp_path, directory):
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "does not exist" in refusal("./nothing")
    assert "does not exist" in refusal("~/no/such/model")
    assert "is not a file" in refusal("nothing.gguf")
    (tmp_path / "empty").mkdir()
    assert "without a config.json" in refusal(tmp_path / "empty")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert f"is a file; give the directory that it is in, {directory}" in refusal(directory / name)
    (tmp_path / "other.gguf").write_bytes(b"PK" + bytes(50))
    assert "is not a GGUF file" in refusal(tmp_path / "other.gguf")


def test_what_may_be_a_hub_id_is_left_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_files("gpt2") is None
    assert check_files("HuggingFaceTB/SmolLM2-135M") is None
    assert check_files(None) is None


def test_a_directory_without_weights(directory):
    (directory / "model.safetensors").unlink()
    assert "without weights: it has no model.safetensors or model.safetensors.ind" in refusal(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")  # whether torch can read it is seen when it is loaded
    assert check_files(str(directory)) == directory


def test_a_checkpoint_that_names_its_file(directory):
    config = json.loads((directory / "config.json").read_text())
    config["transformers_weights"] = "special.safetensors"
    (directory / "config.json").write_text(json.dumps(config))
    assert "it has no special.safetensors" in refusal(directory)
    (directory / "model.safetensors").rename(directory / "special.safetensors")
    assert check_files(str(directory)) == directory


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{'a': 1}"])
def test_a_damaged_config_or_index(directory, content):
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_bytes(content)
    assert str(index) in refusal(directory)
    for map_of_weights in (None, 5, {"lm_head.weight": 3}):
        index.write_text(json.dumps({"weight_map": map_of_weights}))
        assert str(index) in refusal(directory)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "part.safetensors"}}))
    assert check_files(str(directory)) == directory
    (directory / "config.json").write_bytes(content)
    assert f"{directory / 'config.json'}" in refusal(directory)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 100, b"\x04" + bytes(7) + b"null"])
def test_what_is_no_safetensors_file(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    assert "model.safetensors is damaged or cut short: download it again" in refusal(directory)


@pytest.mark.parametrize("place", ["top", "text_config", "n_positions"])
def test_more_tokens_than_the_model_is_for(directory, place):
    """Only where the file says so in so many words; other configurations are for transformers to read."""
    config = json.loads((directory / "config.json").read_text())
    if place == "text_config":  # that of the whole model is for something else
        config = {"text_config": config, "max_position_embeddings": 5}
    elif place == "n_positions":
        config[place] = config.pop("max_position_embeddings")
    (directory / "config.json").write_text(json.dumps(config))
    assert check_files(str(directory), 256) == directory
    assert refusal(directory, 257) == "max_model_len is 257, and the model was made for 256 tokens"


def test_a_length_that_is_known_to_transformers_alone(tmp_path, monkeypatch):
    """Before the weights are loaded."""
    directory = tiny_models.save("opt", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    del config["max_position_embeddings"]  # 2048 then
    (directory / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("cupaged.engine.model.loader.load_weights", None)
    with pytest.raises(ValueError, match="max_model_len is 99999999, and the model was made for 2048 tokens"):
        LLM(directory, device="cpu", max_model_len=99999999)


def test_a_model_that_is_not_supported_is_not_asked_for_its_length(tmp_path):
    """Recurrent models have none, and would be refused with one as well."""
    config = transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="recurrent"):
        LLM(tmp_path, device="cpu")


@pytest.mark.parametrize("flags", ["path", "empty", "file", "length", "dtype", "number"])
def test_the_command_says_so_before_it_imports_anything_heavy(directory, tmp_path, flags):
    (tmp_path / "empty").mkdir()
    arguments, said = {
        "path": (["--model", "./nothing"], "error: model './nothing' does not exist"),
        "empty": (["--model", str(tmp_path / "empty")], "without a config.json"),
        "file": (["--model", str(directory / "model.safetensors")], "give the directory"),
        "length": (["--model", str(directory), "--max-model-len", "99999999"], "max_model_len is 99999999"),
        "dtype": (["--model", str(directory), "--dtype", "int3"], "invalid choice: 'int3'"),
        "number": (["--model", str(directory), "--max-num-seqs", "0"], "max_num_seqs must be"),
    }[flags]
    code = (
        "import sys; from cupaged import serve\n"
        "try: status = serve.main(sys.argv[1:])\n"
        "except SystemExit as error: status = error.code\n"
        "print(status, [name for name in ('torch', 'transformers', 'numba') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "--port", "0", "--device", "cpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() in ("1 []", "2 []")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("asked", "models", "length"), [(128, -1, 128), (128, None, 128), (None, 64, 64), (32, 64, 32)]
)
def test_the_length_that_counts(asked, models, length):
    """A model that says -1, as xlnet does, has no limit."""
    assert check_length(asked, models) == length


@pytest.mark.parametrize(("asked", "models"), [(128, 64), (None, None), (None, -1)])
def test_a_length_that_cannot_be_is_refused(asked, models):
    with pytest.raises(ValueError, match="max_model_len"):
        check_length(asked, models)
