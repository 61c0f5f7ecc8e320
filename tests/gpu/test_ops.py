"""CUDA operators against float64, run at once and from a graph, over poisoned and guarded outputs."""

import pytest
import torch
from torch import Tensor

from disagg import _cuda
from disagg.layers import RopeSpec, cos_sin_cache, cuda_ops, ops, torch_ops
from support.gpu import DTYPES, Guarded, assert_near, call, random

TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CAPTURED = pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def test_cuda_tensors_go_to_the_kernels() -> None:
    for dtype in DTYPES:
        assert ops._ops_for(torch.zeros(1, dtype=dtype, device="cuda")) is cuda_ops
    assert ops._ops_for(torch.zeros(1, dtype=torch.float64, device="cuda")) is torch_ops


# Rows in registers of one and of two loads a thread; any width, and rows past registers.
WIDTHS = [1, 7, 64, 576, 1024, 1026, 2048, 4096, 5120, 8192, 12288, 16384, 16416]


@CAPTURED
@TYPES
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 257])
@pytest.mark.parametrize("adds", [False, True], ids=["norm", "add"])
def test_rms_norm(adds: bool, rows: int, n: int, dtype: torch.dtype, captured: bool) -> None:
    x = random(rows, n, dtype=dtype, seed=n + captured) * 3
    weight = random(n, dtype=dtype, seed=2)
    residual, out = Guarded(rows, n, dtype=dtype), Guarded(rows, n, dtype=dtype)
    before = residual.tensor.copy_(random(rows, n, dtype=dtype, seed=rows)).clone()
    taken = residual.tensor if adds else None
    call(lambda: _cuda.rms_norm(x, taken, weight, out.tensor, 1e-5, stream()), captured)
    summed = residual.check()
    if adds:
        assert torch.equal(summed, before + x)  # one rounding of an exact sum is one rounding
    else:
        assert torch.equal(summed, before)
    assert_near(
        "add_rms_norm" if adds else "rms_norm", out.check(), norm(summed if adds else x, weight, 1e-5)
    )


@TYPES
def test_rms_norm_of_parts_of_wider_rows_unaligned_and_in_place(dtype: torch.dtype) -> None:
    wide, weight = random(5, 200, dtype=dtype, seed=1), random(64, dtype=dtype, seed=2)
    for first in (0, 8, 3):
        part = wide[:, first : first + 64]
        assert_near("rms_norm", ops.rms_norm(part, weight, 1e-6), norm(part, weight, 1e-6))
    for offset in (0, 1):
        x = random(5, 64, dtype=dtype, seed=3, offset=offset)
        want = norm(x, weight, 1e-6)
        assert ops.rms_norm(x, weight, 1e-6, out=x) is x
        assert_near("rms_norm", x, want)
    heads = random(6, 3, 64, dtype=dtype, seed=4)
    assert_near("rms_norm", ops.rms_norm(heads, weight, 1e-6), norm(heads, weight, 1e-6))
    none = torch.empty(0, 64, dtype=dtype, device="cuda")
    assert ops.rms_norm(none, weight, 1e-6).shape == (0, 64)


@CAPTURED
@TYPES
@pytest.mark.parametrize("n", [1, 7, 256, 1536, 3072, 14336, 14338])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_silu_and_mul(rows: int, n: int, dtype: torch.dtype, captured: bool) -> None:
    gate_up, out = random(rows, 2 * n, dtype=dtype, seed=n) * 4, Guarded(rows, n, dtype=dtype)
    call(lambda: _cuda.silu_and_mul(gate_up, out.tensor, False, stream()), captured)
    gate, up = gate_up.double().chunk(2, -1)
    assert_near("silu_and_mul", out.check(), torch.nn.functional.silu(gate) * up)
    if n % 8 == 0:
        eights = gate_up.view(rows, 2, n // 8, 8).transpose(1, 2).reshape(rows, 2 * n)
        got = Guarded(rows, n, dtype=dtype)
        call(lambda: _cuda.silu_and_mul(eights, got.tensor, True, stream()), captured)
        assert torch.equal(got.check(), out.tensor)


@TYPES
def test_silu_is_right_far_from_zero(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-6e4, -104.0, -88.0, -87.0, 0.0, 87.0, 88.0, 104.0, 6e4]], device="cuda").to(dtype)
    got = ops.silu_and_mul(torch.cat([gate, torch.ones_like(gate)], 1))
    assert_near("silu_and_mul", got, torch.nn.functional.silu(gate.double()))


