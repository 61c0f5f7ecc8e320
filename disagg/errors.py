"""Every error this package raises on purpose.

    DisaggError
    ├─ RequestError         the caller can fix it; answered 4xx in OpenAI's shape
    │   ├─ InvalidRequest · UnsupportedParameter · PromptTooLong · Unauthorized · ModelNotFound
    │   └─ Overloaded       429 with Retry-After
    ├─ WorkerError          a worker or link failed; the router may try elsewhere
    │   └─ WorkerLost · StaleGeneration · LayoutMismatch · TransferError (TransferTimeout, LinkLost)
    ├─ ConfigError          at start-up
    └─ InvariantBroken      a bug of ours; ends the process with its evidence

Status codes exist only in `frontend/errors.py`. An expected outcome is a value, not an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "ConfigError",
    "DisaggError",
    "InvalidRequest",
    "InvariantBroken",
    "LayoutMismatch",
    "LinkLost",
    "ModelNotFound",
    "Overloaded",
    "PromptTooLong",
    "RequestError",
    "StaleGeneration",
    "TransferError",
    "TransferTimeout",
    "Unauthorized",
    "UnsupportedParameter",
    "WorkerError",
    "WorkerLost",
    "ungrouped",
]


class DisaggError(Exception):
    """Base of every error of ours."""


class RequestError(DisaggError):
    """The caller can fix it. `param` names the field, or is None where no single field is at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(RequestError):
    """A field has a value that it cannot have."""


class UnsupportedParameter(RequestError):
    """A field of OpenAI's interface that is not supported; refused by name, never ignored."""


class PromptTooLong(RequestError):
    """The prompt, or the prompt with `max_tokens`, does not fit the model's context."""


class Unauthorized(RequestError):
    """The API key is missing or wrong."""


class ModelNotFound(RequestError):
    """No worker serves the model that was named."""


class Overloaded(RequestError):
    """The queue is full; the caller may try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerError(DisaggError):
    """A worker or a link to it failed; the router may try elsewhere."""


class WorkerLost(WorkerError):
    """The worker's process or its link is gone."""


class StaleGeneration(WorkerError):
    """A message belongs to an attempt that has been superseded."""


class LayoutMismatch(WorkerError):
    """Two workers' KV pools cannot exchange pages: dtype, head count, layers or page size differ."""


class TransferError(WorkerError):
    """KV did not arrive."""


class TransferTimeout(TransferError):
    """KV did not arrive before its deadline."""


class LinkLost(TransferError):
    """The KV link to a peer broke."""


class ConfigError(DisaggError):
    """The configuration cannot work. The message names the key, its value and where it came from."""


class InvariantBroken(DisaggError):
    """An audit failed: a bug of ours. Never retried; the process ends with this as its evidence."""


@contextmanager
def ungrouped(kind: type[DisaggError]) -> Iterator[None]:
    """Raise the error of `kind` that a task group wrapped, bare; the first, where the group has no others.

    Not by `raise` in `except*`, which Python 3.11.2 wraps in a group again.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if group.split(kind)[1] is not None:
            raise
        raise error from None
