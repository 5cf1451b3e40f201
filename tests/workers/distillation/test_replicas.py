"""Local SGD: parts of an epoch, the mean of states, and whole rounds against a plain loop of our own."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.workers.distillation.replicas import Part, averaged
from counterweight.workers.distillation.training import Text, Training, divergence, schedule
from counterweight.workers.methods.distillation import Distillation
from tests.workers.distillation.students import Tiny, to_the_end


def parts(count: int, options: Distillation, epoch: int = 1) -> list[Tensor]:
    places = product(range(options.rounds), range(options.replicas))
    return [Part(epoch=epoch, round=r, replica=i).sequences(count, options) for r, i in places]


@pytest.mark.parametrize(("count", "replicas", "rounds"), [(24, 2, 3), (25, 3, 2), (6, 3, 2), (7, 1, 1)])
def test_an_epoch_goes_over_every_sequence_once(count: int, replicas: int, rounds: int) -> None:
    options = Distillation(replicas=replicas, rounds=rounds, batch=2)
    found = parts(count, options)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(count))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1
    assert options.steps(count) == -(-max(sizes) // 2)


def test_every_epoch_has_an_order_of_its_own_and_one_replica_that_of_the_whole() -> None:
    one, several = Distillation(seed=5), Distillation(seed=5, replicas=2, rounds=2)
    for epoch in (1, 2):
        assert torch.equal(torch.cat(parts(12, several, epoch)), parts(12, one, epoch)[0])
    assert not torch.equal(parts(12, one, 1)[0], parts(12, one, 2)[0])


def test_steps_are_counted_through_rounds_and_epochs() -> None:
    options = Distillation(replicas=2, rounds=3, batch=4)
    first = [Part(epoch=e, round=r, replica=1).first_step(48, options) for e in (1, 2) for r in range(3)]
    assert first == [0, 2, 4, 6, 8, 10]


def test_the_mean_is_that_of_the_definition_and_of_one_state_its_own_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"a": torch.randn(5, 3, generator=generator), "b": torch.randn(2, generator=generator)} for _ in range(3)]
    before = copy.deepcopy(states)
    found = averaged(iter(states))
    for name in ("a", "b"):
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(averaged(states[:1])[name], states[0][name])
        assert all(torch.equal(state[name], kept[name]) for state, kept in zip(states, before, strict=True))
    with pytest.raises(ValueError, match="states: none"):
        averaged([])


def reference(text: Text, options: Distillation, rate: float) -> dict[str, Tensor]:
    """Values behind all epochs: torch's own Adam, plain gradients through the whole model, and the mean of parameters and of
    the optimizers' moments after every round."""
    tiny = Tiny(dtype=torch.float64, rounded=False)
    parameters = {name: parameter for name, (parameter, _) in tiny.student.trained(options).items()}
    tiny.student.watch(parameters.values())
    values = [parameter.detach().clone() for parameter in parameters.values()]
    moments = [{"exp_avg": torch.zeros_like(v), "exp_avg_sq": torch.zeros_like(v)} for v in values]
    count, step = len(text.ids), 0
    size = count // (options.replicas * options.rounds)
    per_round = size // options.batch
    for epoch in range(options.epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        for chunk in order.reshape(options.rounds, options.replicas, size):
            ends: list[tuple[list[Tensor], list[dict[str, Tensor]]]] = []
            for own in chunk:
                for parameter, value in zip(parameters.values(), values, strict=True):
                    parameter.data.copy_(value)
                optimizer = torch.optim.Adam(parameters.values(), betas=(0.9, 0.99), eps=1e-10)
                for parameter, moment in zip(parameters.values(), moments, strict=True):
                    kept = {name: tensor.clone() for name, tensor in moment.items()}
                    optimizer.state[parameter] = {"step": torch.tensor(float(step)), **kept}
                for number, batch in enumerate(own.split(options.batch)):
                    total = per_round * options.rounds * options.epochs
                    optimizer.param_groups[0]["lr"] = rate * schedule(step + number, total, options.warmup)
                    hidden = tiny.student.embed(text.ids[batch])
                    for block in tiny.student.blocks:
                        hidden = block(hidden)
                    optimizer.zero_grad()
                    divergence(tiny.student, hidden, text.targets[batch]).backward()
                    optimizer.step()
                found = [{name: optimizer.state[p][name].clone() for name in moments[0]} for p in parameters.values()]
                ends.append(([p.detach().clone() for p in parameters.values()], found))
            step += per_round
            values = [torch.stack(list(group)).mean(0) for group in zip(*(end[0] for end in ends), strict=True)]
            moments = [
                {name: torch.stack([one[name] for one in group]).mean(0) for name in group[0]}
                for group in zip(*(end[1] for end in ends), strict=True)
            ]
    return dict(zip(parameters, values, strict=True))


@pytest.mark.parametrize("replicas", [{"replicas": 2, "rounds": 3}, {"replicas": 3}], ids=str)
def test_rounds_of_replicas_are_those_of_a_plain_loop(replicas: dict[str, Any]) -> None:
    tiny = Tiny(dtype=torch.float64, rounded=False)
    text = tiny.text(24)
    rate = 1e-3
    options = Distillation.model_validate(
        {"epochs": 2, "batch": 2, "factor_rate": rate, "scale_rate": rate, "average": 0.0, **replicas}
    )
    state = to_the_end(Training(tiny.student, text, [tiny.text(2, seed=1)], options))
    assert state.epoch == 2
    for name, expected in reference(text, options, rate).items():
        torch.testing.assert_close(state.tensors[f"{name}/value"], expected, rtol=1e-8, atol=1e-11)
