"""The tuner against the paper's knee and table, against exhaustive search on small tables, and phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise, product
from math import ceil

import pytest

from counterweight.pipeline.residual_tuner import (
    DEVICES,
    Choice,
    Profile,
    Shape,
    afford,
    knee,
    modelled,
    points_to_measure,
    thread_block_candidates,
    tune,
)
from counterweight.workers.methods.residual import Bandwidths
from counterweight.workers.recipe import Recipe

# Llama-3-8B: qkv, o, gate-up, down.
LLAMA = {
    "qkv": Shape(rows=6144, columns=4096),
    "o": Shape(rows=4096, columns=4096),
    "gate_up": Shape(rows=28672, columns=4096),
    "down": Shape(rows=4096, columns=14336),
}

# Table 3 of the paper, AWQ 3 bits, largest and smallest k_chunk of the four layers for a budget of 2.5 % and of 20 %.
PUBLISHED = {
    "RTX 4090": ((4, 9), (15, 16)),
    "RTX 4080 Super": ((5, 9), (24, 27)),
    "RTX 4070 Super": ((25, 26), (41, 44)),
    "RTX 4070 Mobile": ((38, 40), (49, 50)),
    "RTX 4050 Mobile": ((55, 58), (68, 70)),
}


def profiles(bits: float, device: Bandwidths) -> dict[str, Profile]:
    return {name: modelled(shape, bits, device) for name, shape in LLAMA.items()}


def measured(
    time: Callable[[int, int], float], blocks: tuple[int, ...] = (1,), most: int = 20, base: float = 1.0, size: int = 8
) -> Profile:
    """A layer [size, size] whose times are those of a function of thread blocks and k_chunk."""
    table = {(b, k): time(b, k) for b in blocks for k in range(1, most + 1)}
    return Profile(shape=Shape(rows=size, columns=size), base=base, compensated=table)


def k_chunks(choices: Mapping[str, Choice]) -> dict[str, int]:
    return {name: choice.k_chunk for name, choice in choices.items()}


@pytest.mark.parametrize("name", sorted(DEVICES))
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_model_has_the_papers_knee(name: str, bits: int) -> None:
    """Up to 1024 / R * bits / 4 a layer takes as long as without residuals, beyond it longer."""
    device = DEVICES[name]
    bandwidths = device.dram / device.pcie
    assert knee(bits, device) == pytest.approx(1024 / bandwidths * bits / 4)
    for shape in LLAMA.values():  # widths are multiples of 1024, so that every k_chunk is met exactly
        profile = modelled(shape, bits, device)
        for (_, k_chunk), time in profile.compensated.items():
            assert (time == profile.base) == (k_chunk <= knee(bits, device))


def test_modelled_times_are_bytes_over_bandwidth() -> None:
    profile = modelled(Shape(rows=4096, columns=2048), 4, Bandwidths(dram=1000, pcie=10, multiprocessors=20))
    assert profile.base == pytest.approx(4096 * 2048 / 2 / 1e12)
    assert profile.compensated[1, 20] == pytest.approx(40 * 4096 / 2 / 1e10)


def test_modelled_times_know_no_multiprocessors() -> None:
    plans = [
        tune(profiles(4, Bandwidths(dram=1000, pcie=32, multiprocessors=count)), 0.05) for count in (1, 8, 128, 10_000)
    ]
    assert all(k_chunks(plan.choices) == k_chunks(plans[0].choices) for plan in plans)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("RTX 4090", 32),
        ("RTX 4080 Super", 23),
        ("RTX 4070 Super", 16),
        ("RTX 4070 Mobile", 16),
        ("RTX 4050 Mobile", 12),
    ],
)
def test_devices_have_the_papers_bandwidth_ratio(name: str, ratio: int) -> None:
    assert round(DEVICES[name].dram / DEVICES[name].pcie) == ratio


@pytest.mark.parametrize("shape", LLAMA.values(), ids=LLAMA)
@pytest.mark.parametrize("multiprocessors", [20, 132])
def test_thread_blocks_worth_measuring_waste_none(shape: Shape, multiprocessors: int) -> None:
    device = Bandwidths(dram=100, pcie=10, multiprocessors=multiprocessors)
    candidates = thread_block_candidates(shape, device)
    strips, chunks = shape.rows // 256, shape.columns // 1024
    # Of all numbers of blocks whose longest queue of strips is the same, the smallest does the same work with least.
    queues = {n: ceil(strips / n) for n in range(1, strips + 1)}
    smallest = {n for n, queue in queues.items() if queues.get(n - 1) != queue}
    expected = {n for n in smallest | set(range(1, chunks + 1)) if n <= multiprocessors}
    assert candidates == tuple(sorted(expected))


def test_points_reach_twice_the_knee_and_never_more_than_all_channels() -> None:
    device = DEVICES["RTX 4050 Mobile"]
    points = points_to_measure(LLAMA["o"], 3, device)
    assert {blocks for blocks, _ in points} == set(thread_block_candidates(LLAMA["o"], device))
    assert {k for _, k in points} == set(range(1, 129))
    near = Bandwidths(dram=10, pcie=10, multiprocessors=4)
    assert max(k for _, k in points_to_measure(LLAMA["o"], 4, near)) == 1024
    far = Bandwidths(dram=1e5, pcie=1, multiprocessors=4)
    assert {k for _, k in points_to_measure(LLAMA["o"], 2, far)} == {1}


def test_a_free_correction_is_taken_up_to_the_knee_and_no_further() -> None:
    device = DEVICES["RTX 4070 Super"]
    plan = tune(profiles(3, device), 0)
    assert set(k_chunks(plan.choices).values()) == {int(knee(3, device))}
    assert plan.slowdown == 0


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_model_bounds_what_the_paper_measured_and_is_close_on_laptops(name: str) -> None:
    for budget, (smallest, largest) in zip((0.025, 0.2), PUBLISHED[name], strict=True):
        found = k_chunks(tune(profiles(3, DEVICES[name]), budget).choices).values()
        assert largest <= max(found)
        assert not name.endswith("Mobile") or smallest >= 0.75 * min(found)


@pytest.mark.parametrize("budget", [0.0, 0.025, 0.1, 0.2])
def test_the_plan_keeps_the_budget_and_leaves_no_step_that_fits(budget: float) -> None:
    given = profiles(4, DEVICES["RTX 4080 Super"])
    baseline = sum(profile.base for profile in given.values())

    def total(changed: str | None = None) -> float:
        return sum(
            given[name].time(choice.thread_blocks, choice.k_chunk + (name == changed))
            for name, choice in plan.choices.items()
        )

    plan = tune(given, budget)
    assert plan.slowdown == pytest.approx(total() / baseline - 1)
    assert total() <= (1 + budget) * baseline
    assert all(total(name) > (1 + budget) * baseline for name in given)


def test_a_larger_budget_never_corrects_less() -> None:
    found = [k_chunks(tune(profiles(3, DEVICES["H200"]), budget).choices) for budget in (0, 0.05, 0.3)]
    assert all(less[name] <= more[name] for less, more in pairwise(found) for name in less)
    assert found[0] != found[-1]


def test_the_cap_with_the_largest_common_k_chunk_wins() -> None:
    """Few blocks fetch slowly, many take the base's multiprocessors; in between lies the best."""
    blocks = (2, 4, 8)

    def time(b: int, k: int) -> float:
        return max(1 + b / 100, k / b)

    given = {name: measured(time, blocks) for name in "ab"}
    plan = tune(given, 0.05)  # 8 blocks cost 8 % by themselves; 4 blocks fetch 4 rows in time, 2 blocks 2
    assert {choice.thread_blocks for choice in plan.choices.values()} == {4}
    assert set(k_chunks(plan.choices).values()) == {4}
    assert plan.slowdown == pytest.approx(0.04)


