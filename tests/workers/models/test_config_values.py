"""Values that a config.json may not have: refused by kind of field, whatever it is called, in bounded time."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from counterweight.pipeline.model_source import open_model
from counterweight.workers.errors import CheckpointError, CounterweightError
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.config_values import check_layers, check_values
from tests.models import BASE, checkpoint
from tests.patience import cpu_seconds

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"num_labels": 10**7}, r"num_labels: 10000000: expected an integer of at most 1048576"),
    "a count inside": (
        {"vision_config": {"depth": {"n_things": 10**9}}},
        r"vision_config\.depth\.n_things: 1000000000",
    ),
    "a count in a list": ({"parts": [{"mtp_layers": 10**8}]}, r"parts\.mtp_layers"),
    "a position": ({"max_position_embeddings": 10**400}, r"max_position_embeddings: 1000"),
    "no theta": ({"rope_theta": 0}, r"rope_theta: 0: expected a positive number"),
    "a negative theta": (
        {"rope_parameters": {"rope_theta": -1e4}},
        r"rope_parameters\.rope_theta: -10000\.0: expected a positive",
    ),
    "a negative epsilon": ({"rms_norm_eps": -1}, r"rms_norm_eps: -1: expected a number from 0 to 1"),
    "deep": ({"a": json.loads('{"a":' * 900 + "1" + "}" * 900)}, "nested more than 32 deep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_no_model_has_is_refused_by_its_place(case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(CheckpointError, match=said) as caught:
        check_values({**BASE, **changes})
    assert len(str(caught.value)) < 300


def numbers(config: PreTrainedConfig) -> list[str]:
    """Fields that hold a whole number."""
    fields = {**PreTrainedConfig().to_dict(), **config.to_dict()}
    found = [name for name, value in fields.items() if isinstance(value, int) and not isinstance(value, bool)]
    return sorted({*found, "num_labels", "num_return_sequences"})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("value", [10**7, -1, 10**30])
def test_no_number_in_any_field_costs_more_than_seconds(family: str, value: int) -> None:
    base = {**BASE, "model_type": family, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}

    def build(field: str) -> None:
        with contextlib.suppress(CounterweightError):
            BlockBuilder({**base, field: value})

    for field in numbers(CONFIG_MAPPING[family]()):
        assert cpu_seconds(partial(build, field), below=2.0) < 2.0, field


def test_more_layers_than_the_headers_have_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path, num_hidden_layers=2)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1024'))

    def never(_: object) -> Any:
        raise AssertionError("built")

    with pytest.raises(CheckpointError, match="num_hidden_layers: 1024: the checkpoint has tensors of 2 layers"):
        open_model(tmp_path.as_uri(), never)


def test_layers_are_counted_wherever_the_model_lies() -> None:
    names = [f"language_model.model.layers.{index}.mlp.up_proj.weight" for index in range(3)]
    check_layers({"text_config": {"num_hidden_layers": 3}}, names)
    with pytest.raises(CheckpointError, match="num_hidden_layers: 4"):
        check_layers({"text_config": {"num_hidden_layers": 4}}, names)
