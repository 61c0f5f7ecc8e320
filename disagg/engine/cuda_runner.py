"""Runs planned steps on one GPU: decodes as CUDA graphs, everything else kernel by kernel.

The host is one step ahead. A step's inputs are one copy to the device; a token that a step in
flight will sample stays there, in `last_tokens`, by slot.

Of several ranks each runs the same plans, sums between them included in the graphs. Rank 0 samples and
hands its `last_tokens` to the others: they cannot differ by a tie or the order of a sum.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from disagg.attention import AttentionBackend, AttentionBatch
from disagg.attention.batch import HostIndices
from disagg.engine.batch import build_tensors
from disagg.engine.draws import SamplingRows
from disagg.engine.engine import Sampled
from disagg.engine.plan import StepPlan, int32s, packed
from disagg.engine.windows import SAMPLING_FIELDS, RowWindows, graph_sizes, sampling_arrays
from disagg.layers import cuda_ops
from disagg.models import Decoder

log = logging.getLogger(__name__)


_FIRST_STEP = StepPlan(
    step=0,
    num_decodes=0,
    num_tokens=1,
    token_ids=packed([0]),
    slots=packed([0]),
    query_lens=packed([1]),
    kv_lens=packed([1]),
    page_indptr=packed([0, 1]),
    page_indices=packed([0]),
)
"""A prompt of one token in page 0, which is nobody's before the engine begins."""


