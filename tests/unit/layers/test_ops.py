"""Operators against float64, at every level this processor runs."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disagg import _cpu
from disagg._cpu import Level, levels
from disagg.layers import RopeSpec, cos_sin_cache, cpu_ops, ops, torch_ops

DTYPES = (torch.float32, torch.bfloat16)
# Half an ulp of bfloat16 is 2^-9 of the value; where a kernel rounds twice, two.
TOLERANCE = {torch.float32: dict(atol=1e-5, rtol=1e-5), torch.bfloat16: dict(atol=1e-2, rtol=8e-3)}
LEVELS = pytest.mark.parametrize("level", levels(), ids=lambda level: level.name)
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want.double(), **TOLERANCE[dtype])


def every_level(run: Callable[[Level], Tensor]) -> list[Tensor]:
    return [run(level) for level in levels()]


# ---- linear ----


@LEVELS
@TYPES
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 130),
    k=st.one_of(st.integers(1, 50), st.sampled_from([128, 129, 256, 300, 576])),
    bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_linear_equals_float64(
    level: Level, dtype: torch.dtype, rows: int, n: int, k: int, bias: bool, threads: int
) -> None:
    k *= 2  # bfloat16 is read in pairs
    x, weight = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    b = random(n, dtype=dtype, seed=2) if bias else None
    out = torch.full((rows, n), float("nan"), dtype=dtype)
    _cpu.linear(x, weight, b, out, threads, level)
    want = x.double() @ weight.double().T + (0 if b is None else b.double())
    # Errors grow with what is summed, not with the sum.
    scale = 1 if dtype == torch.bfloat16 else k**0.5
    assert_near(out / scale, want / scale, dtype)


@LEVELS
@TYPES
@pytest.mark.parametrize(("n", "k"), [(64, 576), (96, 1536), (32, 6)])
def test_a_packed_weight_gives_the_same_bits(level: Level, dtype: torch.dtype, n: int, k: int) -> None:
    x, weight = random(19, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    plain, packed = torch.empty(19, n, dtype=dtype), torch.empty(19, n, dtype=dtype)
    _cpu.linear(x, weight, None, plain, 2, level)
    _cpu.linear(x, ops.pack_linear(weight.clone()), None, packed, 1, level)
    assert torch.equal(packed, plain)


@LEVELS
@TYPES
def test_a_row_gives_the_same_bits_whatever_shares_the_step(level: Level, dtype: torch.dtype) -> None:
    """Otherwise the text of a request would depend on who else is served."""
    x, weight = random(70, 576, dtype=dtype), ops.pack_linear(random(96, 576, dtype=dtype, seed=1))

    def run(rows: Tensor, threads: int) -> Tensor:
        out = torch.empty(len(rows), 96, dtype=dtype)
        _cpu.linear(rows, weight, None, out, threads, level)
        return out

    whole = run(x, 1)
    assert torch.equal(run(x, 3), whole)
    for count in (1, 2, 3, 5, 8, 11, 13, 33):
        for at in (0, 29):
            assert torch.equal(run(x[at : at + count], 2), whole[at : at + count])


@TYPES
def test_packing_takes_no_memory_and_keeps_every_row(dtype: torch.dtype) -> None:
    weight = random(96, 34, dtype=dtype)
    before = weight.clone()
    packed = ops.pack_linear(weight)
    assert packed.data_ptr() == weight.data_ptr()
    assert packed.nbytes == weight.nbytes
    ids = torch.tensor([0, 95, 33, 0], dtype=torch.int32)
    assert torch.equal(ops.embedding(ids, packed), before[ids.long()])
    assert torch.equal(ops.embedding(ids, before), before[ids.long()])


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(33, 8), torch.zeros(32, 7).bfloat16(), torch.zeros(32, 8).half(), torch.zeros(8, 32).T],
    ids=["part of a panel", "odd pairs", "float16", "strided"],
)
def test_a_weight_that_cannot_be_packed_is_left_as_it_is(weight: Tensor) -> None:
    assert ops.pack_linear(weight) is weight


def test_linear_takes_rows_of_a_wider_matrix_and_types_without_kernels() -> None:
    wide = random(5, 40, dtype=torch.float32)
    weight, bias = random(9, 16, dtype=torch.float32), random(9, dtype=torch.float32)
    want = wide[:, 8:24].double() @ weight.double().T + bias
    assert_near(ops.linear(wide[:, 8:24], weight, bias), want, torch.float32)
    half = ops.linear(wide[:, 8:24].half(), weight.half(), bias.half())
    torch.testing.assert_close(half.double(), want, atol=2e-2, rtol=2e-2)
    odd = ops.linear(wide[:, 8:23].bfloat16(), weight[:, :15].bfloat16())
    assert odd.shape == (5, 9)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "out"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 6), None, torch.zeros(2, 4)),
        (torch.zeros(2, 8), torch.zeros(4, 8).bfloat16(), None, torch.zeros(2, 4)),
        (torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(3), torch.zeros(2, 4)),
        (torch.zeros(2, 8), torch.zeros(4, 8), None, torch.zeros(3, 4)),
        (torch.zeros(2, 8), torch.zeros(4, 8), None, torch.zeros(2, 8)[:, ::2]),
        (torch.zeros(2, 8), torch.zeros(8, 4).T, None, torch.zeros(2, 4)),
        (
            torch.zeros(2, 8).bfloat16(),
            torch.zeros(1, 4, 16, 2).bfloat16(),
            None,
            torch.zeros(2, 32).bfloat16(),
        ),
    ],
)
def test_linear_refuses_what_does_not_fit(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"must be|wrong"):
        _cpu.linear(x, weight, bias, out, 1)


def test_only_cpu_tensors_are_taken() -> None:
    x = torch.zeros(2, 8, device="meta")
    with pytest.raises(TypeError):
        _cpu.linear(x, torch.zeros(4, 8), None, torch.zeros(2, 4), 1)
    with pytest.raises(TypeError):
        _cpu.linear([[0.0]], torch.zeros(4, 8), None, torch.zeros(2, 4), 1)  # type: ignore[arg-type]


def test_embedding_refuses_ids_past_the_end() -> None:
    packed = ops.pack_linear(torch.zeros(32, 8))
    for bad in (32, -1):
        with pytest.raises(ValueError, match="past the end"):
            ops.embedding(torch.tensor([bad]), packed)


# ---- norms ----


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@LEVELS
@TYPES
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 70), n=st.integers(1, 600), threads=st.integers(1, 3))
def test_rms_norm_equals_float64(level: Level, dtype: torch.dtype, rows: int, n: int, threads: int) -> None:
    wide, weight = random(rows, n + 5, dtype=dtype), random(n, dtype=dtype, seed=1)
    x = wide[:, :n]
    out = torch.full((rows, n), float("nan"), dtype=dtype)
    _cpu.rms_norm(x, None, weight, out, 1e-5, threads, level)
    assert_near(out, norm(x, weight, 1e-5), dtype)


@LEVELS
@TYPES
def test_add_rms_norm_adds_to_the_residual_in_place(level: Level, dtype: torch.dtype) -> None:
    x, residual, weight = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(7, 77), (7, 77), (77,)]))
    out, total = torch.empty_like(x), residual.clone()
    _cpu.rms_norm(x, total, weight, out, 1e-5, 1, level)
    assert torch.equal(total, residual + x)  # one rounding of an exact sum is one rounding
    assert_near(out, norm(total, weight, 1e-5), dtype)


def test_norms_of_torch_and_of_the_kernels_agree() -> None:
    x, residual, weight = (random(*s, dtype=torch.float32) for s in [(3, 2, 40), (3, 40), (40,)])
    assert_near(ops.rms_norm(x, weight, 1e-5), norm(x, weight, 1e-5), torch.float32)
    same = x.clone()
    assert ops.rms_norm(same, weight, 1e-5, out=same) is same
    assert_near(same, norm(x, weight, 1e-5), torch.float32)
    half = ops.rms_norm(x.half(), weight.half(), 1e-5)
    torch.testing.assert_close(half.double(), norm(x, weight, 1e-5), atol=1e-2, rtol=1e-2)
    for dtype in (torch.float32, torch.float16):
        before = residual.to(dtype)
        total = before.clone()
        normed, same_total = ops.add_rms_norm(x[:, 0].to(dtype), total, weight.to(dtype), 1e-5)
        assert same_total is total
        assert torch.equal(total, before + x[:, 0].to(dtype))
        torch.testing.assert_close(normed.double(), norm(total, weight, 1e-5), atol=1e-2, rtol=1e-2)


# ---- silu ----


@LEVELS
@TYPES
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), n=st.integers(1, 300), threads=st.integers(1, 3))
def test_silu_and_mul_equals_float64(
    level: Level, dtype: torch.dtype, rows: int, n: int, threads: int
) -> None:
    gate_up = random(rows, 2 * n, dtype=dtype) * 4
    out = torch.full((rows, n), float("nan"), dtype=dtype)
    _cpu.silu_and_mul(gate_up, out, threads, level)
    gate, up = gate_up.double().chunk(2, -1)
    assert_near(out, torch.nn.functional.silu(gate) * up, dtype)


@LEVELS
def test_silu_is_right_far_from_zero(level: Level) -> None:
    gate = torch.tensor([[-1e30, -104.0, -88.0, -87.0, 0.0, 87.0, 88.0, 104.0, 1e30]])
    out = torch.empty_like(gate)
    _cpu.silu_and_mul(torch.cat([gate, torch.ones_like(gate)], 1), out, 1, level)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate), atol=1e-30, rtol=1e-5)


def test_silu_and_mul_of_types_without_kernels() -> None:
    gate_up = random(3, 20, dtype=torch.float32)
    torch.testing.assert_close(
        ops.silu_and_mul(gate_up.half()).float(), ops.silu_and_mul(gate_up), atol=1e-2, rtol=1e-2
    )


# ---- experts ----


class Experts:
    """Arguments of one call, and what it should give."""

    def __init__(self, tokens: int, count: int, choices: int, width: int, inner: int, dtype: torch.dtype):
        self.x = random(tokens, width, dtype=dtype)
        self.scores = random(tokens, count, dtype=dtype, seed=1)
        self.choices = choices
        self.gate_up = random(count, 2 * inner, width, dtype=dtype, seed=2) / width**0.5
        self.down = random(count, width, inner, dtype=dtype, seed=3) / inner**0.5

    def run(self, normalize: bool = True, rows: slice = slice(None)) -> Tensor:
        pages = torch.zeros(len(self.x[rows]), dtype=torch.int32)
        weights = [ops.pack_linear(w.clone()) for w in (self.gate_up, self.down)]
        return ops.experts(self.x[rows], self.scores[rows], self.choices, normalize, pages, *weights)

    def expected(self, normalize: bool = True) -> Tensor:
        weights, chosen = self.scores.double().softmax(-1).topk(self.choices)
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        rows = []
        for x, experts, shares in zip(self.x.double(), chosen, weights, strict=True):
            projected = [(self.gate_up[e].double() @ x).chunk(2) for e in experts]
            results = [
                self.down[e].double() @ (torch.nn.functional.silu(gate) * up)
                for e, (gate, up) in zip(experts, projected, strict=True)
            ]
            rows.append(sum(share * result for share, result in zip(shares, results, strict=True)))
        return torch.stack(rows)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
# Packed weights, plain ones, and one of both; one token, one expert, more choices than tokens.
@pytest.mark.parametrize(
    "shape", [(9, 6, 2, 64, 32), (5, 4, 3, 42, 18), (7, 5, 2, 64, 18), (1, 8, 8, 32, 64), (4, 1, 1, 32, 32)]
)
def test_experts_equal_float64(
    shape: tuple[int, int, int, int, int], normalize: bool, dtype: torch.dtype
) -> None:
    experts = Experts(*shape, dtype)
    got, want = experts.run(normalize), experts.expected(normalize)
    assert got.dtype == dtype
    tolerance = dict(atol=2e-2, rtol=2e-2) if dtype == torch.bfloat16 else dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.double(), want, **tolerance)


@TYPES
def test_experts_of_a_token_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    experts = Experts(40, 6, 3, 64, 32, dtype)
    whole = experts.run()
    parts = [experts.run(rows=rows) for rows in (slice(0, 1), slice(1, 2), slice(2, 33), slice(33, 40))]
    assert torch.equal(torch.cat(parts), whole)


def test_of_equal_scores_the_lower_experts_are_chosen() -> None:
    experts = Experts(3, 6, 2, 32, 32, torch.float32)
    experts.scores[0] = 0.0
    experts.scores[1] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    experts.scores[2] = torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0])
    got = experts.run()
    for row, pair in enumerate(((0, 1), (1, 0), (3, 4))):
        alone = torch.full((6,), -1e9)
        alone[list(pair)] = torch.tensor([1.0, 0.0]) if row == 1 else 0.0
        experts.scores[row] = alone
    torch.testing.assert_close(got, experts.run(), atol=1e-5, rtol=1e-5)


# ---- rope ----


def rotated(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Pairs `(i, i + rotary_dim / 2)` as complex numbers, turned."""
    half = cos_sin.shape[1] // 2
    turn = torch.complex(cos_sin[:, :half].double(), cos_sin[:, half:].double())[positions.long()][:, None]
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :].double()], -1)


