"""DeepSeek-V3 through whole jobs: from bfloat16 and from block-scaled fp8, with a layer for multi-token prediction behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from counterweight import load_model
from counterweight.pipeline.artifact import Published
from counterweight.pipeline.cli import main
from counterweight.pipeline.model_source import open_model
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.errors import CheckpointError, RequestError
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.source import whole
from tests.inprocess import local, run_job
from tests.models import (
    block_scaled,
    build,
    checkpoint,
    read_config,
    read_tensors,
    save,
    save_block_scaled,
    token_ids,
    write_text,
)

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
GPTQ = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq"}}}
EXACT = {"weights": {"bits": 8, "group_size": 32, "quantizer": {"kind": "rtn"}}}
FURTHER = "model.layers.3."


def add_prediction_layer(directory: Path, *, fp8: bool) -> set[str]:
    """Tensors as real checkpoints have them behind the last block; returns their names."""
    draw = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {
        f"{FURTHER}embed_tokens.weight": torch.randn(128, 64, generator=draw),
        f"{FURTHER}eh_proj.weight": torch.randn(64, 128, generator=draw),
        f"{FURTHER}enorm.weight": torch.full((64,), torch.nan),  # nobody looks at it
        f"{FURTHER}shared_head.head.weight": torch.randn(128, 64, generator=draw),
        f"{FURTHER}mlp.down_proj.weight": torch.randn(64, 96, generator=draw),
    }
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if fp8:
        name = f"{FURTHER}mlp.down_proj.weight"
        codes, scale = block_scaled(tensors[name].float(), (24, 16))
        tensors |= {name: codes, f"{name}_scale_inv": scale}
    save_file({**read_tensors(directory), **tensors}, directory / "model.safetensors", metadata={"format": "pt"})
    return set(tensors)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("fp8")
    model = build("deepseek_v3")
    save_block_scaled(model, directory)
    add_prediction_layer(directory, fp8=True)
    return model, directory


Source = tuple[PreTrainedModel, Path]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids(2, 24)).logits
    return found


def ledger_of(published: Published) -> dict[str, dict[str, Any]]:
    return {entry["source"]: entry for entry in json.loads((local(published) / "ledger.json").read_text())["entries"]}


def test_a_block_scaled_source_is_the_model_of_the_decoded_weights(source: Source) -> None:
    model, directory = source
    opened = open_model(directory.as_uri())
    assert opened.tensors
    read = whole(
        Checkpoint.open(opened.store), BlockBuilder(opened.checkpoint.config), torch.device("cpu"), torch.float32
    )
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=1e-5)
    assert (logits(build("deepseek_v3")) - logits(model)).abs().max() > 1e-2  # as it was before fp8


def test_every_tensor_of_a_block_scaled_source_is_accounted_for(source: Source, tmp_path: Path) -> None:
    model, directory = source
    recipe = {**EXACT, "keep": ["lm_head", "*.self_attn.*"]}
    published = run_job(directory, tmp_path, recipe, validation={})
    entries, stored = ledger_of(published), read_tensors(local(published))
    assert entries.keys() == read_tensors(directory).keys()
    kept = "model.layers.0.self_attn.kv_b_proj.weight"
    for name, entry in entries.items():
        if name.startswith(FURTHER):
            assert (entry["fate"], entry["reason"]) == (
                "dropped",
                "of a layer for multi-token prediction, which is not run",
            )
        elif name.endswith("_scale_inv"):
            weight = name.removesuffix("_scale_inv")
            assert (entry["fate"], entry["reason"]) == ("dropped", f"scales of {weight}, decoded with it")
        else:
            assert entry["fate"] in ("kept", "quantized")
            assert set(entry["stored_as"]) <= stored.keys()
    assert entries[kept]["fate"] == "kept"
    assert stored[kept].dtype == torch.bfloat16
    assert torch.equal(stored[kept].float(), model.state_dict()[kept])
    assert torch.float8_e4m3fn not in {tensor.dtype for tensor in stored.values()}
    assert not any(name.startswith(FURTHER) for name in stored)
    config = read_config(local(published))
    assert config["num_nextn_predict_layers"] == 0
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert published.document.baseline is not None
    assert published.document.quantized is not None
    assert published.document.quantized.perplexity == pytest.approx(published.document.baseline.perplexity, rel=0.02)
    ours = logits(load_model(published.uri, dtype=torch.float32))
    assert (ours - logits(model)).norm() < 0.05 * logits(model).norm()  # 8 bits


def test_the_same_weights_in_fp8_and_in_bfloat16_give_the_same_artifact(source: Source, tmp_path: Path) -> None:
    """Tensors are known by what they decode to."""
    model, directory = source
    decoded = tmp_path / "decoded"
    save(model, decoded, torch.bfloat16)
    for name, sha in digests(directory).items():
        assert digests(decoded)[name] == sha
    first = run_job(directory, tmp_path / "a", GPTQ)
    second = run_job(decoded, tmp_path / "b", GPTQ)
    tensors, again = read_tensors(local(first)), read_tensors(local(second))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def digests(directory: Path) -> dict[str, str]:
    opened = open_model(directory.as_uri())
    return {name: found.sha256 for name, found in Checkpoint.open(opened.store).inspect(opened.tensors).items()}


@pytest.mark.parametrize(
    "parts",
    [
        GPTQ,
        {**GPTQ, "activations": {"bits": 8}, "compensation": {"kind": "lrc", "rank": {"count": 4}}},
        {**GPTQ, "residual": {"bits": 4, "channels_per_chunk": 8}},
        {
            **GPTQ,
            "transforms": [{"kind": "rotation", "online_output": True}, {"kind": "smoothing"}],
            "activations": {"bits": 4},
            "compensation": {"kind": "aser", "rank": {"count": 8}, "outliers": 4},
        },
        {"weights": {"bits": 3, "quantizer": {"kind": "rtn"}}, "tuning": {"epochs": 1, "transforms": True}},
    ],
    ids=["w4a16", "w4a8-lrc", "residual", "rotated-w4a4-aser", "tuned"],
)
@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v3-full-queries"])
def test_jobs(case: str, parts: dict[str, Any], tmp_path: Path) -> None:
    original = checkpoint(case, tmp_path / "model", torch.bfloat16, num_hidden_layers=2)
    published = run_job(
        tmp_path / "model", tmp_path / "job", parts, calibration={"propagate": "compressed"}, validation={}
    )
    document = published.document
    assert document.baseline is not None
    assert document.compensated is not None
    assert document.compensated.perplexity < 1.5 * document.baseline.perplexity
    entries, stored = ledger_of(published), read_tensors(local(published))
    assert entries[BIAS]["fate"] == "kept"
    assert stored[BIAS].dtype == torch.float32
    assert torch.equal(stored[BIAS], original.state_dict()[BIAS])
    model = load_model(published.uri, dtype=torch.bfloat16)
    assert torch.equal(model.state_dict()[BIAS], original.state_dict()[BIAS])
    assert bool(torch.isfinite(logits(model)).all())


def test_stock_transformers_has_our_logits(tmp_path: Path) -> None:
    checkpoint("deepseek_v3", tmp_path / "model", torch.bfloat16)
    published = run_job(tmp_path / "model", tmp_path / "job", GPTQ)
    stock, info = AutoModelForCausalLM.from_pretrained(local(published), dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ours = logits(load_model(published.uri, dtype=torch.float32))
    torch.testing.assert_close(logits(stock), ours, rtol=0, atol=1e-6 * float(ours.abs().max()))


def test_layers_for_multi_token_prediction_are_refused_where_the_config_has_none(tmp_path: Path) -> None:
    checkpoint("deepseek_v3", tmp_path, num_nextn_predict_layers=0)
    names = add_prediction_layer(tmp_path, fp8=False)
    with pytest.raises(CheckpointError, match=f"{len(names)} problems") as caught:
        open_model(tmp_path.as_uri())
    assert "expected no such tensor" in str(caught.value)


def test_a_layer_for_multi_token_prediction_is_not_counted(tmp_path: Path) -> None:
    checkpoint("deepseek_v3", tmp_path, torch.bfloat16)
    before = open_model(tmp_path.as_uri())
    names = add_prediction_layer(tmp_path, fp8=False)
    after = open_model(tmp_path.as_uri())
    assert set(after.dropped) == names
    assert (after.tensors, after.parameters) == (before.tensors, before.parameters)


def test_plan_counts_decoded_weights(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is held counts in bfloat16, what is read in bytes of fp8."""
    model, directory = source
    save(model, tmp_path / "decoded", torch.bfloat16)
    write_text(tmp_path / "text.txt", 5000)
    found = {}
    for name, uri in (("fp8", directory.as_uri()), ("bfloat16", (tmp_path / "decoded").as_uri())):
        document = {
            "apiVersion": "counterweight/v1",
            "kind": "CompressionJob",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": uri},
                "calibration": {"source": {"uri": "text.txt"}, "sequences": 8, "sequence_length": 32},
                "recipe": GPTQ,
                "output": {"uri": "out"},
            },
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
        assert main(["plan", str(tmp_path / f"{name}.json"), "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["fp8"]["parameters"] == found["bfloat16"]["parameters"]
    assert found["fp8"]["peak_bytes_per_worker"] == found["bfloat16"]["peak_bytes_per_worker"]
    assert found["fp8"]["source_bytes"] < 0.8 * found["bfloat16"]["source_bytes"]


@pytest.mark.parametrize("where", ["code", "scale"])
def test_a_block_scaled_weight_that_is_not_finite_is_refused(where: str, source: Source, tmp_path: Path) -> None:
    _, directory = source
    tensors = read_tensors(directory)
    name = "model.layers.1.self_attn.o_proj.weight"
    if where == "code":
        tensors[name].view(torch.uint8)[3, 5] = 0xFF
    else:
        tensors[f"{name}_scale_inv"][0, 0] = torch.inf
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in directory.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=rf"{name}: holds NaN or infinity"):
        run_job(bad, tmp_path / "job", GPTQ)
