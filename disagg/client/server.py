"""What is common to all requests to an OpenAI server: its address, its errors, its model, its events."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import msgspec
from msgspec import Struct

from disagg.errors import ConfigError, DisaggError

MAX_EVENT_BYTES = 1 << 24


class ServerError(DisaggError):
    """The server answered with an error; the text is its own."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ServerUnreachable(DisaggError):
    """There is no server at the address, or it left."""


class Delta(Struct):
    """What a chat says more. Reasoning counts as text, under either of its names."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(Struct):
    """A choice of a chunk, of either endpoint."""

    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    def said(self) -> str:
        """The text of this chunk, whatever kind it is."""
        if self.text is not None:
            return self.text
        if self.delta is None:
            return ""
        return self.delta.content or self.delta.reasoning or self.delta.reasoning_content or ""


class Usage(Struct):
    """Tokens, as the server counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ErrorDetail(Struct):
    """What a server says of an error."""

    message: str = ""
    code: str | int | None = None


class Chunk(Struct):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: ErrorDetail | str | None = None


class _ErrorBody(Struct):
    error: ErrorDetail | str


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model] = []


_decode_chunk = msgspec.json.Decoder(Chunk).decode


class EventReader:
    """Cuts a body into server-sent events and decodes them, however the bytes arrive."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False
        """Whether `[DONE]` has come: the stream is complete."""

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """Yield the chunks that are complete now.

        Raises:
            ServerError: The server reports an error in the stream, or sends what is no event.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ServerError("the server sends an event without end")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # an empty line between events, a comment that keeps the connection alive
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.done = True
                return
            yield _chunk_of(payload)


def base_url(url: str) -> str:
    """Bring an address into one form: with a scheme, without `/v1`.

    Raises:
        ConfigError: It is no HTTP address.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"URL = {url!r} is not the address of a server, such as http://127.0.0.1:8000")
    return full.rstrip("/").removesuffix("/v1")


def bearer(api_key: str | None) -> dict[str, str]:
    """Return the headers that carry a key, none without one.

    Raises:
        ConfigError: No header can carry it.
    """
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("api_key must be printable ASCII, as HTTP headers are")
    return {"authorization": f"Bearer {api_key}"}


def first_model(http: httpx.Client) -> str:
    """Ask the server what it serves.

    Raises:
        ServerError, ServerUnreachable: It does not say.
    """
    try:
        answer = http.get("/v1/models")
    except httpx.HTTPError as error:
        raise unreachable(str(http.base_url), error) from error
    if answer.status_code != 200:
        raise error_of(answer.status_code, answer.content)
    try:
        models = msgspec.json.decode(answer.content, type=_Models).data
    except msgspec.DecodeError as error:
        raise ServerError("/v1/models is not a list of models: is this an OpenAI server?") from error
    if not models:
        raise ServerError("the server has no model")
    return models[0].id


def error_of(status: int, body: bytes) -> ServerError:
    """Turn an error answer into ours, with the server's own words where it has any."""
    try:
        error = msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ServerError(f"the server answered with status {status}", status)
    return _server_error(error, status)


def unreachable(url: str, error: Exception) -> ServerUnreachable:
    """Say that nobody answers."""
    return ServerUnreachable(f"no answer from {url} ({error or type(error).__name__})")


def _chunk_of(payload: bytes) -> Chunk:
    try:
        chunk = _decode_chunk(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServerError(f"the server sent an event that is no chunk: {error}") from error
    if chunk.error is not None:
        raise _server_error(chunk.error, None)
    return chunk


def _server_error(error: ErrorDetail | str, status: int | None) -> ServerError:
    if isinstance(error, str):
        return ServerError(error, status)
    code = None if error.code is None else str(error.code)
    return ServerError(error.message or f"the server answered with status {status}", status, code)