class Rope:
    """Arguments of one call: `tokens` new tokens, each to its own slot of a pool of 7s."""

    def __init__(self, tokens: int, heads: int, kv_heads: int, dim: int, rotary: int, dtype: torch.dtype):
        joint = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
        self.q, self.k, self.v = joint.split([heads, kv_heads, kv_heads], 1)
        self.before = joint.clone().split([heads, kv_heads, kv_heads], 1)
        slots = torch.randperm(4 * tokens + 4, generator=torch.Generator().manual_seed(1))[:tokens]
        self.pages, self.offsets = (slots // 4).to(torch.int32), (slots % 4).to(torch.int32)
        self.pool = torch.full((tokens + 1, kv_heads, 3, 2, 4, dim), 7.0, dtype=dtype)
        self.positions = torch.arange(50, 50 + tokens, dtype=torch.int32)
        self.cos_sin = cos_sin_cache(RopeSpec(), rotary, 50 + tokens, torch.device("cpu"))

    def check(self, dtype: torch.dtype, q_norm: Tensor | None = None, k_norm: Tensor | None = None) -> None:
        q, k, v = self.before
        if q_norm is not None and k_norm is not None:
            q, k = norm(q, q_norm, 1e-6).to(dtype), norm(k, k_norm, 1e-6).to(dtype)
        for got, x in ((self.q, q), (self.k, k)):
            # A rotation mixes elements, so a small one has the rounding error of its large partner.
            scale = x.double().abs().amax(-1, keepdim=True).clamp_min(1)
            assert_near(got / scale, rotated(x, self.cos_sin, self.positions) / scale, dtype)
        pages, offsets = self.pages.long(), self.offsets.long()
        assert torch.equal(self.pool[pages, :, 1, 0, offsets], self.k)
        assert torch.equal(self.pool[pages, :, 1, 1, offsets], v)
        self.pool[pages, :, 1, :, offsets] = 7.0
        assert (self.pool == 7).all()


@LEVELS
@TYPES
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 40),
    unrotated=st.sampled_from([0, 0, 6]),
    wide=st.booleans(),
    normed=st.booleans(),
    threads=st.integers(1, 3),
)
def test_rope_and_store_equals_float64(
    level: Level,
    dtype: torch.dtype,
    tokens: int,
    kv_heads: int,
    group: int,
    half: int,
    unrotated: int,
    wide: bool,
    normed: bool,
    threads: int,
) -> None:
    dim = 2 * half + unrotated
    rope = Rope(tokens, group * kv_heads, kv_heads, dim, 2 * half, dtype)
    norms = [random(dim, dtype=dtype, seed=i) if normed else None for i in (3, 4)]
    positions = rope.positions.long() if wide else rope.positions
    where = (rope.pool, 1, rope.pages, rope.offsets)
    call = (rope.q, rope.k, rope.v, positions, rope.cos_sin, *where, *norms, 1e-6, threads, level)
    _cpu.rope_and_store(*call)
    rope.check(dtype, *norms)


