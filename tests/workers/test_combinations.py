"""Every combination of options that the schema allows works on a tiny model, or is refused with a reason.

Combinations are drawn, seeded, from all values of all options, and each value is met in several of them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.artifact.load import load_model
from counterweight.workers.errors import RequestError
from tests.inprocess import run_job
from tests.models import checkpoint

CHOICES: dict[str, list[Any]] = {
    "family": ["llama", "qwen2", "phi3", "gemma2", "mixtral", "gpt_oss", "deepseek_v3-full-queries"],
    "bits": [2, 3, 4, 8],
    "group_size": [None, 32],
    "symmetric": [True, False],
    "quantizer": [
        {"kind": "rtn"},
        {"kind": "rtn", "scale": {"kind": "mse"}},
        {"kind": "gptq"},
        {"kind": "gptq", "target": "regressed"},
        {"kind": "gptq", "target": "mixed", "mix": 0.3},
    ],
    "activations": [
        None,
        {"bits": 8},
        {"bits": 6, "clip": "search"},
        {"bits": 4, "clip": 0.9},
        {"bits": 4, "group_size": 32},
    ],
    "transforms": [
        [],
        [{"kind": "rotation"}],
        [{"kind": "rotation", "residual": False, "online_output": True}],
        [{"kind": "smoothing"}],
        [{"kind": "rotation", "online_down": False}, {"kind": "smoothing", "strength": 0.5}],
    ],
    "compensation": [
        {"kind": "none"},
        {"kind": "svd", "rank": {"count": 4}},
        {"kind": "svd", "rank": {"energy": 0.5}, "whitening": "magnitude"},
        {"kind": "svd", "rank": {"count": 4}, "anticipation": 0.5},
        {"kind": "aser", "rank": {"count": 8}, "outliers": 4},
        {"kind": "aser", "rank": {"fraction": 0.2}, "outliers": 0},
        {"kind": "lrc", "rank": {"budget_bits": 3.0}},
        {"kind": "lrc", "rank": {"count": 4}, "factor_bits": 8},
        {"kind": "lrc", "rank": {"count": 6}, "factor_bits": 4, "refit": "none"},
        {"kind": "lrc", "rank": {"count": 4}, "iterations": 2, "refit": "weight"},
    ],
    "tuning": [None, None, None, {"epochs": 1}, {"epochs": 1, "transforms": True, "block": 4}],
    "residual": [None, {"bits": 4}, {"selection": "static", "channels_per_chunk": 512}],
    "propagate": ["original", "compressed"],
}

REASONS = (
    "residual stream cannot be rotated",  # Gemma
    "expected weights.quantizer.kind rtn",  # tuning
    "expected a compensation of finished codes",  # tuning
    "expected plain",  # a target that would be the weight itself
    "training starts on the whole range",  # tuning with a search for scales
    "which does not look at the input",  # anticipation
)


def combinations(count: int) -> list[dict[str, Any]]:
    """Each option's values in turn, in an order of their own: every value is met count / len(values) times."""
    source = random.Random(0)
    columns = {}
    for name, values in CHOICES.items():
        repeated = (values * (count // len(values) + 1))[:count]
        source.shuffle(repeated)
        columns[name] = repeated
    return [{name: columns[name][index] for name in CHOICES} for index in range(count)]


@pytest.mark.parametrize("choice", combinations(40), ids=str)
def test_a_combination_works_or_says_why_not(choice: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    checkpoint(choice["family"], model, num_hidden_layers=1)
    recipe = {
        "weights": {name: choice[name] for name in ("bits", "group_size", "symmetric", "quantizer")},
        **{name: choice[name] for name in ("activations", "transforms", "compensation", "tuning", "residual")},
    }
    try:
        published = run_job(
            model, tmp_path / "job", recipe, calibration={"propagate": choice["propagate"]}, validation={}
        )
    except RequestError as error:
        if any(reason in str(error) for reason in REASONS):
            pytest.skip(f"refused: {error}")
        raise
    document = published.document
    assert document.compensated is not None
    assert document.compensated.perplexity > 0
    _, reopened = open_artifact(published.uri)
    assert reopened.id == document.id
    assert load_model(published.uri) is not None
