"""The sampler's kernel against the host's sampler, whose draws it must make."""

import numpy as np
import pytest
import torch
from torch import Tensor

from disagg.engine import host_sampler
from disagg.engine.draws import GREEDY_BELOW, SamplingRows
from disagg.engine.sampler import as_float32
from disagg.layers import cuda_ops
from support.gpu import DTYPES, Guarded, call
from support.sampling import make_rows

TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CAPTURED = pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
VOCABS = [1, 7, 33, 1000, 32003, 50257, 128256, 151936]
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 2000},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"min_p": 0.3, "top_p": 0.99, "temperature": 2.0},
    {"top_p": 0.99, "temperature": 50.0},
    {"temperature": 0.0},
    {"temperature": 1e-5},
    {"temperature": 0.01, "top_p": 0.9},
    {"temperature": 1e4},
    {"top_k": 1 << 30, "top_p": 0.7},
]


def make_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int, deviation: float = 3.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, device="cuda") * deviation).to(dtype)


def draw(
    logits: Tensor, rows: SamplingRows, captured: bool = False, slots: Tensor | None = None
) -> list[int]:
    n = len(logits)
    slots = torch.randperm(n + 5, device="cuda").int()[:n] if slots is None else slots
    out, last = Guarded(n, dtype=torch.int32), Guarded(n + 5, dtype=torch.int32)
    columns = [torch.from_numpy(c.copy()).cuda() for c in rows[:4]]
    keys = torch.from_numpy(rows.key.view(np.int32).reshape(-1, 2).copy()).cuda()
    call(lambda: cuda_ops.sample(logits, *columns, keys, slots, out.tensor, last.tensor), captured)
    tokens, real = out.check(), slots >= 0
    assert (tokens[~real] == -7).all()
    assert torch.equal(last.check()[slots[real].long()], tokens[real])
    assert (last.tensor != -7).sum() == real.sum()
    return tokens.tolist()


def assert_drawn_as_on_the_host(logits: Tensor, rows: SamplingRows, tokens: list[int]) -> None:
    """Logarithms may differ in the last bit, so of two equally good tokens either may win."""
    values = as_float32(logits.cpu())
    for i, (got, want) in enumerate(zip(tokens, host_sampler.draw_rows(values, rows), strict=True)):
        if got == want:
            continue
        assert rows.temperature[i] >= GREEDY_BELOW, f"row {i}: {got}, not {want}"
        scaled = host_sampler.scale(values[i], rows.temperature[i])
        limits = int(rows.top_k[i]), float(rows.top_p[i]), float(rows.min_p[i])
        assert scaled[got] >= host_sampler.keep_above(scaled, *limits), f"row {i}: {got} is not kept"
        noise = host_sampler.log_exponential(int(rows.key[i]), np.array([got, want], np.uint32))
        scores = scaled[[got, want]] - noise
        assert abs(scores[0] - scores[1]) <= 1e-5 * max(1.0, abs(scores[1])), f"row {i}: {got}, not {want}"


@CAPTURED
@TYPES
@pytest.mark.parametrize("vocab", VOCABS)
def test_rows_of_every_kind_in_one_call(vocab: int, dtype: torch.dtype, captured: bool) -> None:
    n = len(FILTERS) * 3
    columns = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    mixed = {
        name: [FILTERS[i % len(FILTERS)].get(name, value) for i in range(n)]
        for name, value in columns.items()
    }
    rows = make_rows(n, key=range(n), position=vocab, **mixed)
    logits = make_logits(n, vocab, dtype, seed=vocab + captured)
    assert_drawn_as_on_the_host(logits, rows, draw(logits, rows, captured))


@TYPES
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_many_draws_of_each_kind(filters: dict[str, float], dtype: torch.dtype) -> None:
    rows = make_rows(200, **{"temperature": 0.8, "key": range(200), **filters})
    for deviation in (0.1, 3.0, 30.0):
        logits = make_logits(200, 3001, dtype, seed=1, deviation=deviation)
        assert_drawn_as_on_the_host(logits, rows, draw(logits, rows))


