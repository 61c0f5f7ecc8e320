"""The C++ kernels against attention written down naively, at every level this processor runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg._cpu import Level, PagedAttention, levels
from disagg.attention import CpuAttention
from disagg.errors import ConfigError
from disagg.kv.layout import PageLayout
from support.attention import Case, Heads, Piece, expected, make_case

DTYPES = (torch.float32, torch.bfloat16)
# float32: sums in another order. bfloat16: weights and results are rounded to 8 bits.
TOLERANCE = {torch.float32: dict(atol=2e-5, rtol=2e-5), torch.bfloat16: dict(atol=2e-2, rtol=2e-2)}


def backend(heads: Heads, threads: int = 1, level: Level | None = None) -> CpuAttention:
    layout = PageLayout(heads.page_size, heads.num_kv_heads, 2, heads.head_dim, 4)
    return CpuAttention(layout, heads.num_heads, threads, level)


def sizes() -> st.SearchStrategy[Heads]:
    return st.builds(
        Heads,
        num_kv_heads=st.integers(1, 3),
        group=st.sampled_from([1, 2, 3, 5, 8, 13, 96]),
        head_dim=st.sampled_from([8, 16, 24, 40, 64, 80, 128, 256]),
        page_size=st.sampled_from([1, 3, 16, 64]),
    )


def some_sequences(longest: int = 300) -> st.SearchStrategy[list[Piece]]:
    # Around the edges of tiles (64) and chunks (256) most can go wrong.
    lengths = st.one_of(st.integers(1, longest), st.sampled_from([63, 64, 65, 128, 255, 256, 257]))
    one = lengths.flatmap(
        lambda n: st.builds(Piece, st.just(n), st.one_of(st.just(1), st.integers(1, min(n, 40))))
    )
    return st.lists(one, min_size=1, max_size=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", levels(), ids=lambda level: level.name)
@settings(max_examples=25, deadline=None)
@given(heads=sizes(), sequences=some_sequences(), threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_equals_attention_in_float64(
    level: Level, dtype: torch.dtype, heads: Heads, sequences: list[Piece], threads: int, seed: int
) -> None:
    """The pool is NaN outside of the sequences' tokens, so this also says that nothing else is read."""
    case = make_case(heads, sequences, dtype=dtype, seed=seed)
    out = case.run(backend(heads, threads, level))
    torch.testing.assert_close(out.double(), expected(case), **TOLERANCE[dtype])


MIXED = [Piece(700), Piece(64), Piece(1), Piece(300, 150), Piece(97, 97), Piece(1000, 33)]


@pytest.fixture(params=[(dtype, level) for dtype in DTYPES for level in levels()], ids=str)
def setting(request: pytest.FixtureRequest) -> tuple[torch.dtype, Level]:
    return request.param  # type: ignore[no-any-return]


def mixed(dtype: torch.dtype) -> Case:
    return make_case(Heads(), MIXED, dtype=dtype)


def test_a_sequence_alone_gives_the_same_bits_as_in_a_batch(setting: tuple[torch.dtype, Level]) -> None:
    """Otherwise the text of a request would depend on who else is served."""
    dtype, level = setting
    case = mixed(dtype)
    together = case.run(backend(case.heads, 1, level))
    for i in range(len(MIXED)):
        alone = case.only(i).run(backend(case.heads, 1, level))
        assert torch.equal(alone, case.rows(together, i))


def test_threads_change_no_bit(setting: tuple[torch.dtype, Level]) -> None:
    """Also where one long sequence is cut along its KV for them."""
    dtype, level = setting
    case = mixed(dtype)
    one = case.run(backend(case.heads, 1, level))
    for threads in (2, 3, 7):
        assert torch.equal(case.run(backend(case.heads, threads, level)), one)
        long = case.only(0)
        assert torch.equal(long.run(backend(case.heads, threads, level)), case.rows(one, 0))


@pytest.mark.parametrize("chunk", [1, 16, 37, 64])
def test_chunks_of_a_prompt_change_no_bit(setting: tuple[torch.dtype, Level], chunk: int) -> None:
    """A prefix hit, a decode and a replay after a fault are then the same text, bfloat16 included."""
    dtype, level = setting
    case = mixed(dtype)
    attention = backend(case.heads, 2, level)
    whole = case.only(3).run(attention)
    parts = [case.only(3, at, min(at + chunk, 150)).run(attention) for at in range(0, 150, chunk)]
    assert torch.equal(torch.cat(parts), whole)


