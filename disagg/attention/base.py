"""The interface of attention backends."""

from typing import Protocol

import torch
from msgspec import Struct
from torch import Tensor

from disagg.attention.batch import AttentionBatch
from disagg.kv.layout import PageLayout


class AttentionSizes(Struct, frozen=True, kw_only=True):
    """What backends must know of a rank's model and of its largest step."""

    layout: PageLayout
    """This rank's pages."""
    num_qo_heads: int
    """Query heads of this rank."""
    dtype: torch.dtype
    """Of queries and outputs."""
    kv_dtype: torch.dtype | None = None
    """Of the pool; None where it is `dtype`. Values are scaled by 1."""
    max_rows: int = 0
    """Sequences of one step. Backends on the CPU need neither this nor the next."""
    max_page_indices: int = 0
    """Pages of them all; a page counts once for each sequence that has it."""

    @property
    def is_narrow(self) -> bool:
        """Whether the pool is of another type than the queries."""
        return self.kv_dtype not in (None, self.dtype)


class AttentionBackend(Protocol):
    """Causal attention of new tokens over their sequences' KV in the paged pool.

    One engine's thread uses it. Every step `plan` is called once and then `run` for each layer, so
    what does not depend on the layer (cutting into tasks, workspaces, index tensors) is done once.
    Scores are scaled by `head_dim ** -0.5`. Inputs are the same for all backends: a backend takes
    its layer's K and V as strided views (`kv.layer_views`), for which no copy is made.
    """

    @property
    def name(self) -> str:
        """As `--attention-backend` spells it."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether decodes may be captured in a CUDA graph: `run` launches and neither waits nor allocates."""
        ...

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for `batch`; what was planned before is forgotten."""
        ...

    def run(self, layer: int, q: Tensor, pool: Tensor, out: Tensor) -> None:
        """Attend with the planned batch's tokens. Their own K and V are in the pool already.

        Args:
            layer: Of the pool, from 0.
            q: `[tokens, heads, head_dim]`; heads may lie within wider rows. Not written to.
            pool: `[page, kv_head, layer, 2, token, head_dim]`.
            out: Like `q`; written to.
        """
        ...
