"""The training of a compressed model as a whole: steps, parts of epochs, and which epoch is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterweight.workers.distillation.checkpointed import Forward, accumulate
from counterweight.workers.distillation.replicas import Part
from counterweight.workers.distillation.trainable import TrainableLinear
from counterweight.workers.methods.distillation import Distillation

Head = Callable[[Tensor], Tensor]
"""Final norm and lm_head: hidden states [batch, length, hidden] -> logits [batch, length, vocabulary], with gradients."""

FIRST, SECOND, DENOMINATOR = 0.9, 0.99, 1e-10
"""Adam's decay rates and the number that keeps its denominator from zero: KL's gradients are small."""

MOMENTS = ("first", "second")
RUNNING = ("value", "average", *MOMENTS)
"""What steps change of each parameter: its value, the running average of that, Adam's moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Sequences of one text. ids: [sequences, length] int64. targets: [sequences, length, hidden], the original's last hidden
    states, which enter the final norm."""

    ids: Tensor
    targets: Tensor

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """ids and targets, `size` sequences at a time, in `order` or as they are."""
        order = torch.arange(len(self.ids)) if order is None else order
        for chosen in order.split(size):
            yield self.ids[chosen], self.targets[chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A compressed model in training. embed: ids [batch, length] -> hidden states [batch, length, hidden]. head: its own;
    original: the one of the original model, for the targets. linears, norms: by full name as stored, in a fixed order.
    norm_dtypes: in which norms are stored."""

    embed: Callable[[Tensor], Tensor]
    blocks: Sequence[Forward]
    head: Head
    original: Head
    linears: Mapping[str, TrainableLinear]
    norms: Mapping[str, nn.Parameter]
    norm_dtypes: Mapping[str, torch.dtype]

    def trained(self, options: Distillation) -> dict[str, tuple[nn.Parameter, float]]:
        """What is trained by name, each with its learning rate."""
        found: dict[str, tuple[nn.Parameter, float]] = {}
        for name, linear in self.linears.items():
            for part, factor in (("up", linear.up), ("down", linear.down)):
                if options.factors and factor is not None:
                    found[f"{name}.{part}"] = factor, options.factor_rate
            if options.scales:
                found[f"{name}.gain"] = linear.gain, options.scale_rate
        if options.norms:
            found |= {name: (norm, options.scale_rate) for name, norm in self.norms.items()}
        return found

    def watch(self, trained: Iterable[nn.Parameter]) -> None:
        """Takes gradients of these parameters and of no others."""
        chosen = {id(parameter) for parameter in trained}
        for linear in self.linears.values():
            for parameter in linear.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
        for norm in self.norms.values():
            norm.requires_grad_(id(norm) in chosen)

    @torch.no_grad()
    def round(self) -> None:
        """Computes from now on as what will be stored does."""
        for linear in self.linears.values():
            linear.round()
        for name, norm in self.norms.items():
            norm.copy_(norm.to(self.norm_dtypes[name]))

    def unround(self) -> None:
        """Takes back what `round` did to scales; parameters are to be set anew."""
        for linear in self.linears.values():
            linear.unround()


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where a training stands behind an epoch; with it alone it can be taken up again, to the same bits.

    epoch: passes done. tensors: `<parameter>/<kind>`, with the kinds of `RUNNING` and `best`, the value that is kept. best: the
    epoch whose values these are, 0 for the start. divergences: for each epoch from 0 the KL of each held-out text, in nats a
    token. losses: of each epoch, the mean over the training tokens.
    """

    epoch: int
    tensors: Mapping[str, Tensor]
    best: int
    divergences: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]


def running_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a state's tensors that steps change."""
    return {name: tensor for name, tensor in tensors.items() if name.rpartition("/")[2] in RUNNING}


def divergence(student: Student, hidden: Tensor, targets: Tensor) -> Tensor:
    """KL(original || student) in nats, the mean over tokens, of last hidden states [batch, length, hidden] of both."""
    reference = student.original(targets).log_softmax(-1)
    return functional.kl_div(student.head(hidden).log_softmax(-1), reference, reduction="sum", log_target=True) / (
        hidden.shape[0] * hidden.shape[1]
    )


