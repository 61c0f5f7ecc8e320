"""GGUF files of each family become the checkpoint they were made from."""

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from disagg.checkpoint.gguf import convert_gguf, output_bytes
from disagg.errors import ConfigError
from support.checkpoints import END, END_OF_TEXT, make_checkpoint
from support.gguf_files import CONFIG, write_gguf


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    return (make_checkpoint(tmp_path_factory.mktemp("m")) / "tokenizer.json").read_text()


def convert(path: Path) -> tuple[dict[str, Any], Path]:
    folder = path.with_suffix("")
    folder.mkdir()
    convert_gguf(path, folder)
    return json.loads((folder / "config.json").read_text()), folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_1"])
def test_every_tensor_comes_back(tmp_path: Path, tokenizer_json: str, family: str, quantization: str) -> None:
    """Rows of q and k too, which llama.cpp stores in another order for the llama family alone."""
    path = tmp_path / "m.gguf"
    worth = write_gguf(path, family, quantization=quantization, tokenizer_json=tokenizer_json)
    config, folder = convert(path)
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == worth.keys()
    for name, tensor in worth.items():
        assert loaded[name].shape == tensor.shape
        assert (loaded[name].astype(np.float32) == tensor).all(), name
    assert config["model_type"] == family
    assert config["dtype"] == ("float16" if quantization == "F16" else "float32")
    assert sum(tensor.nbytes for tensor in loaded.values()) == output_bytes(path)
    for field, value in CONFIG.items():
        assert config[field] == pytest.approx(value), field


def test_an_untied_head_is_kept(tmp_path: Path, tokenizer_json: str) -> None:
    path = tmp_path / "m.gguf"
    worth = write_gguf(path, tokenizer_json=tokenizer_json, tie_word_embeddings=False)
    config, folder = convert(path)
    assert config["tie_word_embeddings"] is False
    assert (load_file(folder / "model.safetensors")["lm_head.weight"] == worth["lm_head.weight"]).all()


def test_the_vocabulary_and_the_end_tokens_come_along(tmp_path: Path, tokenizer_json: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tokenizer_json=tokenizer_json, metadata={"tokenizer.ggml.eot_token_id": END_OF_TEXT})
    _, folder = convert(path)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [END, END_OF_TEXT]
    ours, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), Tokenizer.from_str(tokenizer_json)
    for text in ("the quick brown fox", "don't  42 été 你好 \n\n x", "<|im_start|>user\nhi<|im_end|>"):
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert "im_start" in config["chat_template"]


def test_llama3_rope_scaling_is_recovered_from_its_frequencies(tmp_path: Path, tokenizer_json: str) -> None:
    """llama.cpp stores divisors instead of the four parameters that they come from."""
    theta, factor = 500000.0, 8.0
    wavelength = 2 * np.pi * theta ** (np.arange(0, 32, 2) / 32)
    smooth = np.clip((8192 / wavelength - 1.0) / 3.0, 0, 1)
    divisors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    path = tmp_path / "m.gguf"
    write_gguf(
        path,
        tokenizer_json=tokenizer_json,
        rope_theta=theta,
        extra_tensors={"rope_freqs.weight": divisors},
    )
    config, _ = convert(path)
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_rope_frequencies_are_refused(tmp_path: Path, tokenizer_json: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(
        path,
        tokenizer_json=tokenizer_json,
        extra_tensors={"rope_freqs.weight": np.linspace(1, 9, 16, dtype=np.float32)},
    )
    with pytest.raises(ConfigError, match="scales rope by its own frequencies"):
        convert(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "scales rope by 'yarn'"),
        ({"split.count": 2}, "is one part of a split GGUF"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, tokenizer_json: str, metadata: dict[str, Any], message: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tokenizer_json=tokenizer_json, metadata=metadata)
    with pytest.raises(ConfigError, match=message):
        convert(path)


def test_heads_that_are_valued_in_part_are_refused(tmp_path: Path, tokenizer_json: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tokenizer_json=tokenizer_json, value_length=16)
    with pytest.raises(ConfigError, match="rotates or values a part of a head only"):
        convert(path)


@pytest.mark.parametrize(
    ("pre_tokenizer", "architecture", "message"),
    [
        ("tekken", "llama", "unknown pre-tokenizer 'tekken'"),
        ("gpt2", "gemma", "has the architecture 'gemma'; supported are llama"),
    ],
)
def test_other_architectures_and_vocabularies_are_refused(
    tmp_path: Path, tokenizer_json: str, pre_tokenizer: str, architecture: str, message: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, architecture, tokenizer_json=tokenizer_json, pre_tokenizer=pre_tokenizer)
    with pytest.raises(ConfigError, match=message):
        convert(path)


def test_a_tensor_nobody_knows_is_refused(tmp_path: Path, tokenizer_json: str) -> None:
    """Left out, a model of a newer kind would run and talk nonsense."""
    path = tmp_path / "m.gguf"
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    write_gguf(path, tokenizer_json=tokenizer_json, extra_tensors=extra)
    with pytest.raises(ConfigError, match=r"tensors the family does not know: blk.0.attn_sinks.weight"):
        convert(path)


@pytest.mark.parametrize("keep", [0, 3, 40, 2000, 20000, -1])
def test_a_gguf_cut_anywhere_is_refused(tmp_path: Path, tokenizer_json: str, keep: int) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tokenizer_json=tokenizer_json)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"m.gguf"):
        convert(path)


