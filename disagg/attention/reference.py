"""Attention in plain torch, one sequence after another: slow, and obviously right."""

import torch
from torch import Tensor

from disagg.attention.batch import AttentionBatch
from disagg.kv.views import layer_views


class ReferenceAttention:
    """Gathers each sequence's pages and attends in float32, on any device."""

    name = "reference"
    capturable = False

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for `batch`."""
        self._batch = batch

    def run(self, layer: int, q: Tensor, pool: Tensor, out: Tensor) -> None:
        """Attend with the planned batch's tokens."""
        batch = self._batch
        group = q.shape[1] // pool.shape[1]
        views = layer_views(pool, layer)
        tokens, pages = batch.qo_indptr.tolist(), batch.page_indptr.tolist()
        for i, kv_len in enumerate(batch.kv_lens.tolist()):
            new, table = slice(*tokens[i : i + 2]), batch.page_indices[slice(*pages[i : i + 2])].long()
            k, v = (_gather(view, table, kv_len).repeat_interleave(group, 0) for view in views)
            out[new] = _attend(q[new].transpose(0, 1).float(), k, v).transpose(0, 1).to(out.dtype)


def _gather(view: Tensor, table: Tensor, kv_len: int) -> Tensor:
    """A sequence's K or V as float32 `[kv_head, kv_len, head_dim]`."""
    return view[table].transpose(0, 1).flatten(1, 2)[:, :kv_len].float()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last tokens `[head, new, dim]` over all, `[head, kv_len, dim]`."""
    new, kv_len = q.shape[1], k.shape[1]
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    seen = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new)
    weights: Tensor = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return weights @ v
