"""Router and router: one asks another for a ledger record that is not its own."""

from msgspec import Struct


class AskRecord(Struct, frozen=True, array_like=True, tag="ask_record"):
    """Have you this record? Answered by RecordAnswer; who is asked asks nobody else."""

    request_id: str


class RecordAnswer(Struct, frozen=True, array_like=True, tag="record_answer"):
    """The record as JSON, or None."""

    request_id: str
    record: bytes | None
