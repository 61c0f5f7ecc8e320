"""Which control addresses a worker may have.

Links that are not loopback need keys, and those come later; until then such an address is
refused at start rather than served in the clear.
"""

import ipaddress

from disagg.errors import ConfigError

_FORMS = "tcp://127.0.0.1:PORT, tcp://[::1]:PORT or ipc://PATH"


def check_control_address(address: str) -> None:
    """Raise `ConfigError` unless `address` can be reached from this machine alone."""
    scheme, separator, rest = address.partition("://")
    if not separator or not rest:
        raise ConfigError(f"control must be {_FORMS}, got {address!r}")
    if scheme == "ipc":
        return
    if scheme != "tcp":
        raise ConfigError(f"control must be {_FORMS}, got scheme {scheme!r} in {address!r}")
    host, separator, port = rest.rpartition(":")
    if not separator or not (port == "*" or (port.isdigit() and int(port) <= 65535)):
        raise ConfigError(f"control must end in a port from 0 to 65535, got {address!r}")
    if not is_loopback(host):
        raise ConfigError(
            f"control must be a loopback address until links carry keys, got {address!r}; use {_FORMS}"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or an address of the loopback interface."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    # A dual-stack listener reports an IPv4 peer as ::ffff:127.0.0.1.
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
