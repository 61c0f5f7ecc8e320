"""From a body to a checked call. Read `parse_chat` and `parse_completion`; they touch nothing else."""

from collections.abc import Mapping
from secrets import randbits
from typing import Any, Final, cast

import msgspec
from msgspec import UNSET, Struct

from disagg.errors import InvalidRequest, PromptTooLong, UnsupportedParameter
from disagg.frontend.decoding import decode
from disagg.frontend.fields import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    MESSAGE_NEUTRAL,
    ChatFields,
    CompletionFields,
    ContentPart,
    Message,
    SharedFields,
    StreamOptions,
)
from disagg.frontend.stops import StopString
from disagg.protocol import SamplingParams

MAX_SEQUENCES = 128
MAX_MESSAGES = 2048
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
DEFAULT_COMPLETION_TOKENS = 16

_ROLES: Final[dict[str, str]] = {
    "system": "system",
    # OpenAI's newer name for the same; templates of open models know only the older.
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_UNSUPPORTED_ROLES: Final = ("tool", "function")

_chat_decoder = msgspec.json.Decoder(ChatFields)
_completion_decoder = msgspec.json.Decoder(CompletionFields)


class Options(Struct, frozen=True):
    """What both endpoints' requests come to, but for the prompt and its length."""

    model: str
    n: int
    stream: bool
    include_usage: bool
    stops: tuple[StopString, ...]
    max_tokens: int | None
    max_tokens_param: str
    """The field that `max_tokens` came from, to name it in errors."""
    sampling: SamplingParams
    """Checked; its `max_tokens` is not final."""
    cache_salt: str


class ChatCall(Struct, frozen=True):
    """A checked chat request."""

    options: Options
    messages: list[dict[str, Any]]
    """As the chat template wants them."""
    template_arguments: dict[str, Any]


class CompletionCall(Struct, frozen=True):
    """A checked completion request. A prompt is text or token ids; the ids are checked later."""

    options: Options
    prompts: list[str] | list[list[int]]


def parse_chat(body: bytes) -> ChatCall:
    """Decode and check the body of `/v1/chat/completions`.

    Raises:
        RequestError: Naming the first field at fault.
    """
    fields = decode(_chat_decoder, body)
    _refuse_unsupported(fields, CHAT_NEUTRAL)
    max_tokens, param = fields.max_tokens, "max_tokens"
    if fields.max_completion_tokens is not None:
        if max_tokens is not None:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens cannot both be set", param="max_completion_tokens"
            )
        max_tokens, param = fields.max_completion_tokens, "max_completion_tokens"
    options = _options(fields, max_tokens, param)
    _check_count("n", options.n)
    return ChatCall(options, _messages(fields.messages), fields.chat_template_kwargs or {})


def parse_completion(body: bytes) -> CompletionCall:
    """Decode and check the body of `/v1/completions`.

    Raises:
        RequestError: Naming the first field at fault.
    """
    fields = decode(_completion_decoder, body)
    neutral: Mapping[str, tuple[Any, ...]] = COMPLETION_NEUTRAL
    if fields.n is not None:
        # The best n of n: all of them.
        neutral = COMPLETION_NEUTRAL | {"best_of": (fields.n,)}
    _refuse_unsupported(fields, neutral)
    max_tokens = DEFAULT_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    options = _options(fields, max_tokens, "max_tokens")
    _check_count("n", options.n)
    prompts = _prompts(fields.prompt)
    if len(prompts) * options.n > MAX_SEQUENCES:
        raise InvalidRequest(
            f"prompt times n must be at most {MAX_SEQUENCES}, got {len(prompts)} prompts times {options.n}",
            param="prompt",
        )
    return CompletionCall(options, prompts)


def plan_max_tokens(options: Options, num_prompt_tokens: int, max_model_len: int, prompt_param: str) -> int:
    """How many tokens a prompt's output may have: what was asked for, or the rest of the context.

    Raises:
        PromptTooLong: They do not fit together; nothing is ever clamped.
    """
    if num_prompt_tokens >= max_model_len:
        raise PromptTooLong(
            f"the context is {max_model_len} tokens, but {prompt_param} has {num_prompt_tokens}"
            " and leaves no room for an answer",
            param=prompt_param,
        )
    room = max_model_len - num_prompt_tokens
    if options.max_tokens is None:
        return room
    if options.max_tokens > room:
        raise PromptTooLong(
            f"the context is {max_model_len} tokens, but {options.max_tokens + num_prompt_tokens} were"
            f" requested: {num_prompt_tokens} in {prompt_param} and {options.max_tokens} as"
            f" {options.max_tokens_param}",
            param=options.max_tokens_param,
        )
    return options.max_tokens


def _options(fields: SharedFields, max_tokens: int | None, max_tokens_param: str) -> Options:
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(
            f"{max_tokens_param} must be at least 1, got {max_tokens}", param=max_tokens_param
        )
    stream = bool(fields.stream)
    return Options(
        model=fields.model,
        n=1 if fields.n is None else fields.n,
        stream=stream,
        include_usage=_include_usage(fields.stream_options, stream),
        stops=_stops(fields.stop),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        sampling=_sampling(fields),
        cache_salt=_text("cache_salt", fields.cache_salt or ""),
    )


