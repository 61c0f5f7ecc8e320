"""How the benchmarks of kernels time them: as the engine runs them, in a CUDA graph."""

from collections.abc import Callable
from statistics import median

import torch

WARM_UP = 3


def replay_us(step: Callable[[], object], parts: int, rounds: int = 10) -> float:
    """Median replay of a captured step, microseconds for each of its equal `parts`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        times = []
        for _ in range(WARM_UP + rounds):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) * 1e3 / parts)
    return median(times[WARM_UP:])
