"""Every option of a recipe changes what a job stores or how its result scores; one that could do nothing is refused.

Options are found by walking the types of `Recipe` and `Distillation`: a new one without an entry in `CHANGES` fails.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from counterweight.workers.config import Config
from counterweight.workers.methods.distillation import Distillation
from counterweight.workers.recipe import Recipe
from tests.inprocess import local, run_job
from tests.models import checkpoint, write_text

Job = dict[str, Any]
"""A recipe, with calibration's `propagate` beside it where it is not the default, and the `training` of a distillation."""


def with_weights(quantizer: Job, /, **recipe: Any) -> Job:
    return {"weights": {"bits": 3, "group_size": 32, "quantizer": quantizer}, **recipe}


def with_rank(rank: Job) -> Job:
    return with_weights({"kind": "rtn"}, compensation={"kind": "svd", "rank": rank})


RTN = with_weights({"kind": "rtn"})
GPTQ = with_weights({"kind": "gptq"}, activations={"bits": 4}, propagate="compressed")
MIXED = with_weights({"kind": "gptq", "target": "mixed"}, activations={"bits": 4})
SEARCHED = with_weights({"kind": "rtn", "scale": {"kind": "mse"}})
SIGN = {"weights": {"format": "sign"}}
SVD = with_rank({"count": 4})
FORESEEN = with_weights({"kind": "gptq"}, compensation={"kind": "svd", "rank": {"count": 8}})
ASER = with_weights({"kind": "rtn"}, compensation={"kind": "aser", "rank": {"count": 8}, "outliers": 4})
LRC = with_weights({"kind": "gptq"}, activations={"bits": 4}, compensation={"kind": "lrc", "rank": {"count": 4}})
ROTATED = {**GPTQ, "transforms": [{"kind": "rotation"}]}
SMOOTHED = {**GPTQ, "transforms": [{"kind": "smoothing"}]}
TUNED = {**RTN, "tuning": {"epochs": 2, "batch": 3}}
LET = {**RTN, "tuning": {"epochs": 2, "batch": 3, "transforms": True}}
STORED = {**RTN, "residual": {"channels_per_chunk": 64}}
AFFORDED = {
    **RTN,
    "residual": {
        "channels_per_chunk": {"slowdown": 0.0, "device": {"dram": 100.0, "pcie": 50.0, "multiprocessors": 1}}
    },
}
EXCEPTED = {**RTN, "overrides": [{"match": "*.q_proj", "weights": {"bits": 8, "quantizer": {"kind": "rtn"}}}]}

TRAINED = {**SVD, "training": {"epochs": 2, "batch": 3}}
RUINOUS = {**SVD, "training": {"epochs": 4, "factor_rate": 10.0}}
REPLICATED = {**SVD, "training": {"epochs": 2, "batch": 3, "replicas": 2}}

QUANTIZER, SCALE, BRANCH = "weights.quantizer.", "weights.quantizer.scale.", "compensation."
BUDGET = "residual.channels_per_chunk."

