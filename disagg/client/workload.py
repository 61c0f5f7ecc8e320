"""What a load generator asks, and when. Pure: the same workload gives the same requests."""

import random
from itertools import accumulate
from typing import Final

from msgspec import Struct

WORDS: Final = tuple(
    """
    the of and to in is was for on that with as by at from his it an are were which this also be had or
    has first their its one new after but who not they have her she two been other when there all during
    into school time may years more most only over city some world would where later up such used many
    can state about national out known university united then made under three high game part family
    well including people war second before between team while became work number music through house
    long early several life group home same four both name area until line age film show river day place
    street book south north east west season company building party water system local club great land
    point power left right best large small old young public main road
    """.split()  # noqa: SIM905  (a table of words reads better so)
)
"""Common words: each is one token after a space in nearly every vocabulary."""


class Workload(Struct, frozen=True, kw_only=True):
    """Prompts of random words. Lengths are in words, about a token each; reports have the server's count."""

    num_prompts: int = 100
    input_len: int = 512
    output_len: int = 128
    range_ratio: float = 0.0
    """Lengths are uniform between (1 - ratio) and (1 + ratio) times the above."""
    shared_prefix_share: float = 0.0
    """This share of a prompt is the beginning that it has in common with others."""
    num_prefixes: int = 1
    """How many different beginnings there are."""
    seed: int = 0


class Prompt(Struct, frozen=True):
    """One request."""

    text: str
    max_tokens: int


def plan_prompts(workload: Workload) -> list[Prompt]:
    """Draw all prompts. No two are alike, except in the beginnings they share."""
    rng = random.Random(workload.seed)
    longest = round(workload.input_len * (1 + workload.range_ratio))
    prefixes = [_words(rng, longest) for _ in range(workload.num_prefixes)]
    prompts = []
    for index in range(workload.num_prompts):
        num_words = _length(rng, workload.input_len, workload.range_ratio)
        num_shared = round(num_words * workload.shared_prefix_share)
        words = prefixes[index % len(prefixes)][:num_shared] + _words(rng, num_words - num_shared)
        max_tokens = _length(rng, workload.output_len, workload.range_ratio)
        prompts.append(Prompt(" ".join(words), max_tokens))
    return prompts


def plan_arrivals(num_prompts: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each request is sent.

    Args:
        num_prompts: How many.
        rate: Requests a second on average; infinite sends all at once.
        burstiness: Shape of the gamma distribution of the gaps: 1 is a Poisson process, less is
            burstier, more is steadier.
        seed: Of the draws.
    """
    if rate == float("inf"):
        return [0.0] * num_prompts
    rng = random.Random(seed)
    gaps = [rng.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(num_prompts - 1)]
    # The whole takes as long as the rate says, so that two runs can be compared.
    scale = (num_prompts - 1) / rate / sum(gaps) if sum(gaps) else 0.0
    return [0.0, *accumulate(gap * scale for gap in gaps)][:num_prompts]


def _words(rng: random.Random, count: int) -> list[str]:
    return rng.choices(WORDS, k=count)


def _length(rng: random.Random, mean: int, range_ratio: float) -> int:
    return max(1, rng.randint(round(mean * (1 - range_ratio)), round(mean * (1 + range_ratio))))
