"""From a configuration to a loaded worker: what takes long at the start. Runs on the engine thread."""

import os
from collections.abc import Callable

from msgspec import Struct

from disagg.checkpoint import model_hash, tokenizer_hash
from disagg.config import WorkerConfig
from disagg.engine import Limits
from disagg.engine.build import Rank, load_rank, make_engine, pick_device
from disagg.parallel import MeetingStore, TensorParallel
from disagg.protocol import PROTOCOL_VERSION, PeerHello
from disagg.telemetry import Stages
from disagg.transfer import Event, TransferThread, host_id, process_start_time
from disagg.worker.kv_thread import TRANSPORT, make_transfer_thread
from disagg.worker.metrics import WorkerCounts
from disagg.worker.ranks import LocalPort, RankGroup
from disagg.worker.service import Identity, WorkerService
from disagg.worker.transfers import RankPort, Transfers

Progress = Callable[[int, int], None]


class Loaded(Struct, frozen=True, kw_only=True):
    """A worker that can serve."""

    service: WorkerService
    """For the engine thread alone; the rest never changes and is for all."""
    hello: PeerHello
    limits: Limits
    eos_token_ids: list[int]
    dtype: str
    model_hash: str
    tokenizer_hash: str
    transfers: TransferThread


def load_worker(
    config: WorkerConfig,
    *,
    worker_id: str,
    uuid: str,
    ranks: RankGroup,
    counts: WorkerCounts,
    stages: Stages,
    progress: Progress,
    on_transfer: Callable[[Event], None],
    on_crash: Callable[[Exception], None],
) -> Loaded:
    """Load rank 0's share beside the other ranks, and start its transfer thread.

    Args:
        config: Role, model, engine.
        worker_id: Its stable name.
        uuid: This process's.
        ranks: The others, started.
        counts: Where the service counts.
        stages: Where the time is noted.
        progress: Told (bytes placed, bytes in all).
        on_transfer: Takes events of this rank's transfer thread, in that thread.
        on_crash: Told when that thread dies.

    Raises:
        ConfigError: the configuration cannot work, here or on another rank.
        WorkerLost: another rank ended.
    """
    ranks.begin()
    store = MeetingStore(ranks.meeting.put, ranks.meeting.get)
    device = pick_device(config.model.device, 0, ranks.size // config.nodes.num_nodes)
    group = TensorParallel.join(store, 0, ranks.size, device=device, host=ranks.host)
    stages.end("ranks")
    rank = load_rank(config.model, config.engine, tp=group, device=device, progress=progress)
    stages.end("weights")
    thread = make_transfer_thread(
        rank, uuid, 0, config.transfer.transport_backend, on_event=on_transfer, on_crash=on_crash
    )
    own_endpoint = thread.start()
    try:
        endpoints = [own_endpoint, *ranks.wait_ready()]
        # Those of other hosts prove nothing here: then there are none.
        pids = [os.getpid(), *ranks.pids] if ranks.on_one_host else []
        started = [(pid, process_start_time(pid) or 0) for pid in pids]
        hello = PeerHello(PROTOCOL_VERSION, worker_id, uuid, rank.layout, endpoints, host_id(), started)
        loaded = _assemble(config, hello, rank, thread, ranks, counts)
        stages.end("transfer")
        return loaded
    except Exception:
        thread.stop()
        raise


def _assemble(
    config: WorkerConfig,
    hello: PeerHello,
    rank: Rank,
    thread: TransferThread,
    ranks: RankGroup,
    counts: WorkerCounts,
) -> Loaded:
    model = config.model
    engine = make_engine(rank, config.engine, send=ranks.send if ranks.size > 1 else None)
    ports: list[RankPort] = [LocalPort(thread), *ranks.ranks]
    service = WorkerService(
        Identity(role=config.role, hello=hello, transport=TRANSPORT),
        engine=engine,
        transfers=Transfers(ports),
        counts=counts,
    )
    return Loaded(
        service=service,
        hello=hello,
        limits=engine.limits,
        eos_token_ids=list(rank.spec.eos_token_ids),
        dtype=rank.dtype,
        model_hash=model_hash(
            rank.files.path,
            dummy_seed=model.seed if model.load_format == "dummy" else None,
            quantization=model.quantization,
        ),
        tokenizer_hash=tokenizer_hash(rank.files.path),
        transfers=thread,
    )


def whole_percents(tell: Progress) -> Progress:
    """Pass on a call only when another percent is done: a bar needs no more, and a pipe holds little."""
    told = -1

    def progress(done: int, total: int) -> None:
        nonlocal told
        percent = 100 * done // max(1, total)
        if percent > told:
            told = percent
            tell(done, total)

    return progress
