"""Tensor parallelism: how a model's heads and columns are split, and the sums between ranks.

May import torch and `errors`. Read `group.py` first.
"""

from disagg.parallel.group import TensorParallel
from disagg.parallel.meeting import Meeting, MeetingStore

__all__ = ["Meeting", "MeetingStore", "TensorParallel"]
