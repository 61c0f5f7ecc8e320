"""Keys of the links between processes, and files with secrets that are read again when they change.

May import `errors` and `telemetry` only. Read `keys.py` first (which keys there are, and which a client
tries), then `curve.py` (how a ZeroMQ socket gets them, and who lets clients in), `addresses.py` (what may
be spoken to in the clear); `api_keys.py` and `tls.py` are the router's HTTP port's.

A server:

    ring = KeyRing(Path(folder))                # raises ConfigError
    with admission(context, ring):              # once a context, before the first bind
        secure_server(socket, ring, address)    # then bind

A client makes a new socket for every try, and watches its monitor for `HANDSHAKE_FAILED` and
`HANDSHAKE_SUCCEEDED`:

    keys = choice_for(ring, address)            # None where the link stays in the clear
    secure_client(socket, keys, address)        # then connect
    keys.on_accepted()                          # on success
    all_refused = keys.on_refused()             # on failure: close the socket, try the next on another
"""

from disagg.security.addresses import (
    host_of,
    host_port,
    is_loopback,
    is_own_call,
    is_wildcard,
    listen,
)
from disagg.security.api_keys import ApiKeys
from disagg.security.curve import HANDSHAKE_FAILED, admission, choice_for, secure_client, secure_server
from disagg.security.keys import KeyChoice, KeyPair, KeyRing
from disagg.security.tls import tls_context

__all__ = [
    "HANDSHAKE_FAILED",
    "ApiKeys",
    "KeyChoice",
    "KeyPair",
    "KeyRing",
    "admission",
    "choice_for",
    "host_of",
    "host_port",
    "is_loopback",
    "is_own_call",
    "is_wildcard",
    "listen",
    "secure_client",
    "secure_server",
    "tls_context",
]
