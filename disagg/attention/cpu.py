"""Attention by the C++ kernels of csrc/cpu."""

from torch import Tensor

from disagg._cpu import Level, PagedAttention
from disagg.attention.batch import AttentionBatch
from disagg.errors import ConfigError
from disagg.kv.layout import PageLayout


class CpuAttention:
    """Paged attention on the CPU, float32 or bfloat16, accumulated in float32.

    A token's result has the same bits whatever else is in the batch, on any number of threads,
    however its prompt was cut into chunks, and whether it comes as a decode or in a prefill.
    """

    name = "cpu"
    capturable = False

    def __init__(
        self, layout: PageLayout, num_qo_heads: int, num_threads: int, level: Level | None = None
    ) -> None:
        """Raises ConfigError where the kernels do not take these sizes; they are the model's."""
        sizes = (num_qo_heads, layout.num_heads, layout.head_dim, layout.page_size)
        try:
            self._attention = PagedAttention(*sizes, num_threads, level)
        except ValueError as error:
            raise ConfigError(f"attention_backend cpu cannot run this model: {error}") from error

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for `batch`."""
        self._attention.plan(batch.qo_indptr, batch.kv_lens, batch.page_indptr, batch.page_indices)

    def run(self, layer: int, q: Tensor, pool: Tensor, out: Tensor) -> None:
        """Attend with the planned batch's tokens."""
        self._attention.run(q, pool, layer, out)
