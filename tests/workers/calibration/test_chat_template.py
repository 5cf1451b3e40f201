"""Conversations of a data set: as transformers renders them, in the process of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from counterweight.pipeline.model_files import tokenizer_of
from counterweight.workers.calibration.chat_template import ChatTemplate, is_conversation
from counterweight.workers.calibration.encoder import Encoder
from counterweight.workers.calibration.source import DatasetSource
from counterweight.workers.calibration.tokens import token_set
from counterweight.workers.calibration.windows import TokenizerFiles
from counterweight.workers.errors import RequestError
from counterweight.workers.storage import open_store
from tests.models import write_tokenizer

TALK = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 <w3>"},
    {"role": "assistant", "content": "w4\nw5"},
]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "turns": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}",
    "state": (
        "{%- set ns = namespace(first=true) -%}{%- for m in messages %}\n{% if not ns.first %} {% endif %}"
        "{% set ns.first = false %}{{ m.content | trim }}{% if m.role == 'user' %}{% continue %}{% endif %}!{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m | tojson }}{% endif %}{% endfor %}"
    ),
    "tools": "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.content | upper }}{% endfor %}",
}


Start = Callable[[str], Encoder]


@pytest.fixture
def running(tmp_path: Path) -> Start:
    """A tokenizer's process with a template."""
    write_tokenizer(tmp_path)
    data = (tmp_path / "tokenizer.json").read_bytes()
    return lambda template: Encoder(data, ChatTemplate(template, SPECIALS))


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_what_transformers_renders(name: str, running: Start) -> None:
    (expected,), _ = render_jinja_template(conversations=[TALK], chat_template=TEMPLATES[name], **SPECIALS)
    with running(TEMPLATES[name]) as encoder:
        assert encoder.text_of(TALK, "row") == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% for m in messages %}", "unexpected end of template|Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace.__init__.__globals__ }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "does not begin with _"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
    ids=["refuses", "syntax", "classes", "globals", "underscores", "undefined", "endless"],
)
def test_a_template_that_fails_or_wants_out_is_refused(template: str, said: str, running: Start) -> None:
    with (
        running(template) as encoder,
        pytest.raises(RequestError, match=f"^row 3: the model's chat template: .*({said})"),
    ):
        encoder.text_of(TALK, "row 3")


@pytest.mark.parametrize(
    ("row", "found"), [(TALK, True), ([], False), ("text", False), ([{"content": "x"}], False), (["role"], False)]
)
def test_what_a_conversation_is(row: Any, found: bool) -> None:
    assert is_conversation(row) is found


def data_set(folder: Path, rows: Sequence[object]) -> DatasetSource:
    path = folder / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return DatasetSource(path=str(path), column="messages")


def drawn(source: DatasetSource, tokenizer: TokenizerFiles | None) -> list[int]:
    found = token_set(source, tokenizer, length=5, sequences=4, sampling="consecutive", seed=0, field="field")
    return [int(id) for id in found.ids.flatten()]


def test_a_data_set_of_conversations_is_calibrated_on(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w7", "eos_token": {"content": "w8"}}))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}{{ eos_token }} "
    )
    talks = [[{"role": "user", "content": f"w{index} w9"}] for index in range(10, 20)]
    ids = drawn(data_set(tmp_path, talks), tokenizer_of(open_store(tmp_path.as_uri())))
    assert ids == [token for index in range(10, 15) for token in (7, index, 9, 8)]


def test_without_a_template_the_row_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = tokenizer_of(open_store(tmp_path.as_uri()))
    assert tokenizer is not None
    assert tokenizer.chat is None
    with pytest.raises(
        RequestError, match=r"column: 'messages': row 0 of dataset .* holds messages, and the model has no"
    ):
        drawn(data_set(tmp_path, [TALK]), tokenizer)


def test_one_that_cannot_be_read_is_told_when_it_is_needed(tmp_path: Path) -> None:
    """And not before: texts need none."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text('"a text"')
    tokenizer = tokenizer_of(open_store(tmp_path.as_uri()))
    assert tokenizer is not None
    said = r"holds messages, and its chat template cannot be read: chat_template\.json: a JSON str, expected an object"
    with pytest.raises(RequestError, match=said):
        drawn(data_set(tmp_path, [TALK]), tokenizer)


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({"chat_template": "a"}, "a"),
        ({"chat_template": [{"name": "rag", "template": "b"}, {"name": "default", "template": "c"}]}, "c"),
        ({"chat_template": [{"name": "rag", "template": "b"}]}, None),
        ({}, None),
    ],
)
def test_where_a_template_is_found(config: dict[str, Any], source: str | None, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = tokenizer_of(open_store(tmp_path.as_uri()))
    assert found is not None
    assert (None if found.chat is None else found.chat.source) == source
