"""Random paged batches, and what attention over them must give."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from msgspec import Struct
from torch import Tensor

from disagg.attention import AttentionBackend, AttentionBatch


class Heads(Struct, frozen=True):
    """Sizes of one attention layer."""

    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 32
    page_size: int = 16

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


class Piece(Struct, frozen=True):
    """A sequence of `kv_len` tokens, of which the last `new` are of this step."""

    kv_len: int
    new: int = 1


class Case(Struct, frozen=True):
    """A batch, its queries, and a pool in which only its own KV are numbers."""

    heads: Heads
    sequences: tuple[Piece, ...]
    batch: AttentionBatch
    q: Tensor
    pool: Tensor
    layer: int

    def run(self, backend: AttentionBackend) -> Tensor:
        out = torch.full_like(self.q, float("nan"))
        backend.plan(self.batch)
        backend.run(self.layer, self.q, self.pool, out)
        return out

    def only(self, index: int, first: int = 0, last: int | None = None) -> "Case":
        """Sequence `index` alone, in a step that computes its new tokens `[first, last)`."""
        whole = self.sequences[index]
        last = whole.new if last is None else last
        at = int(self.batch.qo_indptr[index])
        part = Piece(whole.kv_len - whole.new + last, last - first)
        batch = make_batch([part], [self.table(index)], self.heads.page_size)
        return Case(self.heads, (part,), batch, self.q[at + first : at + last], self.pool, self.layer)

    def rows(self, out: Tensor, index: int) -> Tensor:
        """The rows of sequence `index`."""
        begin, end = self.batch.qo_indptr[index : index + 2].tolist()
        return out[begin:end]

    def table(self, index: int) -> list[int]:
        begin, end = self.batch.page_indptr[index : index + 2].tolist()
        table: list[int] = self.batch.page_indices[begin:end].tolist()
        return table


def make_case(
    heads: Heads, sequences: Sequence[Piece], *, dtype: torch.dtype, seed: int = 0, num_layers: int = 2
) -> Case:
    """Scatter the sequences over a pool that holds NaN wherever nothing of theirs is."""
    random = torch.Generator().manual_seed(seed)
    counts = [-(-s.kv_len // heads.page_size) for s in sequences]
    num_pages = sum(counts) + 3
    free = torch.randperm(num_pages, generator=random).tolist()
    tables = [[free.pop() for _ in range(count)] for count in counts]
    layer = num_layers - 1
    shape = (num_pages, heads.num_kv_heads, num_layers, 2, heads.page_size, heads.head_dim)
    pool = torch.full(shape, float("nan"), dtype=dtype)
    for s, table in zip(sequences, tables, strict=True):
        for i, page in enumerate(table):
            held = min(heads.page_size, s.kv_len - i * heads.page_size)
            part = pool[page, :, layer, :, :held]
            part.copy_(torch.randn(part.shape, generator=random))
    num_tokens = sum(s.new for s in sequences)
    # Queries lie within wider rows, as those of a joint projection do.
    wide = torch.randn(num_tokens, heads.num_heads + 2, heads.head_dim, generator=random).to(dtype)
    q = wide[:, : heads.num_heads]
    return Case(heads, tuple(sequences), make_batch(sequences, tables, heads.page_size), q, pool, layer)


def make_batch(sequences: Sequence[Piece], tables: Sequence[Sequence[int]], page_size: int) -> AttentionBatch:
    """The step that computes the sequences' last tokens."""
    runs = [range(s.kv_len - s.new, s.kv_len) for s in sequences]

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return AttentionBatch(
        num_decodes=next((i for i, s in enumerate(sequences) if s.new != 1), len(sequences)),
        qo_indptr=ints(list(accumulate((s.new for s in sequences), initial=0))),
        kv_lens=ints([s.kv_len for s in sequences]),
        page_indptr=ints(list(accumulate(map(len, tables), initial=0))),
        page_indices=ints([page for table in tables for page in table]),
        positions=ints([p for run in runs for p in run]),
        token_pages=ints([t[p // page_size] for t, run in zip(tables, runs, strict=True) for p in run]),
        token_offsets=ints([p % page_size for run in runs for p in run]),
        max_qo_len=max((s.new for s in sequences), default=0),
        max_kv_len=max((s.kv_len for s in sequences), default=0),
    )


def expected(case: Case) -> Tensor:
    """Attention in float64, written down naively and apart from every backend."""
    out = torch.empty(case.q.shape, dtype=torch.float64)
    heads = case.heads
    for i, s in enumerate(case.sequences):
        rows = case.rows(out, i)
        pages = case.pool[case.table(i), :, case.layer].double()
        k, v = pages.permute(2, 1, 0, 3, 4).reshape(2, heads.num_kv_heads, -1, heads.head_dim)
        for t in range(s.new):
            seen = s.kv_len - s.new + t + 1
            for h in range(heads.num_heads):
                kv_head = h // heads.group
                q = case.rows(case.q, i)[t, h].double()
                weights = (k[kv_head, :seen] @ q * heads.head_dim**-0.5).softmax(0)
                rows[t, h] = weights @ v[kv_head, :seen]
    return out
