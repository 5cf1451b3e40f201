"""The first step of learning increments, against gradients that are written out: of rounding, clamping and the grid's range."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import RTN
from counterweight.workers.methods.tuning import Tuning
from counterweight.workers.models.block_builder import Block
from counterweight.workers.tuning import tune
from tests.workers.tuning.test_lsi import block_of, formats_of, shards

FORMAT = WeightFormat(bits=3)
RATE, SIDE = 0.05, 8


def rounded(weight: Tensor) -> UniformWeight:
    stored = RTN().quantize(weight, None, FORMAT, scale_dtype=torch.float32).weight
    assert isinstance(stored, UniformWeight)
    return stored


def gradients(block: Block, names: list[str], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of the squared output error by each rounded weight: a plain block whose weights are the rounded ones."""
    plain = block.replica()
    for name in names:
        weight = block.linear(name).weight.detach()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(rounded(weight).dequantize())
        plain.replace(name, linear)
    error = (plain.forward(inputs) - targets).square().mean()
    parameters = [plain.layer.get_submodule(name).get_parameter("weight") for name in names]
    return dict(zip(names, torch.autograd.grad(error, parameters), strict=True))


def through_rounding(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by the weight before rounding, q = s c, c = clamp(round(w / s)), s = 2 max|w| / 7 of each row.

    Straight-through, dq = dw + (c - w / s) ds where the code is within the range, dq = c ds where it is clamped; and all of ds
    comes from the entry with the largest magnitude.
    """
    step = weight.abs().amax(1, keepdim=True) * 2 / 7
    exact = weight / step
    inside = (exact.round() >= -4) & (exact.round() <= 3)
    codes = exact.round().clamp(-4, 3)
    by_step = (gradient * (codes - torch.where(inside, exact, 0))).sum(1, keepdim=True)
    largest = weight.abs().argmax(1, keepdim=True)
    share = weight.gather(1, largest).sign() * by_step * 2 / 7
    return (gradient * inside).scatter_add(1, largest, share)


def test_the_first_step_follows_the_written_out_gradient() -> None:
    """Sequences are all alike, so that it does not matter which of them is held out, and one batch is all that is trained on:
    Adam's first step is the learning rate against the gradient's sign."""
    block = block_of()
    inputs = shards(1, sequences=1)[0]
    targets = block.run(inputs)
    alike, goals = inputs.expand(6, -1, -1), targets.expand(6, -1, -1)
    options = Tuning(clipping=False, block=SIDE, epochs=1, batch=6, lr_increments=RATE)
    result = tune(block, [alike], [goals], formats_of(block, FORMAT, scale_dtype=torch.float32), options)
    assert result.epoch == 1
    for name, gradient in gradients(block, list(result.weights), inputs, targets).items():
        weight = block.linear(name).weight.detach()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        unit = rounded(weight).scale.square().mean().sqrt() * (weight.numel() / len(values)) ** 0.5
        by_direction = left.T @ through_rounding(weight, gradient) @ right.T
        learned = by_direction.diagonal().sign().diag()
        learned[:SIDE, :SIDE] += by_direction[:SIDE, :SIDE].sign()
        expected = rounded(weight - RATE * unit * left @ learned @ right)
        found = result.weights[name]
        assert (found.codes != rounded(weight).codes).float().mean() > 0.01  # a step that is seen
        assert (found.codes == expected.codes).float().mean() > 0.995
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-3, atol=0)
