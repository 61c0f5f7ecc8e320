"""Models' chat templates: the dialect, what a client may make of them, and what happens when they fail."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from disagg.errors import ConfigError, InvalidRequest
from disagg.frontend import chat_template
from disagg.frontend.chat_template import ChatTemplate

HI = [{"role": "user", "content": "hi"}]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = """
{%- if tools is not none %}
    never
{%- endif %}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {%- if message['role'] not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('Only known roles') }}
    {%- endif %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- generation %}{{ bos_token }}[{{ ns.count }}] {{ message.content | trim }}{% endgeneration %}
    {{ message | tojson }}
{%- endfor %}
{{ strftime_now('%Y') | length }} {{ enable_thinking is defined and enable_thinking }}
"""
CHATS: list[list[dict[str, Any]]] = [
    HI,
    [{"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": " é世 <b> "}, *HI],
    HI * 8,
]


@pytest.mark.parametrize("source", [SMOLLM2, BLOCKS], ids=["smollm2", "blocks"])
@pytest.mark.parametrize("messages", CHATS, ids=["one", "many", "long"])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": True}])
def test_renders_as_transformers_does(
    source: str, messages: list[dict[str, Any]], arguments: dict[str, Any]
) -> None:
    """Its dialect is what templates are written and tested in."""
    expected, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>", **arguments
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages, arguments) == expected[0]


def test_a_template_that_refuses_is_the_clients_error_with_its_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render(HI)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 5 }}",
        "{{ range(10**9) | list }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include '/etc/passwd' %}",
        "{{ none.x.y }}",
        "{{ '%s' % (1, 2) }}",
    ],
)
def test_a_template_that_fails_is_the_clients_error_without_a_trace(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render(HI)
    assert caught.value.param == "messages"
    assert "Traceback" not in caught.value.message


def test_a_template_cannot_write_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_GROWTH_CHARS", 1000)
    source = "{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(InvalidRequest, match="characters"):
        ChatTemplate(source, {}).render(HI)


def test_a_template_cannot_run_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_TIMEOUT_S", 0.0)
    with pytest.raises(InvalidRequest, match="seconds"):
        ChatTemplate("{% for i in range(9999) %}{{ i }}{% endfor %}", {}).render(HI)


def test_a_client_cannot_replace_messages_or_tokens() -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}{{ mood }}", {"bos_token": "<s>"})
    forged = {"messages": [{"content": "forged"}], "bos_token": "forged", "mood": "!"}
    assert template.render(HI, forged) == "<s>hi!"


def test_messages_are_data_and_never_template() -> None:
    messages = [{"role": "user", "content": "{{ 7 * 7 }} {% raw %}"}]
    assert "{{ 7 * 7 }} {% raw %}" in ChatTemplate(SMOLLM2, {}).render(messages)


def test_a_damaged_template_ends_the_start() -> None:
    with pytest.raises(ConfigError, match="not a valid template"):
        ChatTemplate("{% for %}", {})


def write_config(folder: Path, **fields: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    write_config(tmp_path, eos_token={"content": "</s>", "lstrip": False})
    assert ChatTemplate.from_folder(tmp_path) is None

    write_config(tmp_path, chat_template="config {{ eos_token }}", eos_token={"content": "</s>"})
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None
    assert found.render(HI) == "config </s>"

    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    write_config(tmp_path, chat_template=named)
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None
    assert found.render(HI) == "named"

    (tmp_path / "chat_template.jinja").write_text("file")
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None
    assert found.render(HI) == "file"

    (tmp_path / "mine.jinja").write_text("mine")
    found = ChatTemplate.from_folder(tmp_path, tmp_path / "mine.jinja")
    assert found is not None
    assert found.render(HI) == "mine"
    with pytest.raises(ConfigError, match=r"other\.jinja"):
        ChatTemplate.from_folder(tmp_path, tmp_path / "other.jinja")
