"""What is served: tiny models and recipes, one for each feature that an engine has to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.models import CASES, MOE, SPARSE, Case

RTN = {"quantizer": {"kind": "rtn"}}
W4 = {"bits": 4, "group_size": 32, **RTN}
W3 = {"bits": 3, "group_size": None, **RTN}
SVD = {"kind": "svd", "rank": {"count": 8}}
ENERGY = {"kind": "svd", "rank": {"energy": 0.5}}
NONE = {"kind": "none"}
ROTATION = [{"kind": "rotation"}]
WIDE = {"head_dim": 32}  # vLLM's attention on a CPU has no heads of 16 channels


@dataclass(frozen=True)
class Served:
    """model, recipe: as `tests.inprocess.run_job` takes them. exact: no rounding tie is likely. Where inputs are quantized
    without a clip, a token's largest channel is one: it stands at (2**bits - 1) / 2 steps, up to the last bit."""

    model: Case
    recipe: Mapping[str, Any]
    exact: bool = True


LLAMA = Case("llama", WIDE)
MIXTRAL = Case("mixtral", {**SPARSE, **WIDE, "sliding_window": None})

SERVED: Mapping[str, Served] = {
    "W4A16": Served(LLAMA, {"weights": W4}),
    "W4A16 asymmetric": Served(LLAMA, {"weights": {**W4, "symmetric": False}}),
    "W3 + SVD, a rank for each module": Served(LLAMA, {"weights": W3, "compensation": ENERGY}),
    "W3 + SVD in int8": Served(LLAMA, {"weights": W3, "compensation": {**SVD, "factor_bits": 8}}),
    "W3 + SVD in int4": Served(LLAMA, {"weights": W3, "compensation": {**SVD, "factor_bits": 4}}),
    "W4A8 ASER": Served(
        LLAMA,
        {
            "weights": {"bits": 4, "group_size": None, **RTN},
            "activations": {"bits": 8},
            "compensation": {"kind": "aser", "rank": {"count": 8}},
        },
        exact=False,
    ),
    "W4A4 LRC, rotated": Served(
        LLAMA,
        {
            "transforms": ROTATION,
            "weights": {"bits": 4, "group_size": None},
            "activations": {"bits": 4, "clip": 0.9},
            "compensation": {"kind": "lrc", "rank": {"fraction": 0.1}},
        },
    ),
    "W4A4 in groups": Served(
        LLAMA, {"weights": W4, "activations": {"bits": 4, "clip": 0.9, "group_size": 32}, "compensation": SVD}
    ),
    "W4A4, no clip": Served(
        LLAMA,
        {"weights": W4, "activations": {"bits": 4}, "compensation": SVD},
        exact=False,
    ),
    "QDEC": Served(LLAMA, {"weights": W3, "compensation": SVD, "residual": {"channels_per_chunk": 256}}),
    "signs": Served(LLAMA, {"weights": {"format": "sign"}, "compensation": SVD}),
    "kept q": Served(LLAMA, {"weights": W4, "compensation": SVD, "keep": ["lm_head", "*.q_proj"]}),
    "tied and biased": Served(
        Case("llama", {**CASES["llama-tied-biased"].config, **WIDE}),
        {"weights": W4, "compensation": SVD},
    ),
    "Mixtral W4A16 + SVD": Served(MIXTRAL, {"weights": W4, "compensation": SVD}),
    "Mixtral W4A4 LRC, rotated": Served(
        MIXTRAL,
        {
            "transforms": ROTATION,
            "weights": {"bits": 4, "group_size": None},
            "activations": {"bits": 4, "clip": 0.9},
            "compensation": {"kind": "lrc", "rank": {"count": 8}},
        },
    ),
    "Mixtral QDEC": Served(MIXTRAL, {"weights": W4, "residual": {"channels_per_chunk": 256}, "compensation": NONE}),
    "Phi-3, fused": Served(Case("phi3", {"hidden_size": 128}), {"weights": W4, "compensation": SVD}),
    "Qwen2": Served(Case("qwen2", {"hidden_size": 128}), {"weights": W4, "compensation": SVD}),
    "Qwen3": Served(CASES["qwen3"], {"weights": W4, "compensation": SVD}),
    "Mistral": Served(CASES["mistral"], {"weights": W4, "compensation": SVD}),
    "Gemma 2": Served(Case("gemma2", {**CASES["gemma2"].config, **WIDE}), {"weights": W4, "compensation": SVD}),
    "Gemma 3": Served(
        Case("gemma3_text", {**CASES["gemma3_text"].config, **WIDE}),
        {"weights": W4, "compensation": SVD},
    ),
    "Qwen3-MoE": Served(
        Case("qwen3_moe", {**MOE, **WIDE, "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
        {"weights": W4, "compensation": SVD},
    ),
    "OLMoE": Served(Case("olmoe", {**SPARSE, "hidden_size": 128}), {"weights": W4, "compensation": SVD}),
}


def folder_of(name: str) -> str:
    """Where an artifact lies below the folder of all."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