CHANGES: Mapping[str, tuple[Job, str, Any]] = {
    "Recipe.transforms": (RTN, "transforms", [{"kind": "rotation"}]),
    "Recipe.weights": (RTN, "weights", {"format": "sign"}),
    "Recipe.activations": (RTN, "activations", {"bits": 8}),
    "Recipe.compensation": (RTN, "compensation", {"kind": "svd"}),
    "Recipe.tuning": (RTN, "tuning", TUNED["tuning"]),
    "Recipe.residual": (RTN, "residual", {"bits": 4}),
    "Recipe.overrides": (RTN, "overrides", EXCEPTED["overrides"]),
    "Recipe.keep": (RTN, "keep", ["lm_head", "*.q_proj"]),
    "Override.match": (EXCEPTED, "overrides.0.match", "*.up_proj"),
    "Override.weights": (EXCEPTED, "overrides.0.weights.bits", 2),
    "Override.compensation": (EXCEPTED, "overrides.0.compensation", {"kind": "svd"}),
    "Weights.bits": (RTN, "weights.bits", 2),
    "Weights.group_size": (RTN, "weights.group_size", None),
    "Weights.symmetric": (RTN, "weights.symmetric", False),
    "Weights.quantizer": (RTN, "weights.quantizer", {"kind": "gptq"}),
    "SignWeights.weighted": (SIGN, "weights.weighted", False),
    "RTN.scale": (RTN, "weights.quantizer.scale", {"kind": "mse"}),
    "GPTQ.damping": (GPTQ, QUANTIZER + "damping", 0.3),
    "GPTQ.act_order": (GPTQ, QUANTIZER + "act_order", False),
    "GPTQ.refinement": (GPTQ, QUANTIZER + "refinement", 0),
    "GPTQ.scale": (GPTQ, QUANTIZER + "scale", {"kind": "absmax"}),
    "GPTQ.target": (GPTQ, QUANTIZER + "target", "regressed"),
    "GPTQ.mix": (MIXED, QUANTIZER + "mix", 0.1),
    "MeanSquare.norm": (SEARCHED, SCALE + "norm", 1.0),
    "MeanSquare.candidates": (SEARCHED, SCALE + "candidates", 5),
    "MeanSquare.shrink": (SEARCHED, SCALE + "shrink", 0.1),
    "MeanSquare.weighted": (SEARCHED, SCALE + "weighted", False),
    "MeanSquare.signed": (SEARCHED, SCALE + "signed", False),
    "Activations.bits": (GPTQ, "activations.bits", 8),
    "Activations.clip": (GPTQ, "activations.clip", 0.8),
    "Activations.group_size": (GPTQ, "activations.group_size", 32),
    "CountRank.count": (SVD, BRANCH + "rank.count", 5),
    "FractionRank.fraction": (with_rank({"fraction": 0.1}), BRANCH + "rank.fraction", 0.2),
    "EnergyRank.energy": (with_rank({"energy": 0.2}), BRANCH + "rank.energy", 0.4),
    "BudgetRank.budget_bits": (with_rank({"budget_bits": 2.0}), BRANCH + "rank.budget_bits", 4.0),
    "SVD.rank": (SVD, BRANCH + "rank", {"fraction": 0.2}),
    "SVD.factor_bits": (SVD, BRANCH + "factor_bits", 8),
    "SVD.whitening": (SVD, BRANCH + "whitening", "magnitude"),
    "SVD.damping": (SVD, BRANCH + "damping", 0.5),
    "SVD.anticipation": (FORESEEN, BRANCH + "anticipation", 0.9),
    "ASER.rank": (ASER, BRANCH + "rank", {"fraction": 0.2}),
    "ASER.factor_bits": (ASER, BRANCH + "factor_bits", 8),
    "ASER.outliers": (ASER, BRANCH + "outliers", 2),
    "ASER.choose": (ASER, BRANCH + "choose", "product"),
    "ASER.reference": (ASER, BRANCH + "reference", "minimum"),
    "ASER.smoothing": (ASER, BRANCH + "smoothing", False),
    "ASER.damping": (ASER, BRANCH + "damping", 0.5),
    "LRC.rank": (LRC, BRANCH + "rank", {"fraction": 0.2}),
    "LRC.factor_bits": (LRC, BRANCH + "factor_bits", 8),
    "LRC.iterations": (LRC, BRANCH + "iterations", 3),
    "LRC.damping": (LRC, BRANCH + "damping", 0.5),
    "LRC.refit": (LRC, BRANCH + "refit", "weight"),
    "Rotation.residual": (ROTATED, "transforms.0.residual", False),
    "Rotation.heads": (ROTATED, "transforms.0.heads", False),
    "Rotation.online_down": (ROTATED, "transforms.0.online_down", False),
    "Rotation.online_output": (ROTATED, "transforms.0.online_output", True),
    "Rotation.random": (ROTATED, "transforms.0.random", False),
    "Rotation.seed": (ROTATED, "transforms.0.seed", 1),
    "Smoothing.strength": (SMOOTHED, "transforms.0.strength", 0.9),
    "Tuning.increments": (TUNED, "tuning.increments", False),
    "Tuning.clipping": (TUNED, "tuning.clipping", False),
    "Tuning.transforms": (TUNED, "tuning.transforms", True),
    "Tuning.block": (TUNED, "tuning.block", 8),
    "Tuning.epochs": (TUNED, "tuning.epochs", 3),
    "Tuning.batch": (TUNED, "tuning.batch", 2),
    "Tuning.lr_increments": (TUNED, "tuning.lr_increments", 0.01),
    "Tuning.lr_clipping": (TUNED, "tuning.lr_clipping", 0.5),
    "Tuning.lr_transforms": (LET, "tuning.lr_transforms", 0.05),
    "Tuning.held_out": (TUNED, "tuning.held_out", 0.5),
    "Tuning.patience": ({**RTN, "tuning": {"epochs": 6, "lr_increments": 0.1}}, "tuning.patience", 1),
    "Tuning.seed": (TUNED, "tuning.seed", 1),
    "Residual.channels_per_chunk": (STORED, "residual.channels_per_chunk", 512),
    "Residual.selection": (STORED, "residual.selection", "static"),
    "Residual.candidates": (STORED, "residual.candidates", 3),
    "LatencyBudget.slowdown": (AFFORDED, BUDGET + "slowdown", 0.5),
    "LatencyBudget.device": (AFFORDED, BUDGET + "device", "RTX 4090"),
    "Distillation.epochs": (TRAINED, "training.epochs", 3),
    "Distillation.batch": (TRAINED, "training.batch", 2),
    "Distillation.factors": (TRAINED, "training.factors", False),
    "Distillation.scales": (TRAINED, "training.scales", False),
    "Distillation.norms": (TRAINED, "training.norms", False),
    "Distillation.factor_rate": (TRAINED, "training.factor_rate", 1e-3),
    "Distillation.scale_rate": (TRAINED, "training.scale_rate", 1e-3),
    "Distillation.warmup": (TRAINED, "training.warmup", 0.5),
    "Distillation.average": (TRAINED, "training.average", 0.0),
    "Distillation.ridge": (TRAINED, "training.ridge", 1.0),
    "Distillation.patience": (RUINOUS, "training.patience", 1),
    "Distillation.seed": (TRAINED, "training.seed", 1),
    "Distillation.replicas": (TRAINED, "training.replicas", 2),
    "Distillation.rounds": (REPLICATED, "training.rounds", 3),
    "Bandwidths.dram": (AFFORDED, BUDGET + "device.dram", 200.0),
    "Bandwidths.pcie": (AFFORDED, BUDGET + "device.pcie", 90.0),
}

