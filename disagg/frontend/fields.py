"""The JSON fields that a client may send: OpenAI's, and those of vLLM's that we have.

A field that OpenAI has and we do not is declared here too: its neutral values pass, any other is
refused by name. Everything else is unknown, and refused as OpenAI does.
"""

from typing import Any, Final

from msgspec import UNSET, Struct, UnsetType

Unsupported = Any | UnsetType
"""A field whose neutral values pass; they are in the tables below."""


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against traffic analysis is never sent; a client that asks for it is refused."""
    continuous_usage_stats: bool | None = None


class ContentPart(Struct):
    """A part of a message. Only text is supported, so other kinds are not read further."""

    type: str
    text: str | UnsetType = UNSET


class Message(Struct, forbid_unknown_fields=True):
    """One message of a chat."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: Unsupported = UNSET
    annotations: Unsupported = UNSET
    audio: Unsupported = UNSET
    tool_calls: Unsupported = UNSET
    tool_call_id: Unsupported = UNSET
    function_call: Unsupported = UNSET
    reasoning: Unsupported = UNSET
    reasoning_content: Unsupported = UNSET


class SharedFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    logit_bias: Unsupported = UNSET
    presence_penalty: Unsupported = UNSET
    frequency_penalty: Unsupported = UNSET
    repetition_penalty: Unsupported = UNSET
    length_penalty: Unsupported = UNSET
    logprobs: Unsupported = UNSET
    prompt_logprobs: Unsupported = UNSET
    best_of: Unsupported = UNSET
    use_beam_search: Unsupported = UNSET
    min_tokens: Unsupported = UNSET
    bad_words: Unsupported = UNSET
    allowed_token_ids: Unsupported = UNSET
    skip_special_tokens: Unsupported = UNSET
    spaces_between_special_tokens: Unsupported = UNSET
    include_stop_str_in_output: Unsupported = UNSET
    truncate_prompt_tokens: Unsupported = UNSET
    structured_outputs: Unsupported = UNSET
    priority: Unsupported = UNSET
    service_tier: Unsupported = UNSET
    response_format: Unsupported = UNSET


class ChatFields(SharedFields, kw_only=True, forbid_unknown_fields=True):
    """Body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """A hint for routing; we route by the prompt itself."""
    prompt_cache_retention: Unsupported = UNSET
    prompt_cache_options: Unsupported = UNSET
    tools: Unsupported = UNSET
    tool_choice: Unsupported = UNSET
    parallel_tool_calls: Unsupported = UNSET
    functions: Unsupported = UNSET
    function_call: Unsupported = UNSET
    top_logprobs: Unsupported = UNSET
    audio: Unsupported = UNSET
    modalities: Unsupported = UNSET
    prediction: Unsupported = UNSET
    reasoning_effort: Unsupported = UNSET
    verbosity: Unsupported = UNSET
    web_search_options: Unsupported = UNSET
    moderation: Unsupported = UNSET
    store: Unsupported = UNSET
    add_generation_prompt: Unsupported = UNSET
    continue_final_message: Unsupported = UNSET
    chat_template: Unsupported = UNSET
    documents: Unsupported = UNSET
    add_special_tokens: Unsupported = UNSET


class CompletionFields(SharedFields, kw_only=True, forbid_unknown_fields=True):
    """Body of `/v1/completions`."""

    prompt: str | list[str | int | list[int]]
    echo: Unsupported = UNSET
    suffix: Unsupported = UNSET
    add_special_tokens: Unsupported = UNSET


SHARED_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "priority": (0,),
    "service_tier": ("auto", "default"),
    "response_format": ({"type": "text"},),
}
"""Values that ask for nothing, besides null."""
CHAT_NEUTRAL: Final = SHARED_NEUTRAL | {
    "logprobs": (False,),
    "best_of": (1,),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "prompt_cache_options": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "top_logprobs": (0,),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "store": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "add_special_tokens": (False,),
}
COMPLETION_NEUTRAL: Final = SHARED_NEUTRAL | {
    "logprobs": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "add_special_tokens": (True,),
}
MESSAGE_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
}
