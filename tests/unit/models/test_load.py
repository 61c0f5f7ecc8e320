"""Loading: every parameter is the checkpoint's, a rank reads its own part only, memory stays bounded."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from disagg.checkpoint import ModelFiles, TensorEntry, TensorReader, read_index
from disagg.errors import ConfigError
from disagg.layers.fp8 import ScaledMatrix, scale_rows
from disagg.models import load_model, load_spec
from disagg.models.load import fill, whole_shapes
from disagg.models.parameters import Parameter, plan_parameters
from disagg.models.sources import NOISE_LENGTH, CheckpointSource, NoiseSource
from support.checkpoints import FAMILIES, make_checkpoint
from support.paged import PagedDriver, PagedSequence

CPU = torch.device("cpu")


def weights_of(folder: Path) -> dict[str, NDArray[np.float32]]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def expected(parameter: Parameter, weights: dict[str, NDArray[np.float32]]) -> Tensor:
    """The pieces cut with numpy and stacked."""
    cuts = []
    for piece in parameter.pieces:
        cut = weights[piece.name][piece.rows.start : piece.rows.stop]
        cuts.append(cut if piece.columns is None else cut[:, piece.columns.start : piece.columns.stop])
    return torch.from_numpy(np.concatenate(cuts).reshape(parameter.shape))


def load(folder: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    spec = load_spec(folder)
    with TensorReader() as reader:
        source = CheckpointSource(read_index(folder), reader)
        return fill(plan_parameters(spec, rank, size), source, whole_shapes(spec), CPU, dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 3])
def test_every_parameter_is_the_checkpoints(tmp_path: Path, family: str, size: int) -> None:
    folder = make_checkpoint(tmp_path / "m", family, max_shard_bytes=300_000)
    weights = weights_of(folder)
    for rank in range(size):
        tensors = load(folder, rank, size)
        plan = plan_parameters(load_spec(folder), rank, size)
        assert tensors.keys() == {parameter.key for parameter in plan}
        for parameter in plan:
            assert torch.equal(tensors[parameter.key], expected(parameter, weights)), parameter.key


def test_tensors_larger_than_the_buffer_come_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg.models.load.CHUNK_BYTES", 7000)  # no multiple of any row
    folder = make_checkpoint(tmp_path / "m")
    weights, tensors = weights_of(folder), load(folder, 1, 2)
    for parameter in plan_parameters(load_spec(folder), 1, 2):
        assert torch.equal(tensors[parameter.key], expected(parameter, weights))


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_weights_are_rounded_to_the_nearest(tmp_path: Path, stored: type) -> None:
    folder = make_checkpoint(tmp_path / "m")
    weights = {name: tensor.astype(stored) for name, tensor in weights_of(folder).items()}
    save_file(weights, folder / "model.safetensors")
    tensors = load(folder, dtype=torch.bfloat16)
    for parameter in plan_parameters(load_spec(folder), 0, 1):
        assert torch.equal(tensors[parameter.key], expected(parameter, weights).to(torch.bfloat16))


class CountingReader(TensorReader):
    """Counts the bytes that are asked of the files."""

    num_bytes = 0

    def read_into(self, entry: TensorEntry, begin: int, buffer: memoryview) -> None:
        self.num_bytes += len(buffer)
        super().read_into(entry, begin, buffer)


def test_a_rank_reads_its_own_part_only(tmp_path: Path) -> None:
    """Eight ranks that each read the whole checkpoint would take eight times as long to start."""
    folder = make_checkpoint(tmp_path / "m")
    spec = load_spec(folder)
    plan = plan_parameters(spec, 1, 3)
    with CountingReader() as reader:
        source = CheckpointSource(read_index(folder), reader)
        tensors = fill(plan, source, whole_shapes(spec), CPU, torch.float32)
        assert reader.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    told: list[tuple[int, int]] = []
    files = ModelFiles(folder, "m", "test")
    load_model(files, load_spec(folder), progress=lambda done, total: told.append((done, total)))
    total = sum(tensor.nbytes for tensor in weights_of(folder).values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    weights = weights_of(folder)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks the tensor model.layers.2.mlp.up_proj.weight"):
        load(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    """Also where this rank's part of it would fit."""
    folder = make_checkpoint(tmp_path / "m")
    weights = weights_of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: np.ascontiguousarray(weights[name][:-1])}, folder / "model.safetensors")
    with pytest.raises(
        ConfigError, match=rf"{name} has shape \(383, 192\), config.json implies \(384, 192\)"
    ):
        load(folder, 0, 2)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    weights = weights_of(folder)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.norm.weight has type I8; loaded are F32, F16 and BF16"):
        load(folder)


