"""One engine over several ranks: rank 0 sends each plan before it runs it, the others follow.

How the bytes travel is the caller's business; they must arrive whole and in order. A `StepPlan` is a
tagged struct, so a link may carry other messages beside it. Where ranks run ahead of the host, a
`StepRetired` follows the end of each step: what rank 0 asks for next may rest on it.
"""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from disagg.engine.engine import Runner, Sampled
from disagg.engine.plan import PENDING, StepPlan, StepRetired, int32s
from disagg.protocol import encode


class LeadingRunner:
    """Rank 0's runner: sends a plan to every other rank, then runs it here.

    Where a step has ended when it is launched (depth 0), tokens that were still unknown when it was
    planned have been sampled by then; they are filled in here, so no rank ever meets one. Elsewhere
    every rank has them on its device.
    """

    def __init__(self, local: Runner, num_slots: int, send: Callable[[bytes], None] | None = None) -> None:
        """Lead.

        Args:
            local: This rank's share.
            num_slots: `Limits.max_num_seqs`.
            send: Hands a plan to all other ranks; must not wait for them to run it. None for a group of one.
        """
        self.depth = local.depth
        self._local = local
        self._send = send
        self._last_tokens = np.zeros(num_slots, np.int32)

    def launch(self, plan: StepPlan) -> Sampled:
        """Begin one step on all ranks."""
        if self.depth > 0:
            return self._launch_ahead(plan)
        plan = fill_pending(plan, self._last_tokens)
        self._tell(plan)
        tokens = self._local.launch(plan)()
        self._last_tokens[int32s(plan.slots)[int32s(plan.samples.rows)]] = tokens
        return lambda: tokens

    def wait(self, step: int) -> None:
        """Wait until a step has ended on this rank."""
        self._local.wait(step)

    def _launch_ahead(self, plan: StepPlan) -> Sampled:
        self._tell(plan)
        sampled = self._local.launch(plan)

        def retired() -> list[int]:
            tokens = sampled()
            self._tell(StepRetired(plan.step))
            return tokens

        return retired

    def _tell(self, message: StepPlan | StepRetired) -> None:
        if self._send is not None:
            self._send(encode(message))


def fill_pending(plan: StepPlan, last_tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> StepPlan:
    """Replace tokens that were unknown at planning by the last one sampled for their slot."""
    token_ids = int32s(plan.token_ids)
    is_pending = token_ids == PENDING
    if not is_pending.any():
        return plan
    slots = np.repeat(int32s(plan.slots), int32s(plan.query_lens))
    return replace(plan, token_ids=np.where(is_pending, last_tokens[slots], token_ids).tobytes())
