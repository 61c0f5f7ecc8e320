"""Which processes make up one system on this machine: arithmetic only."""

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, Struct

from disagg.config import EngineConfig, RoleName, RouterConfig, ServeConfig, WorkerConfig
from disagg.errors import ConfigError


class ProcessSpec(Struct, frozen=True, kw_only=True):
    """One child: `disagg COMMAND`, configured by one struct."""

    name: str
    command: Literal["router", "worker"]
    config: RouterConfig | WorkerConfig


def pool_sizes(config: ServeConfig) -> dict[RoleName, int]:
    """Find how many workers of each role were asked for.

    Raises:
        ConfigError: the numbers cannot serve a request.
    """
    default = 0 if config.unified and config.prefill is UNSET and config.decode is UNSET else 1
    prefill = default if config.prefill is UNSET else config.prefill
    decode = default if config.decode is UNSET else config.decode
    if decode + config.unified == 0:
        raise ConfigError(f"nothing would decode: decode = {decode} and unified = {config.unified}")
    return {"prefill": prefill, "decode": decode, "unified": config.unified}


def plan_processes(config: ServeConfig, runtime_dir: Path) -> list[ProcessSpec]:
    """Lay out the system: workers first, then the router that knows their addresses.

    Control sockets are files in `runtime_dir`, which only this user can enter; a restarted
    worker is found again at the same address.
    """
    workers = [
        _worker(config, role, index, runtime_dir)
        for role, count in pool_sizes(config).items()
        for index in range(count)
    ]
    addresses = tuple(spec.config.control for spec in workers if isinstance(spec.config, WorkerConfig))
    router = RouterConfig(
        host=config.host,
        port=config.port,
        api_key=config.api_key,
        max_body_bytes=config.max_body_bytes,
        workers=addresses,
        model=config.model,
        lease=config.lease,
        routing=config.routing,
    )
    return [*workers, ProcessSpec(name="router", command="router", config=router)]


def _worker(config: ServeConfig, role: RoleName, index: int, runtime_dir: Path) -> ProcessSpec:
    name = f"{role}-{index}"
    sizes = {"prefill": config.prefill_tp, "decode": config.decode_tp, "unified": None}
    engine: EngineConfig = msgspec.structs.replace(
        config.engine, tensor_parallel_size=sizes[role] or config.engine.tensor_parallel_size
    )
    worker = WorkerConfig(
        role=role,
        worker_id=name,
        control=f"ipc://{runtime_dir}/{name}.sock",
        http_port=0,
        model=config.model,
        engine=engine,
        lease=config.lease,
        transfer=config.transfer,
    )
    return ProcessSpec(name=name, command="worker", config=worker)