def _sampling(fields: SharedFields) -> SamplingParams:
    stop_token_ids = fields.stop_token_ids or ()
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids must be at most {MAX_STOP_TOKEN_IDS}, got {len(stop_token_ids)}",
            param="stop_token_ids",
        )
    top_k = 0 if fields.top_k is None else fields.top_k
    return SamplingParams(
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        # vLLM writes "all" as -1.
        top_k=0 if top_k == -1 else _within("top_k", top_k, 2**31 - 1),
        min_p=0.0 if fields.min_p is None else fields.min_p,
        seed=_seed(fields.seed),
        stop_token_ids=tuple(_within("stop_token_ids", token_id, 2**31 - 1) for token_id in stop_token_ids),
        ignore_eos=bool(fields.ignore_eos),
    ).check()


def _seed(seed: int | None) -> int:
    if seed is None:
        return randbits(64)
    if not -(2**63) <= seed < 2**64:
        raise InvalidRequest(f"seed must fit 64 bits, got {seed}", param="seed")
    return seed & (2**64 - 1)


def _within(param: str, value: int, limit: int) -> int:
    if not 0 <= value <= limit:
        raise InvalidRequest(f"{param} must be between 0 and {limit}, got {value}", param=param)
    return value


def _check_count(param: str, n: int) -> None:
    if not 1 <= n <= MAX_SEQUENCES:
        raise InvalidRequest(f"{param} must be between 1 and {MAX_SEQUENCES}, got {n}", param=param)


def _include_usage(options: StreamOptions | None, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    for name in ("include_obfuscation", "continuous_usage_stats"):
        if getattr(options, name):
            raise UnsupportedParameter(
                f"stream_options.{name} is not supported", param=f"stream_options.{name}"
            )
    return bool(options.include_usage)


def _stops(stop: str | list[str] | None) -> tuple[StopString, ...]:
    if stop is None:
        return ()
    texts = [stop] if isinstance(stop, str) else stop
    if len(texts) > MAX_STOPS:
        raise InvalidRequest(f"stop may have at most {MAX_STOPS} strings, got {len(texts)}", param="stop")
    for text in texts:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a stop string must have between 1 and {MAX_STOP_CHARS} characters, got {len(text)}",
                param="stop",
            )
        _text("stop", text)
    return tuple(StopString.of(text) for text in texts)


def _messages(messages: list[Message]) -> list[dict[str, Any]]:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must have between 1 and {MAX_MESSAGES} entries, got {len(messages)}", param="messages"
        )
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, where: str) -> dict[str, Any]:
    role = _ROLES.get(message.role)
    if role is None:
        if message.role in _UNSUPPORTED_ROLES:
            raise UnsupportedParameter(f"the role {message.role} is not supported", param=f"{where}.role")
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {_shown(message.role)}",
            param=f"{where}.role",
        )
    _refuse_unsupported(message, MESSAGE_NEUTRAL, f"{where}.")
    result: dict[str, Any] = {"role": role, "content": _content(message.content, f"{where}.content")}
    if message.name is not None:
        result["name"] = _text(f"{where}.name", message.name)
    return result


def _content(content: str | list[ContentPart] | None, where: str) -> str:
    if isinstance(content, str):
        return _text(where, content)
    if not content:
        raise InvalidRequest(f"{where} must be text or a list of text parts", param=where)
    texts = []
    for index, part in enumerate(content):
        if part.type != "text":
            raise UnsupportedParameter(
                f"{where}[{index}] is of type {_shown(part.type)}; only text is supported",
                param=f"{where}[{index}].type",
            )
        if part.text is UNSET:
            raise InvalidRequest(f"{where}[{index}] has no text", param=f"{where}[{index}].text")
        texts.append(_text(f"{where}[{index}].text", part.text))
    return "\n".join(texts)


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str] | list[list[int]]:
    if isinstance(prompt, str):
        return _texts([prompt])
    if not prompt:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    kinds = {type(entry) for entry in prompt}
    if kinds == {str}:
        return _texts(cast(list[str], prompt))
    if kinds == {int}:
        return [cast(list[int], prompt)]
    if kinds == {list}:
        if not all(prompt):
            raise InvalidRequest("prompt must not hold an empty list of tokens", param="prompt")
        return cast(list[list[int]], prompt)
    raise InvalidRequest("prompt must be all text, all tokens or all lists of tokens", param="prompt")


def _texts(prompts: list[str]) -> list[str]:
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest("prompt must not be empty", param="prompt")
        _text("prompt", prompt)
    return prompts


def _text(param: str, text: str) -> str:
    """Refuse NUL: no tokenizer of a chat model has a use for it, and it ends strings elsewhere."""
    if "\0" in text:
        raise InvalidRequest(f"{param} must not contain a NUL character", param=param)
    return text


def _refuse_unsupported(fields: Struct, neutral: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    for name, values in neutral.items():
        value = getattr(fields, name)
        if value is UNSET or value is None or value in values:
            continue
        raise UnsupportedParameter(
            f"{where}{name} is not supported, except as {_neutral_words(values)}", param=f"{where}{name}"
        )


def _neutral_words(values: tuple[Any, ...]) -> str:
    return " or ".join(["null", *(msgspec.json.encode(value).decode() for value in values)])


def _shown(text: str) -> str:
    """A client's own text in a message to it, at most a few words of it."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
