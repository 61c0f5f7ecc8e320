"""One codec for every socket: msgpack by msgspec, checked against the type on arrival."""

from typing import Any

import msgspec

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Encode one message."""
    return _encoder.encode(message)


def decoder(kind: Any) -> "msgspec.msgpack.Decoder[Any]":
    """Make the typed decoder of one socket; `kind` is a struct or a union of tagged structs.

    Decoding raises `msgspec.ValidationError` or `msgspec.DecodeError` for anything else; the
    endpoint that owns the socket drops such a message and counts it.
    """
    return msgspec.msgpack.Decoder(kind)
