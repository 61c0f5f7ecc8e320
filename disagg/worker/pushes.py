"""The prefill side's progress: which computed pages have gone to which target, and what comes next.

Full pages go out as soon as a chunk has computed them and the target is ready; the last ones with
the token that was sampled. Leases decide how an attempt ends; this forgets it when told to.
Engine thread only.
"""

from collections import deque
from collections.abc import Callable

from msgspec import Struct

from disagg.engine import ChunkDone, SequenceOutput
from disagg.protocol import Target
from disagg.transfer import FinishPush, PushChunk
from disagg.worker.leases import Key, Pushed
from disagg.worker.targets import Targets
from disagg.worker.transfers import Transfers

RATE_PUSHES = 16


class _Push(Struct, kw_only=True):
    key: Key
    target: Target
    deadline: float
    num_taken: int
    """Pages from the prompt's start that were posted, or that the target has already."""
    pages: list[int] = []
    """Pages that are computed, from the prompt's start."""
    is_computed: bool = False
    first: SequenceOutput | None = None
    is_open: bool = False
    """The transfer threads know of it and watch its deadline."""
    is_finished: bool = False


class Pushes:
    """Every attempt whose pages may still be posted."""

    def __init__(self, transfers: Transfers, targets: Targets, clock: Callable[[], float]) -> None:
        self._transfers = transfers
        self._targets = targets
        self._clock = clock
        self._pushes: dict[Key, _Push] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=RATE_PUSHES)

    def __len__(self) -> int:
        return len(self._pushes)

    @property
    def bytes_per_s(self) -> float:
        """Rate of recent pushes; 0 before the first."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(num_bytes for num_bytes, _ in self._recent) / seconds if seconds > 0 else 0.0

    def begin(self, key: Key, target: Target, deadline_s: float) -> None:
        """Open the way to the target of an accepted attempt."""
        self._pushes[key] = _Push(
            key=key,
            target=target,
            deadline=self._clock() + deadline_s,
            num_taken=target.first_missing_page,
        )
        self._targets.open(target.uuid, target.peer_address)

    def on_first_token(self, key: Key, output: SequenceOutput) -> None:
        """Remember the token that ends the push."""
        self._pushes[key].first = output

    def on_chunk(self, key: Key, chunk: ChunkDone) -> None:
        """Push what has become complete."""
        push = self._pushes[key]
        push.pages, push.is_computed = chunk.page_ids, chunk.is_last
        self._advance(push)

    def on_target_ready(self, uuid: str) -> None:
        """Push what has waited for it."""
        for push in self._pushes.values():
            if push.target.uuid == uuid:
                self._advance(push)

    def on_pushed(self, pushed: Pushed) -> None:
        """Note how fast a push went, and forget it."""
        if pushed.num_bytes:
            self._recent.append((pushed.num_bytes, pushed.seconds))
        self.end(pushed.key)

    def end(self, key: Key) -> None:
        """Post nothing more of an attempt. Idempotent."""
        self._pushes.pop(key, None)

    def stranded(self, uuid: str) -> list[Key]:
        """Attempts to a target of which the transfer threads know nothing yet."""
        return [key for key, push in self._pushes.items() if push.target.uuid == uuid and not push.is_open]

    def overdue(self) -> list[Key]:
        """The same whose deadline has passed, whatever their target."""
        now = self._clock()
        return [key for key, push in self._pushes.items() if not push.is_open and now >= push.deadline]

    def _advance(self, push: _Push) -> None:
        if push.is_finished or not self._targets.is_ready(push.target.uuid):
            return
        start, end = push.num_taken, max(push.num_taken, len(push.pages))
        # Also without a page to move: the target waits for the token.
        if end > start or (push.is_computed and not push.is_open):
            push.is_open, push.num_taken = True, end
            self._transfers.submit(
                PushChunk(
                    push.key,
                    push.target.uuid,
                    push.pages[start:end],
                    push.target.page_ids[start:end],
                    push.deadline,
                )
            )
        if push.is_computed:
            assert push.first is not None, "the last chunk comes after its token"
            push.is_finished = True
            self._transfers.submit(
                FinishPush(
                    push.key,
                    token_id=push.first.token_ids[0],
                    position=push.first.position,
                    finished=push.first.finish_reason is not None,
                )
            )
