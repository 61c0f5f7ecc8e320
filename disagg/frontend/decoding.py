"""From a body to a struct, and from what a decoder found wrong to words that name the field."""

import json
import re
from math import isfinite
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from disagg.errors import InvalidRequest
from disagg.frontend.errors import UnknownParameter

MAX_EXPLAINED_BYTES = 1 << 20
"""What is wrong in a longer body is not looked for: that takes long and blocks everybody."""

T = TypeVar("T")

_PLACE: Final = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<where>.*)`)?", re.DOTALL)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)


def decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Decode a body.

    Raises:
        InvalidRequest: It is not JSON, or not what the decoder wants; names the field where there is one.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        _refuse_type(str(error))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _refuse_syntax(body, str(error))
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def _refuse_syntax(body: bytes, text: str) -> NoReturn:
    """Name the field of what Python's more lenient reader takes: NaN, infinity, broken Unicode."""
    try:
        value = (
            json.loads(body.decode("utf-8", "surrogateescape")) if len(body) <= MAX_EXPLAINED_BYTES else None
        )
    except (ValueError, RecursionError):
        value = None
    for path, leaf in _leaves(value):
        if isinstance(leaf, float) and not isfinite(leaf):
            raise InvalidRequest(f"{path} must be a finite number", param=path)
        if isinstance(leaf, str) and not _is_unicode(leaf):
            raise InvalidRequest(f"{path or 'a key'} is not valid Unicode", param=path or None)
    raise InvalidRequest(f"the body is not valid JSON: {text}")


def _leaves(root: Any) -> list[tuple[str, Any]]:
    """Find every scalar with its path; keys come before what is under them. No recursion: input is deep."""
    found: list[tuple[str, Any]] = []
    waiting = [("", root)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            found += [(path, key) for key in value]
            waiting += [(f"{path}.{key}" if path else key, entry) for key, entry in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{index}]", entry) for index, entry in enumerate(value)]
        else:
            found.append((path, value))
    return found


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _refuse_type(text: str) -> NoReturn:
    """Say in our words what msgspec found, naming the field."""
    place = _PLACE.fullmatch(text)
    # Of a mapping's value it only says `[...]`.
    what, where = (place["what"], (place["where"] or "").replace("[...]", "")) if place else (text, "")
    path = f"{where}." if where else ""
    if unknown := _UNKNOWN.fullmatch(what):
        name = path + unknown["name"][:200]
        raise UnknownParameter(f"Unrecognized request argument supplied: {name}", param=name)
    if missing := _MISSING.fullmatch(what):
        name = path + missing["name"]
        raise InvalidRequest(f"you must provide {name}", param=name)
    if not where:
        raise InvalidRequest(f"the body is not an object of this endpoint: {what}")
    raise InvalidRequest(f"{where} has the wrong type: {what}", param=where)
