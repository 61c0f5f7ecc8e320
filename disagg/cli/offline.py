"""What commands share that run an engine in this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from disagg.config import EngineConfig, ModelConfig

if TYPE_CHECKING:
    from disagg.llm import LLM


class OfflineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine in one process."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()


def load_llm(config: OfflineConfig, console: Console) -> "LLM":
    """Load the model under a progress bar on `console`."""
    from disagg.llm import LLM  # brings torch, which `--help` does without

    with _loading(console) as progress:
        return LLM.from_config(config.model, config.engine, progress)


@contextmanager
def _loading(console: Console) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("loading weights"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("")
        yield lambda done, total: progress.update(bar, completed=done, total=total)
