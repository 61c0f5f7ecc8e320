"""What every transport does. A test module subclasses `TransportContract` and makes transports."""

import numpy as np
import pytest

from disagg.errors import LinkLost, TransferError
from disagg.protocol import PeerHello
from disagg.transfer.base import Transport, agent_name
from support.transfer import (
    MakeTransport,
    Pool,
    ended,
    make_hello,
    make_layout,
    make_pool,
    notified,
    poll_until,
    write_of,
)

LAYOUT = make_layout()


class TransportContract:
    """Needs a fixture `make_transport`; what it makes is closed by the fixture."""

    memory = "DRAM"

    @pytest.fixture
    def source_pool(self) -> Pool:
        return make_pool(LAYOUT, seed=1)

    @pytest.fixture
    def target_pool(self) -> Pool:
        return make_pool(LAYOUT)

    @pytest.fixture
    def source(self, make_transport: MakeTransport, source_pool: Pool) -> Transport:
        return make_transport("source", 0, source_pool)

    @pytest.fixture
    def target(self, make_transport: MakeTransport, target_pool: Pool) -> Transport:
        return make_transport("target", 0, target_pool)

    @pytest.fixture
    def hello(self, target: Transport) -> PeerHello:
        return make_hello("decode-0", "target", LAYOUT, [target])

    def test_endpoint_describes_the_pool(self, target: Transport, target_pool: Pool) -> None:
        endpoint = target.endpoint()
        assert endpoint.agent_name == agent_name("target", 0)
        assert endpoint.base_address == target_pool.ctypes.data
        assert (endpoint.num_pages, endpoint.page_bytes) == target_pool.shape
        assert endpoint.memory == self.memory

    def test_write_lands_where_the_plan_says_and_nowhere_else(
        self, source: Transport, target: Transport, hello: PeerHello, source_pool: Pool, target_pool: Pool
    ) -> None:
        source.connect(hello)
        write_id = source.post(write_of(LAYOUT, "target", [5, 6, 2], [0, 1, 9]))
        events = poll_until(lambda e: bool(ended(e)), source, target)
        assert [(e.write_id, e.error) for e in ended(events)] == [(write_id, None)]
        np.testing.assert_array_equal(target_pool[[0, 1, 9]], source_pool[[5, 6, 2]])
        assert not target_pool[[2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]].any()

    def test_each_write_ends_once(self, source: Transport, target: Transport, hello: PeerHello) -> None:
        source.connect(hello)
        ids = [source.post(write_of(LAYOUT, "target", [page], [page])) for page in range(8)]
        events = poll_until(lambda e: len(ended(e)) == 8, source, target)
        events += source.poll()
        assert sorted(e.write_id for e in ended(events)) == sorted(ids)

    def test_notification_arrives_with_its_senders_name(
        self, source: Transport, target: Transport, hello: PeerHello
    ) -> None:
        """The receiver tells by it which rank of which process speaks; it needs no connection."""
        source.connect(hello)
        source.notify("target", 0, b"\x00payload\xff")
        events = poll_until(lambda e: bool(notified(e)), target, source)
        assert [(n.agent_name, n.payload) for n in notified(events)] == [("source:0", b"\x00payload\xff")]

    def test_unknown_peer_is_a_lost_link(self, source: Transport) -> None:
        with pytest.raises(LinkLost, match="nobody"):
            source.post(write_of(LAYOUT, "nobody", [0], [0]))
        with pytest.raises(LinkLost, match="nobody"):
            source.notify("nobody", 0, b"")

    def test_unknown_rank_is_refused(self, source: Transport, hello: PeerHello) -> None:
        source.connect(hello)
        with pytest.raises(TransferError, match="has no rank 1"):
            source.notify("target", 1, b"")

    def test_metadata_of_another_agent_is_refused(
        self, source: Transport, target: Transport, make_transport: MakeTransport
    ) -> None:
        """A hello that lies about its ranks must not direct writes elsewhere."""
        other = make_transport("other", 0, make_pool(LAYOUT))
        with pytest.raises(TransferError, match="is not rank 0 of target"):
            source.connect(make_hello("decode-0", "target", LAYOUT, [other]))

    def test_connecting_twice_is_connecting_once(
        self, source: Transport, target: Transport, hello: PeerHello, target_pool: Pool, source_pool: Pool
    ) -> None:
        source.connect(hello)
        source.connect(hello)
        source.post(write_of(LAYOUT, "target", [3], [3]))
        poll_until(lambda e: bool(ended(e)), source, target)
        np.testing.assert_array_equal(target_pool[3], source_pool[3])

    def test_disconnecting_forgets_the_peer_and_is_idempotent(
        self, source: Transport, hello: PeerHello
    ) -> None:
        source.connect(hello)
        source.disconnect("target")
        source.disconnect("target")
        with pytest.raises(LinkLost):
            source.post(write_of(LAYOUT, "target", [0], [0]))

    def test_a_peer_can_be_connected_again(
        self, source: Transport, target: Transport, hello: PeerHello, target_pool: Pool, source_pool: Pool
    ) -> None:
        for page in range(3):
            source.connect(hello)
            source.post(write_of(LAYOUT, "target", [page], [page]))
            poll_until(lambda e: bool(ended(e)), source, target)
            source.disconnect("target")
        np.testing.assert_array_equal(target_pool[:3], source_pool[:3])
