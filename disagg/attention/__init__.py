"""Attention over the paged KV pool, behind one small interface.

May import torch, `_cpu`, `kv`'s layout and views, `layers` and `errors`. Read `base.py` first.
"""

from disagg.attention.base import AttentionBackend, AttentionSizes
from disagg.attention.batch import AttentionBatch
from disagg.attention.cpu import CpuAttention
from disagg.attention.factory import make_attention
from disagg.attention.phased import PhasedAttention
from disagg.attention.reference import ReferenceAttention

__all__ = [
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSizes",
    "CpuAttention",
    "PhasedAttention",
    "ReferenceAttention",
    "make_attention",
]
