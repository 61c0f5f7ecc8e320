"""Transports by name, and the environment they load in."""

import logging
import os
from collections.abc import MutableMapping

from disagg import nccl
from disagg.errors import ConfigError, TransferError
from disagg.transfer.base import PoolMemory, Transport
from disagg.transfer.cuda_ipc import BLOCKS, NAME, Copier, CudaIpcTransport
from disagg.transfer.host import host_id
from disagg.transfer.nccl import NcclTransport

TRANSPORTS = ("auto", "nixl", "cuda_ipc", "nccl")
"""What `make_transport` knows."""
UCX_TCP_PORT_RANGE = "20000-20999"
"""Where UCX listens for other workers, unless the environment names another range."""

log = logging.getLogger(__name__)


def make_transport(name: str, *, uuid: str, rank: int, pool: PoolMemory) -> Transport:
    """Make one rank's transport over its pool, in the thread that will use it.

    Args:
        name: One of `TRANSPORTS`; `auto` takes `cuda_ipc` for the peers that it reaches, where the pool
            is on a GPU.
        uuid: This worker process's; peers tell a restarted worker by it.
        rank: Tensor-parallel rank whose pool this is.
        pool: Registered for as long as the transport lives.

    Raises:
        ConfigError: the name is unknown, its package is missing, or it cannot carry this pool.
        TransferError: the library refused the memory or could not start.
    """
    if name not in TRANSPORTS:
        raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, got {name}")
    if name == "nccl":
        return _make_nccl(uuid, rank, pool)
    copier = _make_copier(pool, is_required=name == NAME) if name != "nixl" else None
    from disagg.transfer.nixl import NixlTransport

    nixl = NixlTransport(uuid=uuid, rank=rank, pool=pool)
    if copier is None:
        return nixl
    try:
        return CudaIpcTransport(nixl, copier, pool=pool, host_id=host_id(), is_required=name == NAME)
    except TransferError as error:
        if name == NAME:
            raise ConfigError(f"transport_backend is {NAME}, but {error}") from error
        log.warning("KV goes by nixl, because %s", error)
        return nixl


def _make_nccl(uuid: str, rank: int, pool: PoolMemory) -> Transport:
    from disagg.transfer.nixl import NixlTransport

    if pool.memory != "VRAM":
        raise ConfigError("transport_backend is nccl, but the pool is in host memory, which nixl carries")
    nccl.require()
    return NcclTransport(NixlTransport(uuid=uuid, rank=rank, pool=pool), pool)


def _make_copier(pool: PoolMemory, is_required: bool) -> Copier | None:
    """Make what copies from a pool by CUDA IPC; None where nothing can."""
    reason = "the pool is in host memory"
    if pool.memory == "VRAM":
        try:
            from disagg._cuda import PeerCopier

            return PeerCopier(pool.device_id, BLOCKS)
        except ImportError as error:
            reason = f"this build has no CUDA kernels: {error}"
        except RuntimeError as error:
            reason = f"CUDA refuses: {error}"
    if is_required:
        raise ConfigError(f"transport_backend is {NAME}, but {reason}")
    if pool.memory == "VRAM":
        log.warning("KV goes by nixl, because %s", reason)
    return None


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
        environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    else:
        environ.setdefault("UCX_TCP_PORT_RANGE", UCX_TCP_PORT_RANGE)
    # Every failure reaches us as an exception; the copies on stderr are noise beside our own log.
    environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    environ.setdefault("UCX_LOG_LEVEL", "fatal")
