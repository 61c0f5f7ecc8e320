"""Where the time of a start goes."""

from disagg.telemetry import Stages
from support.clock import FakeClock


def test_stages_add_up_to_the_whole_from_the_process_s_beginning() -> None:
    clock = FakeClock()
    stages = Stages(clock, lambda: 1.5)
    stages.end("imports")
    clock.advance(2.25)
    stages.end("weights")
    assert stages.fields() == {"start_s": 3.75, "imports_s": 1.5, "weights_s": 2.25}


def test_the_process_s_age_is_its_own() -> None:
    stages = Stages()
    stages.end("imports")
    assert 0 < stages.fields()["imports_s"] < 24 * 3600
