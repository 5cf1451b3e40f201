"""`--set` on lists: an item by its index, a further one by `+`."""

from __future__ import annotations

from typing import Any

import pytest

from counterweight.pipeline.manifest.overrides import apply_overrides
from counterweight.workers.errors import ManifestError


@pytest.mark.parametrize(
    ("before", "overrides", "after"),
    [
        ({"keep": ["a"]}, ["keep.+=b"], {"keep": ["a", "b"]}),
        ({"keep": ["a"]}, ["keep.0=b"], {"keep": ["b"]}),
        ({"keep": ["a"]}, ["keep.+=b", "keep.+=c", "keep.1=d"], {"keep": ["a", "d", "c"]}),
        ({}, ["keep.+=b"], {"keep": ["b"]}),
        ({"keep": None}, ["keep.+=b"], {"keep": ["b"]}),
        (
            {},
            ["overrides.+.match=x", "overrides.0.weights.bits=8"],
            {"overrides": [{"match": "x", "weights": {"bits": 8}}]},
        ),
        ({"keep": ["a"]}, ["keep=[x, y]"], {"keep": ["x", "y"]}),
    ],
)
def test_items_are_changed_and_added(before: dict[str, Any], overrides: list[str], after: dict[str, Any]) -> None:
    apply_overrides(before, overrides)
    assert before == after


def test_the_path_of_a_further_item_has_its_index() -> None:
    assert apply_overrides({"keep": ["a"]}, ["keep.+=b"]) == [("keep", 1)]


def test_an_index_behind_the_last_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"keep is a list of 1: '3': expected an index from 0, or \+"):
        apply_overrides({"keep": ["a"]}, ["keep.3=b"])
