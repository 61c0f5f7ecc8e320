"""The decoder's own bookkeeping: buffers that steps share, and which logits are computed."""

from pathlib import Path

import pytest
import torch

from disagg.checkpoint import ModelFiles
from disagg.models import load_model, load_spec
from disagg.models.workspace import MAX_SIZES, Widths, Workspace
from support.checkpoints import make_checkpoint
from support.paged import PagedDriver, PagedSequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("m"), num_hidden_layers=2)


def driver(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "cpu") -> PagedDriver:
    decoder = load_model(ModelFiles(folder, "m", "test"), load_spec(folder), dtype=dtype)
    return PagedDriver(decoder, attention=attention)


TOKENS = [(7 * i + 3) % 320 for i in range(40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_same_to_the_bit_however_a_prompt_is_cut(folder: Path, dtype: torch.dtype) -> None:
    """Greedy output must not change with what else a step holds: see the ops' promise."""
    runs = driver(folder, dtype)
    whole = runs.step([(PagedSequence(TOKENS), 40)], range(40))
    assert whole.dtype == dtype
    cut = PagedSequence(TOKENS)
    parts = [runs.step([(cut, n)], range(n)) for n in (1, 1, 20, 17, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_only_the_wanted_logits_come_in_the_wanted_order(folder: Path) -> None:
    runs = driver(folder)
    whole = runs.step([(PagedSequence(TOKENS), 40)], range(40))
    for wanted in ([39], [5, 2, 2, 30], list(range(40)) * 2, []):
        logits = runs.step([(PagedSequence(TOKENS), 40)], wanted)
        assert torch.equal(logits, whole[wanted])
        assert logits.shape == (len(wanted), 320)


def test_logits_outlive_the_next_step(folder: Path) -> None:
    """Activations are overwritten by the next step; what was returned must not be among them."""
    runs = driver(folder)
    sequence = PagedSequence(TOKENS)
    logits = runs.step([(sequence, 20)])
    kept = logits.clone()
    runs.step([(sequence, 20)])
    assert torch.equal(logits, kept)


def test_a_chunk_without_logits_stores_the_same_kv(folder: Path) -> None:
    """The last layer stops after its K and V."""
    with_logits, without = driver(folder), driver(folder)
    with_logits.step([(PagedSequence(TOKENS), 40)])
    without.step([(PagedSequence(TOKENS), 40)], logits_at=())
    torch.testing.assert_close(without.pool, with_logits.pool, rtol=0, atol=0, equal_nan=True)
    assert not without.pool.isnan().all()


def test_two_decoders_in_one_process_do_not_meet(folder: Path, tmp_path: Path) -> None:
    other = driver(make_checkpoint(tmp_path / "other", "qwen3", seed=5))
    ours = driver(folder)
    expected = ours.generate(TOKENS, 8)
    interleaved, logits = ours.prefill(TOKENS)
    output = [int(logits.argmax())]
    while len(output) < 8:
        other.prefill(TOKENS[:9])
        interleaved.token_ids.append(output[-1])
        output.append(int(ours.step([(interleaved, 1)]).argmax()))
    assert output == expected


def test_half_precision_without_kernels_takes_torchs_way(folder: Path) -> None:
    """float16, as a GPU would run it, with the reference attention."""
    logits = driver(folder, torch.float16, "reference").step([(PagedSequence(TOKENS), 40)], range(40))
    exact = driver(folder).step([(PagedSequence(TOKENS), 40)], range(40))
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.float(), exact, atol=0.05, rtol=0.05)


WIDTHS = Widths(hidden_size=6, num_heads=3, num_kv_heads=1, head_dim=2, intermediate_size=5)


def test_buffers_are_shared_by_all_sizes() -> None:
    workspace = Workspace(WIDTHS, torch.float32, torch.device("cpu"))
    large, small = workspace.activations(8), workspace.activations(3)
    assert large.gate_up.shape == (8, 10)
    assert small.gate_up.data_ptr() == large.gate_up.data_ptr()
    assert small.q.shape == (3, 3, 2)
    assert small.v.data_ptr() == small.qkv.data_ptr() + 8 * 4
    assert workspace.activations(3) is small
    assert workspace.activations(9).residual.shape == (9, 6)
    assert workspace.activations(3) is not small  # the buffers have moved


def test_views_of_many_sizes_do_not_pile_up() -> None:
    workspace = Workspace(WIDTHS, torch.float32, torch.device("cpu"))
    first = workspace.activations(1000)
    for n in range(1, 2 * MAX_SIZES):
        workspace.activations(n)
    assert len(workspace._made) <= MAX_SIZES
    assert workspace.activations(1000).residual.data_ptr() == first.residual.data_ptr()
