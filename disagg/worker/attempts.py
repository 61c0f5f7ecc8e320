"""What the worker knows of an attempt besides its lease."""

from msgspec import Struct

from disagg.worker.leases import Key, Kind


def engine_id(key: Key) -> str:
    """Name an attempt to the engine, which may hold two generations of one transfer for a while."""
    return f"{key[0]}/{key[1]}"


class Attempt(Struct, kw_only=True):
    """One attempt, from its acceptance until nothing of it is left."""

    key: Key
    kind: Kind
    router_id: str
    begun_at: float
    token_at: float | None = None
    """When its newest token came out of the engine here."""
    failure: str = ""
    """Why its push failed, in the words of `reasons.py`."""
    ended: bool = False
    """Its lease has ended; only its fence is awaited."""
