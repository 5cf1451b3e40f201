"""Learnable singular-value increments, with learnable clipping and learnable transforms beside them.

Gao et al., "Compensate Quantization Errors: Make Weights Hierarchical to Compensate Each Other" (2024). A linear's weight
W = U diag(S) V^T is quantized not from where it is but from

    W' = W + U (diag(I) + pad(K)) V^T,

I a vector and K a small square matrix, both learned, so that the block's output after rounding comes close to the original
block's. One number moves all weights of a linear together, and across rounding thresholds where it pays. The paper holds I in
units of W; here I = 1 everywhere moves the typical weight by one step of the grid, so that one learning rate serves
weights of any size and number of bits. Written as a sum, W' is W to the bit before training. Around it lie OmniQuant's
transforms (columns times s, the norm in front divided by s) and its clipping (`fake_quant`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.tuning import Tuning
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import ModelFamily, SharedInputGroup
from counterweight.workers.quantization.inputs import checked_matrix
from counterweight.workers.tuning.fake_quant import FakeQuantized, clipping_of, fake_quantize, straight_through


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFormat:
    """How one linear is stored and run: its grid, the dtype of its scales, how its input is quantized (None: it is not)."""

    weights: WeightFormat
    scale_dtype: torch.dtype
    activations: ActivationFormat | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResult:
    """What was learned, and how it went.

    weights: linear -> its codes and grid. norms: parameter of the block -> its new value, for the norms that took up a
    transform, in the scales' dtype. train, held_out: mean squared error of the block's output, per epoch from 0, the
    untrained one (held out: the better of rounding on the whole range and on the one where clipping starts); that of
    training is the mean over the epoch's steps. epoch: the one that was kept. stopped: whether patience ended before the
    epochs did.
    """

    weights: Mapping[str, UniformWeight]
    norms: Mapping[str, Tensor]
    train: tuple[float, ...]
    held_out: tuple[float, ...]
    epoch: int
    stopped: bool


def tune(
    block: Block,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    formats: Mapping[str, LinearFormat],
    options: Tuning,
) -> TuningResult:
    """Quantizes the linears in `formats` (names as in the block) so that the block maps `inputs` to `targets`.

    inputs: shards [sequences, length, hidden], of the original model or of the compressed one so far. targets: the same
    shapes, the original block's outputs for the original's inputs. All sequences have one length. The block is not
    changed. Parameters and losses are float32, sums of losses float64, the rest in the dtype of the inputs; the same
    arguments give the same bits on one thread. Raises ValueError for shards that do not match or hold fewer than two
    sequences, for no linear, for a weight or a target that is not finite, for groups that do not tile a weight and for
    scales that do not fit their dtype.
    """
    if not formats:
        raise ValueError("formats: empty: expected a linear to tune")
    learner = _Learner(block, formats, options)
    train, held_out = _split(_paired(inputs, targets), options)
    initial = learner.error(train)
    best, untrained = learner.untrained(held_out)
    train_errors, held_out_errors, best_epoch = [initial], [untrained], 0
    shuffle = random.Random(options.seed)
    optimizer = torch.optim.Adam(learner.rates())
    # Down to nothing: at a constant rate codes keep flipping.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / options.epochs)
    epoch = 0
    while epoch < options.epochs and epoch - best_epoch < options.patience:
        epoch += 1
        shuffle.shuffle(train)
        train_errors.append(learner.descend(train, optimizer, unit=initial))
        schedule.step()
        held_out_errors.append(learner.error(held_out))
        if held_out_errors[epoch] < held_out_errors[best_epoch]:
            best, best_epoch = learner.values(), epoch
    learner.restore(best)
    return TuningResult(
        weights={name: linear.quantized().stored() for name, linear in learner.linears.items()},
        norms={f"{name}.weight": norm.stored() for name, norm in learner.norms.items()},
        train=tuple(train_errors),
        held_out=tuple(held_out_errors),
        epoch=best_epoch,
        stopped=epoch < options.epochs,
    )


def learned_scales(
    family: ModelFamily,
    groups: Iterable[SharedInputGroup],
    parameters: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
) -> dict[SharedInputGroup, Tensor]:
    """By what each group's input was divided while learning, [in] float32: the weight of the norm before it over its new one,
    for groups whose norm is among `norms`."""
    scales = {}
    for group in groups:
        norm = f"{family.norm_before(group[0])}.weight"
        if norm in norms:
            before, after = (value.float() + family.norm_offset for value in (parameters[norm], norms[norm]))
            scales[group] = before / after
    return scales


Pair = tuple[Tensor, Tensor]
"""A sequence's hidden states before and after the block, [length, hidden] each."""


