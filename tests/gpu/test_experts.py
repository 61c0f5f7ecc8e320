"""A mixture of experts on the GPU: each kernel and the whole, against float64, over poisoned outputs."""

import pytest
import torch
from torch import Tensor

from disagg import _cuda
from disagg.layers import cuda_ops, ops, torch_ops
from support.gpu import DTYPES, Guarded, assert_near, call, random

TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CAPTURED = pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
SEGMENT_PAIRS = 32


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class Routing:
    """Poisoned outputs of `route`, which are called once; each of them guarded."""

    def __init__(
        self,
        scores: Tensor,
        choices: int,
        *,
        normalize: bool = True,
        pages: Tensor | None = None,
        captured: bool = False,
    ) -> None:
        tokens, count = scores.shape
        pairs = tokens * choices
        num_segments = _cuda.max_segments(pairs, count) + 1
        shapes = {
            "experts": (tokens, choices),
            "places": (tokens, choices),
            "tokens": (pairs,),
            "ends": (count,),
            "segments": (num_segments, 4),
        }
        guarded = {name: Guarded(*shape, dtype=torch.int32) for name, shape in shapes.items()}
        weights = Guarded(tokens, choices, dtype=torch.float32)
        g = {name: guard.tensor for name, guard in guarded.items()}
        outputs = (g["experts"], weights.tensor, g["places"], g["tokens"], g["ends"], g["segments"])
        call(lambda: _cuda.route(scores, pages, normalize, *outputs, stream()), captured)
        self.weights = weights.check()
        self.experts, self.places, self.tokens, self.ends, self.segments = (
            guarded[name].check() for name in shapes
        )

    def audit(self) -> None:
        """Places are the pairs ordered by expert; segments cover them, each of one expert."""
        real = self.experts >= 0
        counts = self.experts[real].long().bincount(minlength=len(self.ends))
        assert torch.equal(self.ends.long(), counts.cumsum(0))
        assert torch.equal(self.places >= 0, real)
        places = self.places[real].long()
        assert torch.equal(places.sort().values, torch.arange(len(places), device="cuda"))
        assert torch.equal(self.experts[real].long(), torch.searchsorted(self.ends, places, right=True))
        token = torch.arange(len(real), device="cuda")[:, None].expand_as(real)[real]
        assert torch.equal(self.tokens[places].long(), token)
        covered = torch.zeros(len(places), dtype=torch.int64)
        for expert, begin, count, _ in self.segments[1 : 1 + int(self.segments[0, 2])].tolist():
            assert 1 <= count <= SEGMENT_PAIRS
            assert begin + count <= self.ends[expert] <= begin + counts[expert]
            covered[begin : begin + count] += 1
        assert (covered == 1).all()


@CAPTURED
@TYPES
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 128, 8), (3, 5, 5), (37, 32, 1), (300, 60, 4), (2000, 500, 32)], ids=str
)
def test_route(shape: tuple[int, int, int], normalize: bool, dtype: torch.dtype, captured: bool) -> None:
    tokens, count, choices = shape
    # A permutation of distinct values, so that every type sees the same order.
    order = torch.rand(tokens, count, generator=torch.Generator().manual_seed(tokens)).argsort(1)
    scores = ((order.float() - count / 2) / 32).to(dtype).cuda()
    pages = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    pages[4::5] = -1
    routing = Routing(scores, choices, normalize=normalize, pages=pages, captured=captured)
    routing.audit()
    real = pages == 0
    shares, chosen = scores.double().softmax(-1).topk(choices)
    assert torch.equal(routing.experts[real].long(), chosen[real])
    want = shares / shares.sum(-1, keepdim=True) if normalize else shares
    assert_near("route", routing.weights[real], want[real])
    assert (routing.experts[~real] == -1).all()
    assert (routing.weights[~real] == 0).all()


