"""Decode attention on the GPU against float64, with NaN wherever nothing may be read."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

LAYERS = 3
CANARY = 7.0
UNEVEN = [0, 1, 15, 16, 17, 100, 0, 3000, 31, 32, 33, 511, 512, 513, 2047, 5, 0]
# Of bfloat16 and float16: the output is rounded once, and so are the probabilities.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-6}


@dataclass(kw_only=True)
class Case:
    """A batch whose pool is NaN but for the tokens that its rows have in one layer."""

    kv_lens: list[int]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    layer: int = 1
    seed: int = 0
    spread: float = 1.0  # of the keys: large ones give scores far apart
    num_sms: int | None = None

    def __post_init__(self) -> None:
        from disagg._cuda import DecodeAttention

        self.random = torch.Generator("cuda").manual_seed(self.seed)
        counts = [-(-length // self.page_size) for length in self.kv_lens]
        rows, num_pages = len(self.kv_lens), sum(counts) + 3
        self.page_indptr = _ints([0, *accumulate(counts)])
        shuffled = torch.randperm(num_pages, generator=self.random, device="cuda")
        self.page_indices = shuffled[: sum(counts)].int()
        self.lens = _ints(self.kv_lens)
        shape = (num_pages, self.kv_heads, LAYERS, 2, self.page_size, self.dim)
        self.kv_dtype = self.kv_dtype or self.dtype
        self.pool = torch.full(shape, torch.nan, device="cuda").to(self.kv_dtype)
        for row in range(rows):
            self.fill(row)
        qkv = self.normal(rows, self.heads + 2 * self.kv_heads, self.dim)
        self.q = qkv[:, : self.heads]
        self.around = torch.empty(rows + 2, self.heads, self.dim, dtype=self.dtype, device="cuda")
        self.out = self.around[1:-1]
        sms = self.num_sms or torch.cuda.get_device_properties("cuda").multi_processor_count
        sizes = (self.heads, self.kv_heads, self.dim, self.page_size, rows + 5)
        self.attention = DecodeAttention(*sizes, self.dtype, sms, self.kv_dtype)
        # Whatever was there before must not matter.
        num_bytes = self.attention.workspace_bytes()
        self.workspace = torch.full((num_bytes,), 0xA5, dtype=torch.uint8, device="cuda")

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, device="cuda").to(self.dtype)

    def pages(self, row: int) -> Tensor:
        return self.page_indices[self.page_indptr[row] : self.page_indptr[row + 1]].long()

    def fill(self, row: int) -> None:
        """Fresh K and V for the tokens of a row, NaN behind them."""
        pages, length = self.pages(row), self.kv_lens[row]
        if length == 0:
            return
        shape = (2, self.kv_heads, len(pages) * self.page_size, self.dim)
        tokens = torch.full(shape, torch.nan, dtype=self.dtype, device="cuda")
        tokens[:, :, :length] = self.normal(2, self.kv_heads, length, self.dim)
        tokens[0] *= self.spread
        paged = tokens.unflatten(2, (len(pages), self.page_size)).to(self.kv_dtype)
        # As bytes: not every operator takes e4m3.
        self.pool.view(torch.uint8)[pages, :, self.layer] = paged.permute(2, 1, 0, 3, 4).view(torch.uint8)

    def plan(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self.attention.plan(self.lens, self.page_indptr, self.workspace, stream)

    def run(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        tables = (self.page_indices, self.lens, self.page_indptr)
        self.attention.run(self.q, self.pool, self.layer, *tables, self.out, self.workspace, stream)

    def expected(self) -> Tensor:
        group = self.heads // self.kv_heads
        result = torch.zeros(len(self.kv_lens), self.heads, self.dim, dtype=torch.float64, device="cuda")
        for row, length in enumerate(self.kv_lens):
            if length == 0:
                continue
            pages = self.pool.view(torch.uint8)[self.pages(row), :, self.layer].contiguous()
            tokens = pages.view(self.kv_dtype).float().permute(2, 1, 0, 3, 4).flatten(2, 3)
            k, v = tokens[:, :, :length].double().repeat_interleave(group, 1)
            scores = torch.einsum("hd,htd->ht", self.q[row].double(), k) / self.dim**0.5
            result[row] = torch.einsum("ht,htd->hd", scores.softmax(-1), v)
        return result

    def check(self) -> None:
        self.around.fill_(CANARY)
        self.run()
        self.check_out()

    def check_out(self) -> None:
        expected, got = self.expected(), self.out.double()
        assert not got.isnan().any()
        error = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)
        assert error.max().item() < TOLERANCE[self.dtype]
        empty = [row for row, length in enumerate(self.kv_lens) if length == 0]
        assert (self.out[empty] == 0).all()
        assert (self.around[[0, -1]] == CANARY).all()


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.fixture(autouse=True)
def on_a_stream() -> Iterator[None]:
    """Not the default stream, on which some races cannot show."""
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", range(1, 9))
def test_every_group_and_length_agrees_with_float64(group: int, dim: int) -> None:
    case = Case(kv_lens=UNEVEN, heads=3 * group, kv_heads=3, dim=dim, seed=group, layer=group % LAYERS)
    case.plan()
    case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_page_sizes_and_types_agree_with_float64(page_size: int, dtype: torch.dtype) -> None:
    for dim in (64, 128):
        case = Case(kv_lens=UNEVEN, page_size=page_size, dtype=dtype, dim=dim, seed=page_size)
        case.plan()
        case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_kv_of_e4m3_agrees_with_float64(group: int, dtype: torch.dtype) -> None:
    for page_size in (16, 64):
        sizes = {"heads": 3 * group, "kv_heads": 3, "page_size": page_size, "layer": group % LAYERS}
        case = Case(kv_lens=UNEVEN, dtype=dtype, kv_dtype=torch.float8_e4m3fn, seed=group, **sizes)
        assert case.attention.is_fast
        case.plan()
        case.check()


@pytest.mark.parametrize(
    "kv_lens",
    [
        [1],
        [16],
        [40_000],  # every CTA has a piece of every head
        [20_001, 3, 9_999],
        [0, 0, 0],
        [1] * 300,
        [i % 40 for i in range(4000)],  # more than a block of `plan` has threads, and 48 KB
        [2048] * 64,
        [100 + 37 * i % 1900 for i in range(256)],
    ],
    ids=lambda lens: f"{len(lens)}x{max(lens)}",
)
def test_batches_agree_with_float64(kv_lens: list[int]) -> None:
    case = Case(kv_lens=kv_lens)
    case.plan()
    case.check()


@pytest.mark.parametrize("num_sms", [1, 2, 7, 131])
def test_any_grid_gives_the_same_answer(num_sms: int) -> None:
    """What is merged where depends on the grid; the answer does not, but for rounding."""
    case = Case(kv_lens=UNEVEN, num_sms=num_sms)
    case.plan()
    case.check()


def test_scores_far_apart_agree_with_float64() -> None:
    """The running maximum is raised many times, and most tokens weigh nothing."""
    case = Case(kv_lens=UNEVEN, spread=12.0)
    case.plan()
    case.check()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size", "dtype"),
    [
        (6, 2, 40, 16, torch.float32),
        (8, 2, 128, 16, torch.float32),
        (3, 3, 256, 16, torch.bfloat16),
        (16, 1, 128, 16, torch.bfloat16),
        (4, 2, 64, 10, torch.float16),
        (4, 2, 64, 48, torch.bfloat16),
    ],
)
def test_other_shapes_agree_with_float64(
    heads: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype
) -> None:
    for kv_dtype in (None, torch.float8_e4m3fn):
        shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "page_size": page_size}
        case = Case(kv_lens=UNEVEN, dtype=dtype, kv_dtype=kv_dtype, **shape)
        assert case.attention.workspace_bytes() == 0
        case.plan()
        case.check()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kv_lens", [UNEVEN, [9000], [300] * 200], ids=["uneven", "one", "many"])
def test_a_hundred_runs_are_equal_bit_by_bit(kv_lens: list[int], kv_dtype: torch.dtype) -> None:
    """Pieces arrive in any order and are merged in one."""
    case = Case(kv_lens=kv_lens, kv_dtype=kv_dtype)
    case.plan()
    case.check()
    first = case.out.clone()
    results = []
    for _ in range(100):
        case.run()
        results.append(case.out.clone())
    assert all(torch.equal(first, result) for result in results)


def test_a_row_does_not_depend_on_runs_before_it() -> None:
    """Counters are clean after every layer: many layers follow one plan."""
    case = Case(kv_lens=UNEVEN)
    case.plan()
    for seed in range(5):
        case.random.manual_seed(seed)
        for row in range(len(UNEVEN)):
            case.fill(row)
        case.q.copy_(case.normal(*case.q.shape))
        case.plan()
        case.check()
        case.check()


def test_plan_mends_an_aborted_run() -> None:
    case = Case(kv_lens=[5000, 7])
    case.workspace.fill_(0xFF)
    case.plan()
    case.check()


def test_a_graph_serves_other_lengths_and_padding_rows() -> None:
    """The grid is fixed; kv_lens and the page tables are read on the device at each replay."""
    longest = [700, 0, 33, 2000, 1, 1200, 16, 64]
    case = Case(kv_lens=longest)
    case.plan()
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        case.plan()
        case.run()
        case.run()
    for shrink in (1, 2, 3, 50, 3000):
        case.kv_lens = [length // shrink for length in longest]
        case.lens.copy_(_ints(case.kv_lens))
        counts = [-(-length // case.page_size) for length in case.kv_lens]
        case.page_indptr.copy_(_ints([0, *accumulate(counts)]))
        for row in range(len(longest)):
            case.fill(row)
        case.around.fill_(CANARY)
        graph.replay()
        case.check_out()


def test_a_step_sees_the_token_stored_just_before() -> None:
    """`run` starts early, but reads q and the newest tokens only when the kernels before have ended."""
    case = Case(kv_lens=[length for length in UNEVEN if length])
    rows = torch.arange(len(case.kv_lens), device="cuda")
    last = case.lens.long() - 1
    newest = case.page_indices[case.page_indptr[rows].long() + last // case.page_size].long()
    offsets = last % case.page_size
    layer = case.pool[:, :, case.layer].permute(0, 3, 1, 2, 4)  # [page, token, ...]
    tokens, queries = case.normal(len(rows), case.kv_heads, 2, case.dim), case.normal(*case.q.shape)
    nothing = torch.full_like(tokens, torch.nan)

    def step() -> None:
        case.q.copy_(queries)
        layer.index_put_((newest, offsets), tokens)
        case.run()

    case.plan()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(20):
            case.q.zero_()
            layer.index_put_((newest, offsets), nothing)
            step()
    for _ in range(5):
        tokens.copy_(case.normal(*tokens.shape))
        queries.copy_(case.normal(*queries.shape))
        case.around.fill_(CANARY)
        graph.replay()
        case.check_out()


def test_no_rows_are_nothing_to_do() -> None:
    case = Case(kv_lens=[])
    case.plan()
    case.run()


def test_bad_arguments_are_named() -> None:
    from disagg._cuda import DecodeAttention

    good = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 128,
        "page_size": 16,
        "max_rows": 4,
        "dtype": "bfloat16",
        "num_sms": 132,
    }
    bad = {
        "num_heads": 7,
        "num_kv_heads": 0,
        "head_dim": 100,
        "page_size": 0,
        "max_rows": 10_000,
        "dtype": torch.int32,
        "num_sms": 0,
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"^{name} "):
            DecodeAttention(**{**good, name: value})

    case = Case(kv_lens=[5, 20, 0], heads=8, kv_heads=2)
    arguments = {
        "q": case.q,
        "pool": case.pool,
        "layer": 0,
        "page_indices": case.page_indices,
        "kv_lens": case.lens,
        "page_indptr": case.page_indptr,
        "out": case.out,
        "workspace": case.workspace,
        "stream": 0,
    }
    wrong = {
        "q": [case.q[:2], case.q.float(), case.q.transpose(0, 1), case.q[:, :4]],
        "pool": [case.pool.float(), case.pool[..., :64], case.pool[:, :1], case.pool[:, :, :, :1]],
        "layer": [-1, LAYERS],
        "page_indices": [case.page_indices.long()],
        "kv_lens": [case.lens.long(), _ints([1] * 9)],
        "page_indptr": [case.page_indptr[:-1], case.page_indptr.long()],
        "out": [case.out[:2], case.out.float(), case.out.flatten(1)],
        "workspace": [case.workspace[:-1], case.workspace[1:], case.workspace.view(torch.int32)],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} "):
                case.attention.run(**{**arguments, name: value})
