"""A model's chat template: operator's code over client's data, in a sandbox."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn, Self

import jinja2
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from disagg.errors import ConfigError, InvalidRequest
from disagg.frontend.tokenizer import read_json, special_tokens

RENDER_TIMEOUT_S = 5.0
MAX_GROWTH_CHARS = 1 << 20
"""A rendered prompt may be this much longer than twice its messages; templates carry a preamble."""
_PIECES_PER_CHECK = 256


class ChatTemplate:
    """Compiled once, rendered for every chat request; safe to use from several threads."""

    def __init__(self, source: str, tokens: dict[str, str], name: str = "chat template") -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the {name} is not a valid template: {error}") from error
        self._tokens = tokens

    @classmethod
    def from_folder(cls, folder: Path, override: Path | None = None) -> Self | None:
        """The template of a model's folder, or of a file in its place; None where there is none."""
        path = override or folder / "chat_template.jinja"
        if override is not None or path.exists():
            try:
                return cls(path.read_text(encoding="utf-8"), special_tokens(folder), f"chat template {path}")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read the chat template {path}: {error}") from error
        source = read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if source is None:
            return None
        return cls(source, special_tokens(folder), f"chat template of {folder}")

    def render(self, messages: list[dict[str, Any]], arguments: dict[str, Any] | None = None) -> str:
        """Make the prompt, ready for the assistant's turn.

        Raises:
            InvalidRequest: The template refused the messages, failed on them, or did not end.
        """
        limit = 2 * _num_chars(messages) + MAX_GROWTH_CHARS
        variables = {
            **(arguments or {}),
            **self._tokens,
            "messages": messages,
            "add_generation_prompt": True,
            # Defined and none, as transformers has them: templates ask `tools is not none`.
            "tools": None,
            "documents": None,
        }
        try:
            return _collect(self._template.generate(variables), limit)
        except InvalidRequest:
            raise
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refused: {error.message}", param="messages") from error
        except Exception as error:
            # A template is a program: anything can come out of it, and only for these messages.
            raise InvalidRequest(
                "the chat template cannot render these messages", param="messages"
            ) from error


def _collect(pieces: Any, limit: int) -> str:
    """Join what a template yields, within a size and a time."""
    parts: list[str] = []
    size = 0
    deadline = None
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size > limit:
            raise InvalidRequest(f"the chat template made more than {limit} characters", param="messages")
        if len(parts) % _PIECES_PER_CHECK == 0:
            deadline = deadline or monotonic() + RENDER_TIMEOUT_S
            if monotonic() > deadline:
                raise InvalidRequest(
                    f"the chat template took more than {RENDER_TIMEOUT_S} seconds", param="messages"
                )
    return "".join(parts)


def _num_chars(messages: list[dict[str, Any]]) -> int:
    return sum(len(value) for message in messages for value in message.values() if isinstance(value, str))


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; here its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        """Keep the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The dialect that models' templates are written in, as transformers defines it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
