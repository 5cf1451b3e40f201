"""Tiny compressed models in training, and texts with what the original makes of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.workers.block import CompressedLinear
from counterweight.workers.compensation.regression import stored
from counterweight.workers.distillation.replicas import Part, averaged
from counterweight.workers.distillation.trainable import TrainableLinear, make_trainable
from counterweight.workers.distillation.training import State, Student, Text, Training, running_of
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.source import head_of
from counterweight.workers.tuning.fake_quant import fake_quantize
from tests.models import CASES, EMBEDDING, build, token_ids

CPU = torch.device("cpu")
RANK = 4


def compressed(weight: Tensor, *, bits: int = 3, factor_bits: int | None = None) -> CompressedLinear:
    """A linear's weight [out, in] rounded to nearest, its input in 6 bits, and half of the plain SVD of what rounding left: a
    branch that training can make better."""
    codes = fake_quantize(weight.float(), WeightFormat(bits=bits), torch.float32).stored()
    left, values, right = torch.linalg.svd(weight.float() - codes.dequantize())
    branch = LowRank(up=left[:, :RANK] * values[:RANK] / 2, down=right[:RANK])
    return CompressedLinear(weight=codes, low_rank=stored(branch, factor_bits), activations=ActivationFormat(bits=6))


class Tiny:
    """A model, its compressed blocks in training, and its original blocks. rounded: whether inputs of linears are: a last bit
    then decides which way, and steps behind it differ in more than that."""

    def __init__(
        self, case: str = "llama", dtype: torch.dtype = torch.float32, *, bits: int = 3, rounded: bool = True
    ) -> None:
        model = build(case)
        builder = BlockBuilder({**model.config.to_dict(), "model_type": CASES[case].family})
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.originals: list[Block] = []
        self.blocks: list[Block] = []
        linears: dict[str, TrainableLinear] = {}
        norms: dict[str, nn.Parameter] = {}
        for index in range(builder.blocks):
            slices = builder.layout.sources(index, tensors)
            parameters = {name: part.of(tensors[part.source]) for name, part in slices.items()}
            self.originals.append(builder.block(index, parameters, CPU, dtype))
            block = builder.block(index, parameters, CPU, dtype)
            names = [name for group in block.groups for name in group]
            own = {name: compressed(parameters[f"{name}.weight"], bits=bits) for name in names}
            if not rounded:
                own = {name: replace(linear, activations=None) for name, linear in own.items()}
            trainable, own_norms = make_trainable(block, own, dtype)
            linears |= {f"{index}.{name}": linear for name, linear in trainable.items()}
            norms |= {f"{index}.{name}": norm for name, norm in own_norms.items()}
            self.blocks.append(block)
        head = builder.head(head_of(tensors, builder.names), CPU, dtype)
        self.student = Student(
            embed=builder.embedding(tensors[EMBEDDING], CPU, dtype).requires_grad_(False),
            blocks=[block.forward for block in self.blocks],
            head=head,
            original=head,
            linears=linears,
            norms=norms,
            norm_dtypes=dict.fromkeys(norms, torch.bfloat16),
        )

    def text(self, sequences: int = 6, length: int = 12, seed: int = 0) -> Text:
        """Random tokens."""
        ids = token_ids(sequences, length, seed=seed)
        with torch.no_grad():
            hidden = self.student.embed(ids)
            for block in self.originals:
                hidden = block.run(hidden)
        return Text(ids=ids, targets=hidden)


def epoch(run: Training, state: State) -> State:
    """A pass over the training text by all replicas, in this process."""
    running, loss = running_of(state.tensors), 0.0
    for number in range(run.options.rounds):
        parts = [Part(epoch=state.epoch + 1, round=number, replica=i) for i in range(run.options.replicas)]
        found = [run.train(running, part) for part in parts]
        running = averaged(tensors for tensors, _ in found)
        loss += sum(own for _, own in found)
    return run.close(state, running, loss)


def to_the_end(run: Training, state: State | None = None) -> State:
    """The state that training ends with."""
    state = run.untrained() if state is None else state
    while not run.options.finished(state.epoch, state.best):
        state = epoch(run, state)
    return state
