"""What attention backends see of the pool: one layer's K and V as strided views, never copies."""

from torch import Tensor


def layer_views(pool: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """One layer's K and V, each `[page, kv_head, token, head_dim]` (HND), as views of the pool.

    Args:
        pool: `[page, kv_head, layer, 2, token, head_dim]`.
        layer: In `[0, pool.shape[2])`.
    """
    kv = pool.select(2, layer)
    return kv.select(2, 0), kv.select(2, 1)
