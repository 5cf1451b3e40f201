"""Canonical JSON and digests: equal values, equal bytes; nothing that JSON cannot say."""

from __future__ import annotations

import hashlib
import math
from importlib import metadata

import pytest

from counterweight.workers import keys
from counterweight.workers.config import Method
from counterweight.workers.keys import LIBRARIES, canonical_json, digest, numerics, versions
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.methods.scales import MeanSquare
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.parallel import PIECE_TOKENS
from counterweight.workers.recipe import Recipe
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.setting import Setting


def test_order_and_spacing_do_not_matter() -> None:
    assert canonical_json({"b": [1, 2.5], "a": {"y": None, "x": True}}) == b'{"a":{"x":true,"y":null},"b":[1,2.5]}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_order_of_a_list_matters() -> None:
    assert digest([1, 2]) != digest([2, 1])


@pytest.mark.parametrize(("one", "other"), [(1, "1"), (1, True), (None, "null"), ([], {}), (0, False), ("a", ["a"])])
def test_different_values_have_different_digests(one: object, other: object) -> None:
    assert digest(one) != digest(other)


def test_the_digest_is_the_sha256_of_the_bytes() -> None:
    assert digest(["é"]) == hashlib.sha256(b'["\\u00e9"]').hexdigest()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"a": value})


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}])
def test_what_is_no_json_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        digest(value)


def test_numerics_name_our_revision_and_the_libraries() -> None:
    assert numerics() == {
        "counterweight": keys.NUMERICS,
        "piece_tokens": PIECE_TOKENS,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }
    assert set(LIBRARIES) < set(numerics())


RTN, ROTATION = {"kind": "rtn"}, {"kind": "rotation"}


class TestVersions:
    def test_of_every_method_in_a_recipe_however_deep(self) -> None:
        recipe = Recipe.model_validate(
            {
                "transforms": [ROTATION, {"kind": "smoothing"}],
                "weights": {"quantizer": RTN},
                "activations": {"bits": 8},
                "compensation": {"kind": "svd"},
                "tuning": {},
                "residual": {},
                "overrides": [{"match": "*", "compensation": {"kind": "none"}}],
            }
        )
        methods = "AbsoluteMaximum Activations NoCompensation RTN Residual Rotation SVD Smoothing Tuning"
        assert set(versions(recipe)) == set(methods.split())

    def test_of_mappings_and_of_nothing(self) -> None:
        expected = {"GPTQ": GPTQ.VERSION, "MeanSquare": MeanSquare.VERSION}
        assert versions({"one": [GPTQ()], "other": None}) == expected
        assert versions(None) == {}

    def test_every_method_has_one_of_its_own_under_a_name_of_its_own(self) -> None:
        def leaves(kind: type[Method]) -> list[type[Method]]:
            below = kind.__subclasses__()
            return [leaf for part in below for leaf in leaves(part)] if below else [kind]

        found = leaves(Method)
        assert {GPTQ, MeanSquare, Rotation} < set(found)
        assert all(isinstance(vars(kind)["VERSION"], int) for kind in found)
        assert len({kind.__name__ for kind in found}) == len(found)

    def test_a_raise_changes_the_keys_of_blocks_that_use_the_method_and_no_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gptq, rtn = _block({"kind": "gptq"}), _block(RTN)
        before = gptq.key(), rtn.key(), gptq.calibrate_key()
        monkeypatch.setattr(GPTQ, "VERSION", GPTQ.VERSION + 1)
        assert gptq.key() != before[0]
        assert (rtn.key(), gptq.calibrate_key()) == before[1:]

    def test_a_raise_of_the_rotations_changes_every_key_of_rotated_models(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rotated, plain = _block(RTN, Rotation()), _block(RTN)
        before = rotated.key(), rotated.calibrate_key(), plain.key()
        monkeypatch.setattr(Rotation, "VERSION", Rotation.VERSION + 1)
        assert rotated.key() != before[0]
        assert rotated.calibrate_key() != before[1]
        assert plain.key() == before[2]


def _block(quantizer: dict[str, str], rotation: Rotation | None = None) -> BlockSpec:
    """A block of one linear."""
    part = Recipe.model_validate({"weights": {"quantizer": quantizer}}).for_module("model.layers.0.mlp.up_proj")
    assert part is not None
    setting = Setting(
        source="file:/a", config={}, workspace="file:/b", compute_dtype="float32", device="cpu", rotation=rotation
    )
    return BlockSpec(
        setting=setting, index=0, tensors={}, inputs=(), recipe={"mlp.up_proj": part}, propagate="original"
    )
