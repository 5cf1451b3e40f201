"""What a manifest's recipe means for the linears of a model, and what of it the model cannot give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache

from counterweight.pipeline.manifest import Calibration, Validation
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.residual_tuner import afford
from counterweight.workers.errors import CheckpointError, ManifestError
from counterweight.workers.metrics import METRICS
from counterweight.workers.recipe import ModuleRecipe, Recipe


def block_recipe(source: ModelSource, index: int, recipe: Recipe) -> dict[str, ModuleRecipe]:
    """Linear (name in the block) -> what applies to it; kept linears are absent.

    Patterns of the recipe are matched against the name as the artifact stores it. Latency budgets are resolved here, budgets
    of bits by `allocation`, which has to look at the weights.
    """
    linears = linears_of(source, index)
    asked = {name: recipe.for_module(stored_name(source, index, name)) for name in linears}
    result = {name: _shared(part) for name, part in asked.items() if part is not None}
    return afford(result, {name: linears[name] for name in result})


@lru_cache(maxsize=1024)
def _shared(part: ModuleRecipe) -> ModuleRecipe:
    """One object for equal recipes: a model has tens of thousands of linears, and a kilobyte for each would be felt."""
    return part


def linears_of(source: ModelSource, index: int) -> dict[str, tuple[int, int]]:
    """Linear of a block (name in the block) -> its weight's [out, in]."""
    shapes = source.layout.block_parameters(index)
    return {name: _matrix(shapes[f"{name}.weight"]) for group in source.layout.block_linears(index) for name in group}


def stored_name(source: ModelSource, index: int, name: str) -> str:
    """Full name of a block's linear, as the artifact stores it."""
    return source.layout.module_name(index, name)


def check_recipe(recipe: Recipe, source: ModelSource) -> None:
    """ManifestError for patterns that match no linear, and for a rotation that the family cannot take."""
    _check_overrides(recipe, source)
    _check_rotation(recipe, source)


def check_gates_apply(validation: Validation | None, source: ModelSource) -> None:
    """ManifestError for bounds on what a model without experts does not have."""
    if validation is None or source.layout.experts:
        return
    for field, gates in (("gates", validation.gates), ("prefill_gates", validation.prefill_gates)):
        for metric in METRICS:
            if metric.sparse and getattr(gates, metric.gate, None) is not None:
                raise ManifestError(
                    f"spec.validation.{field}.{metric.gate}: expected null: {source.uri} has no experts"
                )
    sparse = {metric.name for metric in METRICS if metric.sparse}
    for index, bound in enumerate(validation.bounds):
        if bound.metric in sparse:
            raise ManifestError(
                f"spec.validation.bounds.{index}.metric: {bound.metric!r}: expected another: {source.uri} has no experts"
            )


def check_drawn(calibration: Calibration, source: ModelSource, recipes: Iterable[Mapping[str, ModuleRecipe]]) -> None:
    """ManifestError for windows that are drawn for experts where none is compressed. recipes: of all blocks."""
    if calibration.drawn and not any(map(calibration.experts_among, recipes)):
        raise ManifestError(
            f"spec.calibration.drawn: {calibration.drawn}: expected 0: the recipe compresses no expert of {source.uri}"
        )


def check_block(source: ModelSource, index: int, recipe: Mapping[str, ModuleRecipe], propagate: str) -> None:
    """ManifestError, listing them, for what the recipe asks of a block's linears and their shapes cannot give."""
    problems: list[str] = []
    linears = linears_of(source, index)
    for name, part in recipe.items():
        rows, columns = linears[name]
        where = stored_name(source, index, name)
        if (problem := part.weights.problem(rows, columns)) is not None:
            problems.append(f"spec.recipe.weights.{problem} of {where}")
        tiles = None if part.activations is None else part.activations.group_size
        if tiles is not None and columns % tiles:
            problems.append(
                f"spec.recipe.activations.group_size: {tiles}: expected a divisor of {columns}, the input of {where}"
            )
        idle = part.activations is None and propagate == "original"
        if part.weights.regresses is not None and idle:
            problems.append(
                f"spec.recipe.weights.{part.weights.regresses}: expected plain, which is the same here: without quantized "
                "activations and with calibration.propagate original, codes see the original's input"
            )
        problem = part.compensation.problem(rows, columns)
        if problem is not None:
            problems.append(f"spec.recipe.compensation: {where} [{rows}, {columns}]: {problem}")
    if problems:
        raise ManifestError("\n".join(problems[:20]))


def _check_rotation(recipe: Recipe, source: ModelSource) -> None:
    if recipe.rotation is None:
        return
    layout = source.layout
    problem = recipe.rotation.problem(layout.family, layout.model_type)
    if problem is not None:
        raise ManifestError(f"spec.recipe.transforms: {problem}")
    if recipe.rotation.residual and layout.family.wrapper is not None:
        _check_projector(source, layout.family.wrapper.writes)


def _check_projector(source: ModelSource, writers: tuple[str, ...]) -> None:
    """CheckpointError where what writes the stream beside the text model cannot be rotated with it."""
    entries = [source.checkpoint.entry(name) for name in source.beside if source.layout.writes_beside(name)]
    if not entries and source.beside:
        raise CheckpointError(
            f"{source.uri}: no weight of {', '.join(writers)}: expected it, to be rotated with the text model"
        )
    for entry in entries:
        if not entry.dtype.is_floating_point or entry.shape[:1] != (source.layout.hidden_size,):
            raise CheckpointError(
                f"{source.uri}: {entry.file}: tensor {entry.name}: {entry.dtype} of shape {list(entry.shape)}: "
                f"expected floats with {source.layout.hidden_size} rows, to be rotated with the text model"
            )


def _check_overrides(recipe: Recipe, source: ModelSource) -> None:
    """A pattern that matches no module would do nothing: an error, not a log line."""
    names = {
        stored_name(source, index, name)
        for index in range(source.layout.blocks)
        for group in source.layout.block_linears(index)
        for name in group
    } | {"lm_head"}
    patterns = [(f"spec.recipe.overrides.{i}.match", item.match) for i, item in enumerate(recipe.overrides)]
    patterns += [(f"spec.recipe.keep.{i}", pattern) for i, pattern in enumerate(recipe.keep)]
    idle = [
        f"{field}: {pattern!r}: matches no linear layer of the model, expected a glob such as '*.mlp.down_proj'"
        for field, pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if idle:
        raise ManifestError("\n".join(idle))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return (rows, columns)