@pytest.mark.parametrize("seed", range(8))
def test_damage_anywhere_in_the_header_is_refused_in_our_words(
    tmp_path: Path, tokenizer_json: str, seed: int
) -> None:
    """A vocabulary with broken merges, a count of 0 heads: nothing but ConfigError may come of a file."""
    path = tmp_path / "m.gguf"
    write_gguf(path, tokenizer_json=tokenizer_json, hidden_size=32, num_hidden_layers=1)
    whole = path.read_bytes()
    header_bytes = whole.index(b"blk.0.ffn_down")
    rng = random.Random(seed)
    for number in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(8, header_bytes)] = rng.choice((0, 1, 255))
        path.write_bytes(damaged)
        folder = tmp_path / str(number)
        folder.mkdir()
        with contextlib.suppress(ConfigError):
            convert_gguf(path, folder)


@pytest.mark.parametrize("key", ["llama.attention.head_count", "llama.block_count"])
def test_a_count_of_zero_is_refused_by_name(tmp_path: Path, tokenizer_json: str, key: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tokenizer_json=tokenizer_json)
    whole = path.read_bytes()
    at = whole.index(key.encode() + b"\x04") + len(key) + 4  # its type, four bytes, stands before the value
    path.write_bytes(whole[:at] + bytes(4) + whole[at + 4 :])
    with pytest.raises(ConfigError, match=f"{key} 0, not a number above 0"):
        convert(path)


def test_counts_from_a_damaged_header_ask_for_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    huge = (1 << 60).to_bytes(8, "little")
    path.write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + huge + bytes(64)
    )
    with pytest.raises(ConfigError, match="is damaged or cut short"):
        convert(path)


_MEASURE = """
import sys
from pathlib import Path
from disagg.checkpoint.gguf import convert_gguf

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024

small, large = Path(sys.argv[1]), Path(sys.argv[2])
for path in (small, large):  # the small one brings what any conversion needs
    path.with_suffix("").mkdir()
    before = status("VmRSS")
    convert_gguf(path, path.with_suffix(""))
print(status("VmHWM") - before)
"""


def test_the_memory_of_a_conversion_does_not_grow_with_the_model(tmp_path: Path, tokenizer_json: str) -> None:
    small, large = tmp_path / "small.gguf", tmp_path / "large.gguf"
    write_gguf(small, quantization="Q8_0", tokenizer_json=tokenizer_json)
    write_gguf(
        large, quantization="Q8_0", tokenizer_json=tokenizer_json, hidden_size=1024, intermediate_size=4096
    )
    command = [sys.executable, "-c", _MEASURE, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert large.stat().st_size > 25e6
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 100e6
    assert int(done.stdout) < 15e6