def test_rope_without_kernels() -> None:
    rope = Rope(9, 4, 2, 16, 12, torch.float64)
    weight = random(16, dtype=torch.float64)
    ops.rope_and_store(
        rope.q, rope.k, rope.v, rope.positions, rope.cos_sin, rope.pool, 1, rope.pages, rope.offsets,
        q_norm_weight=weight, k_norm_weight=weight, eps=1e-6,
    )  # fmt: skip
    q, k, v = rope.before
    for got, was in ((rope.q, q), (rope.k, k)):
        want = rotated(norm(was, weight, 1e-6), rope.cos_sin, rope.positions)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(rope.pool[rope.pages.long(), :, 1, 1, rope.offsets.long()], v)


@pytest.mark.parametrize("field", ["pages", "offsets", "positions"])
@pytest.mark.parametrize("value", [-1, 1000])
def test_a_slot_outside_of_the_pool_is_refused_before_anything_is_written(field: str, value: int) -> None:
    """A bug of ours must not become a write to another request's KV."""
    rope = Rope(5, 2, 1, 8, 8, torch.float32)
    getattr(rope, field)[4] = value
    with pytest.raises(ValueError, match="out of range"):
        ops.rope_and_store(
            rope.q, rope.k, rope.v, rope.positions, rope.cos_sin, rope.pool, 1, rope.pages, rope.offsets
        )
    assert torch.equal(rope.q, rope.before[0])
    assert (rope.pool == 7).all()


def test_levels_end_with_the_best_and_others_are_refused() -> None:
    assert levels()[0] is Level.BASELINE
    missing = set(Level) - set(levels())
    for level in missing:
        with pytest.raises(ValueError, match="does not run"):
            _cpu.silu_and_mul(torch.zeros(1, 2), torch.zeros(1, 1), 1, level)


def test_without_cuda_kernels_torch_serves_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A build that found no nvcc is slow on a GPU; nobody should have to guess why."""
    monkeypatch.setattr(ops, "why_no_cuda_kernels", lambda: "no nvcc was found")
    assert ops._ops_of_cuda.__wrapped__() is torch_ops
    (line,) = caplog.messages
    assert "nvcc" in line


def test_types_without_kernels_take_torchs_way() -> None:
    assert ops._ops_for(torch.zeros(1)) is cpu_ops
    assert ops._ops_for(torch.zeros(1).bfloat16()) is cpu_ops
    assert ops._ops_for(torch.zeros(1).half()) is torch_ops
    assert ops._ops_for(torch.zeros(1, device="meta")) is torch_ops