@pytest.mark.parametrize("family", ["llama_linear", "qwen3", "qwen3_moe"])
def test_dummy_weights_are_the_same_for_every_tensor_parallel_size(tmp_path: Path, family: str) -> None:
    spec = load_spec(make_checkpoint(tmp_path / "m", family))

    def make(rank: int, size: int) -> dict[str, Tensor]:
        plan = plan_parameters(spec, rank, size)
        return fill(plan, NoiseSource(7, 0.02), whole_shapes(spec), CPU, torch.float32)

    whole, ranks = make(0, 1), [make(rank, 3) for rank in range(3)]
    for key in ("layers.0.output", "layers.2.down"):
        assert torch.equal(torch.cat([rank[key] for rank in ranks], dim=-1), whole[key])
    gate, up = whole["layers.1.gate_up"].chunk(2, dim=-2)
    for i, part in enumerate((gate, up)):
        shares = [rank["layers.1.gate_up"].chunk(2, dim=-2)[i] for rank in ranks]
        assert torch.equal(torch.cat(shares, dim=-2), part)
    assert whole["layers.0.output"].std() == pytest.approx(0.02, rel=0.05)
    assert (whole["final_norm"] == 1).all()
    assert not torch.equal(whole["layers.0.output"], whole["layers.1.output"])
    assert not torch.equal(make(0, 1)["embedding"][:10], NoiseSource(8, 0.02)._noise[:10])


def test_noise_goes_on_past_its_end() -> None:
    source = NoiseSource(0, 1.0)
    out = torch.full((NOISE_LENGTH + 5,), torch.nan)
    source._copy(NOISE_LENGTH - 2, out)
    assert torch.equal(out[:2], source._noise[-2:])
    assert torch.equal(out[2 : 2 + NOISE_LENGTH], source._noise)
    assert torch.equal(out[2 + NOISE_LENGTH :], source._noise[:3])


@pytest.mark.parametrize("size", [1, 3])
def test_quantization_rounds_the_layers_matrices_alone(tmp_path: Path, size: int) -> None:
    """Each row of a rank's part by its own scale, the same as if it were whole in memory."""
    folder = make_checkpoint(tmp_path / "m", "llama_linear", num_hidden_layers=1)
    spec = load_spec(folder)
    for rank in range(size):
        plain = load(folder, rank, size)
        with TensorReader() as reader:
            source, plan = CheckpointSource(read_index(folder), reader), plan_parameters(spec, rank, size)
            got = fill(plan, source, whole_shapes(spec), CPU, torch.bfloat16, quantized=True)
        for key, weight in got.items():
            if key.removeprefix("layers.0.") in ("qkv", "output", "gate_up", "down"):
                assert isinstance(weight, ScaledMatrix)
                want = scale_rows(plain[key])
                assert torch.equal(weight.values.view(torch.uint8), want.values.view(torch.uint8)), key
                assert torch.equal(weight.scales, want.scales), key
            else:
                assert isinstance(weight, Tensor)
                assert torch.equal(weight, plain[key].bfloat16()), key


def test_a_quantized_decoder_is_near_the_plain_one(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "qwen3")
    files, spec = ModelFiles(folder, "m", "test"), load_spec(folder)
    tokens = [(7 * i + 3) % 320 for i in range(40)]

    def logits(quantization: Literal["fp8"] | None) -> Tensor:
        driver = PagedDriver(load_model(files, spec, quantization=quantization))
        return driver.step([(PagedSequence(tokens), 40)], range(40))

    plain, rounded = logits(None), logits("fp8")
    error = ((rounded - plain).norm() / plain.norm()).item()
    assert 1e-3 < error < 0.2


def test_dummy_weights_need_no_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    spec = load_spec(folder)
    for path in folder.iterdir():
        path.unlink()
    decoder = load_model(ModelFiles(folder, "m", "test"), spec, load_format="dummy")
    assert decoder.dtype == torch.float32


_MEASURE = """
import sys
from pathlib import Path
import torch
from disagg.checkpoint import ModelFiles
from disagg.layers.fp8 import ScaledMatrix, scale_rows
from disagg.models import load_model, load_spec

def status(field):  # in bytes; getrusage would begin with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024

def load(folder):
    return load_model(ModelFiles(Path(folder), "m", ""), load_spec(Path(folder)), dtype=dtype)

dtype = getattr(torch, sys.argv[3])
load(sys.argv[2])  # what the first load of any model needs once
before = status("VmRSS")
model = load(sys.argv[1])
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_of_a_load_stays_under_1_3_times_the_weights(tmp_path: Path, dtype: str) -> None:
    """A worker that needs twice its weights to start does not fit where it would run."""
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4, "vocab_size": 16_000}
    folder = make_checkpoint(tmp_path / "m", max_shard_bytes=50_000_000, **shape)
    num_bytes = sum(entry.num_bytes for entry in read_index(folder).values())
    weights_bytes = num_bytes // 4 * getattr(torch, dtype).itemsize
    small = make_checkpoint(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder), str(small), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    grown = int(done.stdout)
    assert 0.9 * weights_bytes < grown < 1.3 * weights_bytes