class _Draws(NamedTuple):
    """Sampling parameters on the device, one row for each token to draw."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    slots: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], slots: Tensor) -> _Draws:
        """Read the bits that `sampling_arrays` has written."""
        floats = {name: inputs[name].view(torch.float32) for name in ("temperature", "top_p", "min_p")}
        return cls(top_k=inputs["top_k"], keys=inputs["keys"].view(-1, 2), slots=slots, **floats)


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: AttentionBatch


class CudaRunner:
    """One rank: a decoder, its KV pool and its attention, on one GPU. Used by one thread."""

    depth = 1

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        pool: Tensor,
        page_size: int,
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        max_page_indices: int,
    ) -> None:
        """Make room for the largest step, run a first one, so that all is compiled, and capture the graphs.

        Args:
            decoder: This rank's weights.
            attention: Reads the pool.
            pool: This rank's pages, `[page, kv_head, layer, 2, page_size, head_dim]`; page 0 is nobody's yet.
            page_size: Tokens.
            max_num_seqs: Sequences of one step.
            max_step_tokens: New tokens of one step.
            max_page_indices: Pages of one step's sequences; a page counts once for each that has it.
        """
        self._pool = pool
        self._decoder = decoder
        self._attention = attention
        self._page_size = page_size
        device = decoder.device
        self._device = device
        self._windows = RowWindows(max_num_seqs, max_page_indices)
        self._staging = torch.zeros(self._windows.size, dtype=torch.int32).pin_memory()
        self._inputs = torch.zeros(self._windows.size, dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        # One more than steps in flight: the oldest is read while the newest is written.
        self._results = [
            torch.zeros(max_num_seqs, dtype=torch.int32).pin_memory() for _ in range(self.depth + 1)
        ]
        self._num_launched = 0
        self._launched: deque[tuple[int, torch.cuda.Event]] = deque(maxlen=self.depth + 1)
        self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
        """The device has taken the last step's inputs and plan: page-locked memory may be written again."""
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        decoder.reserve(max(max_step_tokens, max_num_seqs))
        self._graphs: dict[int, _Graph] = {}
        self._sizes = graph_sizes(max_num_seqs)
        torch.cuda.synchronize(device)
        started_at = time.monotonic()
        self.launch(_FIRST_STEP)
        self._stream.synchronize()  # as long as it takes, for another rank may be compiling
        self._launched.clear()
        log.info("first step run seconds=%.1f", time.monotonic() - started_at)
        if attention.capturable:
            self._capture()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Sampled:
        """Begin one step. Ask for its tokens before the launch after next, which takes their place.

        Ranks other than 0 have none. Asked for them, rank 0 raises `WorkerLost` where another is gone.
        """
        with torch.cuda.stream(self._stream):
            self._taken.synchronize()
            if self._graphs and plan.num_rows == plan.num_decodes:
                self._replay(plan)
            else:
                self._run(plan)
            return self._read_back(plan)

    def wait(self, step: int) -> None:
        """Wait until a step has ended on this rank's GPU; one that is not remembered has."""
        for number, done in self._launched:
            if number == step:
                done.synchronize()

    def _read_back(self, plan: StepPlan) -> Sampled:
        num_samples = plan.num_samples
        result = self._results[self._num_launched % len(self._results)]
        self._num_launched += 1
        result[:num_samples].copy_(self._tokens[:num_samples], non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._launched.append((plan.step, done))

        def sampled() -> list[int]:
            self._decoder.tp.wait(done)
            tokens: list[int] = result[:num_samples].tolist()
            return tokens

        return sampled

    # --- decodes ----------------------------------------------------------------------------------

    def _replay(self, plan: StepPlan) -> None:
        size = next(size for size in self._sizes if size >= plan.num_rows)
        graph, batch = self._graphs[size]
        end = self._windows.pack(plan, size, self._page_size, self._staging.numpy())
        self._inputs[:end].copy_(self._staging[:end], non_blocking=True)
        self._attention.plan(batch)
        self._taken.record()
        graph.replay()

    def _capture(self) -> None:
        """Capture one graph for each size, the largest first, so that all share its memory."""
        started_at = time.monotonic()
        free, _ = torch.cuda.mem_get_info(self._device)
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._windows.pack_padding(self._windows.max_rows, self._staging.numpy())
            self._inputs.copy_(self._staging)
            for size in reversed(self._sizes):
                batch = self._static_batch(size)
                self._attention.plan(batch)
                self._decode(batch)  # what is made at first use must not be made in a capture
                graph = torch.cuda.CUDAGraph()
                # Other threads, NCCL's among them, may call CUDA meanwhile.
                mode = {"capture_error_mode": "thread_local"}
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, **mode):
                    self._decode(batch)
                self._graphs[size] = _Graph(graph, batch)
            self._stream.synchronize()
        taken = free - torch.cuda.mem_get_info(self._device)[0]
        figures = len(self._graphs), time.monotonic() - started_at, taken >> 20
        log.info("decode graphs captured graphs=%d seconds=%.1f megabytes=%d", *figures)

    def _decode(self, batch: AttentionBatch) -> None:
        """One token more of each sequence of a static batch: all that a graph holds."""
        n = batch.num_sequences
        token_ids, slots = self._view("token_ids", n), self._view("slots", n)
        cuda_ops.gather_tokens(token_ids, slots, self._last_tokens)
        logits = self._decoder.forward(token_ids, batch, self._attention, self._pool, None)
        sampling = {name: self._view(name, n) for name in SAMPLING_FIELDS}
        self._sample(logits, _Draws.of(sampling, slots))

    def _static_batch(self, num_rows: int) -> AttentionBatch:
        staged = self._staging
        qo_indptr = torch.arange(num_rows + 1, dtype=torch.int32)
        return AttentionBatch(
            num_decodes=num_rows,
            qo_indptr=qo_indptr.to(self._device),
            kv_lens=self._view("kv_lens", num_rows),
            page_indptr=self._view("page_indptr", num_rows),
            page_indices=self._view("page_indices", num_rows),
            positions=self._view("positions", num_rows),
            token_pages=self._view("token_pages", num_rows),
            token_offsets=self._view("token_offsets", num_rows),
            max_qo_len=1,
            max_kv_len=0,
            # Windows as well: what was staged for the device is what a planner on the host reads.
            on_host=HostIndices(
                qo_indptr,
                self._windows.view("kv_lens", staged, num_rows),
                self._windows.view("page_indptr", staged, num_rows),
            ),
            is_static=True,
        )

    def _view(self, name: str, num_rows: int) -> Tensor:
        return self._windows.view(name, self._inputs, num_rows)

    # --- prefill ----------------------------------------------------------------------------------

    def _run(self, plan: StepPlan) -> None:
        """Run a step that has prefill chunks, kernel by kernel."""
        slots, sampling = int32s(plan.slots), sampling_arrays(SamplingRows.of(plan.samples))
        more = {"decoding": slots[: plan.num_decodes], "sampled": slots[int32s(plan.samples.rows)]}
        tensors = build_tensors(plan, self._page_size, self._device, {**more, **sampling})
        token_ids, logits_at, batch, inputs = tensors
        if plan.num_decodes:
            decoding = inputs["decoding"]
            cuda_ops.gather_tokens(token_ids[: len(decoding)], decoding, self._last_tokens)
        self._attention.plan(batch)
        self._taken.record()
        logits = self._decoder.forward(token_ids, batch, self._attention, self._pool, logits_at)
        if plan.num_samples:
            self._sample(logits, _Draws.of(inputs, inputs["sampled"]))

    def _sample(self, logits: Tensor, draws: _Draws) -> None:
        tp = self._decoder.tp
        if tp.rank == 0:
            out = self._tokens[: len(draws.slots)]
            cuda_ops.sample(logits, *draws, out, self._last_tokens)
        tp.broadcast(self._last_tokens)