def differentiated(student: Student, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """`divergence`, and its derivative by `hidden`; the logits of one sequence are in memory at a time."""
    total, gradient = 0.0, torch.empty_like(hidden)
    for index, (own, other) in enumerate(zip(hidden.split(1), targets.split(1), strict=True)):
        own = own.detach().requires_grad_()
        value = divergence(student, own, other) / len(hidden)
        (gradient[index : index + 1],) = torch.autograd.grad(value, own)
        total += float(value.detach())
    return total, gradient


@torch.no_grad()
def measured(student: Student, text: Text, batch: int) -> float:
    """KL of a text in nats a token, under the branches as they are now."""
    total = 0.0
    for ids, targets in text.batches(batch):
        hidden = student.embed(ids)
        for block in student.blocks:
            hidden = block(hidden)
        pairs = zip(hidden.split(1), targets.split(1), strict=True)
        total += sum(float(divergence(student, own, other)) for own, other in pairs)
    return total / len(text.ids)


class Training:
    """The model at work: parts of epochs, and the end of each. texts: what is trained on; held_out: what decides which epoch is
    kept. Nothing that one call leaves in the student decides what the next one gives."""

    def __init__(self, student: Student, text: Text, held_out: Sequence[Text], options: Distillation) -> None:
        self.student, self.options = student, options
        self._text, self._held_out = text, held_out
        self._trained = student.trained(options)
        self._parameters = {name: parameter for name, (parameter, _) in self._trained.items()}
        student.watch(self._parameters.values())
        self._start = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def begin(self) -> dict[str, Tensor]:
        """What the first part starts from: `<parameter>/<kind>`, for each kind of `RUNNING`."""
        tensors: dict[str, Tensor] = {}
        for name, value in self._start.items():
            zero = torch.zeros_like(value)
            tensors |= {f"{name}/{kind}": zero if kind in MOMENTS else value for kind in RUNNING}
        return tensors

    def untrained(self) -> State:
        """The state before the first epoch, with its measures."""
        running = self.begin()
        self._fill(running, "value", stored=False)
        best = {f"{name}/best": value for name, value in self._start.items()}
        return State(epoch=0, tensors={**running, **best}, best=0, divergences=(self._divergences(),), losses=())

    def train(self, running: Mapping[str, Tensor], part: Part) -> tuple[dict[str, Tensor], float]:
        """One part of an epoch, from the tensors of `begin` or of other parts; what they are behind it, and the sum of its
        sequences' losses."""
        tensors = {name: tensor.clone() for name, tensor in running.items()}
        self._fill(tensors, "value", stored=False)
        count, loss = len(self._text.ids), 0.0
        step = part.first_step(count, self.options)
        for ids, targets in self._text.batches(self.options.batch, part.sequences(count, self.options)):
            loss += self._step(tensors, step, ids, targets) * len(ids)
            step += 1
        for parameter in self._parameters.values():
            parameter.grad = None
        return tensors, loss

    def close(self, before: State, running: Mapping[str, Tensor], loss: float) -> State:
        """The state behind an epoch, measured. running: of its replicas, averaged; loss: the sum over all its sequences."""
        self._fill(running, "average", stored=True)
        found = self._divergences()
        best, source, kind = before.best, before.tensors, "best"
        if improves(found, before.divergences[best], before.divergences[0]):
            best, source, kind = before.epoch + 1, running, "average"
        return State(
            epoch=before.epoch + 1,
            tensors={**running, **{f"{name}/best": source[f"{name}/{kind}"] for name in self._parameters}},
            best=best,
            divergences=(*before.divergences, found),
            losses=(*before.losses, loss / len(self._text.ids)),
        )

    def settle(self, state: State) -> None:
        """Sets the student to the epoch that is kept, for its linears and norms to be stored."""
        self._fill(state.tensors, "best", stored=False)

    def _step(self, tensors: dict[str, Tensor], step: int, ids: Tensor, targets: Tensor) -> float:
        """One step of Adam, in place; the batch's divergence."""
        student, options = self.student, self.options
        for parameter in self._parameters.values():
            parameter.grad = None
        loss = accumulate(student.blocks, lambda hidden: differentiated(student, hidden, targets), student.embed(ids))
        steps = options.steps(len(self._text.ids)) * options.rounds * options.epochs
        share = schedule(step, steps, options.warmup)
        with torch.no_grad():
            for name, (parameter, peak) in self._trained.items():
                # An expert that no token of the batch has reached has no gradient.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                value, start = tensors[f"{name}/value"], self._start[name]
                if options.ridge:
                    gradient = gradient + 2 * options.ridge * (value - start) / start.square().sum()
                first = tensors[f"{name}/first"].lerp_(gradient, 1 - FIRST)
                second = tensors[f"{name}/second"].lerp_(gradient.square(), 1 - SECOND)
                scale = (second / (1 - SECOND ** (step + 1))).sqrt_().add_(DENOMINATOR)
                value.sub_(first / scale, alpha=share * peak / (1 - FIRST ** (step + 1)))
                tensors[f"{name}/average"].lerp_(value, 1 - min(options.average, (step + 1) / (step + 11)))
                parameter.copy_(value)
        return loss

    def _divergences(self) -> tuple[float, ...]:
        return tuple(measured(self.student, text, self.options.batch) for text in self._held_out)

    def _fill(self, tensors: Mapping[str, Tensor], kind: str, *, stored: bool) -> None:
        """Sets what is trained; stored: to what is read back of it."""
        self.student.unround()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"{name}/{kind}"])
        if stored:
            self.student.round()


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at `step` of `steps`: linear to 1 over the share `warmup`, then a cosine to 0."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (math.floor(rising) + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def improves(found: Sequence[float], best: Sequence[float], start: Sequence[float]) -> bool:
    """Whether divergences `found` of the held-out texts count and are better than the `best` so far: none is above its
    `start`, and the mean of their shares of it is smaller."""
    if any(one > first for one, first in zip(found, start, strict=True)):
        return False
    return _share(found, start) < _share(best, start)


def _share(found: Sequence[float], start: Sequence[float]) -> float:
    return sum(one / first if first else 0.0 for one, first in zip(found, start, strict=True))