def test_of_two_caps_with_the_same_k_chunk_the_faster_wins() -> None:
    given = {"a": measured(lambda b, k: 1 + k / 10 + (0.01 if b == 2 else 0), (2, 3))}
    assert tune(given, 0.25).choices["a"] == Choice(k_chunk=2, thread_blocks=3)


def test_each_layer_takes_its_largest_number_of_blocks_under_the_cap() -> None:
    def time(b: int, k: int) -> float:
        return 1 + k / 100 / b

    given = {"narrow": measured(time, (1, 2, 4)), "wide": measured(time, (1, 3, 16))}
    choices = tune(given, 0.01).choices
    assert (choices["narrow"].thread_blocks, choices["wide"].thread_blocks) == (4, 16)


def test_what_is_left_of_the_budget_goes_where_a_step_is_cheap() -> None:
    steep, flat = measured(lambda _, k: 1 + k / 10), measured(lambda _, k: 1 + k / 100)
    plan = tune({"steep": steep, "flat": flat}, 0.15)  # 0.30 in all: common k_chunk 2 takes 0.22, 8 flat steps the rest
    assert k_chunks(plan.choices) == {"steep": 2, "flat": 10}
    assert plan.slowdown == pytest.approx(0.15)


def test_every_round_steps_every_layer_that_fits_the_cheapest_first() -> None:
    given = {"a": measured(lambda _, k: 1 + k / 99), "z": measured(lambda _, k: 1 + k / 100)}
    assert k_chunks(tune(given, 0.0305).choices) == {"a": 3, "z": 3}
    assert k_chunks(tune(given, 0.0355).choices) == {"a": 3, "z": 4}