def rotated(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Pairs `(i, i + rotary_dim / 2)` as complex numbers, turned."""
    half = cos_sin.shape[1] // 2
    turn = torch.complex(cos_sin[:, :half].double(), cos_sin[:, half:].double())[positions.long()][:, None]
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :].double()], -1)


# (heads, kv_heads, head_dim, rotary_dim): Qwen3-0.6B, Llama-3.1-8B, sizes that take fewer lanes than a power
# of two, and what is neither aligned nor rotated whole.
HEADS = [
    (16, 8, 128, 128),
    (32, 8, 128, 128),
    (9, 3, 64, 64),
    (4, 2, 256, 256),
    (4, 1, 96, 96),
    (3, 3, 80, 80),
    (6, 2, 128, 64),
    (5, 1, 34, 34),
    (2, 2, 18, 6),
]


@CAPTURED
@TYPES
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_rope_and_store(
    tokens: int, normed: bool, shape: tuple[int, int, int, int], dtype: torch.dtype, captured: bool
) -> None:
    heads, kv_heads, dim, rotary = shape
    page_size, layers, layer, num_pages = 16, 3, 1, tokens // 8 + 3
    all_heads = heads + 2 * kv_heads
    joint = Guarded(tokens, all_heads, dim, dtype=dtype)
    before = joint.tensor.copy_(random(tokens, all_heads, dim, dtype=dtype, seed=tokens + captured)).clone()
    q, k, v = joint.tensor.split([heads, kv_heads, kv_heads], 1)
    pool = Guarded(num_pages, kv_heads, layers, 2, page_size, dim, dtype=dtype)
    order = torch.randperm(num_pages * page_size, generator=torch.Generator().manual_seed(tokens))[:tokens]
    pages, offsets = (order // page_size).int().cuda(), (order % page_size).int().cuda()
    positions = torch.arange(50, 50 + tokens, dtype=torch.int32, device="cuda").flip(0)
    padding = torch.arange(tokens, device="cuda") % 5 == 4
    pages[padding] = -1
    positions[padding] = 1 << 30  # read by nobody
    cos_sin = cos_sin_cache(RopeSpec(), rotary, 50 + tokens, torch.device("cuda"))
    norms = [random(dim, dtype=dtype, seed=i) if normed else None for i in (3, 4)]
    arguments = (q, k, v, positions, cos_sin, pool.tensor, layer, pages, offsets, *norms, 1e-6)
    call(lambda: _cuda.rope_and_store(*arguments, stream()), captured)

    real = ~padding
    after, slots = joint.check(), (pages[real].long(), slice(None), layer)
    assert torch.equal(after[padding], before[padding])
    assert torch.equal(v, before[:, heads + kv_heads :])
    for got, was, weight in ((q, before[:, :heads], norms[0]), (k, before[:, heads:-kv_heads], norms[1])):
        x = was if weight is None else _twice_rounded(was, weight, dtype)
        want = rotated(x[real], cos_sin, positions[real])
        # A rotation mixes elements, so a small one has the rounding error of its large partner.
        # And a norm's value at the edge of a rounding may fall to the other side.
        assert_near("rope_and_store", got[real], want, want.abs().amax(-1, keepdim=True), roundings=2)
    stored = pool.check()
    assert torch.equal(stored[(*slots, 0, offsets[real].long())], k[real])
    assert torch.equal(stored[(*slots, 1, offsets[real].long())], v[real])
    stored[(*slots, slice(None), offsets[real].long())] = float("nan")
    assert stored.isnan().all()


def _twice_rounded(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm as the models compute it."""
    wide = x.double()
    factor = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return ((wide * factor).to(dtype).double() * weight.double()).to(dtype)


@TYPES
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rope_stores_e4m3_as_torch_rounds_it(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """And the largest value in place of what is more, which torch makes NaN."""
    heads, kv_heads, dim, rotary = shape
    tokens, layer, narrow = 37, 1, torch.float8_e4m3fn
    joint = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype, seed=dim) * 300
    q, k, v = joint.split([heads, kv_heads, kv_heads], 1)
    pool = torch.full((4, kv_heads, 2, 2, 16, dim), torch.nan, device="cuda").to(narrow)
    where = torch.arange(tokens, dtype=torch.int32, device="cuda")
    pages, offsets = where // 16 + 1, where % 16
    cos_sin = cos_sin_cache(RopeSpec(), rotary, tokens, torch.device("cuda"))
    want_q = rotated(q, cos_sin, where)
    ops.rope_and_store(q, k, v, where, cos_sin, pool, layer, pages, offsets)
    assert_near("rope_and_store", q, want_q, want_q.abs().amax(-1, keepdim=True))
    stored, slots = pool.view(torch.uint8), (pages.long(), slice(None), layer)
    for kind, x in enumerate((k, v)):
        assert x.abs().max() > 448
        want = x.float().clamp(-448, 448).to(narrow).view(torch.uint8)
        assert torch.equal(stored[(*slots, kind, offsets.long())], want)
    stored[(*slots, slice(None), offsets.long())] = 0x7F
    assert (stored == 0x7F).all(), "bytes of others"


def test_rope_takes_wide_positions() -> None:
    q, k, v = random(4, 6, 64, dtype=torch.bfloat16, seed=1).split([2, 2, 2], 1)
    pool = torch.zeros(2, 2, 1, 2, 16, 64, dtype=torch.bfloat16, device="cuda")
    where = torch.arange(4, dtype=torch.int32, device="cuda")
    cos_sin = cos_sin_cache(RopeSpec(), 64, 9, torch.device("cuda"))
    want = rotated(q, cos_sin, where.long() + 5)
    ops.rope_and_store(q, k, v, where.long() + 5, cos_sin, pool, 0, torch.zeros_like(where), where)
    assert_near("rope_and_store", q, want, want.abs().amax(-1, keepdim=True))


@CAPTURED
@TYPES
@pytest.mark.parametrize("n", [1, 6, 576, 1024, 4096])
@pytest.mark.parametrize("tokens", [1, 300])
def test_embedding(tokens: int, n: int, dtype: torch.dtype, captured: bool) -> None:
    weight, out = random(1000, n, dtype=dtype, seed=n), Guarded(tokens, n, dtype=dtype)
    ids = torch.randint(1000, (tokens,), dtype=torch.int32, device="cuda")
    call(lambda: _cuda.embedding(ids, weight, out.tensor, stream()), captured)
    assert torch.equal(out.check(), weight[ids.long()])


def test_embedding_of_no_token_is_nan() -> None:
    """A token that was never filled in must be seen, and must not read foreign memory."""
    weight = random(10, 64, dtype=torch.bfloat16, seed=1)
    got = ops.embedding(torch.tensor([3, -1, 10, 1 << 30], device="cuda"), weight)
    assert torch.equal(got[0], weight[3])
    assert got[1:].isnan().all()


@CAPTURED
@pytest.mark.parametrize("tokens", [1, 129, 1000])
def test_gather_tokens_fills_in_what_is_pending(tokens: int, captured: bool) -> None:
    ids = Guarded(tokens, dtype=torch.int32)
    last = torch.randperm(2000, device="cuda").int()
    slots = torch.randint(2000, (tokens,), dtype=torch.int32, device="cuda")
    ids.tensor.copy_(torch.arange(tokens))
    ids.tensor[::3] = -1
    slots[::6] = -1
    is_pending, before = ids.tensor == -1, ids.tensor.clone()
    call(lambda: cuda_ops.gather_tokens(ids.tensor, slots, last), captured)
    want = torch.where(is_pending, torch.where(slots < 0, 0, last[slots.long()]), before)
    assert torch.equal(ids.check(), want)


@CAPTURED
def test_kernels_that_overlap_give_the_same_bits_as_kernels_that_wait(captured: bool) -> None:
    """Each begins while the one before it runs; it must see all that was written before."""
    x, residual, weight = (
        random(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate([(256, 1024), (256, 1024), (1024,)])
    )
    up = random(256, 4096, dtype=torch.bfloat16, seed=5)

    def chain(between: object) -> list[Tensor]:
        state = [t.clone() for t in (x, residual, up)]
        gated = torch.empty(256, 2048, dtype=torch.bfloat16, device="cuda")

        def run() -> None:
            for _ in range(20):
                ops.add_rms_norm(state[0], state[1], weight, 1e-6, out=state[0])
                between()
                ops.rms_norm(state[1], weight, 1e-6, out=state[2].view(1024, 1024)[256:512])
                between()
                ops.silu_and_mul(state[2], out=gated)
                between()
                ops.rms_norm(gated.view(512, 1024)[:256], weight, 1e-6, out=state[0])
                between()

        call(run, captured and between is not torch.cuda.synchronize)
        return [*state, gated]

    for got, want in zip(chain(lambda: None), chain(torch.cuda.synchronize), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("x", "weight", "out"),
    [((2, 8), (7,), (2, 8)), ((2, 8), (8,), (3, 8)), ((2, 8), (8,), (2, 9))],
)
def test_what_does_not_fit_is_refused(
    x: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]
) -> None:
    tensors = [torch.zeros(shape, device="cuda") for shape in (x, weight, out)]
    with pytest.raises(ValueError, match=r"must be|wrong"):
        _cuda.rms_norm(tensors[0], None, tensors[1], tensors[2], 1e-6, stream())
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        _cuda.silu_and_mul(
            *(torch.zeros(2, n, dtype=torch.int32, device="cuda") for n in (8, 4)), False, stream()
        )
