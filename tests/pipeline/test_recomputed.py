"""Every figure of a report, computed again by other means: the artifact as `counterweight.load_model` gives it, the original as
transformers loads it, and the files as safetensors reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import counterweight
from counterweight.pipeline.artifact import ArtifactDocument
from counterweight.pipeline.artifact.report import BitsPerWeight, Report
from counterweight.workers.metrics import METRICS
from counterweight.workers.tasks.records import ModuleReport
from tests.inprocess import local, run_job
from tests.models import checkpoint, read_tensors

SVD = {"kind": "svd", "rank": {"count": 4}}
RTN = {"kind": "rtn"}
W3 = {"bits": 3, "quantizer": RTN}
W4A8 = {"weights": {"bits": 4, "quantizer": RTN}, "activations": {"bits": 8}}
STORE = {"channels_per_chunk": 100}

RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "W4 A16": ("llama", {"weights": {"bits": 4, "group_size": 32, "symmetric": False}}),
    "W4 A8, SVD": ("llama", {**W4A8, "compensation": SVD}),
    "W4 A8, ASER": ("llama", {**W4A8, "compensation": {"kind": "aser", "rank": {"count": 8}}}),
    "W4 A4, rotated, LRC": (
        "llama",
        {
            "transforms": [{"kind": "rotation"}],
            "weights": {"bits": 4},
            "activations": {"bits": 4, "clip": 0.9},
            "compensation": {"kind": "lrc", "rank": {"fraction": 0.1}},
        },
    ),
    "W3, QDEC": ("llama", {"weights": W3, "residual": STORE}),
    "W3, static QDEC, int8 factors": (
        "llama",
        {"weights": W3, "compensation": {**SVD, "factor_bits": 8}, "residual": {**STORE, "selection": "static"}},
    ),
    "experts": ("mixtral", {"weights": {"bits": 4, "group_size": 32}, "compensation": SVD}),
    "experts, QDEC": ("mixtral", {"weights": W3, "compensation": SVD, "residual": STORE}),
    "one bit": ("llama", {"weights": {"format": "sign"}, "compensation": SVD}),
}
TRANSFORMED = ("W4 A8, ASER", "W4 A4, rotated, LRC")
"""In other coordinates than the original: scales or a rotation are folded into what stands before the linears."""
STORES = [name for name, (_, recipe) in RECIPES.items() if "residual" in recipe]
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "quantized": {"compensated": False},
    "compensated": {"residual": "all"},
    "compensated_prefill": {},
}
"""Variant of a report -> how `load_model` gives it to a text that comes whole."""
EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What an expert's linears are called on disk -> in a loaded model."""
CODES, SCALES = ("packed", "signs"), ("scale", "zero_point", "row_scale", "column_scale")
SEQUENCES, LENGTH = 8, 32
HELD_OUT = 8
SEEN = {"sequences": SEQUENCES, "sequence_length": LENGTH, "experts": {"floor": 0.0}, "held_out": HELD_OUT}


@dataclass(frozen=True)
class Linear:
    """A linear of the original on some tokens. x: [tokens, in], exact: its output [tokens, out] float64."""

    x: Tensor
    exact: Tensor

    @classmethod
    def of(cls, weight: Tensor, x: Tensor) -> Linear:
        return cls(x, x.double() @ weight.detach().double().T)


