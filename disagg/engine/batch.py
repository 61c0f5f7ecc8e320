"""From a planned step to the tensors that the decoder takes.

Built on the host as one array of int32 and moved to the device by one copy.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from disagg.attention import AttentionBatch
from disagg.attention.batch import HostIndices
from disagg.engine.plan import Int32s, StepPlan, int32s


class StepTensors(NamedTuple):
    """What `Decoder.forward` takes of one step."""

    token_ids: Tensor
    """int32 `[tokens]`"""
    logits_at: Tensor
    """int64 `[samples]`: the last token of each row that is sampled."""
    batch: AttentionBatch
    more: dict[str, Tensor]
    """What was to travel with them."""


def build_tensors(
    plan: StepPlan, page_size: int, device: torch.device, more: Mapping[str, Int32s] | None = None
) -> StepTensors:
    """Lay out one step: where every new token stands in its sequence and in the pool.

    `more` travels in the same copy.
    """
    query_lens, kv_lens = int32s(plan.query_lens), int32s(plan.kv_lens)
    page_indptr, page_indices = int32s(plan.page_indptr), int32s(plan.page_indices)
    qo_indptr = np.zeros(plan.num_rows + 1, np.int32)
    np.cumsum(query_lens, out=qo_indptr[1:])
    # Token t of row r stands at the row's start plus t's distance from the row's first token.
    first_positions = kv_lens - query_lens - qo_indptr[:-1]
    positions = np.arange(plan.num_tokens, dtype=np.int32) + np.repeat(first_positions, query_lens)
    token_pages = page_indices[np.repeat(page_indptr[:-1], query_lens) + positions // page_size]
    more = more or {}
    parts = {
        **more,
        "token_ids": int32s(plan.token_ids),
        "logits_at": qo_indptr[1:][int32s(plan.samples.rows)] - 1,
        "qo_indptr": qo_indptr,
        "kv_lens": kv_lens,
        "page_indptr": page_indptr,
        "page_indices": page_indices,
        "positions": positions,
        "token_pages": token_pages,
        "token_offsets": positions % page_size,
    }
    tensors: dict[str, Any] = _move(parts, device)
    moved = {name: tensors.pop(name) for name in more}
    token_ids, logits_at = tensors.pop("token_ids"), tensors.pop("logits_at").long()
    indices = (torch.from_numpy(array) for array in (qo_indptr, kv_lens.copy(), page_indptr.copy()))
    batch = AttentionBatch(
        num_decodes=plan.num_decodes,
        max_qo_len=int(query_lens.max()),
        max_kv_len=int(kv_lens.max()),
        on_host=None if device.type == "cpu" else HostIndices(*indices),
        **tensors,
    )
    return StepTensors(token_ids, logits_at, batch, moved)


def _move(parts: dict[str, Int32s], device: torch.device) -> dict[str, Tensor]:
    joined = torch.from_numpy(np.concatenate(list(parts.values())))
    if device.type != "cpu":
        joined = joined.pin_memory().to(device, non_blocking=True)
    pieces = torch.split(joined, [len(part) for part in parts.values()])
    return dict(zip(parts, pieces, strict=True))