@TYPES
def test_top_k_and_top_p_of_a_wide_choice_keep_what_the_definition_keeps(dtype: torch.dtype) -> None:
    """top_p is a share of what top_k keeps, however many those are."""
    logits = make_logits(1, 3000, dtype, seed=3)
    p = logits.double().softmax(-1)[0].cpu().numpy()
    order = np.argsort(-p, kind="stable")[:2000]
    before = np.cumsum(p[order]) - p[order]
    floor = p[order[before < 0.95 * p[order].sum()]].min()
    rows = make_rows(4000, temperature=1.0, top_k=2000, top_p=0.95, key=range(4000))
    drawn = set(draw(logits.expand(4000, -1).contiguous(), rows))
    assert drawn <= set(np.flatnonzero(p >= floor * (1 - 1e-9)).tolist())
    assert len(drawn) > 100


@TYPES
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = make_logits(64, 50257, dtype, seed=2)
    for i in range(64):
        logits[i, torch.randperm(50257)[:5].cuda()] = 100
    logits[5] = 0
    logits[5, ::2] = -0.0
    rows = make_rows(64, temperature=0.0)
    assert draw(logits, rows) == as_float32(logits.cpu()).argmax(-1).tolist()


@TYPES
def test_parts_of_wider_rows_and_odd_strides(dtype: torch.dtype) -> None:
    wide = make_logits(9, 5003, dtype, seed=4)
    rows = make_rows(9, temperature=[0, 1, 1, 1, 1, 1, 1, 1, 1], top_k=[0, 0, 3] * 3, key=range(9))
    for first, last in ((0, 4096), (8, 4104), (3, 5000)):
        part = wide[:, first:last]
        assert_drawn_as_on_the_host(part, rows, draw(part, rows))


def test_padding_writes_nothing() -> None:
    logits = make_logits(6, 1000, torch.bfloat16, seed=5)
    logits[2] = float("nan")
    slots = torch.tensor([3, 0, -1, -1, 7, 1], dtype=torch.int32, device="cuda")
    for captured in (False, True):
        draw(logits, make_rows(6, key=range(6)), captured, slots)


@TYPES
def test_masked_tokens_are_never_drawn(dtype: torch.dtype) -> None:
    logits = make_logits(50, 3000, dtype, seed=6)
    logits[:, 1::2] = -torch.inf
    for filters in ({}, {"top_k": 2000}, {"top_p": 0.99}, {"min_p": 1e-6}, {"temperature": 0.0}):
        rows = make_rows(50, **{"key": range(50), **filters})
        tokens = draw(logits, rows)
        assert all(token % 2 == 0 for token in tokens)
        assert_drawn_as_on_the_host(logits, rows, tokens)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_row_of_no_numbers_still_gives_a_token_of_the_vocabulary(value: float) -> None:
    """A broken model must not become an illegal access in the next step's embedding."""
    logits = torch.full((12, 40000), value, dtype=torch.bfloat16, device="cuda")
    mixed = {"temperature": [0, 1, 1, 1] * 3, "top_k": [0, 0, 5, 0] * 3, "top_p": [1, 1, 1, 0.5] * 3}
    assert all(0 <= token < 40000 for token in draw(logits, make_rows(12, key=range(12), **mixed)))


def test_a_draw_does_not_depend_on_what_else_is_in_the_batch() -> None:
    logits = make_logits(40, 151936, torch.bfloat16, seed=7)
    rows = make_rows(40, temperature=0.6, top_p=[1.0, 0.9] * 20, key=range(40))
    together = draw(logits, rows)
    assert draw(logits, rows) == together
    for i in (0, 17, 39):
        assert draw(logits[i : i + 1], rows.at(np.array([i]))) == together[i : i + 1]


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 40,000 positions: a biased hash or rule would show."""
    p = np.array([0.5, 0.25, 0.15, 0.06, 0.03, 0.01])
    n = 40_000
    logits = torch.from_numpy(np.log(p).astype(np.float32)).cuda().expand(n, -1).contiguous()
    drawn = draw(logits, make_rows(n, temperature=1.0, position=range(n)))
    chi_square = ((np.bincount(drawn, minlength=6) - p * n) ** 2 / (p * n)).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: once in a thousand keys