def test_one_plan_serves_every_layer_and_a_new_plan_replaces_it() -> None:
    case, other = make_case(Heads(), [Piece(40, 9)], dtype=torch.float32), mixed(torch.float32)
    attention = backend(case.heads)
    case.run(attention)
    first = other.run(attention)
    out = torch.empty_like(first)
    other.pool[:, :, 0] = other.pool[:, :, 1]
    attention.run(0, other.q, other.pool, out)
    assert torch.equal(out, first)


def test_scores_far_apart_do_not_overflow() -> None:
    case = make_case(Heads(), [Piece(300, 70)], dtype=torch.float32)
    case.q.mul_(300)  # e^300 is no float32
    torch.testing.assert_close(case.run(backend(case.heads)).double(), expected(case), atol=1e-3, rtol=1e-3)


def test_an_empty_batch_is_no_work() -> None:
    case = make_case(Heads(), [], dtype=torch.float32)
    assert case.run(backend(case.heads)).shape == (0, 6, 32)


@pytest.mark.parametrize(
    ("heads", "problem"),
    [
        (Heads(head_dim=20), "head_dim"),
        (Heads(head_dim=264), "head_dim"),
        (Heads(group=97), "96 query heads"),
    ],
)
def test_a_model_that_the_kernels_cannot_run_is_refused(heads: Heads, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        backend(heads)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ((ints(0, 1), ints(17), ints(0, 1), ints(5)), "too few pages"),
        ((ints(0, 3), ints(2), ints(0, 1), ints(5)), "fewer tokens in KV"),
        ((ints(0, 1), ints(16), ints(0, 2), ints(5)), "too short"),
        ((ints(0, 1), ints(16), ints(0, 1), ints(-1)), "negative"),
        ((ints(1, 0), ints(16), ints(0, 1), ints(5)), "ascend"),
        ((ints(0, 1, 2), ints(16), ints(0, 1), ints(5)), "one longer"),
    ],
)
def test_a_wrong_plan_is_refused_and_forgets_the_last_one(
    plan: tuple[torch.Tensor, ...], problem: str
) -> None:
    """A bug of ours must not become a read of foreign memory."""
    attention = PagedAttention(2, 1, 8, 16, 1)
    attention.plan(ints(0, 1), ints(16), ints(0, 1), ints(5))
    with pytest.raises(ValueError, match=problem):
        attention.plan(*plan)
    q = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="planned tokens"):
        attention.run(q, torch.zeros(6, 1, 1, 2, 16, 8), 0, torch.zeros_like(q))


def test_indices_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        PagedAttention(2, 1, 8, 16, 1).plan(ints(0, 1).long(), ints(16), ints(0, 1), ints(5))


@pytest.mark.parametrize(
    ("q", "pool", "layer", "problem"),
    [
        (torch.zeros(1, 2, 8), torch.zeros(5, 1, 1, 2, 16, 8), 0, "past the end"),
        (torch.zeros(1, 2, 8), torch.zeros(6, 1, 1, 2, 16, 8), 1, "no such layer"),
        (torch.zeros(1, 2, 8), torch.zeros(6, 2, 1, 2, 16, 8), 0, "another shape"),
        (torch.zeros(2, 2, 8), torch.zeros(6, 1, 1, 2, 16, 8), 0, "planned tokens"),
        (torch.zeros(1, 2, 8), torch.zeros(6, 1, 1, 2, 16, 8).bfloat16(), 0, "pool's type"),
        (torch.zeros(1, 2, 8).half(), torch.zeros(6, 1, 1, 2, 16, 8).half(), 0, "float32 or bfloat16"),
        (torch.zeros(1, 2, 16)[..., ::2], torch.zeros(6, 1, 1, 2, 16, 8), 0, "pool's type"),
    ],
)
def test_a_wrong_run_is_refused(q: torch.Tensor, pool: torch.Tensor, layer: int, problem: str) -> None:
    attention = PagedAttention(2, 1, 8, 16, 1)
    attention.plan(ints(0, 1), ints(16), ints(0, 1), ints(5))
    with pytest.raises(ValueError, match=problem):
        attention.run(q, pool, layer, torch.zeros_like(q))