def _paired(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Pair]:
    """Input and target of every sequence; ValueError unless shards match and all sequences have one shape."""
    if len(inputs) != len(targets):
        raise ValueError(f"targets: {len(targets)} shards: expected {len(inputs)}, one for each of the inputs")
    for index, (shard, target) in enumerate(zip(inputs, targets, strict=True)):
        if shard.ndim != 3 or shard.shape[1:] != inputs[0].shape[1:]:
            raise ValueError(f"inputs[{index}]: {list(shard.shape)}: expected [sequences, length, hidden], all alike")
        if target.shape != shard.shape:
            raise ValueError(f"targets[{index}]: {list(target.shape)}: expected {list(shard.shape)}, as the inputs")
        if not bool(torch.isfinite(target).all()):
            raise ValueError(f"targets[{index}]: holds NaN or infinity: expected finite values")
    return [pair for both in zip(inputs, targets, strict=True) for pair in zip(*both, strict=True)]


def _split(pairs: list[Pair], options: Tuning) -> tuple[list[Pair], list[Pair]]:
    """What is trained on and what is held out, at least one sequence each."""
    if len(pairs) < 2:
        raise ValueError(f"inputs: {len(pairs)} sequences: expected at least 2, one to train on and one to hold out")
    order = random.Random(options.seed).sample(range(len(pairs)), len(pairs))
    count = options.held(len(pairs))
    return [pairs[index] for index in sorted(order[count:])], [pairs[index] for index in sorted(order[:count])]


