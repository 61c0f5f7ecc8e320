"""The agent of a node, without its leader."""

import asyncio

from disagg.config import NodesConfig, WorkerConfig
from disagg.worker.node import _Agent


async def _drain() -> int:
    nodes = NodesConfig(num_nodes=2, node_rank=1, leader_address="127.0.0.1")
    agent = _Agent(WorkerConfig(role="decode", nodes=nodes), None, lambda _: None)
    async with asyncio.timeout(5.0):
        return await agent.drain()


def test_a_node_that_has_not_joined_drains_at_once() -> None:
    """No leader would tell it of an end: preStop would last for all of the grace period."""
    assert asyncio.run(_drain()) == 0
