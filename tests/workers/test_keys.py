"""Canonical JSON and digests: equal values, equal bytes; nothing that JSON cannot say."""

from __future__ import annotations

import hashlib
import math
from importlib import metadata

import pytest

from counterweight.workers import keys
from counterweight.workers.keys import LIBRARIES, canonical_json, digest, numerics


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
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }
    assert set(LIBRARIES) < set(numerics())
