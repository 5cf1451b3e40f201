"""What a compressed block is made from, by names for people: kept in its record, so that a later run can say what is not the
same where the record is not the one that it looks for."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.keys import digest, numerics, versions
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.tasks.block import BlockSpec

INPUTS = "hidden states that enter the block"
"""They follow from all parts of the blocks before: when they alone differ, something there does."""

ALONE = "run of its own"
"""Of a run that shares no work: nobody else finds what it finished."""

DIGITS = 16
"""Of a digest. A name of 64 digits in a record is that of a blob that it needs (`pipeline.prune`)."""

_DIGEST = "sha256:"


def made_from(spec: BlockSpec) -> dict[str, str]:
    """Part -> its value, or the digest of what is too long to be shown; what the spec does not know yet is left out. Specs
    with equal keys have equal parts, and those with equal parts have equal keys, as far as these digits go."""
    setting = spec.setting
    shared = setting.determines()
    parts = {
        "config.json": _short(shared["config"]),
        "calibration.compute_dtype": setting.compute_dtype,
        "calibration.propagate": spec.propagate,
        "device": setting.device,
        "rotation": "none" if shared["rotation"] is None else _short(shared["rotation"]),
        "tokens per shard": str(shared["shard_tokens"]),
    }
    computing = numerics()
    parts["numerics"] = str(computing.pop("counterweight"))
    parts["tokens per piece"] = str(computing.pop("piece_tokens"))
    parts |= {library: str(version) for library, version in computing.items()}
    recipe = {name: part.model_dump(mode="json") for name, part in spec.recipe.items()}
    for field in ModuleRecipe.model_fields:
        parts[f"recipe.{field}"] = _short({name: part[field] for name, part in recipe.items()})
    for method, version in versions((spec.recipe, setting.rotation, spec.experts)).items():
        parts[f"version of {method}"] = str(version)
    parts["calibration.experts"] = "none" if spec.experts is None else _short(spec.experts.model_dump(mode="json"))
    parts["calibration.drawn"] = "none" if spec.drawn_from is None else f"shards from {spec.drawn_from}"
    parts["calibration.held_out"] = "none" if spec.held_out_from is None else f"shards from {spec.held_out_from}"
    parts["calibration.segment_blocks"] = f"a segment from block {spec.since}" if spec.since else "none"
    if spec.tensors:
        parts["weights"] = _short(dict(spec.tensors))
    if spec.tokens:
        parts["calibration tokens"] = _short(spec.tokens)
    if spec.inputs:
        parts[INPUTS] = _short([blob.sha256 for blob in (*spec.inputs, *spec.original_inputs)])
    if setting.run:
        parts[ALONE] = setting.run
    return parts


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts that are known on both sides and are not the same; `INPUTS` only where nothing else tells why these differ.
    A method that only one side uses is no difference of versions: the recipe is another."""
    found = [name for name, value in now.items() if before.get(name, value) != value]
    return [name for name in found if name != INPUTS] or found


def change(part: str, before: str, now: str) -> str:
    """A part that is not the same, for people."""
    if before.startswith(_DIGEST) or now.startswith(_DIGEST):
        return f"{part}: not the same"
    return f"{part}: {before} before, {now} now"


def _short(value: object) -> str:
    return f"{_DIGEST}{digest(value)[:DIGITS]}"
