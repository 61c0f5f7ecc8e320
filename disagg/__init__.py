"""Serve large language models with prefill and decode in separate pools.

Read `docs/architecture.md` first. `LLM` runs one engine in this process; everything else is
reached through the `disagg` command. Importing this package does not import torch.
"""

from typing import TYPE_CHECKING, Any

from disagg.protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from disagg.llm import LLM

__all__ = ["LLM", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from disagg.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
