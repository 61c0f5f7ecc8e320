"""Hashes that tell models and tokenizers apart, and agree where they are the same."""

import json
import shutil
from pathlib import Path

import pytest

from disagg.checkpoint import model_hash, read_index, tokenizer_hash
from support.checkpoints import make_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def test_a_copy_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    """Pods of one release find the same model at different places and times."""
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    assert model_hash(copy) == model_hash(folder)
    assert tokenizer_hash(copy) == tokenizer_hash(folder)
    assert len(model_hash(folder)) == 32


def test_another_value_in_any_tensor_is_another_model(folder: Path) -> None:
    """A fine-tune has the shapes, sizes and names of its base."""
    before = model_hash(folder)
    seen = {before}
    for entry in read_index(folder).values():
        content = bytearray(entry.path.read_bytes())
        content[entry.offset + entry.num_bytes // 2] ^= 1
        entry.path.write_bytes(content)
        seen.add(model_hash(folder))
    assert len(seen) == len(read_index(folder)) + 1


def test_another_configuration_is_another_model(folder: Path) -> None:
    before = model_hash(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert model_hash(folder) != before


def test_dummy_weights_are_told_apart_by_their_seed(folder: Path) -> None:
    hashes = {model_hash(folder), model_hash(folder, dummy_seed=0), model_hash(folder, dummy_seed=1)}
    assert len(hashes) == 3
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert model_hash(folder, dummy_seed=0) in hashes, "dummy weights need no files"


def test_rounded_weights_are_another_model(folder: Path) -> None:
    """Their KV differs, and so does what follows it."""
    assert model_hash(folder, quantization="fp8") != model_hash(folder)


def test_the_tokenizer_is_apart_from_the_model_and_the_template(folder: Path) -> None:
    model, tokenizer = model_hash(folder), tokenizer_hash(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_hash(folder) == tokenizer
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert tokenizer_hash(folder) != tokenizer
    assert model_hash(folder) == model
