"""Which addresses stay on this machine (what leaves it needs keys), and both families of IP in one place."""

import ipaddress
import socket
from collections.abc import Mapping


def host_of(address: str) -> str | None:
    """Return the host of `tcp://HOST:PORT`, without brackets; None for any other kind of address."""
    scheme, _, rest = address.partition("://")
    return rest.rpartition(":")[0].removeprefix("[").removesuffix("]") if scheme == "tcp" else None


def host_port(host: str, port: int | str) -> str:
    """Return HOST:PORT as addresses and URLs have it: an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def may_be_ipv6(address: str) -> bool:
    """Whether a ZeroMQ socket needs IPv6 for an address: not for an IPv4 one, nor `localhost`, 127.0.0.1."""
    host = host_of(address)
    return host not in (None, "localhost") and not isinstance(_parse(host or ""), ipaddress.IPv4Address)


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """Open a TCP listener. `*` and `::` take IPv4 too, and `*` it alone where the system has no IPv6.

    Raises:
        OSError: The address cannot be had; `socket.gaierror` where the host is none.
    """
    if host == "*":
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - what was asked for
    families = {found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    both = family == socket.AF_INET6 and is_wildcard(host)
    return socket.create_server((host, port), family=family, backlog=backlog, dualstack_ipv6=both)


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
