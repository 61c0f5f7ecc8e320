"""Where the inputs of a decode step lie in one buffer of int32, whatever the batch.

A CUDA graph reads what it was captured with: fixed addresses. So every input has a window of its
own, wide enough for the largest batch, and one copy moves them all. Sequences past the real batch
are padding, up to the next size that a graph was captured for.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from disagg.engine.draws import SamplingRows
from disagg.engine.plan import Int32s, StepPlan, int32s

PADDING = {"slots": -1, "token_pages": -1}
"""What an input holds past the batch; 0 where nothing is said."""
PLACES = ("token_ids", "slots", "kv_lens", "positions", "token_pages", "token_offsets")
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "keys")
WIDTHS = {"keys": 2}
"""Int32s of an input for one sequence; 1 where nothing is said."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph, ascending: padding costs at most an eighth, or four sequences."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_num_seqs:
        sizes.append(sizes[-1] + max(4, 1 << max(0, sizes[-1].bit_length() - 4)))
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class RowWindows:
    """The windows for up to `max_rows` sequences; lengths and offsets are in int32."""

    def __init__(self, max_rows: int, max_page_indices: int) -> None:
        widths = {name: max_rows * WIDTHS.get(name, 1) for name in (*PLACES, *SAMPLING_FIELDS)}
        widths |= {"page_indptr": max_rows + 1, "page_indices": max_page_indices}
        self.max_rows = max_rows
        self.max_page_indices = max_page_indices
        self._begins: dict[str, int] = {}
        self.size = 0
        for name, width in widths.items():
            self._begins[name] = self.size
            self.size += -(-width // 4) * 4  # windows begin at 16 bytes, where vectors may be loaded

    def pack(self, plan: StepPlan, num_rows: int, page_size: int, out: Int32s) -> int:
        """Write a step of decodes alone, padded to `num_rows`, to `out` `[size]`.

        Returns:
            How much of `out` is to be copied.
        """
        page_indices = int32s(plan.page_indices)
        for name, values, padding in _inputs(plan, page_size):
            begin, width = self._begins[name], num_rows * WIDTHS.get(name, 1)
            out[begin : begin + len(values)] = values
            out[begin + len(values) : begin + width] = padding
        begin, page_indptr = self._begins["page_indptr"], int32s(plan.page_indptr)
        out[begin : begin + len(page_indptr)] = page_indptr
        out[begin + len(page_indptr) : begin + num_rows + 1] = page_indptr[-1]
        begin = self._begins["page_indices"]
        out[begin : begin + len(page_indices)] = page_indices
        return begin + len(page_indices)

    def pack_padding(self, num_rows: int, out: Int32s) -> None:
        """Write `num_rows` of padding."""
        out[: self._begins["page_indices"]] = 0
        for name, padding in PADDING.items():
            out[self._begins[name] : self._begins[name] + num_rows] = padding

    def view(self, name: str, buffer: Tensor, num_rows: int) -> Tensor:
        """The window of an input in `buffer`, the bits of floats as int32, for `num_rows`."""
        begin = self._begins[name]
        match name:
            case "page_indptr":
                return buffer[begin : begin + num_rows + 1]
            case "page_indices":
                return buffer[begin : begin + self.max_page_indices]
            case _:
                return buffer[begin : begin + num_rows * WIDTHS.get(name, 1)]


def _inputs(plan: StepPlan, page_size: int) -> Iterator[tuple[str, Int32s, int]]:
    kv_lens = int32s(plan.kv_lens)
    positions = kv_lens - 1
    drawn = SamplingRows.of(plan.samples)
    arrays = {
        "token_ids": int32s(plan.token_ids),
        "slots": int32s(plan.slots),
        "kv_lens": kv_lens,
        "positions": positions,
        # A decode's token goes to the last of its pages.
        "token_pages": int32s(plan.page_indices)[int32s(plan.page_indptr)[1:] - 1],
        "token_offsets": positions % page_size,
        **sampling_arrays(drawn),
    }
    for name, values in arrays.items():
        yield name, values, PADDING.get(name, 0)


def sampling_arrays(rows: SamplingRows) -> dict[str, Int32s]:
    """Sampling parameters as the device takes them, the bits of floats as int32; `keys` has two a draw."""
    return {
        "temperature": rows.temperature.view(np.int32),
        "top_k": rows.top_k,
        "top_p": rows.top_p.view(np.int32),
        "min_p": rows.min_p.view(np.int32),
        "keys": rows.key.view(np.int32),
    }
