"""Code that lies beside a checkpoint: whatever its config asks for, nobody reads, copies or runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from counterweight import load_model
from counterweight.pipeline.model_source import open_model
from counterweight.workers.errors import CheckpointError
from tests.inprocess import RecordedProgress, local, run_job
from tests.models import checkpoint, read_config, token_ids

CODE = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
RTN = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}}, "compensation": {"kind": "none"}}


def booby_trapped(case: str, directory: Path) -> Path:
    """A checkpoint that asks for code which leaves a mark; where that would be."""
    checkpoint(case, directory, torch.bfloat16, num_hidden_layers=1)
    mark = directory.parent / "ran"
    evil = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: pass\n"
    for name in ("evil.py", "__init__.py", "configuration_deepseek.py"):
        (directory / name).write_text(evil)
    config = {**read_config(directory), "auto_map": CODE, "custom_pipelines": {"x": {"impl": "evil.Evil"}}}
    if "text_config" in config:
        config["text_config"]["auto_map"] = CODE
    (directory / "config.json").write_text(json.dumps(config))
    return mark


@pytest.mark.parametrize("case", ["deepseek_v3", "kimi_k2", "minimax_m2", "gemma3"])
def test_a_known_family_is_compressed_without_the_code_that_its_config_asks_for(case: str, tmp_path: Path) -> None:
    mark, progress = booby_trapped(case, tmp_path / "model"), RecordedProgress()
    assert (tmp_path / "model" / "evil.py").exists()
    assert "auto_map" in (tmp_path / "model" / "config.json").read_text()
    published = run_job(tmp_path / "model", tmp_path / "job", RTN, validation={}, progress=progress)
    with torch.no_grad():
        ours = load_model(published.uri, dtype=torch.float32)(token_ids(1, 16)).logits
        # It would have to be trusted, and it is not there.
        stock = AutoModelForCausalLM.from_pretrained(local(published), dtype=torch.float32, trust_remote_code=False)
        torch.testing.assert_close(stock(token_ids(1, 16)).logits, ours, rtol=0, atol=1e-4)
    assert "auto_map" not in (local(published) / "config.json").read_text()
    assert not list((tmp_path / "job").rglob("*.py"))
    assert not mark.exists()
    assert any("auto_map" in note and "never run" in note for note in progress.notes)


def test_code_is_refused_for_a_family_that_nobody_here_knows(tmp_path: Path) -> None:
    mark = booby_trapped("llama", tmp_path / "model")
    config = {**read_config(tmp_path / "model"), "model_type": "evil"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"auto_map: .* needs code from its repository, which is never run"):
        open_model((tmp_path / "model").as_uri())
    assert not mark.exists()


def test_every_config_may_ask_at_any_depth(tmp_path: Path) -> None:
    """In a list too; nothing of it is left, and all else is."""
    checkpoint("llama", tmp_path, torch.bfloat16)
    plain = read_config(tmp_path)
    asking = {**plain, "auto_map": CODE, "parts": [{"auto_map": {"A": "e.E"}, "b": 1}]}
    (tmp_path / "config.json").write_text(json.dumps(asking))
    opened = open_model(tmp_path.as_uri()).checkpoint
    assert opened.asks_for_code
    assert opened.config == {**plain, "parts": [{"b": 1}]}
