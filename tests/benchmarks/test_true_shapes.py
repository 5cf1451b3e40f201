"""Synthetic checkpoints have the tensors of the published models, and plans of them are quick and grow as they should."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from counterweight.pipeline.devices import memory_of
from counterweight.pipeline.loads import load_of
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import Plan, make_plan
from counterweight.pipeline.units import bytes_text
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.footprint import footprint
from counterweight.workers.footprint.solves import batched
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.plain import plain_layout

ROOT = Path(__file__).parent.parent.parent

MODELS = (
    "Mixtral-8x7B",
    "Mixtral-8x22B",
    "Qwen3-30B-A3B",
    "Qwen3-235B-A22B",
    "DeepSeek-V3",
    "Llama-3-8B",
    "Llama-3-70B",
)


@pytest.fixture
def true_shapes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("true_shapes")


def job(model: Path, **resources: Any) -> CompressionJob:
    return CompressionJob.model_validate(
        {
            "apiVersion": "counterweight/v1",
            "kind": "CompressionJob",
            "metadata": {"name": "shapes"},
            "spec": {
                "model": {"uri": model.as_uri()},
                "calibration": {
                    "source": {"kind": "standard_library", "part": "calibration"},
                    "sequences": 512,
                    "sequence_length": 2048,
                    "compute_dtype": "bfloat16",
                },
                "recipe": {"weights": {"bits": 4, "group_size": 128, "quantizer": {"kind": "gptq"}}},
                "resources": {"workers": 8, "gpus_per_worker": 1, **resources},
                "output": {"uri": (model.parent / "output").as_uri()},
            },
        }
    )


def test_these_models_are_there(true_shapes: ModuleType) -> None:
    assert tuple(true_shapes.shapes()) == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_the_parameters_that_its_publisher_says(model: str, true_shapes: ModuleType) -> None:
    shape = true_shapes.shapes()[model]
    layout = BlockBuilder(shape.config).layout
    assert plain_layout(shape.config, frozenset()) == layout, "a plan asks transformers what the model is"
    tensors = layout.expected([])
    assert sum(map(prod, tensors.values())) == pytest.approx(shape.parameters, rel=0.005)


@pytest.mark.parametrize("model", ["Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeek-V3", "Llama-3-8B"])
def test_a_checkpoint_has_the_parameters_of_transformers_model(
    model: str, true_shapes: ModuleType, tmp_path: Path
) -> None:
    config = true_shapes.shapes()[model].with_layers(2)
    source = open_model(true_shapes.make(config, tmp_path).as_uri())
    fields = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**fields))
    # A router's correction bias is stored, but is a buffer.
    biases = sum(buffer.numel() for name, buffer in stock.named_buffers() if name.endswith("correction_bias"))
    assert source.parameters == sum(parameter.numel() for parameter in stock.parameters()) + biases


def test_a_hole_takes_no_room(true_shapes: ModuleType, tmp_path: Path) -> None:
    true_shapes.make(true_shapes.shapes()["Llama-3-8B"].with_layers(1), tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 2 << 30
    assert sum(file.stat().st_blocks * 512 for file in files) < 1 << 20


def test_samples_need_the_whole_model_and_a_pass_over_it_for_each_token(
    true_shapes: ModuleType, tmp_path: Path
) -> None:
    config = true_shapes.shapes()["Llama-3-8B"].config
    source = open_model(true_shapes.make(config, tmp_path).as_uri())
    plain = job(tmp_path, workers=1).model_dump(mode="json")
    text = {"text": {"kind": "standard_library", "part": "evaluation"}, "windows": 8, "compute_dtype": "bfloat16"}

    def planned(**more: object) -> Plan:
        spec = {**plain["spec"], "validation": {**text, **more}}
        return make_plan(CompressionJob.model_validate({**plain, "spec": spec}), source, "H100-80G")

    without, few, many = planned(), planned(generation={"new_tokens": 8}), planned(generation={"new_tokens": 4096})
    assert "whole" not in without.largest
    assert few.largest == many.largest == "validation, a model as a whole"
    assert without.peak_bytes_per_worker < 2 * source.parameters < few.peak_bytes_per_worker
    # Keys and values of 4 prompts, at most as wide as the stream, in 16 bits.
    tokens = 4 * (4096 - 8)
    assert many.peak_bytes_per_worker - few.peak_bytes_per_worker == tokens * 2 * 2 * 32 * 4096
    assert without.estimate is not None
    assert few.estimate is not None
    assert many.estimate is not None
    assert "whole models" not in without.estimate.stages
    assert many.estimate.stages["whole models"] > 10 * few.estimate.stages["whole models"] > 0
    asked = planned(tasks={"questions": {"uri": "questions.yaml"}})
    assert asked.largest == "validation, a model as a whole"


def test_weights_are_random_and_the_same_again(true_shapes: ModuleType, tmp_path: Path) -> None:
    config = true_shapes.narrowed(true_shapes.shapes()["Llama-3-8B"].with_layers(1), 32)
    sources = [open_model(true_shapes.make(config, tmp_path / n, weights=True).as_uri()) for n in ("one", "two")]
    name = "model.layers.0.mlp.down_proj.weight"
    one, two = (Checkpoint.open(source.store).read(name) for source in sources)
    assert one.shape == (128, 448)
    assert torch.equal(one, two)
    assert one.float().std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(Checkpoint.open(sources[0].store).read("model.norm.weight").float(), torch.ones(128))


def test_no_layer_is_no_model(true_shapes: ModuleType) -> None:
    with pytest.raises(ValueError, match="layers: 0: expected at least 1"):
        true_shapes.shapes()["Llama-3-8B"].with_layers(0)


def test_time_grows_with_layers_and_the_peak_does_not(true_shapes: ModuleType, tmp_path: Path) -> None:
    plans: list[Plan] = []
    for layers in (32, 64, 96):
        config = true_shapes.shapes()["Mixtral-8x7B"].with_layers(layers)
        source = open_model(true_shapes.make(config, tmp_path / str(layers)).as_uri())
        plans.append(make_plan(job(tmp_path / str(layers)), source, "H100-80G"))
    one, two, three = (plan.estimate.seconds for plan in plans if plan.estimate is not None)
    assert three - two == pytest.approx(two - one, rel=0.05)  # stretches of shards, and rounds of workers, are whole
    assert len({plan.peak_bytes_per_worker for plan in plans}) == 1


def test_batches_on_a_gpu_take_what_its_memory_leaves(true_shapes: ModuleType, tmp_path: Path) -> None:
    """Eight down projections of Mixtral's width, of which the batches of a GPU of unknown memory hold one."""
    source = open_model(true_shapes.make(true_shapes.shapes()["Mixtral-8x7B"].with_layers(1), tmp_path).as_uri())
    seconds: list[float] = []
    for memory, together in ((memory_of("H100-80G"), 8), (48 << 30, 2), (20 << 30, 1)):
        asked = job(tmp_path, memory_per_worker=f"{memory >> 20}MiB")
        plan = make_plan(asked, source, "H100-80G")
        (block,) = plan.blocks
        load = replace(load_of(asked, source, 0, block.recipe), passes=block.passes, batch_bytes=block.batch_bytes)
        assert footprint(load).peak == block.peak_bytes <= memory
        calls = [len(call) for one in load.by_pass() for call in batched(one) if call[0].shapes == ((4096, 14336),)]
        assert max(calls) == together
        assert plan.estimate is not None
        seconds.append(plan.estimate.steps["solve"])
    assert (
        seconds[0] < seconds[1] < seconds[2]
    )  # a kernel takes a block of columns, so a batch saves little more than starts


