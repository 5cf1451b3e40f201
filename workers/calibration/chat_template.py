"""A model's chat template: conversations to the text that the model was taught on.

It is a program that came with the model, so it is run by Jinja's sandbox, and in the process that runs its tokenizer, which has
limits of memory and time. It sees what transformers' `apply_chat_template` shows it, without tools, documents and a prompt for
an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from counterweight.workers.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""role and content, and what else a data set has."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """source: Jinja's. specials: bos_token and others -> the text of the token."""

    source: str
    specials: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """For the process that renders it."""
        return json.dumps(asdict(self)).encode()


def is_conversation(row: object) -> bool:
    """Whether a data set's value is a list of messages."""
    return (
        isinstance(row, Sequence)
        and not isinstance(row, str)
        and len(row) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in row)
    )


def without_template(messages: Sequence[Message], where: str, reason: str = "") -> str:
    """What renders a conversation where there is no template: RequestError, naming where it stands. reason: why the model's
    cannot be read."""
    lacks = f"its chat template cannot be read: {reason}" if reason else "the model has no chat template"
    raise RequestError(f"{where} holds messages, and {lacks}: expected text")


def compiled(data: bytes) -> tuple[Template, Mapping[str, str]]:
    """What `to_bytes` wrote, ready to run. jinja2's errors for what is no template.

    The environment is that of transformers 5.23 (`utils/chat_template_utils.py`), its bars against ways out of the sandbox
    included: a `dict` and a `namespace` without attributes of Python's own.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said; here it is text like any other."""

        tags = {"generation"}  # noqa: RUF012  as jinja2 has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Guarded(Namespace):
        """jinja2's namespace, whose attributes are names of a template's own."""

        def __init__(*arguments: Any, **named: Any) -> None:
            self, *rest = arguments
            values = dict(*rest, **named)
            for name in values:
                check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    class Mappings:
        """`dict`, called."""

        def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
            return dict(*arguments, **named)

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"namespace: {name!r}: expected a name that does not begin with _")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    asked = json.loads(data)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json  # jinja2's own escapes for HTML
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: DATE,
        "dict": Mappings(),
        "namespace": Guarded,
    }
    return environment.from_string(asked["source"]), asked["specials"]


DATE = "26 Jul 2024"
"""What a template that asks for today's date is told: tokens must not depend on the day. It is Llama 3's own default."""


def _json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def rendered(template: Template, specials: Mapping[str, str], messages: Sequence[Message]) -> str:
    """The conversation as text. jinja2's errors, and whatever else a template does."""
    return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=False, **specials)
