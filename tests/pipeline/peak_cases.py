"""Jobs of one block whose memory is compared with the plan's: name -> the job, and the phase with its peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.pipeline.peak import Measured

Case = tuple[Measured, str]

GPTQ: Mapping[str, Any] = {"weights": {"bits": 4, "group_size": 128}}
RTN: Mapping[str, Any] = {"weights": {"bits": 4, "group_size": 128, "quantizer": {"kind": "rtn"}}}
WEIGHTED: Mapping[str, Any] = {"weights": {**RTN["weights"], "quantizer": {"kind": "rtn", "scale": {"kind": "mse"}}}}
REGRESSED: Mapping[str, Any] = {"weights": {**GPTQ["weights"], "quantizer": {"kind": "gptq", "target": "regressed"}}}


ALL_BUT_UP = ["lm_head", "*.self_attn.*", "*.down_proj"]
"""Kept, so that there are few sums of statistics."""


def dense(hidden: int, intermediate: int, **more: Any) -> dict[str, Any]:
    """A llama's config."""
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    return {"hidden_size": hidden, "intermediate_size": intermediate, **heads, **more}


def few(recipe: Mapping[str, Any], hidden: int, intermediate: int, **more: Any) -> Measured:
    """On few tokens, so that weights and statistics are what counts."""
    return Measured(recipe=recipe, config=dense(hidden, intermediate), **{"sequences": 2, "length": 128, **more})


def many(recipe: Mapping[str, Any], hidden: int, intermediate: int, **more: Any) -> Measured:
    """On full shards, so that activations are what counts."""
    return Measured(recipe=recipe, config=dense(hidden, intermediate), **{"sequences": 16, "length": 512, **more})


def experts(recipe: Mapping[str, Any], hidden: int, intermediate: int, count: int, **more: Any) -> Measured:
    """Of many experts on few tokens."""
    sizes = dense(hidden, intermediate, num_local_experts=count, num_experts_per_tok=2)
    return Measured(case="mixtral", recipe=recipe, config=sizes, **{"sequences": 2, "length": 64, **more})


def svd(fraction: float) -> dict[str, Any]:
    return {**RTN, "compensation": {"kind": "svd", "rank": {"fraction": fraction}}}


def lrc(fraction: float, iterations: int) -> dict[str, Any]:
    options = {"kind": "lrc", "rank": {"fraction": fraction}, "iterations": iterations}
    return {**GPTQ, "activations": {"bits": 4}, "compensation": options}


CASES: Mapping[str, Case] = {
    "squares": (few(RTN, 256, 4096), "solve"),
    "activations": (many(RTN, 256, 2048), "forward"),
    "long sequences": (many(RTN, 512, 1024, sequences=2, length=8192), "forward"),
    "activations, two threads": (many(RTN, 256, 2048, threads=2, sequences=48), "forward"),
    "activations, quantized": (many({**RTN, "activations": {"bits": 8}}, 256, 2048, sequences=32), "forward"),
    "activations, bfloat16": (many(RTN, 256, 3072, compute="bfloat16"), "forward"),
    "held out, more than is solved on": (
        few({**RTN, "activations": {"bits": 8}}, 256, 2560, length=512, held_out=16),
        "forward",
    ),
    "held out, no products": (few(RTN, 1024, 4096, length=512, held_out=2), "solve"),
    "thresholds": (many({**RTN, "residual": {}}, 256, 1024), "forward"),
    "attention": (
        Measured(case="gemma2", recipe=RTN, config=dense(256, 512, head_dim=16), sequences=2, length=1024),
        "forward",
    ),
    "experts": (
        Measured(
            case="mixtral",
            recipe=RTN,
            config={**dense(256, 1024), "num_local_experts": 16, "num_experts_per_tok": 2},
            length=256,
        ),
        "forward",
    ),
    "experts below the floor": (
        Measured(
            case="mixtral",
            recipe=RTN,
            config={**dense(512, 128), "num_local_experts": 2, "num_experts_per_tok": 1},
            sequences=224,
            length=512,
            experts={"floor": 64.0, "sample": 256.0},
        ),
        "starved",
    ),
    "every token through every expert": (
        Measured(
            case="mixtral",
            recipe=RTN,
            config={**dense(256, 1024), "num_local_experts": 8, "num_experts_per_tok": 1},
            sequences=32,
            length=256,
            experts={"every_token": True},
        ),
        "forward",
    ),
    "sums": (experts(RTN, 128, 1024, 48), "forward"),
    "experts, in passes": (experts(GPTQ, 256, 1024, 32, share=0.5), "forward"),
    "experts, quantized, in passes": (
        experts({**GPTQ, "activations": {"bits": 4}}, 512, 512, 48, share=0.22),
        "forward",
    ),
    "experts, in passes, compressed": (
        experts(GPTQ, 256, 1024, 40, share=0.5, propagate="compressed"),
        "forward",
    ),
    "GPTQ": (few(GPTQ, 256, 4096), "solve"),
    "GPTQ, rows": (few(GPTQ, 1024, 3072), "solve"),
    "sign": (few({"weights": {"format": "sign"}}, 768, 3072), "solve"),
    "RTN, weighted": (few(WEIGHTED, 1024, 4096, dtype="float32"), "solve"),
    "SVD, few tokens": (few(svd(0.3), 512, 1792), "solve"),
    "SVD, few ranks": (
        few({**svd(0.05), "keep": ["lm_head", "*.self_attn.*", "*.up_proj", "*.gate_proj"]}, 1024, 3072),
        "solve",
    ),
    "LRC": (few(lrc(0.1, 1), 512, 1536), "solve"),
    "LRC, statistics that stay": (few(lrc(0.1, 1), 512, 1536, beside=True), "solve"),
    "residual store": (few({**RTN, "residual": {"selection": "static"}}, 1024, 4096), "solve"),
    "regressed": (few({**REGRESSED, "keep": ALL_BUT_UP}, 768, 3072, propagate="compressed"), "solve"),
    "rotation": (
        few(
            {
                **RTN,
                "transforms": [{"kind": "rotation"}],
                "keep": ["lm_head", "*.q_proj", "*.v_proj", "*.o_proj", "*.mlp.*"],
            },
            2048,
            2048,
        ),
        "load",
    ),
    "smoothing": (
        few(
            {**RTN, "transforms": [{"kind": "smoothing"}], "keep": ALL_BUT_UP},
            1536,
            3072,
        ),
        "prepare",
    ),
    "tuning, activations": (
        many({**RTN, "tuning": {"kind": "lsi", "epochs": 1, "transforms": True, "batch": 8}}, 256, 1024),
        "tune",
    ),
    "tuning": (few({**RTN, "tuning": {"kind": "lsi", "epochs": 1}}, 1024, 2048), "tune"),
    "propagation": (many(RTN, 512, 2048, propagate="compressed"), "propagate"),
}

SHARED: Mapping[str, Case] = {
    "two workers, LRC, compressed": (few(lrc(0.1, 1), 512, 1536, propagate="compressed", workers=2), "solve"),
    "three workers, experts": (experts(GPTQ, 256, 1024, 24, propagate="compressed", workers=3), "forward"),
}
"""Blocks that workers share."""

LARGE: Mapping[str, Case] = {
    "Mixtral-8x7B at half width, half of its memory": (experts(GPTQ, 2048, 7168, 8, share=0.5), "solve"),
    "the same, W4A4 LRC": (experts(lrc(0.1, 1), 2048, 7168, 8, share=0.5), "solve"),
}
"""Of the shapes that matter, and too slow for a test: `python -m tests.pipeline.peak NAME`."""