def test_on_two_layers_no_pair_of_more_channels_fits() -> None:
    """Exhaustively: whatever corrects at least as many channels of both layers, and more of one, exceeds the budget."""
    given = {
        "a": measured(lambda _, k: max(1.0, 0.13 * k), most=16),
        "b": measured(lambda _, k: max(2.0, 0.31 * k), most=16, base=2.0, size=16),
    }
    for budget in (0.0, 0.03, 0.1, 0.4):
        found = k_chunks(tune(given, budget).choices)
        for k_a, k_b in product(range(17), repeat=2):
            if k_a >= found["a"] and k_b >= found["b"] and (k_a, k_b) != (found["a"], found["b"]):
                assert given["a"].time(1, k_a) + given["b"].time(1, k_b) > 3 * (1 + budget)


def test_the_smallest_layer_is_left_out_when_nothing_fits() -> None:
    """A launch costs the small layer a fifth of its time, the large one next to nothing."""
    given = {
        "large": measured(lambda _, k: 10 + k / 100, base=10.0, size=64),
        "small": measured(lambda _, k: 1.2 + k / 100, size=8),
    }
    plan = tune(given, 0.01)
    assert plan.choices["small"] == Choice(k_chunk=0, thread_blocks=0)
    assert plan.choices["large"] == Choice(k_chunk=11, thread_blocks=1)


def test_nothing_is_corrected_when_no_layer_affords_it() -> None:
    plan = tune({"a": measured(lambda _, k: 2.0 + k), "b": measured(lambda _, k: 2.0 + k)}, 0.1)
    assert k_chunks(plan.choices) == {"a": 0, "b": 0}
    assert plan.slowdown == 0


def test_a_plan_stays_within_what_was_measured() -> None:
    given = {"short": measured(lambda _, k: 1.0, most=5), "long": measured(lambda _, k: 1.0, most=9)}
    assert k_chunks(tune(given, 1).choices) == {"short": 5, "long": 9}
    nothing = Profile(shape=Shape(rows=8, columns=8), base=1.0, compensated={})
    assert k_chunks(tune({"a": nothing}, 1).choices) == {"a": 0}


def test_requests_without_meaning_are_refused() -> None:
    given = {"a": measured(lambda _, k: 1.0)}
    with pytest.raises(ValueError, match="profiles: none"):
        tune({}, 0.1)
    for budget in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="budget: "):
            tune(given, budget)
    for time in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a: holds a time that is not positive"):
            tune({"a": measured(lambda _, k, time=time: time)}, 0.1)  # type: ignore[misc]


def recipe_of(**residual: object) -> Recipe:
    return Recipe.model_validate({"weights": {"bits": 3}, "residual": residual})


def test_a_recipes_budget_becomes_what_each_layer_affords() -> None:
    shapes = {name: (shape.rows, shape.columns) for name, shape in LLAMA.items()}
    numbers = {}
    for slowdown in (0.0, 0.1):
        recipe = recipe_of(channels_per_chunk={"slowdown": slowdown, "device": "RTX 4070 Super"})
        part = recipe.for_module("model.layers.0.mlp.down_proj")
        assert part is not None
        found = afford(dict.fromkeys(LLAMA, part), shapes)
        profiles = {name: modelled(shape, 3, DEVICES["RTX 4070 Super"]) for name, shape in LLAMA.items()}
        planned = tune(profiles, slowdown).choices
        numbers[slowdown] = {name: own.residual.per_chunk for name, own in found.items() if own.residual is not None}
        assert numbers[slowdown] == {name: choice.k_chunk for name, choice in planned.items()}
    assert all(numbers[0.1][name] > numbers[0.0][name] for name in LLAMA)


def test_bandwidths_may_be_measured_ones_and_a_layer_that_affords_nothing_gets_no_store() -> None:
    slow = {"dram": 4000, "pcie": 0.5, "multiprocessors": 20}
    budget = {"slowdown": 0, "device": slow}
    part = recipe_of(channels_per_chunk=budget).for_module("model.layers.0.mlp.down_proj")
    assert part is not None
    found = afford({"down": part, "kept": part.model_copy(update={"residual": None})}, {"down": (64, 64)})
    assert found["down"].residual is None
    assert found["kept"].residual is None


def test_a_number_of_channels_is_left_as_it_is() -> None:
    part = recipe_of(channels_per_chunk=5).for_module("model.layers.0.mlp.down_proj")
    assert part is not None
    assert afford({"down": part}, {"down": (64, 64)}) == {"down": part}
