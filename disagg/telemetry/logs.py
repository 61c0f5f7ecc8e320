"""Logs that a person reads and a program can parse: time, level, process, sentence, key=value.

    12:00:01.250 INFO  router   request ended id=7 decision=disaggregated ttft_ms=41.2

A call says `log.info("request ended %s", fields(id=..., ttft_ms=...))`: standard logging, so
that tests, `caplog` and foreign handlers work unchanged.
"""

import logging
import sys
from typing import IO, Any

_NEEDS_QUOTES = frozenset(" \t\n\r\"'=\\")


class fields:  # noqa: N801  (reads as a function where it is used)
    """Key-values for a log call, formatted only if the line is written."""

    __slots__ = ("_values",)

    def __init__(self, **values: Any) -> None:
        self._values = values

    def __str__(self) -> str:
        return " ".join(f"{key}={_text(value)}" for key, value in self._values.items() if value is not None)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    # repr escapes newlines: nothing that a client sends can forge a second line.
    return repr(text) if not text or not _NEEDS_QUOTES.isdisjoint(text) or not text.isprintable() else text


class _Formatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-5s {process:<9} %(message)s", datefmt="%H:%M:%S")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return f"{super().formatTime(record, datefmt)}.{int(record.msecs):03d}"


def set_up_logging(process: str, *, level: int = logging.INFO, stream: IO[str] | None = None) -> None:
    """Send the logs of this package to `stream` (stderr), each line marked with `process`.

    For the start of a process. Calling it again replaces what it set up before; handlers of the
    root logger, where an embedding program may have its own, are left alone.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_Formatter(process))
    logger = logging.getLogger("disagg")
    for old in [h for h in logger.handlers if isinstance(h.formatter, _Formatter)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
