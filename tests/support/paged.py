"""Drives a decoder over a paged pool without an engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from disagg.attention import AttentionBatch, AttentionSizes, make_attention
from disagg.kv.layout import PageLayout
from disagg.models import Decoder


@dataclass
class PagedSequence:
    """Tokens so far, and the pages that hold the KV of the computed ones."""

    token_ids: list[int]
    page_ids: list[int] = field(default_factory=list)
    num_computed: int = 0


class PagedDriver:
    """A decoder with its pool; hands out pages in scattered order and never takes them back."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        attention: str = "cpu",
        num_pages: int = 64,
        page_size: int = 16,
    ) -> None:
        spec, dtype = decoder.spec, decoder.dtype
        layout = PageLayout(page_size, decoder.num_kv_heads, spec.num_layers, spec.head_dim, dtype.itemsize)
        self.decoder = decoder
        self.attention = make_attention(
            attention, AttentionSizes(layout=layout, num_qo_heads=decoder.num_heads, dtype=dtype), "cpu"
        )
        self.page_size = page_size
        # What was never written must not be read.
        self.pool = torch.full((num_pages, *layout.shape), float("nan"), dtype=dtype)
        self._free = [(i * 37) % num_pages for i in range(num_pages)]  # 37 is prime to powers of two

    def step(
        self, work: Sequence[tuple[PagedSequence, int]], logits_at: Iterable[int] | None = None
    ) -> Tensor:
        """Compute `count` more tokens of each sequence; decodes must come first.

        Returns logits of `logits_at`, by default the last new token of each sequence.
        """
        for sequence, count in work:
            needed = -(-(sequence.num_computed + count) // self.page_size)
            while len(sequence.page_ids) < needed:
                sequence.page_ids.append(self._free.pop())
        batch, token_ids = make_batch(work, self.page_size)
        if logits_at is None:
            logits_at = (batch.qo_indptr[1:] - 1).tolist()
        self.attention.plan(batch)
        logits = self.decoder.forward(
            token_ids, batch, self.attention, self.pool, torch.tensor(list(logits_at), dtype=torch.int64)
        )
        for sequence, count in work:
            sequence.num_computed += count
        return logits

    def prefill(self, token_ids: Sequence[int], chunk: int | None = None) -> tuple[PagedSequence, Tensor]:
        """Compute a prompt, whole or in chunks; returns logits of its last token `[1, vocab]`."""
        sequence = PagedSequence(list(token_ids))
        while (left := len(token_ids) - sequence.num_computed) > (chunk or left):
            self.step([(sequence, chunk or left)], logits_at=())
        return sequence, self.step([(sequence, left)])

    def generate(self, token_ids: Sequence[int], num_tokens: int, chunk: int | None = None) -> list[int]:
        """Greedy continuation, end tokens ignored."""
        sequence, logits = self.prefill(token_ids, chunk)
        output = [int(logits.argmax())]
        while len(output) < num_tokens:
            sequence.token_ids.append(output[-1])
            output.append(int(self.step([(sequence, 1)]).argmax()))
        return output


def make_batch(work: Sequence[tuple[PagedSequence, int]], page_size: int) -> tuple[AttentionBatch, Tensor]:
    """The batch that computes `count` more tokens of each sequence, and their token ids."""
    counts = [count for _, count in work]
    positions = [range(s.num_computed, s.num_computed + n) for s, n in work]
    tables = [s.page_ids[: -(-(s.num_computed + n) // page_size)] for s, n in work]

    def ints(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    batch = AttentionBatch(
        num_decodes=next((i for i, n in enumerate(counts) if n != 1), len(counts)),
        qo_indptr=ints(accumulate(counts, initial=0)),
        kv_lens=ints(p.stop for p in positions),
        page_indptr=ints(accumulate(map(len, tables), initial=0)),
        page_indices=ints(page for table in tables for page in table),
        positions=ints(p for run in positions for p in run),
        token_pages=ints(
            table[p // page_size] for table, run in zip(tables, positions, strict=True) for p in run
        ),
        token_offsets=ints(p % page_size for run in positions for p in run),
        max_qo_len=max(counts),
        max_kv_len=max(p.stop for p in positions),
    )
    token_ids = ints(s.token_ids[p] for (s, _), run in zip(work, positions, strict=True) for p in run)
    return batch, token_ids
