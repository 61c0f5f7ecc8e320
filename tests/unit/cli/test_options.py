import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from disagg.cli.options import build, config_options, describe
from disagg.config import RouterConfig, ServeConfig, WorkerConfig, flatten, leaves
from disagg.errors import ConfigError

ALL = [ServeConfig, RouterConfig, WorkerConfig]


def parse(
    kind: type[Any], *arguments: str, env: dict[str, str] | None = None, argument: str | None = None
) -> Any:
    """Run a command that only builds its configuration."""

    @click.command()
    @config_options(kind, argument=argument)
    def command(**values: Any) -> None:
        click.get_current_context().obj.append(build(kind, values))

    found: list[Any] = []
    result = CliRunner().invoke(command, list(arguments), env=env, obj=found)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return found[0] if found else result


@pytest.mark.parametrize("kind", ALL)
def test_every_leaf_is_described_and_unique(kind: type[Any]) -> None:
    """A leaf is a flag, a variable and a file key: two of one name would be set together."""
    names = [path[-1] for path, _ in leaves(kind)]
    assert len(names) == len(set(names))
    assert all(describe(kind).values())


@pytest.mark.parametrize("kind", ALL)
def test_defaults_alone_are_valid(kind: type[Any]) -> None:
    assert parse(kind) == kind()


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    """The order that every operator expects."""
    file = tmp_path / "disagg.toml"
    file.write_text("port = 1\nmax_attempts = 2\nlease_ttl_s = 3.0\n")
    env = {"DISAGG_MAX_ATTEMPTS": "4", "DISAGG_PORT": "5"}
    config = parse(RouterConfig, "--config", str(file), "--port", "6", env=env)
    assert (config.port, config.routing.max_attempts, config.lease.lease_ttl_s) == (6, 4, 3.0)


def test_a_wrong_value_is_named_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "disagg.toml"
    file.write_text("max_attempts = 0\n")
    with pytest.raises(
        ConfigError, match=r"max_attempts = 0 from config file .*disagg.toml: Expected `int` >= 1"
    ):
        parse(RouterConfig, "--config", str(file))
    with pytest.raises(ConfigError, match=r"port = 70000 from DISAGG_PORT"):
        parse(RouterConfig, env={"DISAGG_PORT": "70000"})
    with pytest.raises(ConfigError, match=r"lease_ttl_s = 0.0 from --lease-ttl-s"):
        parse(RouterConfig, "--lease-ttl-s", "0")


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    """A misspelt key that is ignored runs a system nobody configured."""
    file = tmp_path / "disagg.json"
    file.write_text(json.dumps({"max_atempts": 3}))
    with pytest.raises(ConfigError, match="max_atempts"):
        parse(RouterConfig, "--config", str(file))


def test_lists_come_from_repeated_flags() -> None:
    assert parse(RouterConfig, "--api-key", "a", "--api-key", "b").api_key == ("a", "b")


def test_the_model_is_a_positional_argument() -> None:
    assert parse(ServeConfig, "some/model", argument="model").model.model == "some/model"


def test_flattened_configuration_is_read_back_alike(tmp_path: Path) -> None:
    """This is how the supervisor configures its children."""
    config = parse(WorkerConfig, "--role", "decode", "--tensor-parallel-size", "2", "--control", "ipc:///x")
    file = tmp_path / "worker.json"
    file.write_text(json.dumps(flatten(config)))
    assert parse(WorkerConfig, "--config", str(file)) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"port": "80"}', r"port = '80' from config file .*: Expected `int`, got `str`"),
        ('{"port": null}', r"port = None from config file .*: Expected `int`, got `null`"),
        ('{"port": [80]}', r"port = \[80\] from config file .*: Expected `int`, got `array`"),
        ('{"workers": "ipc://a"}', r"workers = 'ipc://a' from config file .*: Expected `array`, got `str`"),
        ("[1]", r"config file .* must hold one object with keys, not \[1\]"),
    ],
)
def test_a_file_s_wrong_types_are_named_with_the_file(tmp_path: Path, content: str, message: str) -> None:
    """A list where text belongs, and text where a list does, are neither converted nor a traceback."""
    file = tmp_path / "disagg.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse(RouterConfig, "--config", str(file))


def test_a_value_of_the_wrong_type_is_named_with_its_source() -> None:
    """Who exported a variable long ago is not sent to look for a flag."""
    with pytest.raises(ConfigError, match="port from DISAGG_PORT: 'abc' is not a valid integer"):
        parse(RouterConfig, env={"DISAGG_PORT": "abc"})
    with pytest.raises(ConfigError, match="port from --port: 'abc' is not a valid integer"):
        parse(RouterConfig, "--port", "abc")


@pytest.mark.parametrize("key", ["", "a b", "ключ", "key\n"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str) -> None:
    """It would lock every client out; what was meant to be a secret is not printed."""
    with pytest.raises(ConfigError, match="api_key = … from --api-key"):
        parse(RouterConfig, "--api-key", key)
