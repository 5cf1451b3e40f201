"""The recipes whose stored tensors are pinned: every method and every option that chooses another computation, in few jobs.

What a recipe does not name is the manifest's default: a change of a default is a change of bits too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from counterweight.workers import keys
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.keys import digest, versions
from counterweight.workers.methods.distillation import Distillation
from counterweight.workers.recipe import Recipe
from tests.golden.sources import DIGESTS


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A job. recipe: as in a manifest. training: of a distillation, on seven of eight sequences, for which the others are held
    out; None for none. experts: of calibration, None for the default. model: of `sources.MODELS`. sequences: of calibration,
    256 to a shard.

    sways: kinds of values (see `made.Made`) in which a last bit that differs can grow: it lets an activation round the other
    way, which moves every statistic behind it, and training, compressed blocks before and branches hand that on.
    """

    recipe: Mapping[str, Any]
    training: Mapping[str, Any] | None = None
    experts: Mapping[str, Any] | None = None
    model: str = "dense"
    propagate: str = "original"
    compute_dtype: str = "float32"
    sequences: int = 64
    sways: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """Digest of the job: what was recorded for another one is no answer."""
        sources = [DIGESTS[self.model], DIGESTS["tokens"]]
        asked = [self.recipe, self.propagate, self.compute_dtype, self.sequences, sources]
        younger = [part for part in (self.training, self.experts) if part is not None]
        return digest([*asked, *younger])[:16]

    @property
    def versions(self) -> dict[str, int]:
        """One of these must be raised when the bits change."""
        trained = None if self.training is None else Distillation.model_validate(self.training)
        sparse = ExpertCalibration() if self.model == "experts" else None
        return {"NUMERICS": keys.NUMERICS, **versions((Recipe.model_validate(self.recipe), trained, sparse))}


def _weights(bits: int = 4, group_size: int | None = 32, symmetric: bool = True, **quantizer: Any) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "symmetric": symmetric, "quantizer": quantizer or {"kind": "gptq"}}


def _gptq(**options: Any) -> dict[str, Any]:
    return {"kind": "gptq", **options}


RTN = {"kind": "rtn"}
A8 = {"bits": 8}
A4 = {"bits": 4}
SVD4 = {"kind": "svd", "rank": {"count": 4}}
COMPRESSED = "compressed"

