import pytest
import torch

from disagg.kv.layout import PageLayout
from disagg.kv.views import layer_views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_seen_where_the_page_layout_says(dtype: torch.dtype) -> None:
    """The transfer moves bytes by `PageLayout` and attention reads by views: both must mean the same."""
    layout = PageLayout(page_size=4, num_heads=3, num_layers=5, head_dim=8, item_bytes=dtype.itemsize)
    pool = torch.empty((6, *layout.shape), dtype=dtype)
    assert pool[0].nbytes == layout.page_bytes
    pool.copy_(torch.arange(pool.numel()).view(pool.shape))
    for layer in range(layout.num_layers):
        for which, view in enumerate(layer_views(pool, layer)):
            assert view.shape == (6, 3, 4, 8)
            assert torch.equal(view, pool[:, :, layer, which])
            at = view[2, 1].data_ptr() - pool.data_ptr()
            in_head = (layer * 2 + which) * 4 * 8 * dtype.itemsize
            assert at == 2 * layout.page_bytes + layout.head_bytes + in_head


def test_views_are_no_copies() -> None:
    pool = torch.zeros(2, 1, 3, 2, 4, 8)
    k, v = layer_views(pool, 1)
    k.fill_(1)
    v.fill_(2)
    assert pool.sum() == pool[:, :, 1].sum() == 3 * 2 * 4 * 8
