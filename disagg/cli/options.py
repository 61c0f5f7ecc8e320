"""Click options generated from the configuration structs, and back: precedence, checks, sources.

A leaf field `lease_ttl_s` of any composed struct is the flag `--lease-ttl-s`, the variable
`DISAGG_LEASE_TTL_S` and the key `lease_ttl_s` of a configuration file.
"""

import json
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
import msgspec
from click.core import ParameterSource
from msgspec import Struct, inspect

from disagg.config import leaves
from disagg.errors import ConfigError

T = TypeVar("T", bound=Struct)
F = TypeVar("F", bound=Callable[..., Any])

ENVIRONMENT_PREFIX = "DISAGG_"


def config_options(kind: type[Struct], *, argument: str | None = None) -> Callable[[F], F]:
    """Decorate a command with one option per leaf of `kind`, and `--config FILE`.

    `argument` names the leaf that is a positional argument instead. The command receives every
    leaf by name; `build` makes the struct of them.
    """

    def decorate(command: F) -> F:
        hints = _hints(kind)
        for path, field in reversed(list(leaves(kind))):
            name = path[-1]
            description, hint = hints[path]
            env = ENVIRONMENT_PREFIX + name.upper()
            if name == argument:
                command = click.argument(name, required=False, envvar=env)(command)
                continue
            command = click.option(*_declarations(name, hint), **_attributes(field, hint, description, env))(
                command
            )
        file = click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            envvar=ENVIRONMENT_PREFIX + "CONFIG",
            callback=_load_file(kind),
            help="TOML or JSON file with any of these, flags' names with underscores.",
        )
        return file(command)

    return decorate


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make the configuration of what the command received.

    Raises:
        ConfigError: a value is out of range; names the key, the value and where it came from.
    """
    context = click.get_current_context()
    nested: dict[str, Any] = {}
    for path, _ in leaves(kind):
        value = values[path[-1]]
        if context.get_parameter_source(path[-1]) is ParameterSource.DEFAULT or value is None:
            continue
        owner = nested
        for part in path[:-1]:
            owner = owner.setdefault(part, {})
        owner[path[-1]] = value
        _check(kind, path, value, _source(context, path[-1]))
    return msgspec.convert(nested, kind)


def describe(kind: type[Struct]) -> dict[tuple[str, ...], str]:
    """Return the description of every leaf, by its path."""
    return {path: description for path, (description, _) in _hints(kind).items()}


def _hints(kind: type[Struct], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], tuple[str, Any]]:
    """Find description and plain type of every leaf."""
    found: dict[tuple[str, ...], tuple[str, Any]] = {}
    for name, hint in kind.__annotations__.items():
        if isinstance(hint, type) and issubclass(hint, Struct):
            found |= _hints(hint, (*path, name))
        else:
            plain, *metas = get_args(hint)
            found[(*path, name)] = (metas[0].description or "", plain)
    return found


def _choices(hint: Any) -> list[Any]:
    """List the members of a union, without the absent ones."""
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    present = [arm for arm in arms if arm not in (type(None), msgspec.UnsetType)]
    return [get_args(arm)[0] if get_origin(arm) is Annotated else arm for arm in present]


class _Option(click.Option):
    """Says of a value of the wrong type which flag or variable it came from."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert what was given."""
        try:
            return super().type_cast_value(ctx, value)
        except click.BadParameter as error:
            assert self.name is not None
            raise ConfigError(f"{self.name} from {_source(ctx, self.name)}: {error.message}") from error


def _declarations(name: str, hint: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [f"{flag}/--no-{flag[2:]}" if hint is bool else flag, name]


def _attributes(field: inspect.Field, hint: Any, description: str, env: str) -> dict[str, Any]:
    plain = _choices(hint)[0]
    attributes: dict[str, Any] = {"cls": _Option, "help": description, "envvar": env, "show_envvar": False}
    default = field.default
    if default not in (None, (), msgspec.NODEFAULT, msgspec.UNSET):
        attributes |= {"default": default, "show_default": True}
    if get_origin(plain) is Literal:
        attributes["type"] = click.Choice(get_args(plain))
    elif get_origin(plain) is tuple:
        attributes |= {"multiple": True, "type": str}
    elif plain is not bool:
        attributes["type"] = plain
    return attributes


def _load_file(kind: type[Struct]) -> Callable[[click.Context, click.Parameter, Path | None], None]:
    def load(context: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        try:
            content = (
                json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
            )
        except ValueError as error:
            raise ConfigError(f"config file {path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"config file {path} must hold one object with keys, not {content!r:.40}")
        known = {leaf[-1]: leaf for leaf, _ in leaves(kind)}
        for key, value in content.items():
            if key not in known:
                raise ConfigError(f"config file {path} has the unknown key {key!r}")
            # Here, where the file's own types are known: click would take a string for a list of letters.
            _check(kind, known[key], value, f"config file {path}")
        context.default_map = {**(context.default_map or {}), **content}

    return load


def _source(context: click.Context, name: str) -> str:
    match context.get_parameter_source(name):
        case ParameterSource.ENVIRONMENT:
            return ENVIRONMENT_PREFIX + name.upper()
        case _:
            return "--" + name.replace("_", "-")


def _check(kind: type[Struct], path: tuple[str, ...], value: Any, source: str) -> None:
    nested: Any = value
    for part in reversed(path):
        nested = {part: nested}
    try:
        msgspec.convert(nested, kind)
    except msgspec.ValidationError as error:
        reason = str(error).split(" - at ")[0]
        shown = "…" if path[-1] == "api_key" else repr(value)
        raise ConfigError(f"{path[-1]} = {shown} from {source}: {reason}") from error