@dataclass(frozen=True)
class Made:
    """A source, its artifact, and the text that it was calibrated on and validated with."""

    source: Path
    root: Path
    text: str
    transformed: bool

    @cached_property
    def report(self) -> Report:
        return Report.model_validate_json((self.root / "report" / "report.json").read_bytes())

    @cached_property
    def windows(self) -> Tensor:
        """The first windows of the text, [windows, length]."""
        return self._windows(0, SEQUENCES)

    @cached_property
    def unseen(self) -> Tensor:
        """Those behind them."""
        return self._windows(SEQUENCES, HELD_OUT)

    def _windows(self, first: int, count: int) -> Tensor:
        ids: Tensor = AutoTokenizer.from_pretrained(self.root)(self.text, return_tensors="pt").input_ids
        return ids[0, first * LENGTH : (first + count) * LENGTH].view(count, LENGTH)

    @cached_property
    def original(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()

    def load(self, **arguments: Any) -> Any:
        return counterweight.load_model(self.root.as_uri(), dtype=torch.float32, **arguments)

    @cached_property
    def qualities(self) -> dict[str, dict[str, float]]:
        """Of every variant, all windows in one pass."""
        reference = log_probabilities(self.original, self.windows)
        found = {"baseline": recomputed(reference, reference, self.windows)}
        for name, arguments in VARIANTS.items():
            own = log_probabilities(self.load(**arguments), self.windows)
            found[name] = recomputed(reference, own, self.windows)
        return found

    def linears_on(self, windows: Tensor) -> dict[str, Linear]:
        """Those of which the input is known, by their names in the report. In other coordinates those are the queries and keys
        that read the embedding, which the artifact keeps; their outputs are in the original's."""
        found = original_linears(self.original, windows)
        if not self.transformed:
            return found
        names = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qk"]
        entered = inputs(self.load(), names, windows)
        return {name: Linear(entered[name], found[name].exact) for name in names}

    @cached_property
    def stored(self) -> dict[str, dict[str, int]]:
        """Part of the bits -> module -> its bits in the artifact's files; `kept`: what belongs to no quantized linear."""
        found: dict[str, dict[str, int]] = {part: {} for part in ("code", "scale", "factor", "residual", "kept")}
        for directory, whole in (("", None), ("compensation", "factor"), ("residual", "residual")):
            for name, tensor in read_tensors(self.root / directory).items():
                module, _, kind = name.removeprefix("base_model.model.").partition(".weight_")
                if kind == "shape":
                    continue
                part = whole or ("code" if kind in CODES else "scale" if kind in SCALES else "kept")
                if whole == "factor":
                    module = module.partition(".lora_")[0]
                if whole == "residual":
                    module = module.partition(".residual_")[0]
                found[part][module] = found[part].get(module, 0) + 8 * tensor.nbytes
        return found


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.log_softmax(model(ids).logits, dim=-1)


def recomputed(reference: Tensor, own: Tensor, ids: Tensor) -> dict[str, float]:
    """Every metric from log-probabilities [windows, length, vocabulary] of the original and of a model."""
    loss = -own[:, :-1].gather(2, ids[:, 1:, None]).double().mean()
    divergence = functional.kl_div(own, reference, reduction="none", log_target=True).sum(-1).double()
    return {
        "perplexity": float(loss.exp()),
        "kl": float(divergence.mean()),
        "kl_p99": float(divergence.quantile(0.99, dim=1).mean()),
        "kl_last_quarter": float(divergence[:, -max(1, divergence.shape[1] // 4) :].mean()),
        "top1_agreement": float((own.argmax(-1) == reference.argmax(-1)).double().mean()),
    }


@torch.no_grad()
def inputs(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What enters these modules, [tokens, in] each."""
    found: dict[str, Tensor] = {}

    def take(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found[name] = arguments[0].flatten(0, -2)

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(take, name)) for name in names]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def original_linears(model: Any, ids: Tensor) -> dict[str, Linear]:
    """Every linear inside the blocks, of experts too."""
    names = [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]
    found = {name: Linear.of(model.get_submodule(name).weight, x) for name, x in inputs(model, names, ids).items()}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            (experts, routed) = layer.mlp.experts, routing(model, index, ids)
            for expert, x in enumerate(routed):
                place = f"model.layers.{index}.block_sparse_moe.experts.{expert}"
                gate, up = experts.gate_up_proj[expert].chunk(2)
                inner = experts.act_fn(x @ gate.T) * (x @ up.T)
                found[f"{place}.w1"], found[f"{place}.w3"] = Linear.of(gate, x), Linear.of(up, x)
                found[f"{place}.w2"] = Linear.of(experts.down_proj[expert], inner.detach())
    return found


@torch.no_grad()
def routing(model: Any, index: int, ids: Tensor) -> list[Tensor]:
    """What enters each expert of a block, [tokens, hidden]."""
    found: list[Tensor] = []

    def take(experts: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, _ = arguments
        found.extend(hidden[(chosen == expert).any(-1)] for expert in range(len(experts.down_proj)))

    hook = model.model.layers[index].mlp.experts.register_forward_pre_hook(take)
    model(ids)
    hook.remove()
    return found


def place_of(module: str) -> str:
    """Where a loaded model has a module of the report."""
    place, _, leaf = module.replace(".block_sparse_moe.", ".mlp.").rpartition(".")
    return f"{place}.{EXPERTS.get(leaf, leaf)}"


Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts by recipe, each made once."""
    found: dict[str, Made] = {}

    def made(name: str) -> Made:
        if name not in found:
            family, recipe = RECIPES[name]
            place = tmp_path_factory.mktemp("recomputed")
            checkpoint(family, place / "model")
            published = run_job(
                place / "model",
                place / "output",
                recipe,
                calibration={**SEEN, "sampling": "consecutive"},
                validation={"windows": SEQUENCES, "sequence_length": LENGTH},
            )
            text = (place / "output" / "text.txt").read_text()
            found[name] = Made(place / "model", local(published), text, name in TRANSFORMED)
        return found[name]

    return made


@pytest.mark.parametrize("metric", [metric.name for metric in METRICS if not metric.sparse])
@pytest.mark.parametrize("variant", ["baseline", *VARIANTS])
@pytest.mark.parametrize("name", RECIPES)
def test_metrics_are_those_of_the_loaded_model(name: str, variant: str, metric: str, make: Make) -> None:
    made = make(name)
    if variant == "compensated_prefill" and name not in STORES:
        assert made.report.compensated_prefill is None
        assert made.qualities[variant] == made.qualities["compensated"]
        return
    reported = getattr(made.report.qualities[variant], metric)
    assert made.qualities[variant][metric] == pytest.approx(reported, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", STORES)
def test_decoding_is_what_tokens_that_come_one_at_a_time_see(name: str, make: Make) -> None:
    """With the cache of keys and values, under `load_model`'s default; the same tokens given whole differ."""
    made = make(name)
    model, rows = made.load(), []
    cache = None
    with torch.no_grad():
        for position in range(LENGTH):
            step = model(made.windows[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rows.append(step.logits)
        decoded, whole = torch.cat(rows, 1), made.load(residual="all")(made.windows).logits
        prefill = model(made.windows).logits
    size = float(whole.abs().max())
    torch.testing.assert_close(decoded, whole, rtol=0, atol=1e-5 * size)
    assert (prefill - whole).abs().max() > 1e-2 * size
    reference = log_probabilities(made.original, made.windows)
    perplexity = recomputed(reference, torch.log_softmax(decoded, -1), made.windows)["perplexity"]
    assert made.report.compensated is not None
    assert perplexity == pytest.approx(made.report.compensated.perplexity, rel=1e-6)


@pytest.mark.parametrize("figure", ["quantized", "compensated"])
@pytest.mark.parametrize("name", RECIPES)
def test_held_out_errors_are_those_of_the_loaded_layers_on_other_windows(name: str, figure: str, make: Make) -> None:
    """Of experts with few of these tokens see `tests/workers/test_held_out.py`."""
    made = make(name)
    model = made.load(compensated=figure == "compensated")
    reported = {module.name: module.held_out for module in made.report.modules}
    judged = 0
    for module, linear in made.linears_on(made.unseen).items():
        held_out = reported[module]
        assert held_out is not None
        if held_out.of_layer:
            continue
        with torch.no_grad():
            found = model.get_submodule(place_of(module))(linear.x[None])[0].double()
        error = float((found - linear.exact).square().sum() / linear.exact.square().sum())
        assert error == pytest.approx(getattr(held_out, figure), rel=1e-4), module
        assert held_out.tokens == len(linear.x)
        judged += 1
    assert judged >= 2


@pytest.mark.parametrize("figure", ["code_bits", "scale_bits", "factor_bits", "residual_bits"])
@pytest.mark.parametrize("name", RECIPES)
def test_bits_of_modules_are_those_of_their_tensors(name: str, figure: str, make: Make) -> None:
    made = make(name)
    stored = made.stored[figure.removesuffix("_bits")]
    found = {module.name: getattr(module, figure) for module in made.report.modules}
    assert found == {module: stored.get(module, 0) for module in found}


@pytest.mark.parametrize("figure", BitsPerWeight.model_fields)
@pytest.mark.parametrize("name", RECIPES)
def test_bits_per_weight_are_those_of_the_files(name: str, figure: str, make: Make) -> None:
    made = make(name)
    source = read_tensors(made.source)
    weights = sum(source[f"{module.name}.weight"].numel() for module in made.report.modules)
    bits = {part: sum(modules.values()) for part, modules in made.stored.items()}
    kept = bits.pop("kept")
    expected = {f"{part}s": found / weights for part, found in bits.items()}
    expected["weights"], expected["residual"] = expected.pop("codes"), expected.pop("residuals")
    expected["total"] = sum(expected.values())
    expected["model"] = (sum(bits.values()) + kept) / sum(tensor.numel() for tensor in source.values())
    assert getattr(made.report.bits_per_weight, figure) == pytest.approx(expected[figure], rel=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_the_parts_that_are_listed_add_up(name: str, make: Make) -> None:
    bits = make(name).report.bits_per_weight
    assert sum(bits.parts.values()) == pytest.approx(bits.total, rel=1e-12)
    assert ("residual store" in bits.parts) == (name in STORES)


@pytest.mark.parametrize("figure", ["rows", "columns", "bits", "group_size", "rank", "tokens"])
@pytest.mark.parametrize("name", RECIPES)
def test_modules_are_what_lies_there(name: str, figure: str, make: Make) -> None:
    made = make(name)
    source, artifact = read_tensors(made.source), read_tensors(made.root)
    adapter = read_tensors(made.root / "compensation")
    tokens = {module: len(linear.x) for module, linear in original_linears(made.original, made.windows).items()}
    for module in made.report.modules:
        rows, columns = source[f"{module.name}.weight"].shape
        down = adapter.get(f"base_model.model.{module.name}.lora_A.weight")
        packed = artifact.get(f"{module.name}.weight_packed", artifact.get(f"{module.name}.weight_signs"))
        scale = artifact.get(f"{module.name}.weight_scale")
        assert packed is not None
        expected = {
            "rows": rows,
            "columns": columns,
            "bits": packed.numel() * 32 // (rows * columns),
            "group_size": None if scale is None or scale.shape[1] == 1 else columns // scale.shape[1],
            "rank": 0 if down is None else down.shape[0],
            "tokens": tokens[module.name],
        }
        assert getattr(module, figure) == expected[figure], module.name


def test_the_model_and_the_windows_are_those_that_were_asked_for(make: Make) -> None:
    report = make("experts").report
    assert report.model.parameters == sum(tensor.numel() for tensor in read_tensors(make("experts").source).values())
    assert report.validation is not None
    for tokens in (report.calibration, report.validation):
        assert (tokens.sequences, tokens.sequence_length) == (SEQUENCES, LENGTH)
    assert report.calibration.held_out == HELD_OUT


@pytest.mark.parametrize("name", RECIPES)
def test_files_have_the_sizes_and_digests_that_are_listed(name: str, make: Make) -> None:
    root = make(name).root
    document = ArtifactDocument.model_validate_json((root / "artifact.json").read_bytes())
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    del found["artifact.json"]
    assert {path: (entry.size, entry.sha256) for path, entry in document.files.items()} == {
        path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in found.items()
    }
    assert document.qualities == make(name).report.qualities
    assert document.bits_per_weight == make(name).report.bits_per_weight


def test_no_figure_of_a_report_is_left_out() -> None:
    """Whoever adds one adds a test above. Times and memory cannot be measured again; the rest here is what was asked for."""
    assert set(Report.model_fields) == {
        *("baseline", *VARIANTS, "bits_per_weight", "modules", "model", "calibration", "validation"),
        *("tasks", "stages", "schema_version", "name", "id", "created", "recipe", "software"),
        "distillation",  # in test_distillation
        "routers",  # in test_routers
        "validation_dtype",
        "windows",  # of the first text, for tests of significance: in tests/pipeline/judging
        *("texts", "kl_by_position"),  # in test_validate
        *("gates", "base_model_problem", "benchmarks", "generation"),  # in tests/pipeline/judging
        *("sizes", "making", "earlier"),  # in test_report_making
    }
    assert set(ModuleReport.model_fields) == {
        *("error_quantized", "error_compensated", "code_bits", "scale_bits", "factor_bits", "residual_bits"),
        *("rows", "columns", "bits", "group_size", "rank", "tokens", "name", "fallbacks", "seconds", "held_out"),
        "drawn",  # in test_drawing
    }
    assert {metric.name for metric in METRICS} == {
        *("perplexity", "kl", "kl_p99", "kl_last_quarter", "top1_agreement", "router_agreement")
    }
