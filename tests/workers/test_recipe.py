"""What a recipe means for one module: keep, overrides in order, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from counterweight.workers.methods.compensations import LRC, SVD, AnyCompensation, NoCompensation
from counterweight.workers.methods.compensations.rank import CountRank
from counterweight.workers.methods.quantizers import GPTQ, RTN
from counterweight.workers.methods.weights import SignWeights, Weights
from counterweight.workers.recipe import ModuleRecipe, Recipe, solved_together

DOWN = "model.layers.0.mlp.down_proj"
QUERY = "model.layers.11.self_attn.q_proj"


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate({"weights": {"bits": 4, "group_size": 128}, **fields})


def resolved(found: Recipe, module: str) -> ModuleRecipe:
    part = found.for_module(module)
    assert part is not None
    return part


def test_without_overrides_every_module_gets_the_whole() -> None:
    found = recipe(activations={"bits": 8}, compensation={"kind": "svd"})
    for module in (DOWN, QUERY):
        part = resolved(found, module)
        assert part.weights == found.weights
        assert part.activations == found.activations
        assert part.compensation == found.compensation


def test_defaults() -> None:
    part = resolved(recipe(), DOWN)
    assert isinstance(part.weights.quantizer, GPTQ)
    assert part.weights.symmetric
    assert part.activations is None
    assert part.compensation == NoCompensation()


def test_an_override_replaces_what_it_names_where_it_matches() -> None:
    found = recipe(overrides=[{"match": "*.down_proj", "weights": {"bits": 8, "quantizer": {"kind": "rtn"}}}])
    down, query = resolved(found, DOWN), resolved(found, QUERY)
    assert (down.weights.bits, down.weights.group_size, down.weights.quantizer) == (8, None, RTN())
    assert down.compensation == found.compensation
    assert (query.weights.bits, query.weights.group_size) == (4, 128)


def test_later_overrides_win_field_by_field() -> None:
    found = recipe(
        overrides=[
            {"match": "*", "weights": {"bits": 8}, "compensation": {"kind": "svd"}},
            {"match": "*.layers.0.*", "weights": {"bits": 2}},
        ]
    )
    assert resolved(found, DOWN).weights.bits == 2
    assert isinstance(resolved(found, DOWN).compensation, SVD)
    assert resolved(found, QUERY).weights.bits == 8


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("*.down_proj", DOWN, True),
        ("down_proj", DOWN, False),
        ("model.layers.1.*", QUERY, False),
        ("model.layers.1*", QUERY, True),
        ("*.[qk]_proj", QUERY, True),
        ("*.Q_PROJ", QUERY, False),
        ("*", DOWN, True),
    ],
)
def test_patterns_are_globs_over_the_whole_name(pattern: str, module: str, matches: bool) -> None:
    found = recipe(keep=["lm_head", pattern])
    assert (found.for_module(module) is None) == matches
    assert found.keeps(module) == matches


def test_kept_modules_stay_kept_whatever_overrides_say() -> None:
    found = recipe(keep=["lm_head", "*.down_proj"], overrides=[{"match": "*.down_proj", "weights": {"bits": 8}}])
    assert found.for_module(DOWN) is None


def test_the_head_is_always_kept() -> None:
    assert recipe().for_module("lm_head") is None
    assert recipe(keep=["*_head"]).for_module("lm_head") is None
    with pytest.raises(ValidationError, match="expected a pattern for lm_head"):
        recipe(keep=[])


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": {"bits": 5}},
        {"weights": {"bits": 4, "group_size": 48}},
        {"weights": {"bits": 4, "quantizer": {"kind": "awq"}}},
        {"weights": {"bits": 4, "extra": 1}},
        {"activations": {"bits": 5}},
        {"compensation": {"kind": "magic"}},
        {"overrides": [{"match": "*"}]},
        {"overrides": [{"match": "", "weights": {"bits": 8}}]},
        {"overrides": [{"match": "x" * 201, "weights": {"bits": 8}}]},
        {"keep": ["lm_head", ""]},
        {"rotation": True},
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        recipe(**fields)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().weights = None  # type: ignore[assignment, misc]


def test_a_module_recipe_survives_json() -> None:
    part = resolved(recipe(compensation={"kind": "svd"}, activations={"bits": 8}), DOWN)
    assert ModuleRecipe.model_validate_json(part.model_dump_json()) == part


@pytest.mark.parametrize(
    ("compensation", "together"),
    [
        (NoCompensation(), [("q", "k", "v")]),
        (SVD(rank=CountRank(count=2), anticipation=0.5), [("q",), ("k", "v")]),
        (LRC(rank=CountRank(count=2)), [("q",), ("k", "v")]),
    ],
)
def test_linears_of_one_recipe_are_solved_together_unless_a_rank_depends_on_their_size(
    compensation: AnyCompensation, together: list[tuple[str, ...]]
) -> None:
    recipe = ModuleRecipe(weights=Weights(), activations=None, compensation=compensation)
    rows = {"q": 64, "k": 32, "v": 32}
    assert list(solved_together(dict.fromkeys(rows, recipe), rows)) == together


def test_linears_of_other_recipes_or_dependent_rows_are_solved_apart() -> None:
    four, two = (
        ModuleRecipe(weights=Weights(bits=bits), activations=None, compensation=NoCompensation()) for bits in (4, 2)
    )
    sign = ModuleRecipe(weights=SignWeights(format="sign"), activations=None, compensation=NoCompensation())
    alike = dict.fromkeys("qkv", 32)
    assert list(solved_together({"q": four, "k": two, "v": four}, alike)) == [("q", "v"), ("k",)]
    assert list(solved_together(dict.fromkeys("qkv", sign), alike)) == [("q",), ("k",), ("v",)]
