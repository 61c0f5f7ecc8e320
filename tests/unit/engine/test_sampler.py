"""What is drawn depends on the logits and the draw's key alone, and follows the distribution."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from disagg.engine import host_sampler
from disagg.engine.draws import draw_keys
from disagg.engine.sampler import as_float32, log_exponential, sample, sample_batch
from support.sampling import make_rows

VOCAB = 3000


def make_logits(n: int, vocab: int = VOCAB, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, vocab)).astype(np.float32) * 3


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def kept_by_rule(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> set[int]:
    """The tokens that may be drawn, by the definition in float64."""
    p = softmax(logits / np.float32(temperature))
    kept = p >= min_p * p.max()
    order = [i for i in np.argsort(-p, kind="stable").tolist() if kept[i]]
    order = order[: top_k or None]
    share = p[order] / p[order].sum()
    before = np.cumsum(share) - share
    return {i for i, b in zip(order, before.tolist(), strict=True) if b < top_p}


@pytest.fixture(params=["host", "torch"])
def draw(request: pytest.FixtureRequest) -> object:
    """Both samplers, called alike."""
    if request.param == "host":
        return host_sampler.draw_rows
    return lambda logits, rows: sample_batch(torch.from_numpy(logits), rows).tolist()


def test_greedy_is_the_first_of_the_likeliest(draw: object) -> None:
    logits = make_logits(4)
    logits[1, [7, 900]] = 100
    rows = make_rows(4, temperature=[0, 0, 1e-9, 0], key=range(4))
    assert draw(logits, rows) == logits.argmax(-1).tolist()
    assert draw(logits, rows)[1] == 7


FILTERS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 2000, "top_p": 0.95},
    {"top_k": 2000},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"min_p": 0.3, "top_p": 0.99, "temperature": 2.0},
    {"top_p": 0.99, "temperature": 50.0},  # flat: the likeliest 1,024 do not reach it
    {"top_k": 2000, "top_p": 0.3, "temperature": 50.0},  # a share of the 2,000, not of all
    {"top_k": 2000, "top_p": 0.6, "temperature": 50.0},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_only_what_the_filters_keep_is_drawn(draw: object, filters: dict) -> None:
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    logits = make_logits(1)
    kept = kept_by_rule(logits[0], **options)
    n = 400
    drawn = draw(np.repeat(logits, n, 0), make_rows(n, key=range(n), **options))
    assert set(drawn) <= kept
    assert len(set(drawn)) > min(len(kept), 40) // 2


@pytest.mark.parametrize("filters", [{}, *FILTERS], ids=str)
def test_both_samplers_draw_the_same(filters: dict) -> None:
    """A GPU's worker goes on where a CPU's broke off."""
    n = 50
    logits = make_logits(n, seed=1)
    rows = make_rows(n, **{"temperature": 0.8, "key": range(n), **filters})
    assert host_sampler.draw_rows(logits, rows) == sample_batch(torch.from_numpy(logits), rows).tolist()


def test_both_make_the_same_noise() -> None:
    keys = draw_keys(np.arange(8, dtype=np.uint64), np.zeros(8, np.int32), np.zeros(8, np.int32))
    ids = np.arange(VOCAB)
    halves = torch.tensor(keys.view(np.int32).reshape(-1, 2))
    batch = log_exponential(halves, torch.from_numpy(ids).int()).numpy()
    for row, key in zip(batch, keys.tolist(), strict=True):
        np.testing.assert_allclose(
            row, host_sampler.log_exponential(key, ids.astype(np.uint32)), rtol=1e-5, atol=1e-6
        )


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 40,000 positions: a biased hash or rule would show."""
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.06, 0.03, 0.01], np.float32))[None]
    n = 40_000
    drawn = host_sampler.draw_rows(np.repeat(logits, n, 0), make_rows(n, temperature=1.0, position=range(n)))
    expected = softmax(logits[0]) * n
    chi_square = ((np.bincount(drawn, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: once in a thousand keys


@pytest.mark.parametrize("varied", ["seed", "choice_index", "position"])
def test_noise_is_independent_along_whatever_is_varied(varied: str) -> None:
    """Neighbouring seeds, choices and positions have nothing in common."""
    n = 2000
    columns = {
        "seed": np.zeros(n),
        "choice_index": np.zeros(n),
        "position": np.zeros(n),
        varied: np.arange(n),
    }
    keys = draw_keys(
        columns["seed"].astype(np.uint64),
        columns["choice_index"].astype(np.int32),
        columns["position"].astype(np.int32),
    )
    ids = np.arange(64, dtype=np.uint32)
    noise = np.exp([host_sampler.log_exponential(key, ids) for key in keys.tolist()])
    assert abs(noise.mean() - 1) < 0.02
    assert abs(noise.var() - 1) < 0.1
    correlation = np.corrcoef(np.concatenate((noise[:-1].T, noise[1:].T)))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.12  # 16,000 pairs with a deviation of 0.022


def test_a_draw_does_not_depend_on_what_else_is_in_the_batch(draw: object) -> None:
    logits = make_logits(6)
    rows = make_rows(6, temperature=[1, 0, 0.5, 1, 1, 2], top_k=[0, 0, 5, 0, 40, 0], key=range(6))
    together = draw(logits, rows)
    for i in range(6):
        assert draw(logits[i : i + 1], rows.at(np.array([i]))) == together[i : i + 1]
    order = np.array([5, 3, 0, 2])
    assert draw(logits[order], rows.at(order)) == [together[i] for i in order]


def test_a_draw_is_steady_under_rounding() -> None:
    """Other batch shapes round logits otherwise; text must not change for it."""
    n = 2000
    logits = make_logits(n, 500)
    nudged = logits * np.float32(1 + 1e-6)
    rows = make_rows(n, temperature=1.0, key=range(n))
    changed = np.not_equal(host_sampler.draw_rows(logits, rows), host_sampler.draw_rows(nudged, rows)).sum()
    assert changed <= 1


def test_seeds_use_all_64_bits() -> None:
    a, b = draw_keys(np.array([1, 1 + 2**63], np.uint64), np.zeros(2, np.int32), np.zeros(2, np.int32))
    assert a != b


def test_extreme_logits_are_drawn_from() -> None:
    logits = np.array([[-np.inf, 3e38, -3e38, -np.inf]], np.float32)
    for temperature in (1e-5, 1.0, 2.0):
        assert host_sampler.draw_rows(logits, make_rows(1, temperature=temperature)) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_type_are_read_exactly(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(make_logits(3)).to(dtype)
    np.testing.assert_array_equal(as_float32(logits), logits.float().numpy())
    assert sample(logits, make_rows(3, temperature=0)) == logits.float().numpy().argmax(-1).tolist()
