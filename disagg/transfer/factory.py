"""Transports by name, and the environment they load in."""

import os
from collections.abc import MutableMapping

from disagg.errors import ConfigError
from disagg.transfer.base import PoolMemory, Transport

TRANSPORTS = ("nixl",)
"""What `make_transport` knows."""
UCX_TCP_PORT_RANGE = "20000-20999"
"""Where UCX listens for other workers, unless the environment names another range."""


def make_transport(name: str, *, uuid: str, rank: int, pool: PoolMemory) -> Transport:
    """Make one rank's transport over its pool, in the thread that will use it.

    Args:
        name: One of `TRANSPORTS`.
        uuid: This worker process's; peers tell a restarted worker by it.
        rank: Tensor-parallel rank whose pool this is.
        pool: Registered for as long as the transport lives.

    Raises:
        ConfigError: the name is unknown, or its package is missing.
        TransferError: the library refused the memory or could not start.
    """
    if name == "nixl":
        from disagg.transfer.nixl import NixlTransport

        return NixlTransport(uuid=uuid, rank=rank, pool=pool)
    raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, got {name}")


def prepare_environment(
    environ: MutableMapping[str, str] | None = None,
    *,
    loopback_only: bool = True,
) -> None:
    """Set what NIXL and UCX read once, when they load: before the first `make_transport`.

    UCX has no authentication and listens on outside interfaces even for local work: on loopback
    it is held to `lo`, elsewhere to one port range that a firewall can name. What the user has
    set himself is left alone.
    """
    environ = os.environ if environ is None else environ
    if loopback_only:
        environ.setdefault("UCX_NET_DEVICES", "lo")
    else:
        environ.setdefault("UCX_TCP_PORT_RANGE", UCX_TCP_PORT_RANGE)
    # Every failure reaches us as an exception; the copies on stderr are noise beside our own log.
    environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    environ.setdefault("UCX_LOG_LEVEL", "fatal")
