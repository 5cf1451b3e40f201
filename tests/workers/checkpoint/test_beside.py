"""Files beside a model's weights: each is carried over, or named with the reason why it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterweight.pipeline.model_files import check_files
from counterweight.workers.checkpoint.beside import MAX_FILES, SideFile, beside
from counterweight.workers.errors import RequestError
from counterweight.workers.storage import open_store
from tests.models import checkpoint

CARRIED = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
    ),
    *("merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "qwen.tiktoken", "LICENSE", "LICENSE.txt", "NOTICE.md"),
    *("USE_POLICY.md", "license", "additional_chat_templates/tool_use.jinja"),
)
LEFT_OUT = {
    "README.md": "says what the source is",
    "modeling_own.py": "code is never carried over",
    "setup.sh": "code is never carried over",
    "pytorch_model.bin": "weights",
    "consolidated.safetensors": "weights",
    "pytorch_model.bin.index.json": "weights, or an index",
    "ledger.json": "a name of the artifact's own files",
    "artifact.json": "a name of the artifact's own files",
    "logo.png": "of no kind",
    ".gitattributes": "of no kind",
    "odd\u00e9.json": "of no kind",
}


def entries(root: Path, *shards: str) -> dict[str, SideFile]:
    return {entry.name: entry for entry in beside(open_store(root.as_uri()), shards)}


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def test_each_file_is_carried_or_named_with_a_reason(tmp_path: Path) -> None:
    put(tmp_path, *CARRIED, *LEFT_OUT, "config.json", "model.safetensors.index.json", "model-00001.safetensors")
    put(tmp_path, "report/report.json", "original/params.json", "original/tokenizer.model")
    found = entries(tmp_path, "model-00001.safetensors")
    assert {name for name, entry in found.items() if entry.fate == "carried"} == set(CARRIED)
    assert all(not found[name].reason for name in CARRIED)
    for name, reason in LEFT_OUT.items():
        assert found[name].fate == "left out"
        assert found[name].reason.startswith(reason)
    for folder in ("report/", "original/"):  # once, however many files it has
        assert found[folder].reason == "a folder that transformers does not read"
    assert set(found) == {*CARRIED, *LEFT_OUT, "report/", "original/"}


def test_what_are_too_many_are_named(tmp_path: Path) -> None:
    put(tmp_path, "zebra.json")
    put(tmp_path, *(f"a{number:04}.txt" for number in range(MAX_FILES)))
    found = entries(tmp_path)
    assert len(found) == MAX_FILES + 1
    assert found["zebra.json and what follows"].reason == f"behind the first {MAX_FILES} files of the folder"


def test_a_tokenizer_is_carried_whatever_else_is_in_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "tokenizer.json", *(f"a/{number:04}.txt" for number in range(MAX_FILES + 1)))
    found = entries(tmp_path)
    assert found["tokenizer.json"].fate == "carried"
    assert found["a/"].fate == "left out"


def test_a_link_that_leads_out_is_refused_before_anything_begins(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", torch.float32, num_hidden_layers=1)
    (tmp_path / "secret.txt").write_text("s")
    (tmp_path / "model" / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RequestError, match=r"vocab\.txt: a link out of"):
        check_files(open_store((tmp_path / "model").as_uri()))
