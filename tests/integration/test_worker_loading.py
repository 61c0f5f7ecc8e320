"""A worker that is still loading: its http port answers, and nobody is kept waiting for it."""

import asyncio
import threading
from typing import Any, NoReturn

import httpx
import pytest

from disagg.config import LeaseConfig, WorkerConfig
from disagg.errors import WorkerError
from disagg.telemetry import Stages
from disagg.worker import main
from support.sockets import LIMIT_S, until


def test_drain_of_a_worker_that_is_loading_returns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs there that could end: preStop would last for all of the grace period."""
    loaded = threading.Event()

    def load_worker(*arguments: Any, **more: Any) -> NoReturn:
        loaded.wait()
        raise WorkerError("loaded enough")

    monkeypatch.setattr(main, "load_worker", load_worker)
    lease = LeaseConfig(drain_seconds=100 * LIMIT_S)
    config = WorkerConfig(role="decode", control="tcp://127.0.0.1:0", http_port=0, lease=lease)

    async def test() -> None:
        worker = main._Worker(config, None, Stages(), lambda _: None)
        running = asyncio.create_task(worker.run())
        try:
            await until(lambda: hasattr(worker, "_http_url"))
            async with asyncio.timeout(LIMIT_S), httpx.AsyncClient(base_url=worker._http_url) as http:
                answer = await http.post("/drain")
                assert (answer.status_code, answer.json()) == (200, {"leases": 0})
                assert (await http.get("/health")).json() == {"state": "starting"}
        finally:
            loaded.set()
            with pytest.raises(WorkerError, match="loaded enough"):
                await running

    asyncio.run(test())
