"""Safetensors on disk: what is read is what the reference library wrote, and damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from disagg.checkpoint.tensors import TensorReader, TensorSpec, TensorWriter, read_header, read_index
from disagg.errors import ConfigError
from support.checkpoints import make_checkpoint


def test_any_bytes_of_a_tensor_are_read_from_any_shard(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", max_shard_bytes=200_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    expected = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    entries = read_index(folder)
    assert entries.keys() == expected.keys()
    with TensorReader() as reader:
        for name, tensor in expected.items():
            whole = bytearray(tensor.nbytes)
            reader.read_into(entries[name], 0, memoryview(whole))
            assert whole == tensor.tobytes()
            tail = bytearray(4)
            reader.read_into(entries[name], tensor.nbytes - 4, memoryview(tail))
            assert tail == tensor.tobytes()[-4:]


def test_what_is_written_in_pieces_the_reference_library_reads(tmp_path: Path) -> None:
    a, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(5, dtype=np.float16)
    specs = [TensorSpec("a", "F32", (3, 4)), TensorSpec("b", "F16", (5,))]
    writer = TensorWriter(tmp_path / "x.safetensors", specs)
    for row in a:
        writer.write(row.data.cast("B"))
    writer.write(b.data.cast("B"))
    writer.finish()
    loaded = load_file(tmp_path / "x.safetensors")
    assert (loaded["a"] == a).all()
    assert (loaded["b"] == b).all()
    assert all(entry.offset % 4 == 0 for entry in read_header(tmp_path / "x.safetensors"))


def test_a_writer_notices_missing_bytes(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "x.safetensors", [TensorSpec("a", "F32", (2,))])
    writer.write(memoryview(bytes(4)))
    with pytest.raises(AssertionError):
        writer.finish()
    writer.close()


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    """A download that broke off must not be served."""
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(1000, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model.safetensors is cut short: a ends at"):
        read_index(tmp_path)


def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(1000, np.float32)}, path)
    entry = read_index(tmp_path)["a"]
    path.write_bytes(path.read_bytes()[:2000])
    with TensorReader() as reader, pytest.raises(ConfigError, match="was cut short while a was read"):
        reader.read_into(entry, 0, memoryview(bytearray(4000)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"\xff" * 64, "is not a safetensors file"),
        ((16).to_bytes(8, "little") + b"{not json.......", "damaged safetensors header"),
        ((8).to_bytes(8, "little") + b"[1,2,3] ", "damaged safetensors header"),
    ],
)
def test_other_files_are_not_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "offsets", "message"),
    [
        ("F32", (0, 12), "has 12 bytes, not what its shape needs"),
        ("Q4", (0, 16), "unknown type Q4"),
        ("F32", (-16, 0), "is cut short"),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, dtype: str, offsets: tuple[int, int], message: str
) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": offsets}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ConfigError, match=message):
        read_index(tmp_path)


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", max_shard_bytes=200_000)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=f"{gone.name} named by model.safetensors.index.json is missing"):
        read_index(folder)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ConfigError, match="is not an index of safetensors files"):
        read_index(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no .safetensors file"):
        read_index(tmp_path)