def test_of_equal_scores_the_lower_experts_are_chosen() -> None:
    scores = torch.zeros(3, 128, dtype=torch.bfloat16, device="cuda")
    scores[1, 70:] = 1.0
    scores[2, 5] = -1.0
    routing = Routing(scores, 8)
    routing.audit()
    want = [[*range(8)], [*range(70, 78)], [0, 1, 2, 3, 4, 6, 7, 8]]
    assert routing.experts.tolist() == want


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_scores_that_are_no_numbers_choose_some_expert(value: float) -> None:
    """A broken row must not write to foreign memory."""
    scores = torch.full((9, 40), value, dtype=torch.float32, device="cuda")
    scores[3:6].neg_()
    Routing(scores, 8).audit()


# (tokens, experts, choices, width, inner, skew): Qwen3-30B-A3B's sizes; few and many pairs an expert; all
# tokens to the same experts; experts without any; sizes that the fast kernels do not take.
SHAPES = [
    (1, 128, 8, 2048, 768, 0.0),
    (64, 16, 4, 2048, 768, 0.0),
    (200, 16, 2, 2048, 768, 0.0),
    (100, 32, 2, 256, 64, 30.0),
    (5, 100, 3, 192, 128, 0.0),
    (33, 7, 7, 64, 192, 0.0),
    (40, 6, 3, 66, 42, 0.0),
    (3, 4, 2, 4096, 64, 0.0),
]


