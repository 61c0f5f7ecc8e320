"""How fast the engine has been lately, as the router's predictions need it."""

from collections import deque
from statistics import median

WINDOW_STEPS = 64


class StepRates:
    """Prefill throughput and decode step time over recent steps."""

    def __init__(self) -> None:
        self._prefills: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS)
        self._decodes: deque[float] = deque(maxlen=WINDOW_STEPS)

    def record(self, num_prefill_tokens: int, num_decode_tokens: int, step_s: float) -> None:
        """Count one step.

        Of a mixed step, prefill is charged what exceeds a decode step, but at least half: kernels
        are shared, so the difference of two noisy times may be nothing at all.
        """
        if num_prefill_tokens == 0:
            self._decodes.append(step_s)
            return
        decode_s = self.decode_step_s if num_decode_tokens else 0.0
        self._prefills.append((num_prefill_tokens, max(step_s - decode_s, step_s / 2)))

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second of prefill; 0 before the first."""
        seconds = sum(seconds for _, seconds in self._prefills)
        return sum(tokens for tokens, _ in self._prefills) / seconds if seconds > 0 else 0.0

    @property
    def decode_step_s(self) -> float:
        """Median duration of steps that decode and do nothing else; 0 before the first."""
        return median(self._decodes) if self._decodes else 0.0
