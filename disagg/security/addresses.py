"""Which addresses stay on this machine. What leaves it needs keys."""

import ipaddress
from collections.abc import Mapping


def host_of(address: str) -> str | None:
    """Return the host of `tcp://HOST:PORT`, without brackets; None for any other kind of address."""
    scheme, _, rest = address.partition("://")
    return rest.rpartition(":")[0].removeprefix("[").removesuffix("]") if scheme == "tcp" else None


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or an address of the loopback interface."""
    if host == "localhost":
        return True
    address = _parse(host)
    # A dual-stack listener reports an IPv4 peer as ::ffff:127.0.0.1.
    mapped = getattr(address, "ipv4_mapped", None)
    return address is not None and bool((mapped or address).is_loopback)


def is_own_call(client_host: str | None, headers: Mapping[str, str]) -> bool:
    """Whether an HTTP request comes from this machine, and not from a page in a browser on it."""
    return client_host is not None and is_loopback(client_host) and "origin" not in headers


def is_wildcard(host: str) -> bool:
    """Whether `host` stands for every interface, so that nobody can connect to it by that name."""
    address = _parse(host)
    return host == "*" or (address is not None and address.is_unspecified)


def _parse(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
