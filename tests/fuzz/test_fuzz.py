"""The short form of `make fuzz`: some seeds of every target."""

from __future__ import annotations

import random
from functools import partial

import pytest

from tests.fuzz.costs import MAX_BYTES, metered
from tests.fuzz.targets import Fuzz
from tests.patience import MAX_CPU, cpu_seconds

SEEDS = {"tokenizer": 25, "dataset": 12, "artifact": 25, "stream": 60, "text": 200, "manifest": 150}
"""How many of a target's; of the others `USUAL`."""
USUAL = 40

REGRESSIONS = [("config", 117), ("config", 526)]
"""Targets and seeds that once failed: control characters in what transformers says of a config, an IndexError of transformers.
A change of `mutations.py` changes what a seed makes: look then whether these still fail without what mended them."""

NAMES = ["config", "weights", "tokenizer", "text", "stream", "dataset", "manifest", "artifact"]


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    made = Fuzz(tmp_path_factory.mktemp("fuzz"))
    assert made.models
    assert made.published.exists()
    return made


def _attack(fuzz: Fuzz, name: str, seed: int) -> None:
    fuzz.targets[name](random.Random(seed))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_inputs_are_refused_or_right(fuzz: Fuzz, name: str) -> None:
    most = fuzz.normal(name).cpu + MAX_CPU
    for seed in range(SEEDS.get(name, USUAL)):
        attack = partial(_attack, fuzz, name, seed)
        with metered() as cost:
            assert cpu_seconds(attack, below=most) < most, seed
        assert cost.bytes < MAX_BYTES, seed


@pytest.mark.parametrize(("name", "seed"), REGRESSIONS)
def test_what_once_failed_is_refused_or_right(fuzz: Fuzz, name: str, seed: int) -> None:
    fuzz.targets[name](random.Random(seed))


def test_every_target_is_in_the_short_form(fuzz: Fuzz) -> None:
    assert list(fuzz.targets) == NAMES
