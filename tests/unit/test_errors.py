import asyncio

import pytest

from disagg.errors import ConfigError, DisaggError, WorkerLost, ungrouped


async def fail(error: Exception) -> None:
    raise error


async def run(*errors: Exception) -> None:
    with ungrouped(DisaggError):
        async with asyncio.TaskGroup() as tasks:
            for error in errors:
                tasks.create_task(fail(error))


def test_an_error_of_ours_leaves_a_task_group_as_itself() -> None:
    """A process that cannot start ends with one sentence, not with a traceback of groups."""
    for errors in ([ConfigError("device")], [ConfigError("device"), WorkerLost("w0")]):
        with pytest.raises(ConfigError, match="device") as raised:
            asyncio.run(run(*errors))
        assert raised.value.__cause__ is None
        assert raised.value.__suppress_context__


def test_what_is_not_of_that_kind_stays_in_its_group() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(run(ConfigError("device"), ZeroDivisionError()))
    assert len(raised.value.exceptions) == 2


def test_groups_within_groups_are_opened() -> None:
    with pytest.raises(ConfigError), ungrouped(ConfigError):
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [ConfigError("device")])])


def test_what_is_raised_bare_is_left_alone() -> None:
    with pytest.raises(ZeroDivisionError), ungrouped(DisaggError):
        raise ZeroDivisionError