class _Learner:
    """A replica of the block whose linears are trainable."""

    def __init__(self, block: Block, formats: Mapping[str, LinearFormat], options: Tuning) -> None:
        self._options = options
        self._block = block.replica()
        self.norms = dict(self._fold(formats)) if options.transforms else {}
        scales = {name: norm.log_scale for norm in self.norms.values() for name in norm.readers}
        self.linears: dict[str, _TunedLinear] = {}
        for name, format in formats.items():
            linear = _TunedLinear(name, block.linear(name), format, scales.get(name), options)
            linear.transform = self._block.transforms.get(name)
            self.linears[name] = linear
            self._block.replace(name, linear)
        for name, norm in self.norms.items():
            self._block.replace(name, norm)

    def _fold(self, formats: Mapping[str, LinearFormat]) -> Iterator[tuple[str, _FoldedNorm]]:
        """The norms that feed only linears which are tuned."""
        family = family_of(self._block.model_type)
        modules = dict(self._block.layer.named_modules())
        for name in family.norms:
            readers = tuple(module for module in modules if family.norm_before(module) == name)
            if readers and all(reader in formats for reader in readers):
                dtype = formats[readers[0]].scale_dtype
                yield name, _FoldedNorm(modules[name], readers, dtype, family.norm_offset)

    def rates(self) -> list[dict[str, object]]:
        """The parameters in groups of one learning rate each, as an optimizer takes them."""
        options, linears = self._options, self.linears.values()
        increments = [value for linear in linears for value in (linear.increments, linear.square) if value is not None]
        clipping = [linear.clipping for linear in linears if linear.clipping is not None]
        groups = [
            (increments, options.lr_increments),
            (clipping, options.lr_clipping),
            ([norm.log_scale for norm in self.norms.values()], options.lr_transforms),
        ]
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.rates() for parameter in group["params"]]  # type: ignore[attr-defined]

    def values(self) -> list[Tensor]:
        """A copy of every parameter's value."""
        return [parameter.detach().clone() for parameter in self._parameters()]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Sets every parameter to a value that `values` gave."""
        for parameter, value in zip(self._parameters(), values, strict=True):
            parameter.data.copy_(value)

    def untrained(self, pairs: Sequence[Pair]) -> tuple[list[Tensor], float]:
        """Values that round to nearest, and their error: where training starts, or on the whole range if that is better.
        Clipping starts a little inside of it, which costs more than it wins at 8 bits."""
        start = self.values()
        found = (start, self.error(pairs))
        if self._options.clipping:
            clipping = {linear.clipping for linear in self.linears.values()}
            whole = [
                torch.full_like(value, torch.inf) if parameter in clipping else value
                for parameter, value in zip(self._parameters(), start, strict=True)
            ]
            self.restore(whole)
            found = min(found, (whole, self.error(pairs)), key=lambda one: one[1])
            self.restore(start)
        return found

    @torch.no_grad()
    def error(self, pairs: Sequence[Pair]) -> float:
        """Mean squared error of the block's output."""
        errors = [float(self._error(batch)) * len(batch) for batch in self._batches(pairs)]
        return sum(errors) / len(pairs)

    def descend(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer, *, unit: float) -> float:
        """One pass over `pairs`, a step per batch; returns the mean of the errors on the way.

        unit: the error in which gradients are expressed, so that Adam's epsilon is as small for any scale of the output.
        """
        parameters, total = self._parameters(), 0.0
        for batch in self._batches(pairs):
            error = self._error(batch)
            # Not backward(): the block's own tensors are shared with the original and must not gather gradients.
            gradients = torch.autograd.grad(error / max(unit, torch.finfo().tiny), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient  # None for an expert without tokens
            optimizer.step()
            total += float(error.detach()) * len(batch)
        return total / len(pairs)

    def _error(self, batch: Sequence[Pair]) -> Tensor:
        hidden, target = (torch.stack(part) for part in zip(*batch, strict=True))
        output = self._block.forward(hidden)
        return (output.float() - target.float()).square().mean(dtype=torch.float64)

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
        for start in range(0, len(pairs), self._options.batch):
            yield pairs[start : start + self._options.batch]


class _TunedLinear(nn.Module):
    """A linear with a fake-quantized weight; takes the place of the original, [..., in] -> [..., out]. transform: of its
    input, before that is quantized."""

    weight: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self, name: str, linear: nn.Linear, format: LinearFormat, log_scale: nn.Parameter | None, options: Tuning
    ) -> None:
        super().__init__()
        self._format, self._log_scale = format, log_scale
        self.transform: Hadamard | None = None
        self._bias = None if linear.bias is None else linear.bias.detach()
        weight = checked_matrix(name, linear.weight.detach())
        self.register_buffer("weight", weight)
        self.clipping = nn.Parameter(clipping_of(weight, format.weights)) if options.clipping else None
        self.increments = self.square = None
        if options.increments:
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            # One grid step for the typical weight: ||U diag(I) V^T|| = ||I||, spread over all entries of the weight.
            step = fake_quantize(weight, format.weights, format.scale_dtype).scale.square().mean().sqrt()
            unit = step * (weight.numel() / len(values)) ** 0.5
            self.register_buffer("left", left * unit)  # [out, p]
            self.register_buffer("right", right)  # [p, in]
            self.increments = nn.Parameter(torch.zeros_like(values))
            side = min(options.block, len(values))
            self.square = nn.Parameter(weight.new_zeros(side, side)) if side else None

    def quantized(self) -> FakeQuantized:
        """The weight as it is now, rounded."""
        weight = self.weight
        if self.increments is not None:
            weight = weight + (self.left * self.increments) @ self.right
        if self.square is not None:
            side = len(self.square)
            weight = weight + self.left[:, :side] @ self.square @ self.right[:side]
        if self._log_scale is not None:
            weight = weight * self._log_scale.exp()
        return fake_quantize(weight, self._format.weights, self._format.scale_dtype, self.clipping)

    def forward(self, x: Tensor) -> Tensor:
        activations = self._format.activations
        if self.transform is not None:
            x = self.transform.apply(x)
        inner = x if activations is None else straight_through(x, fake_quantize_activations(x.detach(), activations))
        return functional.linear(inner, self.quantized().weight().to(x.dtype), self._bias)


class _FoldedNorm(nn.Module):
    """A norm whose output is divided, channel by channel, by the learned scales that multiply its readers' columns."""

    def __init__(self, norm: nn.Module, readers: SharedInputGroup, dtype: torch.dtype, offset: float) -> None:
        """offset: what the norm adds to its weight before it multiplies."""
        super().__init__()
        self.readers = readers
        self._norm, self._dtype = norm, dtype
        weight = norm.get_parameter("weight")
        self._gain = weight.detach().float()
        self._offset = offset
        self.log_scale = nn.Parameter(torch.zeros_like(self._gain))

    def _weight(self) -> Tensor:
        exact = (self._gain + self._offset) * (-self.log_scale).exp() - self._offset
        return straight_through(exact, exact.detach().to(self._dtype).float())

    def stored(self) -> Tensor:
        """The norm's new weight [hidden], as the checkpoint will hold it."""
        return self._weight().detach().to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._weight().to(self._norm.get_parameter("weight").dtype)
        result: Tensor = functional_call(self._norm, {"weight": weight}, (x,))
        return result
