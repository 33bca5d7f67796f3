"""Chat templates: Hugging Face's Jinja templates, rendered in a sandbox with the functions that they expect.

Contract: huggingface/transformers docs/source/en/chat_templating.md and src/transformers/utils/chat_template_utils.py.
A template comes with the model and is not trusted: it cannot reach Python objects, change its inputs or load files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tersor.errors import ModelError

Message = Mapping[str, Any]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Returns the content's nodes."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(template: str, messages: Sequence[Message], special_tokens: Mapping[str, str], add_generation_prompt: bool = True) -> str:
    """Returns the text of the conversation, ready for the assistant's turn.

    messages: dicts with `role` and `content`; special_tokens: bos_token, eos_token, ... as text.
    Raises ModelError for malformed messages, a broken template, and what the template itself refuses.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ModelError(f"chat message {i} is {message!r}; need a mapping with role and content")
    plain = json.loads(json.dumps([dict(m) for m in messages]))  # the template sees nothing but JSON types
    try:
        return (
            _environment()
            .from_string(template)
            .render(messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special_tokens)
        )
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"chat template: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """Returns the sandbox with what Hugging Face's templates may call."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Returns value as JSON; unlike Jinja's own filter it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    """Ends rendering with the template's own complaint."""
    raise jinja2.TemplateError(message)
