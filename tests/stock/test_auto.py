"""Artifacts under transformers' own names: as `load_model` has them, or refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    pipeline,
)

from counterweight import load_model
from tests.inprocess import local, run_job
from tests.models import checkpoint, token_ids
from tests.stock.known import known_to_transformers

W3 = {"bits": 3, "group_size": None, "quantizer": {"kind": "rtn"}}
ROTATED = {"transforms": [{"kind": "rotation"}], "weights": W3, "activations": {"bits": 8, "clip": 0.9}}
LRC = {**ROTATED, "compensation": {"kind": "lrc", "rank": {"count": 8}}}
RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "W3 A8, rotated, LRC": ("llama", LRC),
    "the same in int8": ("qwen2", {**LRC, "compensation": {**LRC["compensation"], "factor_bits": 8}}),
    "experts": ("mixtral", ROTATED),
    "a residual store": ("llama", {**ROTATED, "residual": {"channels_per_chunk": 16}}),
    "fused": ("phi3", ROTATED),
}


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    with known_to_transformers():
        yield


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("auto"), *RECIPES["W3 A8, rotated, LRC"])


def made(root: Path, family: str, recipe: Mapping[str, Any]) -> Path:
    checkpoint(family, root / "model", torch.float32)
    return local(run_job(root / "model", root / "output", recipe))


@pytest.mark.parametrize("name", RECIPES)
def test_an_auto_class_gives_what_load_model_gives(name: str, tmp_path: Path) -> None:
    place = made(tmp_path, *RECIPES[name])
    assert AutoConfig.from_pretrained(place).model_type == f"counterweight_{RECIPES[name][0]}"
    model, ours = AutoModelForCausalLM.from_pretrained(place), load_model(place.as_uri())
    ids = token_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
        expected = ours.generate(ids, **options)
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)


@pytest.mark.parametrize("asked", ["float16", torch.bfloat16])
def test_dtype_and_options_are_followed(artifact: Path, asked: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=asked, device_map={"": "cpu"}, compensated=False)
    dtype = getattr(torch, asked) if isinstance(asked, str) else asked
    assert model.get_input_embeddings().weight.dtype == dtype
    ours = load_model(artifact.as_uri(), dtype=dtype, compensated=False)
    ids = token_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)


def test_an_attention_is_the_one_that_is_asked_for(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_pipeline_and_tokenizer(artifact: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    generator = pipeline("text-generation", model=str(artifact), tokenizer=tokenizer)
    (found,) = generator("w1 w2 w3", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("w1 w2 w3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"model": "cpu", "lm_head": "cpu"}}, r"^device_map: .*expected auto or one device"),
        ({"device_map": "balanced"}, r"^device_map: 'balanced'"),
        ({"dtype": "int8"}, r"^dtype: 'int8': expected auto or a floating-point dtype"),
        ({"max_memory": {0: "1GB"}}, r"^max_memory: expected none of these"),
    ],
)
def test_what_would_not_be_followed_is_refused(artifact: Path, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(artifact, **options)


def test_a_model_is_not_saved_without_its_weights(artifact: Path, tmp_path: Path) -> None:
    for model in (AutoModelForCausalLM.from_pretrained(artifact), load_model(artifact.as_uri())):
        with pytest.raises(ValueError, match="quantized with counterweight and is not serializable"):
            model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_peft_trains_what_is_not_quantized(artifact: Path) -> None:
    """Gradients reach the adapter, and nothing else: a quantized layer has no parameters."""
    ids = token_ids(2, 16)
    base = AutoModelForCausalLM.from_pretrained(artifact)
    before = base(ids).logits.detach()
    model = get_peft_model(base, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    model(ids, labels=ids).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name and parameter.grad is not None for name, parameter in trained.items())
    assert any(bool(parameter.grad.abs().max() > 0) for parameter in trained.values() if parameter.grad is not None)
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= parameter.grad
        assert not torch.equal(model(ids).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, before)


def test_peft_refuses_quantized_layers(artifact: Path) -> None:
    """Neither a new adapter, nor the branch a second time."""
    for adapted in (
        lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
        lambda model: PeftModel.from_pretrained(model, artifact / "compensation"),
    ):
        with pytest.raises(ValueError, match=r"Target module CompensatedLinear.* is not supported"):
            adapted(AutoModelForCausalLM.from_pretrained(artifact))


def test_a_model_class_by_itself_is_refused(artifact: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected AutoModelForCausalLM\.from_pretrained or counterweight\.load_model"
    ):
        LlamaForCausalLM.from_pretrained(artifact)


@pytest.mark.parametrize("first", ["counterweight.auto", "transformers"])
def test_it_works_whichever_is_imported_first(artifact: Path, first: str) -> None:
    program = (
        f"import {first}\nimport counterweight.auto, sys\nfrom transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(artifact)], capture_output=True, text=True, check=True, timeout=600
    )
    assert ran.stdout.splitlines()[-1] == "LlamaForCausalLM"