class Case:
    def __init__(self, shape: tuple[int, int, int, int, int, float], dtype: torch.dtype) -> None:
        tokens, count, self.choices, width, inner, skew = shape
        self.x = random(tokens, width, dtype=dtype, seed=1)
        self.scores = random(tokens, count, dtype=dtype, seed=2)
        self.scores[:, : self.choices] += skew
        self.gate_up = random(count, 2 * inner, width, dtype=dtype, seed=3) / width**0.5
        self.down = random(count, width, inner, dtype=dtype, seed=4) / inner**0.5

    def rows(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Token and expert of each place."""
        pairs = int(routing.ends[-1])
        places = torch.arange(pairs, dtype=torch.int32, device="cuda")
        return routing.tokens[:pairs].long(), torch.searchsorted(routing.ends, places, right=True)

    def expected(self, pages: Tensor) -> Tensor:
        """In float64, of the experts that the scores choose."""
        weights = self.scores.double().softmax(-1)
        order = self.scores.sort(dim=-1, descending=True, stable=True).indices[:, : self.choices]
        weights = weights.gather(1, order)
        weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(self.x, dtype=torch.float64)
        for expert in range(len(self.down)):
            token, choice = ((order == expert) & (pages >= 0)[:, None]).nonzero(as_tuple=True)
            gate, up = (self.x[token].double() @ self.gate_up[expert].double().T).chunk(2, -1)
            result = (torch.nn.functional.silu(gate) * up) @ self.down[expert].double().T
            total[token] += result * weights[token, choice, None]
        return total


@CAPTURED
@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_pairs(
    shape: tuple[int, int, int, int, int, float], dtype: torch.dtype, captured: bool
) -> None:
    case = Case(shape, dtype)
    pages = torch.zeros(len(case.x), dtype=torch.int32, device="cuda")
    pages[2::7] = -1
    routing = Routing(case.scores, case.choices, pages=pages)
    token, expert = case.rows(routing)
    pairs, inner = len(routing.tokens), case.down.shape[2]
    gated, out = Guarded(pairs, inner, dtype=dtype), Guarded(pairs, case.x.shape[1], dtype=dtype)
    y = random(pairs, inner, dtype=dtype, seed=5)

    def run() -> None:
        _cuda.experts_gate_up(case.x, routing.tokens, case.gate_up, routing.segments, gated.tensor, stream())
        _cuda.experts_down(y, case.down, routing.segments, out.tensor, stream())

    call(run, captured)
    got_gated, got_out = gated.check(), out.check()
    assert got_gated[len(token) :].isnan().all()  # of padding there is nothing
    assert got_out[len(token) :].isnan().all()
    for e in expert.unique():
        at = (expert == e).nonzero()[:, 0]
        gate, up = (case.x[token[at]].double() @ case.gate_up[e].double().T).chunk(2, -1)
        want = torch.nn.functional.silu(gate) * up
        # Two sums of up to 2,048 products, of float32 in float32.
        assert_near("experts_gate_up", got_gated[at], want, want.abs() + 0.25, roundings=4)
        want = y[at].double() @ case.down[e].double().T
        assert_near("experts_down", got_out[at], want, want.abs() + 0.25, roundings=2)


@CAPTURED
@TYPES
@pytest.mark.parametrize("width", [8, 42, 2048, 2056, 5120])
@pytest.mark.parametrize("tokens", [1, 77])
def test_combine(tokens: int, width: int, dtype: torch.dtype, captured: bool) -> None:
    choices = 5
    y, weights = random(tokens * choices, width, dtype=dtype, seed=1), torch.rand(tokens, choices).cuda()
    places = torch.randperm(tokens * choices).int().view(tokens, choices).cuda()
    places[3::4] = -1
    out = Guarded(tokens, width, dtype=dtype)
    call(lambda: _cuda.combine(y, weights, places, out.tensor, stream()), captured)
    parts = y.double()[places.long()] * weights.double()[..., None]
    parts[3::4] = 0
    assert_near("combine", out.check(), parts.sum(1), parts.abs().sum(1))


@CAPTURED
@TYPES
@pytest.mark.parametrize(
    "shape", [*SHAPES, (700, 16, 4, 256, 128, 0.0), (600, 12, 3, 192, 96, 30.0)], ids=str
)
def test_the_whole_mixture(
    shape: tuple[int, int, int, int, int, float], dtype: torch.dtype, captured: bool
) -> None:
    """By our kernels, or by torch's grouped product where steps are large."""
    case = Case(shape, dtype)
    pages = torch.zeros(len(case.x), dtype=torch.int32, device="cuda")
    pages[2::7] = -1
    out = Guarded(*case.x.shape, dtype=dtype)
    weights = (case.gate_up, case.down)
    ops.experts(case.x, case.scores, case.choices, True, pages, *weights)  # a library may load at first use
    call(
        lambda: ops.experts(case.x, case.scores, case.choices, True, pages, *weights, out=out.tensor),
        captured,
    )
    got, want = out.check(), case.expected(pages)
    assert (got[pages < 0] == 0).all()
    # What lies between the products is rounded as well.
    assert_near("experts", got, want, want.abs() + want.std(), roundings=3)
    if (pages >= 0).all():
        exact = torch.empty_like(case.x)
        torch_ops.experts(case.x, case.scores, case.choices, True, pages, *weights, exact)
        assert_near("experts", got, exact.double(), want.abs() + want.std(), roundings=6)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Bits of a token are the same alone and among others, while the same kernels take the step."""
    case = Case((60, 32, 4, 2048, 768, 0.0), torch.bfloat16)
    pages = torch.zeros(60, dtype=torch.int32, device="cuda")

    def run(rows: slice) -> Tensor:
        return ops.experts(
            case.x[rows], case.scores[rows], case.choices, True, pages[rows], case.gate_up, case.down
        )

    assert cuda_ops.GROUPED_PAIRS * 32 >= 60 * 4
    whole = run(slice(0, 60))
    assert torch.equal(torch.cat([run(slice(i, i + 1)) for i in range(60)]), whole)


def test_no_tokens() -> None:
    case = Case((4, 8, 2, 64, 64, 0.0), torch.bfloat16)
    none = torch.zeros(0, dtype=torch.int32, device="cuda")
    assert ops.experts(case.x[:0], case.scores[:0], 2, True, none, case.gate_up, case.down).shape == (0, 64)


def test_what_does_not_fit_is_refused() -> None:
    case = Case((4, 8, 2, 64, 64, 0.0), torch.bfloat16)
    routing = Routing(case.scores, 2)
    out = torch.empty(8, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="weight must be"):
        _cuda.experts_down(out, case.down.float(), routing.segments, out, stream())
    with pytest.raises(ValueError, match="one row of out a pair"):
        _cuda.experts_down(out[:7], case.down, routing.segments, out, stream())
    with pytest.raises(ValueError, match="segments must be"):
        _cuda.experts_down(out, case.down, routing.segments[:, :3], out, stream())
    with pytest.raises(ValueError, match="room for every segment"):
        _cuda.route(
            case.scores, None, True, routing.experts, routing.weights, routing.places, routing.tokens,
            routing.ends, routing.segments[:8], stream(),
        )  # fmt: skip