NO_CHANGE = {
    "GPTQ.block_size": "tests/workers/quantization/test_gptq.py: test_block_size_changes_speed_only",
    "Bandwidths.multiprocessors": "tests/pipeline/test_residual_tuner.py: test_modelled_times_know_no_multiprocessors",
}
"""Options that say themselves that the result is the same, with the test of that."""

REFUSED: list[tuple[Job, str, Any, str]] = [
    (SVD, "compensation", {"kind": "svd", "whitening": "none", "damping": 0.1}, "damping: 0.1: expected 0"),
    (SVD, "compensation", {"kind": "svd", "whitening": "magnitude", "damping": 0.1}, "damping: 0.1: expected 0"),
    (SVD, "compensation", {"kind": "svd", "whitening": "none", "anticipation": 0.1}, "anticipation: expected 0"),
    (SVD, BRANCH + "anticipation", 0.5, "anticipation: expected 0 with rtn, which does not look at the input"),
    (
        {"weights": {"format": "sign", "weighted": False}},
        "compensation",
        {"kind": "svd", "anticipation": 0.5},
        "anticipation: expected 0 with sign, which does not look at the input",
    ),
    (ASER, "compensation", {"kind": "aser", "outliers": 0, "choose": "product"}, "choose: product: expected"),
    (
        ASER,
        "compensation",
        {"kind": "aser", "smoothing": False, "reference": "minimum"},
        "reference: minimum: expected",
    ),
    (ASER, "compensation", {"kind": "aser", "outliers": 0, "reference": "minimum"}, "reference: minimum: expected"),
    (GPTQ, QUANTIZER + "mix", 0.3, "mix: expected only with target: mixed"),
    (RTN, "transforms", [{"kind": "rotation", "random": False, "seed": 3}], "seed: 3: expected 0 unless random"),
    (RTN, "transforms", [{"kind": "rotation", "residual": False, "heads": False, "seed": 3}], "seed: 3: expected 0"),
    (TUNED, "weights.quantizer.scale", {"kind": "mse"}, "weights.quantizer.scale.kind: mse: expected absmax"),
    (TUNED, "compensation", {"kind": "svd", "anticipation": 0.5}, "expected a compensation of finished codes"),
    (TUNED, "tuning", {"increments": False, "block": 4}, "block: 4: expected 0 unless increments are learned"),
]


