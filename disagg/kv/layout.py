"""Where bytes lie in a KV pool: arithmetic only, no tensors.

A pool is `[page, kv_head, layer, 2 (k, v), token, head_dim]`, C-contiguous, so a page is one run
of bytes and any contiguous range of a page's heads is one run within it.
"""

from msgspec import Struct

from disagg.protocol import KvLayout

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


class PageLayout(Struct, frozen=True):
    """One rank's share of a `KvLayout`: its heads are `[rank * num_heads, (rank + 1) * num_heads)`."""

    page_size: int
    num_heads: int
    """KV heads of this rank."""
    num_layers: int
    head_dim: int
    item_bytes: int

    @classmethod
    def of(cls, layout: KvLayout) -> "PageLayout":
        """The share of every rank of `layout`; its head count divides evenly, checked at start."""
        return cls(
            layout.page_size,
            layout.num_kv_heads // layout.tp_size,
            layout.num_layers,
            layout.head_dim,
            ITEM_BYTES[layout.dtype],
        )

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one page, over all layers."""
        return self.num_layers * 2 * self.page_size * self.head_dim * self.item_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.num_heads * self.head_bytes

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one page: `[kv_head, layer, 2, token, head_dim]`."""
        return (self.num_heads, self.num_layers, 2, self.page_size, self.head_dim)
