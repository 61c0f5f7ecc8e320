"""How a model's tensors are cut: every element of the checkpoint lands where it must, exactly once."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from disagg.checkpoint import read_index
from disagg.errors import ConfigError
from disagg.layers.rope import RopeSpec
from disagg.models import ModelSpec, check_tensor_parallel, load_spec, tensor_parallel_sizes
from disagg.models.parameters import plan_parameters, vocab_range
from disagg.models.spec import ExpertsSpec
from support.checkpoints import FAMILIES, make_checkpoint

SPEC = ModelSpec(
    family="llama",
    num_layers=2,
    hidden_size=24,
    num_heads=12,
    num_kv_heads=6,
    head_dim=4,
    intermediate_size=36,
    vocab_size=50,
    rope=RopeSpec(),
    rms_eps=1e-5,
    tie_word_embeddings=False,
    qk_norm=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    max_position_embeddings=64,
    eos_token_ids=(),
    dtype="float32",
)
EXPERTS = replace(
    SPEC, intermediate_size=12, mlp_bias=False, experts=ExpertsSpec(count=5, choices=2, normalize=True)
)


@pytest.mark.parametrize("spec", [SPEC, EXPERTS], ids=["mlp", "experts"])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_ranks_share_every_split_tensor_and_repeat_the_norms(size: int, spec: ModelSpec) -> None:
    """An element two ranks have is counted twice in their sum, one that none has is lost."""
    taken: dict[str, Counter[tuple[int, int]]] = {}
    for rank in range(size):
        for parameter in plan_parameters(spec, rank, size):
            for piece in parameter.pieces:
                columns = piece.columns or range(parameter.shape[-1] if len(parameter.shape) > 1 else 1)
                count = taken.setdefault(piece.name, Counter())
                count.update((row, column) for row in piece.rows for column in columns)
    whole = {p.name: pp.shape for pp in plan_parameters(spec, 0, 1) for p in pp.pieces}
    assert taken.keys() == whole.keys()
    for name, count in taken.items():
        repeated = name.endswith(("norm.weight", "mlp.gate.weight"))
        assert set(count.values()) == {size if repeated else 1}, name


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_rank_has_whole_heads_and_their_columns_of_the_output(size: int) -> None:
    for rank in range(size):
        by_key = {p.key: p for p in plan_parameters(SPEC, rank, size)}
        q, k, v = by_key["layers.1.qkv"].pieces
        assert len(q.rows) == 2 * len(k.rows)
        assert k.rows == v.rows
        assert k.rows.start % SPEC.head_dim == 0
        assert by_key["layers.1.output"].pieces[0].columns == q.rows
        assert by_key["layers.1.down"].pieces[0].columns == by_key["layers.1.gate_up"].pieces[1].rows
        assert ("layers.0.output_bias" in by_key) == (rank == 0)
        assert ("layers.0.down_bias" in by_key) == (rank == 0)


@given(st.integers(1, 300), st.integers(1, 40))
def test_ranks_share_the_vocabulary_without_gap_or_overlap(vocab_size: int, size: int) -> None:
    spec = replace(SPEC, vocab_size=vocab_size)
    ids = [token for rank in range(size) for token in vocab_range(spec, rank, size)]
    assert ids == list(range(vocab_size))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_names_all_tensors_of_a_checkpoint(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path / "m", family)
    planned = {piece.name for p in plan_parameters(load_spec(folder), 0, 1) for piece in p.pieces}
    assert planned == read_index(folder).keys()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_sizes_that_divide_are_accepted(size: int) -> None:
    check_tensor_parallel(SPEC, size)
    assert size in tensor_parallel_sizes(SPEC)


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({}, 4, "tensor_parallel_size 4 does not divide the model's 6 KV heads; use 1, 2, 3 or 6"),
        ({}, 12, "tensor_parallel_size 12 does not divide the model's 6 KV heads; use 1, 2, 3 or 6"),
        (
            {"intermediate_size": 32},
            3,
            "tensor_parallel_size 3 does not divide the model's intermediate_size 32; use 1 or 2",
        ),
        (
            {"num_kv_heads": 1},
            2,
            "tensor_parallel_size 2 does not divide the model's 1 KV heads; use 1",
        ),
    ],
)
def test_other_sizes_are_refused_with_those_that_work(
    fields: dict[str, int], size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_tensor_parallel(replace(SPEC, **fields), size)
    assert str(refused.value) == message


@pytest.mark.parametrize("spec", [SPEC, EXPERTS], ids=["mlp", "experts"])
def test_shapes_are_those_of_the_pieces(spec: ModelSpec) -> None:
    for parameter in plan_parameters(spec, 1, 3):
        rows = sum(len(piece.rows) for piece in parameter.pieces)
        columns = {len(piece.columns) for piece in parameter.pieces if piece.columns is not None}
        assert np.prod(parameter.shape[:-1] or parameter.shape) == rows
        assert not columns or columns == {parameter.shape[-1]}
        assert np.prod(parameter.shape) > 0
