"""What `plan` says that a block's task computes is what torch executes in it, within `TOLERANCE`, whatever computes most of it.

Tasks run whole, on tiny models, under a counter that knows operations and their shapes and nothing of the plan. Norms, rotary
embeddings and activation functions, which the plan leaves out, are less than `TOLERANCE` of even the cheapest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.gains import Gains
from counterweight.workers.worker import Worker
from tests.flop_counter import counted
from tests.pipeline.peak import Measured, prepared

TOLERANCE = 0.02

GRID: Mapping[str, Any] = {"bits": 4, "group_size": 128}
GPTQ: Mapping[str, Any] = {"weights": GRID}
RTN: Mapping[str, Any] = {"weights": {**GRID, "quantizer": {"kind": "rtn"}}}
REGRESSED: Mapping[str, Any] = {"weights": {**GRID, "quantizer": {"kind": "gptq", "target": "regressed"}}}
LRC: Mapping[str, Any] = {**GPTQ, "activations": {"bits": 4}, "compensation": {"kind": "lrc"}}
FINER_LRC: Mapping[str, Any] = {**LRC, "activations": {"bits": 8}}
"""Plain codes are tried beside the joint ones."""
PLAIN_SVD: Mapping[str, Any] = {**RTN, "compensation": {"kind": "svd"}}
ASER: Mapping[str, Any] = {
    **RTN,
    "activations": {"bits": 8},
    "compensation": {"kind": "aser", "rank": {"count": 16}, "outliers": 8},
}
SMOOTHED: Mapping[str, Any] = {**RTN, "transforms": [{"kind": "smoothing"}]}
BOTH: Mapping[str, Any] = {
    **RTN,
    "activations": {"bits": 8},
    "transforms": [{"kind": "smoothing"}, {"kind": "rotation"}],
}


def tuned(**options: Any) -> dict[str, Any]:
    return {**RTN, "tuning": {"kind": "lsi", "epochs": 2, **options}}


def sizes(hidden: int, intermediate: int, **more: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"hidden_size": hidden, "intermediate_size": intermediate, **heads, **more}


def dense(recipe: Mapping[str, Any], **more: Any) -> Measured:
    return Measured(recipe=recipe, config=sizes(128, 384), **{"sequences": 4, "length": 64, **more})


def sparse(recipe: Mapping[str, Any], **more: Any) -> Measured:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    shape = {"sequences": 8, "length": 128, "experts": {"floor": 0.0}, **more}
    return Measured(case="mixtral", recipe=recipe, config=sizes(128, 256, **experts), **shape)


MLA = {"hidden_size": 128, "moe_intermediate_size": 128, "kv_lora_rank": 128, "q_lora_rank": 128, "v_head_dim": 32}

CASES: Mapping[str, Measured] = {
    "RTN": dense(RTN),
    "RTN, wide": Measured(recipe=RTN, config=sizes(256, 512), sequences=2, length=128),
    "GPTQ": dense(GPTQ),
    "GPTQ, bfloat16": dense(GPTQ, compute="bfloat16"),
    "GPTQ, experts": sparse(GPTQ),
    "GPTQ, experts all below the floor": sparse(GPTQ, experts={"floor": 64.0, "sample": 3.0}),
    "GPTQ, every token through every expert": sparse(LRC, experts={"every_token": True}),
    "some kept": dense({**GPTQ, "keep": ["lm_head", "*.q_proj", "*.down_proj"]}),
    "clips": dense({**RTN, "activations": {"bits": 4, "clip": "search"}}),
    "sign": dense({"weights": {"format": "sign"}}),
    "two shards": dense(RTN, sequences=130),
    "latent attention": Measured(
        case="deepseek_v3",
        recipe=RTN,
        config={**MLA, "first_k_dense_replace": 0},
        sequences=4,
        length=128,
        experts={"floor": 0.0},
    ),
    "attention without a fused kernel": Measured(
        case="gemma2", recipe=GPTQ, config=sizes(128, 256, head_dim=32), sequences=4, length=128
    ),
    "residual store": dense({**RTN, "residual": {}}),
    "propagation": dense(PLAIN_SVD, propagate="compressed"),
    "propagation, much of it through branches": dense(
        {**RTN, "compensation": {"kind": "svd", "whitening": "none", "rank": {"fraction": 1.0}}},
        sequences=32,
        propagate="compressed",
    ),
    "propagation beside the original": dense(REGRESSED, propagate="compressed"),
    "LRC": dense(LRC),
    "LRC, held out": dense(LRC, held_out=2),
    "experts, held out": sparse(GPTQ, held_out=4),
    "experts, drawn": sparse(GPTQ, experts={"floor": 3.5, "sample": 3.0}, drawn=16, sequences=4),
    "experts, drawn, all still below": sparse(GPTQ, experts={"floor": 64.0, "sample": 3.0}, drawn=16, held_out=4),
    "held out beside the original": dense(REGRESSED, propagate="compressed", held_out=2),
    "LRC, rotated, propagated": dense({**FINER_LRC, "transforms": [{"kind": "rotation"}]}, propagate="compressed"),
    "rotation across heads": dense({**RTN, "transforms": [{"kind": "rotation", "online_output": True}]}),
    "ASER": dense(ASER),
    "ASER, propagated": dense(ASER, propagate="compressed"),
    "smoothing": dense(SMOOTHED),
    "smoothing, experts": sparse(SMOOTHED),
    "smoothing beside the original": dense({**REGRESSED, **SMOOTHED, **REGRESSED}, propagate="compressed"),
    "smoothing before a rotation": dense(BOTH),
    "increments": dense(tuned()),
    "a square of increments, transforms": dense(tuned(block=32, transforms=True, batch=2)),
    "clipping alone, propagated": dense(tuned(increments=False), propagate="compressed"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_blocks_task_computes_what_is_planned(name: str, tmp_path: Path) -> None:
    found = prepared(CASES[name], tmp_path)
    worker = Worker("cpu")
    executed = counted(lambda: worker.run(found.task))
    worker.close()
    assert found.plan.flops == pytest.approx(executed.total, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("propagate", "recipe"),
    [
        ("original", LRC),
        ("compressed", FINER_LRC),
        *((propagate, recipe) for propagate in ("original", "compressed") for recipe in (ASER, PLAIN_SVD)),
    ],
)
def test_a_budget_costs_gains_and_where_it_must_a_further_calibration(
    propagate: str, recipe: Mapping[str, Any], tmp_path: Path
) -> None:
    sharing = {**recipe, "compensation": {**recipe["compensation"], "rank": {"budget_bits": 1.0}}}
    alike = sizes(128, 384) | {"num_key_value_heads": 4}  # so that all linears have the same largest rank
    measured = Measured(recipe=sharing, config=alike, propagate=propagate, sequences=4, length=64)
    found = prepared(measured, tmp_path)
    spec = found.task.block
    calibrated = spec.model_copy(update={"propagate": "original", "original_inputs": ()})
    # The plan does not know how a budget is shared out: it counts the largest rank of each linear.
    solved = {
        name: part.model_copy(update={"compensation": part.compensation.with_rank(128)})
        for name, part in spec.recipe.items()
    }
    worker = Worker("cpu")

    def both() -> None:
        worker.run(Gains(block=calibrated, keep=True))
        worker.run(Compress(block=spec.model_copy(update={"recipe": solved})))

    executed = counted(both)
    worker.close()
    assert found.plan.flops == pytest.approx(executed.total, rel=TOLERANCE)


def test_the_phases_are_parts_of_the_whole(tmp_path: Path) -> None:
    plan = prepared(dense({**BOTH, **tuned()}), tmp_path).plan
    parts = (plan.prepare_flops, plan.forward_flops, plan.statistics_flops, plan.tune_flops, plan.solve_flops)
    assert all(part > 0 for part in parts)
    assert plan.flops == sum(parts)
