"""What a block is made from: each part of the key under a name of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from counterweight.workers import keys
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.recipe import ModuleRecipe, Recipe
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.made_from import INPUTS, change, differing, made_from
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.workspace import Blob

ONE, OTHER = "a" * 64, "b" * 64


def recipe(**changed: Any) -> dict[str, ModuleRecipe]:
    asked = {"weights": {"bits": 4, "quantizer": {"kind": "rtn"}}, **changed}
    part = Recipe.model_validate(asked).for_module("model.layers.0.mlp.up_proj")
    assert part is not None
    return {"mlp.up_proj": part}


def block(**changed: Any) -> BlockSpec:
    setting = Setting(source="file:/a", config={"x": 1}, workspace="file:/b", compute_dtype="float32", device="cpu")
    fields: dict[str, Any] = {
        "setting": setting,
        "index": 0,
        "tensors": {"w": ONE},
        "inputs": (Blob(sha256=ONE, size=1),),
        "recipe": recipe(),
        "propagate": "original",
        "tokens": ONE,
    }
    return BlockSpec(**{**fields, **changed})


def placed(**changed: Any) -> Callable[[], BlockSpec]:
    """A block of another setting. Hidden states that enter it are other ones then."""
    inputs = (Blob(sha256=OTHER, size=1),)
    return lambda: block(setting=block().setting.model_copy(update=changed), inputs=inputs)


def changed(**fields: Any) -> Callable[[], BlockSpec]:
    return lambda: block(**fields)


CHANGES: dict[str, tuple[Callable[[], BlockSpec], str]] = {
    "weights": (changed(tensors={"w": OTHER}), "weights: not the same"),
    "calibration tokens": (
        changed(tokens=OTHER, inputs=(Blob(sha256=OTHER, size=1),)),
        "calibration tokens: not the same",
    ),
    INPUTS: (changed(inputs=(Blob(sha256=OTHER, size=1),)), f"{INPUTS}: not the same"),
    "config.json": (placed(config={"x": 2}), "config.json: not the same"),
    "calibration.compute_dtype": (
        placed(compute_dtype="bfloat16"),
        "calibration.compute_dtype: float32 before, bfloat16 now",
    ),
    "device": (placed(device="cuda"), "device: cpu before, cuda now"),
    "rotation": (placed(rotation=Rotation()), "rotation: not the same"),
    "calibration.propagate": (
        changed(propagate="compressed"),
        "calibration.propagate: original before, compressed now",
    ),
    "calibration.segment_blocks": (
        changed(since=2, inputs=(Blob(sha256=OTHER, size=1),)),
        "calibration.segment_blocks: none before, a segment from block 2 now",
    ),
    "calibration.experts": (changed(experts=ExpertCalibration()), "calibration.experts: not the same"),
    "calibration.drawn": (changed(drawn_from=1), "calibration.drawn: none before, shards from 1 now"),
    "calibration.held_out": (
        changed(held_out_from=1),
        "calibration.held_out: none before, shards from 1 now",
    ),
    "recipe.weights": (
        changed(recipe=recipe(weights={"bits": 3, "quantizer": {"kind": "rtn"}})),
        "recipe.weights: not the same",
    ),
    "recipe.activations": (changed(recipe=recipe(activations={"bits": 8})), "recipe.activations: not the same"),
    "recipe.compensation": (
        changed(recipe=recipe(compensation={"kind": "svd", "rank": {"count": 2}})),
        "recipe.compensation: not the same",
    ),
    "recipe.residual": (changed(recipe=recipe(residual={})), "recipe.residual: not the same"),
    "recipe.smoothing": (
        changed(recipe=recipe(transforms=[{"kind": "smoothing"}])),
        "recipe.smoothing: not the same",
    ),
    "recipe.tuning": (changed(recipe=recipe(tuning={})), "recipe.tuning: not the same"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_part_that_changes_alone_is_named_alone(part: str) -> None:
    make, text = CHANGES[part]
    before, now = made_from(block()), made_from(make())
    assert differing(before, now) == [part]
    assert change(part, before[part], now[part]) == text
    assert make().key() != block().key()


def test_every_part_is_in_this_table_or_is_a_version() -> None:
    others = {"numerics", "torch", "transformers", "tokens per shard", "tokens per piece"}
    parts = {part for part in made_from(block()) if not part.startswith("version of ")}
    assert parts - others == CHANGES.keys()


def test_a_recipe_has_no_field_that_is_in_no_part() -> None:
    assert {f"recipe.{field}" for field in ModuleRecipe.model_fields} <= made_from(block()).keys()


@pytest.mark.parametrize(
    ("library", "text"),
    [("torch", "torch: 0.9 before, {now} now"), ("transformers", "transformers: 0.9 before, {now} now")],
)
def test_a_library_is_named_with_both_versions(library: str, text: str) -> None:
    now = made_from(block())
    before = {**now, library: "0.9"}
    assert differing(before, now) == [library]
    assert change(library, before[library], now[library]) == text.format(now=keys.numerics()[library])


def test_numerics_and_versions_of_methods_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gptq = block(recipe=recipe(weights={"bits": 4, "quantizer": {"kind": "gptq"}}))
    before, rtn = made_from(gptq), made_from(block())
    monkeypatch.setattr(GPTQ, "VERSION", GPTQ.VERSION + 1)
    assert differing(before, made_from(gptq)) == ["version of GPTQ"]
    assert differing(rtn, made_from(block())) == []
    # A method that only one of them uses is another recipe, and no other version.
    assert differing(rtn, made_from(gptq)) == ["recipe.weights"]
    monkeypatch.setattr(keys, "NUMERICS", keys.NUMERICS + 1)
    assert differing(rtn, made_from(block())) == ["numerics"]


def test_a_raise_of_the_rotations_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rotated = placed(rotation=Rotation())
    before = made_from(rotated())
    monkeypatch.setattr(Rotation, "VERSION", Rotation.VERSION + 1)
    assert differing(before, made_from(rotated())) == ["version of Rotation"]


def test_what_is_not_known_is_not_compared() -> None:
    known = made_from(block())
    outline = made_from(block(tensors={}, inputs=(), tokens=""))
    assert known.keys() - outline.keys() == {"weights", "calibration tokens", INPUTS}
    assert differing(known, outline) == []


def test_no_part_looks_like_the_name_of_a_blob() -> None:
    """A prune would keep what it names."""
    assert not [value for value in made_from(block()).values() if re.fullmatch(r"[0-9a-f]{64}", value)]
