"""What one iteration of the engine thread sends, in order."""

from disagg.protocol import KvReceived, SequenceTokens, Tokens
from disagg.worker.outbox import Outbox, ToRouter


def tokens(transfer_id: str, position: int) -> SequenceTokens:
    return SequenceTokens(transfer_id, 0, position, [1])


RECEIVED = KvReceived("b", 0, 1, 1, 1, 0.0, "memory")


def test_tokens_of_a_step_are_one_message_a_router() -> None:
    outbox = Outbox()
    outbox.add_tokens("r0", tokens("a", 0))
    outbox.add_tokens("r1", tokens("b", 0))
    outbox.add_tokens("r0", tokens("c", 0))
    assert outbox.take() == [
        ToRouter("r0", Tokens([tokens("a", 0), tokens("c", 0)])),
        ToRouter("r1", Tokens([tokens("b", 0)])),
    ]
    assert outbox.take() == []


def test_nothing_overtakes_tokens() -> None:
    """Two steps without a flush between them keep their order, also beside other messages."""
    outbox = Outbox()
    outbox.add_tokens("r0", tokens("a", 0))
    outbox.to_router("r0", RECEIVED)
    outbox.add_tokens("r0", tokens("a", 1))
    assert outbox.take() == [
        ToRouter("r0", Tokens([tokens("a", 0)])),
        ToRouter("r0", RECEIVED),
        ToRouter("r0", Tokens([tokens("a", 1)])),
    ]
