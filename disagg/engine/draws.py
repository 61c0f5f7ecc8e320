"""What a draw depends on: its sampling parameters and a key of (seed, choice, position).

A token is drawn by the Gumbel-max rule: the one with the highest `logit / temperature - log(e)`
wins, where every token has exponential noise `e` of its own, hashed from the draw's key and the
token's id. The rule gives exactly the softmax's distribution, does not know what else is in the
batch, and is steady: logits that differ by an epsilon change the winner with a probability of that
order. An inverse of the cumulative distribution would move every later token's interval with each
rounding.

The noise: two rounds of a 32-bit hash, one half of the key entering before each. 31 bits become the
uniform `u`, and `e` is `-log1p(-u)`: the winners' `u` is near zero, where a float is precise.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from disagg.engine.plan import SamplePlan

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: dividing by them would overflow."""
TOP_TOKENS = 1024
"""`top_p` looks at this many of the likeliest tokens first; only a flatter distribution is sorted whole."""

# The hash's multipliers and shifts: Fibonacci hashing, then Wellons' `lowbias32` cut in two rounds.
TOKEN_FACTOR = 0x9E3779B1
ROUND_FACTORS = ((0x7FEB352D, 0x846CA68B), (0x85EBCA6B, 0xC2B2AE35))
ROUND_SHIFTS = ((16, 15, 16), (16, 13, 16))

_SPLITMIX_STEP = np.uint64(0x9E3779B97F4A7C15)
_SPLITMIX_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class SamplingRows(NamedTuple):
    """A step's sampling parameters, one entry for each token to draw."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    key: NDArray[np.uint64]

    @classmethod
    def of(cls, plan: SamplePlan) -> "SamplingRows":
        """Read a plan's buffers."""
        return cls(
            temperature=np.frombuffer(plan.temperature, np.float32),
            top_k=np.frombuffer(plan.top_k, np.int32),
            top_p=np.frombuffer(plan.top_p, np.float32),
            min_p=np.frombuffer(plan.min_p, np.float32),
            key=draw_keys(
                np.frombuffer(plan.seed, np.uint64),
                np.frombuffer(plan.choice_index, np.int32),
                np.frombuffer(plan.position, np.int32),
            ),
        )

    def at(self, rows: NDArray[np.intp]) -> "SamplingRows":
        """Some of the rows."""
        return SamplingRows(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.key[rows]
        )


def draw_keys(
    seed: NDArray[np.uint64], choice_index: NDArray[np.int32], position: NDArray[np.int32]
) -> NDArray[np.uint64]:
    """Hash what a draw depends on to 64 bits, by rounds of splitmix64."""
    key = _splitmix(seed)
    key = _splitmix(key ^ choice_index.astype(np.uint64))
    return _splitmix(key ^ position.astype(np.uint64))


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _SPLITMIX_STEP
    x = (x ^ (x >> np.uint64(30))) * _SPLITMIX_FACTORS[0]
    x = (x ^ (x >> np.uint64(27))) * _SPLITMIX_FACTORS[1]
    return x ^ (x >> np.uint64(31))
