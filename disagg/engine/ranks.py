"""One engine over several ranks: rank 0 sends each plan before it runs it, the others follow.

How the bytes travel is the caller's business; they must arrive whole and in order. A `StepPlan` is a
tagged struct, so a link may carry other messages beside it.
"""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from disagg.engine.engine import Runner, Sampled
from disagg.engine.plan import PENDING, StepPlan, int32s
from disagg.protocol import encode


class LeadingRunner:
    """Rank 0's runner: sends a plan to every other rank, then runs it here.

    Tokens that were still unknown when the step was planned have been sampled by the time it
    runs; they are filled in here, so no rank ever meets one.
    """

    depth = 0

    def __init__(self, local: Runner, num_slots: int, send: Callable[[bytes], None] | None = None) -> None:
        """Lead.

        Args:
            local: This rank's share.
            num_slots: `Limits.max_num_seqs`.
            send: Hands a plan to all other ranks; must not wait for them to run it. None for a group of one.
        """
        self._local = local
        self._send = send
        self._last_tokens = np.zeros(num_slots, np.int32)

    def launch(self, plan: StepPlan) -> Sampled:
        """Run one step on all ranks."""
        plan = fill_pending(plan, self._last_tokens)
        if self._send is not None:
            self._send(encode(plan))
        tokens = self._local.launch(plan)()
        self._last_tokens[int32s(plan.slots)[int32s(plan.samples.rows)]] = tokens
        return lambda: tokens


def fill_pending(plan: StepPlan, last_tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> StepPlan:
    """Replace tokens that were unknown at planning by the last one sampled for their slot."""
    token_ids = int32s(plan.token_ids)
    is_pending = token_ids == PENDING
    if not is_pending.any():
        return plan
    slots = np.repeat(int32s(plan.slots), int32s(plan.query_lens))
    return replace(plan, token_ids=np.where(is_pending, last_tokens[slots], token_ids).tobytes())
