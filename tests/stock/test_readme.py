"""The README's Python, as it stands there, in a directory that holds a pulled artifact and its validation text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight import load_model
from tests.inprocess import local, run_job
from tests.models import checkpoint, token_ids

ROOT = Path(__file__).parent.parent.parent
SVD = {"kind": "svd", "rank": {"count": 8}}
RECIPES: dict[str, dict[str, Any]] = {
    "branches": {"weights": {"bits": 3, "group_size": 32}, "compensation": SVD},
    "stores": {"weights": {"bits": 3}, "compensation": SVD, "residual": {"channels_per_chunk": 100}},
}


def block(word: str) -> str:
    """The block of Python that has this word."""
    (found,) = [
        text for text in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if word in text
    ]
    return str(found)


def run(word: str, place: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables that the block leaves."""
    checkpoint("llama", place / "model", torch.bfloat16)
    artifact = local(run_job(place / "model", place / "output", recipe, validation={}))
    shutil.copytree(artifact, place / "artifact")
    shutil.copy(place / "output" / "text.txt", place / "validation.txt")
    monkeypatch.chdir(place)
    variables: dict[str, Any] = {}
    exec(block(word), variables)
    return variables


def test_there_is_no_other() -> None:
    blocks = re.findall(r"```python\n", (ROOT / "README.md").read_text())
    assert len(blocks) == len({block("PeftModel"), block("load_model")})


@torch.no_grad()
def test_stock_loading_gives_our_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run("PeftModel", tmp_path, RECIPES["branches"], monkeypatch)["model"]
    uri, ids = (tmp_path / "artifact").as_uri(), token_ids(2, 24)
    found, ours = model.float()(ids).logits, load_model(uri, dtype=torch.float32)(ids).logits
    without = load_model(uri, dtype=torch.float32, compensated=False)(ids).logits
    torch.testing.assert_close(found, ours, rtol=0, atol=2e-2 * float(ours.abs().max()))  # weights in bfloat16
    assert (found - ours).norm() < 0.2 * (without - ours).norm()


def test_a_reports_figure_is_had_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run("load_model", tmp_path, RECIPES["stores"], monkeypatch)["report"]
    found, reported = (float(word) for word in capsys.readouterr().out.split()[-2:])
    assert reported == report["compensated"]["perplexity"] != report["compensated_prefill"]["perplexity"]
    assert found == pytest.approx(reported, rel=1e-6)
