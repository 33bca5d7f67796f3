"""Chat templates against transformers' apply_chat_template."""

from __future__ import annotations

from datetime import datetime

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tersor.engine.chat import render_chat
from tersor.errors import ModelError
from tiny import tokenizer_json

# Of the forms that models in use have: ChatML with a default system turn, headers with BOS and trimmed content,
# alternation enforced by exceptions, and the rarer parts of the language.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
HEADERS = """{{- bos_token }}
{%- set ns = namespace(date=strftime_now("%Y")) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nYear: " ~ ns.date ~ "\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
ALTERNATING = """{{ bos_token }}{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}
{% endif %}
    {% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content + eos_token }}{% endif %}
{% endfor %}"""
RARE = """{%- for m in messages -%}
{%- if m.role == 'system' %}{% continue %}{% endif -%}
{{ m | tojson }}|{{ {'b': '<é>', 'a': [1, none, true]} | tojson(indent=2) }}|{{ dict(a=1) }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}
{%- if loop.index > 2 %}{% break %}{% endif -%}
{%- endfor -%}{{ tools is none }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"""
CONVERSATIONS = [
    [{"role": "user", "content": "Hello <b>&</b> \u4f60\u597d"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b 'c' \"d\""}, {"role": "user", "content": "e"}],
]
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "alternating": ALTERNATING, "rare": RARE}
CASES = [
    pytest.param(template, messages, id=f"{name}-{messages[0]['role']}-{len(messages)}")
    for name, template in TEMPLATES.items()
    for messages in CONVERSATIONS
    if not (template is ALTERNATING and messages[0]["role"] == "system")  # which it refuses; see below
]


@pytest.mark.parametrize(("template", "messages"), CASES)
@pytest.mark.parametrize("prompt", [True, False])
def test_text_is_that_of_transformers(template: str, messages: list[dict[str, str]], prompt: bool) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json()), chat_template=template, **SPECIAL)
    want = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(template, messages, SPECIAL, prompt) == want


def test_the_year_is_now() -> None:
    assert f"Year: {datetime.now().year}\n" in render_chat(HEADERS, CONVERSATIONS[0], SPECIAL)


def test_what_the_template_refuses_is_told() -> None:
    with pytest.raises(ModelError, match="chat template: roles must alternate"):
        render_chat(ALTERNATING, CONVERSATIONS[1], SPECIAL)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",  # the inputs cannot be changed
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% include '/etc/hostname' %}",
        "{{ messages[9].role }}",
        "{{ 1 // 0 }}",
        "{% for %}",
        "{{ range(999999999) | list }}",
    ],
)
def test_hostile_and_broken_templates_are_refused(template: str) -> None:
    with pytest.raises(ModelError, match=r"^chat template: "):
        render_chat(template, CONVERSATIONS[0], {})


@pytest.mark.parametrize("message", ["hello", {"content": "x"}, {"role": 3, "content": "x"}, {"role": "user"}], ids=str)
def test_malformed_messages_are_refused(message: object) -> None:
    with pytest.raises(ModelError, match=r"chat message 0 is .*need a mapping with role and content"):
        render_chat(CHATML, [message], {})  # type: ignore[list-item]
