"""Runs planned steps on one rank's share of the model."""

import torch
from torch import Tensor

from disagg.attention import AttentionBackend
from disagg.engine.batch import build_tensors
from disagg.engine.draws import SamplingRows
from disagg.engine.engine import Sampled
from disagg.engine.plan import StepPlan
from disagg.engine.sampler import sample
from disagg.models import Decoder


class ModelRunner:
    """One rank: a decoder, its KV pool and its attention. Used by one thread.

    All ranks of a group run the same plans in the same order; rank 0 samples. Each step has ended
    when `launch` returns.
    """

    depth = 0

    def __init__(self, decoder: Decoder, attention: AttentionBackend, pool: Tensor, page_size: int) -> None:
        self._pool = pool
        self._decoder = decoder
        self._attention = attention
        self._page_size = page_size

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Sampled:
        """Run one step; rank 0 samples, the others have no tokens.

        Raises:
            WorkerLost: another rank is gone; this one cannot go on either.
        """
        token_ids, logits_at, batch, _ = build_tensors(plan, self._page_size, self._decoder.device)
        self._attention.plan(batch)
        logits = self._decoder.forward(token_ids, batch, self._attention, self._pool, logits_at)
        if self._decoder.tp.rank != 0 or plan.num_samples == 0:
            if self._decoder.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            return list
        tokens = sample(logits, SamplingRows.of(plan.samples))
        return lambda: tokens

    def wait(self, step: int) -> None:
        """Each has ended when it was launched."""