def test_what_is_too_little_for_a_block_is_refused_with_what_is_enough(true_shapes: ModuleType, tmp_path: Path) -> None:
    """Of Mixtral at half width a half of what a block needs at once is enough, and an eighth is not: a single expert's down
    projection takes about a half."""
    config = true_shapes.narrowed(true_shapes.shapes()["Mixtral-8x7B"].with_layers(1), 2)
    source = open_model(true_shapes.make(config, tmp_path).as_uri())

    def planned(memory: int) -> Plan:
        return make_plan(job(tmp_path, memory_per_worker=f"{memory >> 20}MiB"), source, "H100-80G")

    need = make_plan(job(tmp_path), source).blocks[0].undivided_bytes
    half, eighth = planned(need // 2), planned(need // 8)
    assert not half.problems
    assert half.peak_bytes_per_worker <= need // 2
    (problem,) = eighth.problems
    assert problem.startswith(f"block 0 in 10 passes over the tokens needs {bytes_text(eighth.peak_bytes_per_worker)} ")
    assert not planned(eighth.peak_bytes_per_worker + (1 << 20)).problems


def test_a_plan_of_a_large_model_is_quick(true_shapes: ModuleType, tmp_path: Path) -> None:
    """4 CPU seconds and 90 MiB, as `benchmarks/planning.py` has it; with a margin for other machines."""
    shape = true_shapes.shapes()["Qwen3-235B-A22B"]
    true_shapes.make(shape.with_layers(94), tmp_path / "model")
    save_file({"input_ids": torch.zeros(512, 2048, dtype=torch.int32)}, tmp_path / "tokens.safetensors")
    manifest = tmp_path / "job.json"
    asked = job(tmp_path / "model").model_dump(mode="json", by_alias=True)
    asked["spec"]["calibration"]["source"] = {"kind": "tokens", "uri": "file:tokens.safetensors"}
    manifest.write_text(json.dumps(asked))
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    measure += (
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
    )
    command = [sys.executable, "-m", "counterweight.pipeline.cli", "plan", str(manifest), "--device", "H100-80G"]
    printed = subprocess.run([sys.executable, "-c", measure, *command], check=True, capture_output=True, text=True)
    seconds, kibibytes = map(float, printed.stdout.split())
    assert seconds < 9
    assert kibibytes < 150 << 10
