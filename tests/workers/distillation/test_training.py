"""Training of a tiny model's branches: that it wins, never loses, goes on where it was, and that every option counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.workers.distillation.training import (
    State,
    Text,
    Training,
    divergence,
    improves,
    measured,
    schedule,
)
from counterweight.workers.methods.distillation import Distillation
from tests.workers.distillation.students import Tiny, epoch, to_the_end

OPTIONS: dict[str, Any] = {"epochs": 2, "factor_rate": 1e-3, "scale_rate": 1e-3, "average": 0.5}
RUINOUS: dict[str, Any] = {"factor_rate": 10.0}


def training(tiny: Tiny, *, held_out: list[Text] | None = None, **options: Any) -> Training:
    texts = [tiny.text(8, seed=1), tiny.text(8, seed=2)] if held_out is None else held_out
    return Training(tiny.student, tiny.text(24), texts, Distillation.model_validate({**OPTIONS, **options}))


def trained(**options: Any) -> State:
    return to_the_end(training(Tiny(), **options))


def parts_of(tiny: Tiny) -> dict[str, Tensor]:
    """Everything that can be trained, as it would be stored."""
    found = dict(tiny.student.norms)
    parts: dict[str, Tensor] = {name: norm.detach().clone() for name, norm in found.items()}
    for name, linear in tiny.student.linears.items():
        stored = linear.stored()
        parts |= {f"{name}.{part}": tensor.clone() for part, tensor in stored.weight.parts.items()}
        if stored.low_rank is not None:
            parts |= {f"{name}.up": stored.low_rank.up.clone(), f"{name}.down": stored.low_rank.down.clone()}
    return parts


def same(one: State, other: State) -> bool:
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_divergence_is_that_of_the_definition() -> None:
    tiny = Tiny(dtype=torch.float64)
    student, text = tiny.student, tiny.text(3)
    hidden = torch.randn(text.targets.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    meant, own = student.original(text.targets), student.head(hidden)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=meant), torch.distributions.Categorical(logits=own)
    ).mean()
    assert float(divergence(student, hidden, text.targets)) == pytest.approx(float(expected), rel=1e-10)
    assert float(divergence(student, text.targets, text.targets)) == pytest.approx(0, abs=1e-12)


def test_measured_is_the_mean_over_all_tokens_whatever_the_batch() -> None:
    tiny = Tiny(dtype=torch.float64)
    text = tiny.text(7)
    assert measured(tiny.student, text, 3) == pytest.approx(measured(tiny.student, text, 7), rel=1e-12)


def test_training_wins_on_every_held_out_text() -> None:
    state = trained()
    assert state.best > 0
    start, best = state.divergences[0], state.divergences[state.best]
    assert all(after < before for before, after in zip(start, best, strict=True))
    assert state.losses[-1] < state.losses[0]


def test_what_is_kept_is_measured_as_it_is_stored() -> None:
    tiny = Tiny()
    texts = [tiny.text(8, seed=1)]
    run = training(tiny, held_out=texts)
    state = to_the_end(run)
    run.settle(state)
    tiny.student.round()
    assert measured(tiny.student, texts[0], 4) == state.divergences[state.best][0]


def test_training_that_only_loses_keeps_the_start() -> None:
    tiny = Tiny()
    before = parts_of(tiny)
    run = training(tiny, **RUINOUS)
    state = to_the_end(run)
    assert state.best == 0
    run.settle(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts_of(tiny).items())


def test_an_epoch_counts_only_where_no_text_gets_worse() -> None:
    start = (0.1, 0.2)
    assert improves((0.09, 0.2), start, start)
    assert not improves((0.01, 0.2001), start, start)
    assert not improves((math.nan, 0.1), start, start)
    assert improves((0.08, 0.18), (0.09, 0.19), start)
    assert not improves((0.09, 0.19), (0.08, 0.18), start)


def test_training_goes_on_from_a_state_to_the_same_bits() -> None:
    whole = trained(epochs=3, patience=3)
    run = training(Tiny(), epochs=3, patience=3)
    state = epoch(run, run.untrained())
    state = to_the_end(training(Tiny(), epochs=3, patience=3), state)
    assert same(whole, state)
    assert (whole.best, whole.divergences, whole.losses) == (state.best, state.divergences, state.losses)


def test_the_same_training_gives_the_same_bits() -> None:
    assert same(trained(), trained())


@pytest.mark.parametrize(
    "option",
    [
        {"epochs": 1},
        {"batch": 3},
        {"factors": False},
        {"scales": False},
        {"norms": False},
        {"factor_rate": 1e-4},
        {"scale_rate": 1e-4},
        {"warmup": 0.5},
        {"average": 0.0},
        {"ridge": 1.0},
        {"seed": 1},
        {"replicas": 2},
        {"replicas": 2, "rounds": 3},
    ],
    ids=lambda option: list(option)[-1],
)
def test_every_option_counts(option: dict[str, Any]) -> None:
    found, plain = trained(**option), trained(**({"replicas": 2} if "rounds" in option else {}))
    assert found.tensors.keys() != plain.tensors.keys() or not same(found, plain)


def test_patience_ends_training_that_does_not_win() -> None:
    assert trained(epochs=5, patience=2, **RUINOUS).epoch == 2
    assert trained(epochs=5, patience=3, **RUINOUS).epoch == 3


def test_a_strong_ridge_holds_the_factors() -> None:
    def moved(state: State) -> float:
        begun = training(Tiny()).untrained().tensors
        return sum(
            float((tensor - begun[name]).square().sum())
            for name, tensor in state.tensors.items()
            if name.endswith("/value")
        )

    assert moved(trained(ridge=100.0)) < 0.5 * moved(trained())


def test_the_average_is_that_of_the_steps() -> None:
    """Against a loop of our own: values after each step, from a training with one step an epoch."""
    tiny = Tiny()
    text = tiny.text(4)
    options = Distillation.model_validate({"epochs": 4, "batch": 4, "average": 0.3, "patience": 4})
    run = Training(tiny.student, text, [tiny.text(2, seed=1)], options)
    state = run.untrained()
    name = next(name for name in state.tensors if name.endswith("/value")).removesuffix("/value")
    average: Tensor = state.tensors[f"{name}/value"]
    for step in range(4):
        state = epoch(run, state)
        decay = min(0.3, (step + 1) / (step + 11))
        average = decay * average + (1 - decay) * state.tensors[f"{name}/value"]
        torch.testing.assert_close(state.tensors[f"{name}/average"], average, rtol=1e-6, atol=1e-8)


def test_steps_are_those_of_torchs_adam() -> None:
    tiny, other = Tiny(dtype=torch.float64), Tiny(dtype=torch.float64)
    text = tiny.text(12)
    options = Distillation.model_validate(
        {"epochs": 1, "batch": 4, "factor_rate": 1e-3, "scale_rate": 1e-3, "average": 0.0, "warmup": 0.0}
    )
    run = Training(tiny.student, text, [tiny.text(2, seed=1)], options)
    state = epoch(run, run.untrained())

    parameters = {name: parameter for name, (parameter, _) in other.student.trained(options).items()}
    optimizer = torch.optim.Adam(parameters.values(), betas=(0.9, 0.99), eps=1e-10)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for step, (ids, targets) in enumerate(text.batches(4, order)):
        optimizer.param_groups[0]["lr"] = 1e-3 * schedule(step, 3, 0.0)
        hidden = other.student.embed(ids)
        for block in other.student.blocks:
            hidden = block(hidden)
        optimizer.zero_grad()
        divergence(other.student, hidden, targets).backward()
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(state.tensors[f"{name}/value"], parameter.detach(), rtol=1e-9, atol=1e-12)


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 10
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert schedule(0, 4, 0.0) == 1.0
