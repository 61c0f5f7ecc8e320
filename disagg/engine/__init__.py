"""One engine: scheduler, step loop, sampler, model runner.

May import `kv`, `attention`, `models`, `layers`, `parallel`, `protocol`, `config` and `errors`.
What is re-exported here needs no torch; `sampler.py`, `runner.py` and `build.py` do and are
imported by name. Read `scheduler.py` first, then `plan.py`, what it tells the ranks.
"""

from disagg.engine.admission import Limits
from disagg.engine.engine import Engine, Runner
from disagg.engine.plan import SamplePlan, StepPlan, StepRetired
from disagg.engine.request import (
    Added,
    ChunkDone,
    EngineRequest,
    EngineStats,
    Event,
    Refused,
    Reservation,
    SequenceOutput,
    StepOutput,
)
from disagg.engine.scheduler import Scheduler

__all__ = [
    "Added",
    "ChunkDone",
    "Engine",
    "EngineRequest",
    "EngineStats",
    "Event",
    "Limits",
    "Refused",
    "Reservation",
    "Runner",
    "SamplePlan",
    "Scheduler",
    "SequenceOutput",
    "StepOutput",
    "StepPlan",
    "StepRetired",
]
