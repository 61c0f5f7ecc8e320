import io
import logging

from disagg.telemetry import fields, set_up_logging


def test_a_line_is_readable_and_parses() -> None:
    stream = io.StringIO()
    set_up_logging("router", stream=stream)
    try:
        logging.getLogger("disagg.some").info("request ended %s", fields(id="r1", ttft_ms=1.25, none=None))
        set_up_logging("router", stream=stream)
        logging.getLogger("disagg.some").warning("again %s", fields(reason="two words"))
    finally:
        logger = logging.getLogger("disagg")
        logger.handlers.clear()
        logger.propagate = True
    first, second = stream.getvalue().splitlines()
    assert first[12:] == " INFO  router    request ended id=r1 ttft_ms=1.25"
    assert second[12:] == " WARNING router    again reason='two words'", "and no line comes twice"


def test_nothing_that_a_client_sends_forges_a_line() -> None:
    assert str(fields(id="a\nINFO b")) == r"id='a\nINFO b'"
    assert str(fields(id="")) == "id=''"
    assert "\x1b" not in str(fields(id="\x1b[31m"))
