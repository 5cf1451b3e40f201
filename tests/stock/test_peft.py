"""The low-rank branches under stock PEFT, on the model that stock transformers has loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from counterweight import load_model
from tests.inprocess import local, run_job
from tests.models import DEEPSEEK, MOE, Case, checkpoint, token_ids

RTN = {"quantizer": {"kind": "rtn"}}
W3 = {"bits": 3, "group_size": 32, **RTN}
SVD = {"kind": "svd", "rank": {"count": 8}}
NONE = {"kind": "none"}

MODELS: Mapping[str, Case] = {
    "llama": Case("llama"),
    "llama-12": Case("llama", {"num_hidden_layers": 12, "hidden_size": 32, "intermediate_size": 32}),
    "qwen2": Case("qwen2"),
    "phi3": Case("phi3"),
    "gemma3_text": Case("gemma3_text", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "mixtral": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": Case("deepseek_v3", DEEPSEEK),
    "qwen3_moe": Case("qwen3_moe", {**MOE, "mlp_only_layers": [1]}),
}

RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "one rank": ("llama", {"compensation": SVD}),
    "a rank for each module": ("llama", {"compensation": {"kind": "svd", "rank": {"energy": 0.5}}}),
    "a share": ("qwen2", {"compensation": {"kind": "svd", "rank": {"fraction": 0.2}}}),
    "some modules": (
        "llama",
        {"compensation": NONE, "overrides": [{"match": "*.1.mlp.down_proj", "compensation": SVD}]},
    ),
    # Block 1's names are ends and beginnings of block 11's: a pattern that is too loose gives it a wrong rank.
    "names that begin alike": (
        "llama-12",
        {
            "compensation": {"kind": "svd", "rank": {"count": 4}},
            "overrides": [{"match": "*.layers.1.*", "compensation": {"kind": "svd", "rank": {"count": 7}}}],
        },
    ),
    "quantized activations": ("llama", {"compensation": SVD, "activations": {"bits": 8}}),
    "kept modules": ("llama", {"compensation": SVD, "keep": ["lm_head", "*.q_proj"]}),
    "fused projections": ("phi3", {"compensation": SVD}),
    "tied": ("gemma3_text", {"compensation": SVD}),
    "attention of a mixture": (
        "mixtral",
        {"compensation": SVD, "overrides": [{"match": "*.experts.*", "compensation": NONE}]},
    ),
    "latent attention": (
        "deepseek_v3",
        {"compensation": SVD, "overrides": [{"match": "*.mlp.*", "compensation": NONE}]},
    ),
    "attention of a mixture with dense blocks": (
        "qwen3_moe",
        {"compensation": SVD, "overrides": [{"match": "*.mlp.*", "compensation": NONE}]},
    ),
}

Make = Callable[[str, Mapping[str, Any]], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts by model and recipe; sources are made once."""
    sources: dict[str, Path] = {}

    def made(model: str, recipe: Mapping[str, Any]) -> Path:
        if model not in sources:
            sources[model] = tmp_path_factory.mktemp(model)
            checkpoint(MODELS[model], sources[model], torch.bfloat16)
        return local(run_job(sources[model], tmp_path_factory.mktemp("output"), {"weights": W3, **recipe}))

    return made


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def stock(directory: Path) -> PreTrainedModel:
    """The quantized model as transformers loads it, unpacked as the README says it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.hf_quantizer.compressor.decompress_model(model)
    return model


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("name", RECIPES)
def test_stock_peft_has_our_compensated_logits(name: str, make: Make) -> None:
    directory = make(*RECIPES[name])
    ids = token_ids(2, 24)
    ours = logits(load_model(directory.as_uri(), dtype=torch.float32), ids)
    without = logits(load_model(directory.as_uri(), dtype=torch.float32, compensated=False), ids)
    adapted = PeftModel.from_pretrained(stock(directory), directory / "compensation").eval()
    size = float(ours.abs().max())
    assert (ours - without).abs().max() > 1e-2 * size
    torch.testing.assert_close(logits(adapted, ids), ours, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize(("activations", "same"), [(None, True), ({"bits": 8}, False)])
def test_weights_that_are_unpacked_while_they_are_loaded(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: Mapping[str, Any] | None, same: bool
) -> None:
    """`AutoPeftModelForCausalLM` as docs/serving.md has it, and without an argument where a copy's config.json says so."""
    directory = make("llama", {"compensation": SVD, **({} if activations is None else {"activations": activations})})
    base = PeftConfig.from_pretrained(directory / "compensation").base_model_name_or_path
    assert isinstance(base, str)
    shutil.copytree(directory, tmp_path / base)
    monkeypatch.chdir(tmp_path)
    unpacked = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    unpacked.hf_quantizer.compressor.decompress_model(unpacked)
    ids = token_ids(2, 24)
    expected = logits(PeftModel.from_pretrained(unpacked, f"{base}/compensation"), ids)
    asked = AutoPeftModelForCausalLM.from_pretrained(
        f"{base}/compensation", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert torch.equal(logits(asked, ids), expected) == same
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        AutoPeftModelForCausalLM.from_pretrained(f"{base}/compensation")
    config = json.loads((tmp_path / base / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (tmp_path / base / "config.json").write_text(json.dumps(config))
    assert torch.equal(
        logits(AutoPeftModelForCausalLM.from_pretrained(f"{base}/compensation"), ids), logits(asked, ids)
    )


def test_ranks_differ_where_they_are_chosen_by_energy(make: Make) -> None:
    config = PeftConfig.from_pretrained(make(*RECIPES["a rank for each module"]) / "compensation")
    assert len(set(config.rank_pattern.values())) > 2


REFUSED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "experts": ("mixtral", {"compensation": SVD}),
    "some experts": (
        "qwen3_moe",
        {"compensation": NONE, "overrides": [{"match": "*.experts.1.down_proj", "compensation": SVD}]},
    ),
    "shared experts": (
        "deepseek_v3",
        {"compensation": NONE, "overrides": [{"match": "*.shared_experts.*", "compensation": SVD}]},
    ),
    # PEFT would take them for experts, and leave them out.
    "dense blocks called as experts are": (
        "qwen3_moe",
        {"compensation": NONE, "overrides": [{"match": "*.layers.1.mlp.*_proj", "compensation": SVD}]},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stock_peft_cannot_represent_it_refuses(name: str, make: Make) -> None:
    """transformers still loads the model without branches, and we load all of it."""
    directory = make(*REFUSED[name])
    base = stock(directory)
    with pytest.raises((KeyError, ValueError), match="COUNTERWEIGHT"):
        PeftModel.from_pretrained(base, directory / "compensation")
    ids = token_ids(2, 24)
    without = logits(load_model(directory.as_uri(), dtype=torch.float32, compensated=False), ids)
    torch.testing.assert_close(logits(base, ids), without, rtol=0, atol=1e-6 * float(without.abs().max()))
    assert (logits(load_model(directory.as_uri(), dtype=torch.float32), ids) - without).abs().max() > 1e-3


def test_without_branches_there_is_no_adapter(make: Make) -> None:
    assert not (make("llama", {"compensation": NONE}) / "compensation").exists()
