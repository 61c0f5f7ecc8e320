"""One step's sequences, as attention kernels want them."""

from typing import NamedTuple

from msgspec import Struct
from torch import Tensor


class HostIndices(NamedTuple):
    """Index tensors of a batch in the host's memory, for planners that run there. Fields as the batch's."""

    qo_indptr: Tensor
    kv_lens: Tensor
    page_indptr: Tensor


class AttentionBatch(Struct, frozen=True, kw_only=True, eq=False):
    """The new tokens of one step and where their sequences' KV lies.

    Built on the host once a step and moved to the device once. Tokens of all sequences lie flat in
    one axis, in the order of the sequences: decodes first, then prefill chunks. Page tables are CSR,
    which is what FlashInfer takes and what flash-attn's tables are padded from. Index tensors are
    int32 and contiguous.
    """

    num_decodes: int
    """Sequences with exactly one new token; they come first."""
    qo_indptr: Tensor
    """`[n + 1]`: sequence i's new tokens are `[qo_indptr[i], qo_indptr[i + 1])`."""
    kv_lens: Tensor
    """`[n]`: tokens of each sequence in KV after this step, its new ones included."""
    page_indptr: Tensor
    """`[n + 1]`: sequence i's pages are `page_indices[page_indptr[i] : page_indptr[i + 1]]`."""
    page_indices: Tensor
    positions: Tensor
    """int32 or int64 `[tokens]`: place of each new token in its sequence."""
    token_pages: Tensor
    """`[tokens]`: page that takes each new token's K and V."""
    token_offsets: Tensor
    """`[tokens]`: place in that page."""
    max_qo_len: int
    max_kv_len: int
    on_host: HostIndices | None = None
    """Set where the batch is on another device: reading an index back from there would wait for it."""
    is_static: bool = False
    """Its tensors keep their addresses from step to step: what `run` launches may be replayed later.

    It may end in padding: sequences with a `kv_len` of 0, no pages, and a `token_pages` of -1.
    """

    @property
    def host(self) -> HostIndices:
        """What a planner on the host reads."""
        return self.on_host or HostIndices(self.qo_indptr, self.kv_lens, self.page_indptr)

    @property
    def num_sequences(self) -> int:
        """Sequences of the step."""
        return len(self.kv_lens)

    def sequences(self, begin: int, end: int) -> "AttentionBatch":
        """The batch of sequences `[begin, end)` alone, their tokens numbered from 0.

        Lengths' maxima are kept, so they are upper bounds there.
        """
        host = self.host
        first, last = int(host.qo_indptr[begin]), int(host.qo_indptr[end])
        first_page, last_page = int(host.page_indptr[begin]), int(host.page_indptr[end])
        part = HostIndices(
            host.qo_indptr[begin : end + 1] - first,
            host.kv_lens[begin:end],
            host.page_indptr[begin : end + 1] - first_page,
        )
        return AttentionBatch(
            num_decodes=max(0, min(self.num_decodes, end) - begin),
            qo_indptr=self.qo_indptr[begin : end + 1] - first,
            kv_lens=self.kv_lens[begin:end],
            page_indptr=self.page_indptr[begin : end + 1] - first_page,
            page_indices=self.page_indices[first_page:last_page],
            positions=self.positions[first:last],
            token_pages=self.token_pages[first:last],
            token_offsets=self.token_offsets[first:last],
            max_qo_len=self.max_qo_len,
            max_kv_len=self.max_kv_len,
            on_host=part if self.on_host is not None else None,
        )
