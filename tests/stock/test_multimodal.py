"""Artifacts of multimodal models under stock transformers and PEFT: text as we validated it, images as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from counterweight import load_model
from tests.inprocess import local, run_job
from tests.models import checkpoint, token_ids

RTN = {"quantizer": {"kind": "rtn"}}
W4 = {"bits": 4, "group_size": 32, **RTN}
MIXED = {
    "weights": W4,
    "overrides": [{"match": "*.mlp.*down_proj", "weights": {"bits": 8, **RTN}}],
    "keep": ["lm_head", "*.layers.1.self_attn.o_proj"],
    "compensation": {"kind": "svd", "rank": {"count": 4}},
}
"""Two schemes, a layer that is kept, and a branch for each of the others."""

GPTQ = {"weights": {"bits": 4, "group_size": 32}, "compensation": {"kind": "none"}}
PLAIN_ROTATION = [{"kind": "rotation", "heads": False, "online_down": False}]


def stock(directory: Path, auto: Any = AutoModelForImageTextToText) -> PreTrainedModel:
    """Loaded with nothing missing, nothing left over."""
    model, found = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values())
    loaded: PreTrainedModel = model
    return loaded


@torch.no_grad()
def logits(model: Any, **given: Tensor) -> Tensor:
    found: Tensor = model(**given).logits
    return found


@pytest.mark.parametrize("case", ["gemma3", "mistral3", "qwen3_5"])
def test_layers_and_branches_of_several_schemes(case: str, tmp_path: Path) -> None:
    original = checkpoint(case, tmp_path / "model", torch.bfloat16)
    published = run_job(tmp_path / "model", tmp_path / "job", MIXED)
    ids = token_ids(2, 32)
    model = stock(local(published))
    codes = logits(load_model(published.uri, dtype=torch.float32, compensated=False), input_ids=ids)
    torch.testing.assert_close(logits(model, input_ids=ids), codes, rtol=0, atol=1e-5)
    if case != "mistral3":  # of which AutoModelForCausalLM makes nothing
        torch.testing.assert_close(
            logits(stock(local(published), AutoModelForCausalLM), input_ids=ids), codes, rtol=0, atol=1e-5
        )
    kept = {name: tensor for name, tensor in model.state_dict().items() if "vis" in name or "projector" in name}
    assert kept
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in kept.items())
    compensated = logits(load_model(published.uri, dtype=torch.float32), input_ids=ids)
    assert (compensated - codes).abs().max() > 1e-2
    adapted = PeftModel.from_pretrained(model, str(local(published) / "compensation"))
    torch.testing.assert_close(logits(adapted, input_ids=ids), compensated, rtol=0, atol=1e-4)


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_experts(auto: Any, tmp_path: Path) -> None:
    checkpoint("qwen3_5_moe", tmp_path / "model", torch.bfloat16)
    published = run_job(tmp_path / "model", tmp_path / "job", GPTQ)
    ids = token_ids(2, 32)
    expected = logits(load_model(published.uri, dtype=torch.float32), input_ids=ids)
    torch.testing.assert_close(logits(stock(local(published), auto), input_ids=ids), expected, rtol=0, atol=1e-5)


def test_what_transformers_has_no_words_for_is_refused(tmp_path: Path) -> None:
    checkpoint("llama4", tmp_path / "model", torch.bfloat16)
    published = run_job(tmp_path / "model", tmp_path / "job", GPTQ)
    with pytest.raises(ValueError, match="counterweight_llama4"):
        stock(local(published))


def test_images_enter_a_rotated_stream_rotated(tmp_path: Path) -> None:
    original = checkpoint("mistral3", tmp_path / "model", torch.bfloat16)
    recipe = {"weights": {"bits": 8, **RTN}, "compensation": {"kind": "none"}, "transforms": PLAIN_ROTATION}
    model = stock(local(run_job(tmp_path / "model", tmp_path / "job", recipe)))
    ids = token_ids(1, 16).clamp(max=100)
    ids[0, [3, 5]] = original.config.image_token_index
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "image_sizes": torch.tensor([[28, 28], [28, 28]])}
    expected = logits(original, pixel_values=images, **given)

    def error(found: Tensor) -> float:
        return float((found - expected)[0, 3:].abs().median() / expected.std())

    assert error(logits(original, pixel_values=0 * images, **given)) > 0.2  # images matter
    assert error(logits(model, pixel_values=images, **given)) < 0.05
    projector = "model.multi_modal_projector.linear_2.weight"
    model.get_parameter(projector).data.copy_(original.get_parameter(projector))
    assert error(logits(model, pixel_values=images, **given)) > 0.2  # and so does the projector's rotation
