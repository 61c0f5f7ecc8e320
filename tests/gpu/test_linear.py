"""Products of few rows against float64, over poisoned and guarded outputs, at once and from graphs."""

import itertools

import pytest
import torch
from torch import Tensor

from disagg import _cuda
from disagg.layers import ops
from support.gpu import Guarded, assert_near, call, random

BF16 = torch.bfloat16
ROWS = [1, 7, 16, 63, 65, 100, 127, 130, 200, 240, 255, 256]
# Qwen3-0.6B's, Llama-3.1-8B's, and what else the rule allows.
QWEN = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
ODD = [(64, 64), (192, 320), (8384, 1600), (448, 4160), (4160, 64), (12800, 192)]
CAPTURED = pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])


class Product:
    """One weight, and all that a call needs. The weight is written when this returns."""

    def __init__(self, n: int, k: int, *, seed: int, gated: bool = False) -> None:
        self.n, self.k, self.gated = n, k, gated
        self.weight = random(n, k, dtype=BF16, seed=seed) / k**0.5
        self.sms = torch.cuda.get_device_properties().multi_processor_count
        self.workspace = torch.zeros(0, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

    def plan(self, rows: int) -> _cuda.LinearPlan:
        plan = _cuda.plan_linear(rows, self.n, self.k, self.gated, self.sms)
        return self.make_room(plan, rows)

    def make_room(self, plan: _cuda.LinearPlan, rows: int) -> _cuda.LinearPlan:
        size = _cuda.linear_workspace_bytes(plan, rows, self.n, self.k)
        if size > len(self.workspace):
            self.workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        return plan

    def run(
        self,
        x: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        squares: Tensor | None = None,
        emits: tuple[Tensor, Tensor, Tensor] | None = None,
        plan: _cuda.LinearPlan | None = None,
    ) -> None:
        plan = self.plan(len(x)) if plan is None else plan
        stream = torch.cuda.current_stream().cuda_stream
        extras = (squares, 1e-6, *(emits or (None, None, None)))
        _cuda.linear(x, self.weight, bias, residual, out, self.gated, *extras, plan, self.workspace, stream)

    def want(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        result = x.double() @ self.weight.double().t()
        result = result if bias is None else result + bias.double()
        if self.gated:
            gate, up = result.view(len(x), -1, 2, 8).unbind(2)
            return (torch.nn.functional.silu(gate) * up).flatten(1)
        return result if residual is None else result + residual.double()


def check(name: str, got: Tensor, want: Tensor, roundings: int = 1) -> None:
    # Sums of float32 in another order: an error of a sum's size, not of the result's.
    assert_near(name, got, want, scale=want.abs() + 0.05, roundings=roundings)


@CAPTURED
@pytest.mark.parametrize("shape", QWEN + LLAMA + ODD, ids=str)
def test_linear(shape: tuple[int, int], captured: bool) -> None:
    product = Product(*shape, seed=sum(shape))
    for rows in ROWS if shape not in LLAMA else (1, 65, 127, 240, 256):
        x = random(rows, product.k, dtype=BF16, seed=rows + captured)
        out = Guarded(rows, product.n, dtype=BF16)
        product.plan(rows)
        call(lambda x=x, out=out: product.run(x, out.tensor), captured)
        check("linear", out.check(), product.want(x))


@pytest.mark.parametrize("shape", [QWEN[0], QWEN[1], LLAMA[0], (448, 4160)], ids=str)
def test_linear_adds_a_bias_and_a_residual(shape: tuple[int, int]) -> None:
    product = Product(*shape, seed=1)
    for rows in (1, 77, 256):
        x = random(rows, product.k, dtype=BF16, seed=rows)
        bias, out = random(product.n, dtype=BF16, seed=2), Guarded(rows, product.n, dtype=BF16)
        before = out.tensor.copy_(random(rows, product.n, dtype=BF16, seed=3)).clone()
        call(lambda x=x, out=out: product.run(x, out.tensor, residual=out.tensor), captured=True)
        check("linear + residual", out.check(), product.want(x, residual=before))
        call(lambda x=x, out=out, bias=bias: product.run(x, out.tensor, bias=bias), captured=False)
        check("linear + bias", out.check(), product.want(x, bias))


@pytest.mark.parametrize(("n", "k"), [(1024, 2048), (4096, 4096), (1088, 1088)])
def test_a_norm_between_two_products(n: int, k: int) -> None:
    first = Product(n, k, seed=1)
    seconds = Product(1280, n, seed=2), Product(2560, n, seed=3, gated=True)
    for rows in (1, 7, 100, 256):
        tokens = first.plan(rows).tokens
        plan = first.plan(rows)
        if plan.splits == 1:
            plan = _cuda.LinearPlan(tokens, 1, 1, 4, -(-n // 64) * 4, 3, 3, 1)
        x, norm = random(rows, k, dtype=BF16, seed=rows), random(n, dtype=BF16, seed=4)
        summed, normed = Guarded(rows, n, dtype=BF16), Guarded(rows, n, dtype=BF16)
        before = summed.tensor.copy_(random(rows, n, dtype=BF16, seed=5) * 3).clone()
        squares = Guarded(n // 64, 256, dtype=torch.float32)
        outs = [Guarded(rows, 1280, dtype=BF16) for _ in seconds]

        def run(
            x: Tensor = x,
            norm: Tensor = norm,
            summed: Tensor = summed.tensor,
            emits: tuple[Tensor, Tensor, Tensor] = (squares.tensor, norm, normed.tensor),
            outs: list[Guarded] = outs,
            plan: _cuda.LinearPlan = plan,
        ) -> None:
            first.run(x, summed, residual=summed, emits=emits, plan=plan)
            for second, out in zip(seconds, outs, strict=True):
                second.run(emits[2], out.tensor, squares=emits[0])

        for second in seconds:
            second.plan(rows)
        call(run, captured=True)
        check("linear + residual", summed.check(), first.want(x, residual=before))
        assert torch.equal(normed.check(), (summed.tensor.float() * norm.float()).to(BF16))
        sums = summed.tensor.double().square()
        assert_near("squares", squares.check()[:, :rows], sums.view(rows, -1, 64).sum(-1).t(), roundings=8)
        factor = (sums.mean(-1, keepdim=True) + 1e-6).rsqrt()
        for second, out in zip(seconds, outs, strict=True):
            check("normed linear", out.check(), second.want(normed.tensor.double() * factor), roundings=2)


@pytest.mark.parametrize("shape", [(6144, 1024), (28672, 4096), (64, 64), (448, 4160)], ids=str)
def test_linear_gates(shape: tuple[int, int]) -> None:
    product = Product(*shape, seed=1, gated=True)
    for rows in (1, 77, 240):
        x = random(rows, product.k, dtype=BF16, seed=rows) * 2
        out = Guarded(rows, product.n // 2, dtype=BF16)
        product.plan(rows)
        call(lambda x=x, out=out: product.run(x, out.tensor), captured=True)
        check("gated linear", out.check(), product.want(x), roundings=3)


def test_linear_takes_and_leaves_parts_of_wider_rows() -> None:
    product = Product(1024, 2048, seed=4)
    x = random(33, 4096, dtype=BF16, seed=1)[:, 1024:3072]
    out = Guarded(33, 1536, dtype=BF16)
    call(lambda: product.run(x, out.tensor[:, 256:1280]), captured=False)
    whole = out.check()
    check("linear", whole[:, 256:1280], product.want(x))
    assert whole[:, :256].isnan().all()
    assert whole[:, 1280:].isnan().all()


def test_every_plan_gives_the_same_result() -> None:
    """Also those that the rule does not pick: every cluster, cut and size of ring."""
    product, rows = Product(1088, 1088, seed=5), 90
    x = random(rows, product.k, dtype=BF16, seed=6)
    want = product.want(x)
    tried = 0
    for groups, multicast, splits in itertools.product((1, 2), (1, 2, 4), (1, 2, 4, 8)):
        if multicast * splits > 8:
            continue
        tiles = -(-product.n // (64 * groups * multicast))
        for slices in (tiles * splits, 3, 29) if splits == 1 else (tiles * splits,):
            for tokens, stages, sends in itertools.product((32, 96, 256), (2, 3), (0, 1)):
                plan = _cuda.LinearPlan(tokens, groups, multicast, splits, slices, stages, stages, sends)
                out = Guarded(rows, product.n, dtype=BF16)
                product.make_room(plan, rows)
                torch.cuda.synchronize()
                call(lambda out=out, plan=plan: product.run(x, out.tensor, plan=plan), captured=False)
                check("linear", out.check(), want)
                tried += 1
    assert tried == 2 * 12 * (3 * 3 + 6)


@pytest.mark.parametrize("rows", [1, 64, 100, 256])
def test_a_chain_has_the_same_bits_a_hundred_times(rows: int) -> None:
    """Each product needs the one before it, which still runs when it is launched."""
    first, second = Product(2048, 1024, seed=1), Product(1024, 2048, seed=2)
    third, fourth = Product(3072, 1024, seed=3, gated=True), Product(1024, 1536, seed=4)
    x = random(rows, 1024, dtype=BF16, seed=rows)
    a, b = (torch.empty(rows, n, dtype=BF16, device="cuda") for n in (2048, 1024))
    c, d = (torch.empty(rows, n, dtype=BF16, device="cuda") for n in (1536, 1024))
    products = (first, second, third, fourth)
    for product in products:
        product.plan(rows)

    def chain() -> None:
        first.run(x, a)
        second.run(a, b, residual=x)
        third.run(b, c)
        fourth.run(c, d, residual=b)

    chain()
    torch.cuda.synchronize()
    for product, taken, got, residual in ((first, x, a, None), (second, a, b, x), (fourth, c, d, b)):
        check("linear", got, product.want(taken, residual=residual))
    wanted = [t.clone() for t in (a, b, c, d)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            chain()
    for _ in range(100):
        for t in (a, b, c, d):
            t.fill_(torch.nan)
        graph.replay()
        for got, want in zip((a, b, c, d), wanted, strict=True):
            assert torch.equal(got, want)


def test_a_row_does_not_depend_on_its_place() -> None:
    product = Product(1024, 3072, seed=5)
    x = random(200, 3072, dtype=BF16, seed=6)
    out = torch.empty(200, 1024, dtype=BF16, device="cuda")
    turned = torch.empty_like(out)
    product.run(x, out)
    product.run(x.roll(77, 0), turned)
    assert torch.equal(turned, out.roll(77, 0))


def test_what_it_does_not_take_is_refused() -> None:
    for rows, n, k in ((257, 64, 64), (1, 96, 64), (1, 64, 96), (1, 64, 0)):
        with pytest.raises(ValueError, match=r"must be|more than"):
            _cuda.plan_linear(rows, n, k, False, 132)
    product = Product(128, 64, seed=1)
    x, out = (torch.zeros(4, n, dtype=BF16, device="cuda") for n in (64, 128))
    with pytest.raises(ValueError, match="tokens"):
        product.run(x, out, plan=_cuda.LinearPlan(24, 1, 1, 1, 2, 2, 2, 1))
    with pytest.raises(ValueError, match="out must be"):
        product.run(x, out[:, :64])
    with pytest.raises(ValueError, match="x must be"):
        product.run(x.float(), out)


@pytest.mark.parametrize("rows", [5, 100, 128, 129, 300])
def test_operators_of_a_layer_by_both_ways(rows: int) -> None:
    """Few rows by our kernel, many by cuBLAS: of the same packed weights, with and without a bias."""
    down, gate_up = (
        random(*s, dtype=BF16, seed=i) / s[1] ** 0.5 for i, s in enumerate(((320, 192), (768, 320)))
    )
    norm, gate_up_bias = random(320, dtype=BF16, seed=3), random(768, dtype=BF16, seed=4)
    packed, packed_bias = (ops.pack_gate_up(t.clone()) for t in (gate_up, gate_up_bias))
    torch.cuda.synchronize()
    x, residual = random(rows, 192, dtype=BF16, seed=5), random(rows, 320, dtype=BF16, seed=6)
    summed, normed, gated = residual.clone(), torch.empty_like(residual), x.new_empty(rows, 384)
    ops.linear_add_rms_norm(x, down, None, summed, norm, 1e-6, torch.empty_like(residual), normed)
    delta = x.double() @ down.double().t()
    # cuBLAS's product is rounded before it is added, so that its size counts, not the sum's.
    sizes = residual.double().abs() + delta.abs()
    assert_near("linear, then residual", summed, residual.double() + delta, scale=sizes)
    assert torch.equal(normed, ops.rms_norm(summed, norm, 1e-6))
    for bias, used in ((None, None), (gate_up_bias, packed_bias)):
        ops.linear_silu_and_mul(normed, packed, used, x.new_empty(rows, 768), gated)
        sums = normed.double() @ gate_up.double().t() + (0 if bias is None else bias.double())
        gate, up = sums.chunk(2, 1)
        check("gated linear", gated, torch.nn.functional.silu(gate) * up, roundings=2)