RECIPES: Mapping[str, Golden] = {
    # Quantizers, scale searches, grids.
    "rtn-absmax": Golden(recipe={"weights": _weights(**RTN)}),
    "rtn-mse-asymmetric": Golden(
        recipe={"weights": _weights(3, 64, False, **RTN, scale={"kind": "mse", "norm": 2.4, "candidates": 12})},
    ),
    "rtn-mse-unweighted": Golden(
        recipe={
            "weights": _weights(
                8, None, **RTN, scale={"kind": "mse", "weighted": False, "signed": False, "shrink": 0.3}
            )
        }
    ),
    "gptq-two-shards": Golden(recipe={"weights": _weights()}, sequences=300, compute_dtype="bfloat16"),
    "gptq-as-it-comes": Golden(
        recipe={
            "weights": _weights(
                2, 32, False, **_gptq(act_order=False, refinement=0, block_size=24, scale={"kind": "absmax"})
            )
        }
    ),
    "gptq-regressed": Golden(
        recipe={"weights": _weights(3, **_gptq(target="regressed", damping=0.05)), "activations": A8},
        propagate=COMPRESSED,
        sways=("codes", "scales"),
    ),
    "gptq-mixed": Golden(
        recipe={"weights": _weights(4, None, **_gptq(target="mixed", mix=0.3)), "compensation": SVD4},
        propagate=COMPRESSED,
        sways=("codes", "scales", "branches", "errors"),
    ),
    "sign": Golden(recipe={"weights": {"format": "sign"}, "compensation": SVD4}),
    # Activations.
    "activations-clipped": Golden(
        recipe={"weights": _weights(), "activations": {"bits": 4, "clip": 0.9, "group_size": 32}}
    ),
    "activations-searched": Golden(
        recipe={"weights": _weights(), "activations": {"bits": 4, "clip": "search"}},
        propagate=COMPRESSED,
        sways=("codes", "errors"),
    ),
    # Low-rank branches.
    "svd-none": Golden(
        recipe={"weights": _weights(**RTN), "compensation": {**SVD4, "whitening": "none", "factor_bits": 8}}
    ),
    "svd-magnitude": Golden(
        recipe={
            "weights": _weights(3, **RTN),
            "compensation": {"kind": "svd", "rank": {"fraction": 0.1}, "whitening": "magnitude"},
        }
    ),
    "svd-diagonal-energy": Golden(
        recipe={
            "weights": _weights(3, **RTN),
            "compensation": {"kind": "svd", "rank": {"energy": 0.3}, "whitening": "diagonal", "damping": 0.1},
        }
    ),
    "svd-budget": Golden(
        recipe={"weights": _weights(), "compensation": {"kind": "svd", "rank": {"budget_bits": 2.0}, "damping": 0.02}},
    ),
    "svd-anticipated": Golden(
        recipe={
            "weights": _weights(3),
            "compensation": {"kind": "svd", "rank": {"count": 6}, "anticipation": 0.5},
        },
        propagate=COMPRESSED,
    ),
    "lrc-joint": Golden(
        recipe={"weights": _weights(), "activations": A4, "compensation": {"kind": "lrc", "rank": {"count": 4}}},
        sways=("codes", "scales"),
    ),
    "lrc-weight-twice": Golden(
        recipe={
            "weights": _weights(4, None, **_gptq(target="mixed")),
            "activations": A4,
            "compensation": {
                "kind": "lrc",
                "rank": {"count": 4},
                "iterations": 2,
                "refit": "weight",
                "factor_bits": 8,
            },
        },
        sways=("codes", "scales"),
    ),
    "lrc-int4": Golden(
        recipe={
            "weights": _weights(),
            "activations": A4,
            "compensation": {"kind": "lrc", "rank": {"count": 4}, "factor_bits": 4, "refit": "none"},
        },
        sways=("codes", "scales", "branches", "errors"),
    ),
    "aser": Golden(
        recipe={
            "weights": _weights(**RTN),
            "activations": A8,
            "compensation": {
                "kind": "aser",
                "rank": {"count": 8},
                "outliers": 4,
                "choose": "product",
                "reference": "minimum",
            },
        }
    ),
    "aser-unsmoothed": Golden(
        recipe={
            "weights": _weights(3),
            "compensation": {"kind": "aser", "rank": {"count": 8}, "outliers": 3, "smoothing": False, "damping": 0.05},
        }
    ),
    # Transforms.
    "rotation": Golden(
        recipe={"transforms": [{"kind": "rotation", "seed": 7}], "weights": _weights(), "activations": A4},
        sways=("codes", "errors"),
    ),
    "rotation-online": Golden(
        recipe={
            "transforms": [
                {"kind": "rotation", "residual": False, "heads": False, "online_output": True, "random": False},
                {"kind": "smoothing", "strength": 0.5},
            ],
            "weights": _weights(4, None),
        },
        propagate=COMPRESSED,
        sways=("codes", "scales", "errors"),
    ),
    "smoothing": Golden(
        recipe={"transforms": [{"kind": "smoothing"}], "weights": _weights(), "activations": A8, "compensation": SVD4},
        sways=("branches",),
    ),
    # Tuning.
    "distillation": Golden(
        recipe={"weights": _weights(3, None, **RTN), "activations": A8, "compensation": SVD4},
        training={"epochs": 1},
        sways=("scales", "branches", "kept"),
    ),
    "tuning": Golden(recipe={"weights": _weights(3, **RTN), "tuning": {"epochs": 2, "batch": 4}}, sways=("errors",)),
    "tuning-transforms": Golden(
        recipe={
            "weights": _weights(3, 64, False, **RTN),
            "activations": A8,
            "tuning": {"clipping": False, "transforms": True, "block": 4, "epochs": 2, "batch": 4, "seed": 3},
            "compensation": SVD4,
        },
        propagate=COMPRESSED,
        sways=("codes", "scales", "branches", "kept", "errors"),
    ),
    # Residual stores. Bucketed and exact selections store what chunked does.
    "residual": Golden(
        recipe={
            "weights": _weights(3, **RTN),
            "residual": {"selection": "static", "channels_per_chunk": 64, "candidates": 12},
        },
        propagate=COMPRESSED,
    ),
    # Exceptions, and mixtures of experts.
    "overrides": Golden(
        recipe={
            "weights": _weights(3),
            "compensation": SVD4,
            "overrides": [
                {"match": "*.down_proj", "weights": _weights(8, None, **RTN)},
                {"match": "*.layers.1.mlp.*", "compensation": {"kind": "none"}},
            ],
            "keep": ["lm_head", "*.layers.0.self_attn.q_proj"],
        }
    ),
    "experts": Golden(
        recipe={
            "transforms": [{"kind": "rotation"}, {"kind": "smoothing", "strength": 0.4}],
            "weights": _weights(),
            "compensation": SVD4,
            "residual": {"channels_per_chunk": 128},
        },
        model="experts",
        sways=("branches", "corrections"),
    ),
    "experts-compressed": Golden(
        recipe={
            "weights": _weights(4, 32, True, **_gptq(target="mixed")),
            "activations": A8,
            "compensation": {"kind": "lrc", "rank": {"count": 4}},
        },
        model="experts",
        propagate=COMPRESSED,
        sways=("codes", "scales", "errors"),
    ),
    "experts-starved": Golden(
        recipe={"weights": _weights(), "activations": A8, "compensation": SVD4},
        model="experts",
        sequences=4,
        sways=("branches",),
    ),
    "experts-every-token": Golden(
        recipe={"weights": _weights()}, model="experts", experts={"every_token": True}, sequences=8
    ),
    "experts-aser": Golden(
        recipe={
            "weights": _weights(**RTN),
            "compensation": {"kind": "aser", "rank": {"count": 8}, "outliers": 4},
        },
        model="experts",
        compute_dtype="bfloat16",
    ),
}