def options(config: type[Config]) -> Iterator[str]:
    """`Class.field` of everything that can be chosen in a `config` and below it."""
    for name, field in config.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            continue  # the name of a kind, or the only value there is
        yield f"{config.__name__}.{name}"
        for below in configs_in(field.annotation):
            yield from options(below)


def configs_in(annotation: object) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from configs_in(part)


def changed(value: Any, path: list[str], new: Any) -> Any:
    """`value` with `new` at the path of keys and indices."""
    if not path:
        return new
    first, *rest = path
    if isinstance(value, list):
        index = int(first)
        return [*value[:index], changed(value[index], rest, new), *value[index + 1 :]]
    return {**value, first: changed(value.get(first, {}), rest, new)}


class Jobs:
    """Runs jobs on one tiny model, each once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._done: dict[str, object] = {}
        text = {"uri": write_text(directory / "trained.txt", 8000, seed=1).as_uri()}
        self._texts = {
            "texts": [{"source": text, "sequences": 24}],
            "held_out": [{"source": text, "sequences": 4, "skip": 24}],
        }
        # As many values as queries: smoothing reaches the input of o_proj.
        checkpoint("llama", directory / "model", num_hidden_layers=1, num_key_value_heads=4)

    def outcome(self, job: Job) -> object:
        """Digests of the files of tensors, and the figures of the validation."""
        asked = json.dumps(job, sort_keys=True)
        if asked not in self._done:
            recipe = {name: part for name, part in job.items() if name not in ("propagate", "training")}
            published = run_job(
                self._directory / "model",
                self._directory / str(len(self._done)),
                recipe,
                calibration={"propagate": job.get("propagate", "original")},
                validation={},
                distillation={**self._texts, "training": job["training"]} if "training" in job else None,
            )
            document = published.document
            files = {name: entry.sha256 for name, entry in document.files.items() if name.endswith(".safetensors")}
            report = json.loads((local(published) / "report" / "report.json").read_text())["distillation"]
            trained = None if report is None else (report["kept"], report["divergences"])
            self._done[asked] = files, document.compensated, trained
        return self._done[asked]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("options"))


def test_no_option_is_forgotten() -> None:
    assert {*options(Recipe), *options(Distillation)} == {*CHANGES, *NO_CHANGE}


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_the_result(option: str, jobs: Jobs) -> None:
    job, where, value = CHANGES[option]
    assert jobs.outcome(changed(job, where.split("."), value)) != jobs.outcome(job)


def test_an_option_that_changes_nothing_leaves_every_bit(jobs: Jobs) -> None:
    """The control: a job that computes the same once more has the same outcome."""
    again = changed(AFFORDED, [*BUDGET.split(".")[:-1], "device", "multiprocessors"], 128)
    assert jobs.outcome(again) == jobs.outcome(AFFORDED)


@pytest.mark.parametrize(("job", "where", "value", "message"), REFUSED, ids=str)
def test_an_option_that_would_do_nothing_is_refused(job: Job, where: str, value: Any, message: str) -> None:
    recipe = {name: part for name, part in changed(job, where.split("."), value).items() if name != "propagate"}
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(recipe)
