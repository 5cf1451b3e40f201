"""The jobs that drills disturb: what each changes of one manifest, `tests.pipeline.tiny.MANIFEST`."""

from __future__ import annotations

TRAINED = "distilled"

_SCALAR = "spec.recipe.weights={bits: 3, quantizer: {kind: rtn}}"
_TEXTS = (
    "texts: [{source: {uri: calibration.txt}, sequences: 8}], held_out: [{source: {uri: validation.txt}, sequences: 3}]"
)
_TRAINING = "{epochs: 2, batch: 2, replicas: 2, rounds: 2, average: 0.5, factor_rate: 3e-4, scale_rate: 3e-4}"

VARIANTS = {
    "original": ("spec.calibration.propagate=original",),
    "compressed": ("spec.calibration.propagate=compressed",),
    "rotated": ("spec.recipe.transforms=[{kind: rotation}]", "spec.recipe.activations={bits: 8}"),
    "tuned": (_SCALAR, "spec.recipe.tuning={epochs: 2, batch: 4}"),
    TRAINED: (
        _SCALAR,
        "spec.recipe.compensation={kind: svd, rank: {count: 2}, whitening: none}",
        f"spec.distillation={{{_TEXTS}, training: {_TRAINING}}}",
    ),
}
"""Name -> overrides. The training of the distilled one wins: its bytes are those that the last epoch has left."""
