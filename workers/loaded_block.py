"""A source block in a worker's memory: read, verified, in the recipe's coordinates, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from counterweight.kernels.hadamard import Hadamard
from counterweight.workers.context import TaskContext
from counterweight.workers.errors import CheckpointError
from counterweight.workers.keys import digest
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import SharedInputGroup, is_expert
from counterweight.workers.models.lent import LentLinear
from counterweight.workers.models.source import read_parameters
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.transforms.smoothing import fold


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBlock:
    """A source block that can run, and what it was made of.

    parameters: in the recipe's coordinates; what is kept is carried over, the rest is solved. dtypes: of the parameters in
    the source, in which they are stored. online: linear -> transform of its input at inference. lent: whether experts run on
    `parameters` themselves (see `LentLinear`), and these are let go one by one.
    """

    block: Block
    parameters: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    online: dict[str, Hadamard]
    lent: bool = False

    @property
    def bytes(self) -> int:
        """Memory of its weights, as they were read and as they run; once, where that is the same."""
        tensors = [*self.parameters.values(), *self.block.layer.parameters()]
        return sum({(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in tensors}.values())

    def let_go(self, linears: Iterable[str]) -> None:
        """Of experts that run no more, where they are lent: their weights."""
        for name in linears:
            if self.lent and is_expert(name):
                del self.parameters[f"{name}.weight"]
                self.block.linear(name).weight = nn.Parameter(torch.empty(0), requires_grad=False)


def load_block(
    context: TaskContext,
    setting: Setting,
    index: int,
    digests: Mapping[str, str],
    dtype: torch.dtype,
    *,
    lent: bool = False,
) -> LoadedBlock:
    """A source block on the device, every tensor verified, in the setting's coordinates. lent: see `LoadedBlock`."""
    builder = context.source(setting)[1]
    key, read = _parameters(context, setting, index, digests)
    parameters = context.ahead.take(key, read)
    dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
    online: dict[str, Hadamard] = {}
    if setting.rotation is not None:
        heads, key_value_heads = builder.config.num_attention_heads, builder.config.num_key_value_heads
        parameters, online = setting.rotation.block(
            builder.config.model_type, parameters, heads, key_value_heads, context.device
        )
    block = run_block(context, builder, index, parameters, online, dtype, lent=lent)
    return LoadedBlock(block=block, parameters=parameters, dtypes=dtypes, online=online, lent=lent)


def read_ahead(context: TaskContext, setting: Setting, index: int, digests: Mapping[str, str]) -> None:
    """Begins to read what `load_block` will want of this block, into the host's memory, where the worker reads ahead."""
    context.ahead.begin(*_parameters(context, setting, index, digests))


def _parameters(
    context: TaskContext, setting: Setting, index: int, digests: Mapping[str, str]
) -> tuple[str, Callable[[], dict[str, Tensor]]]:
    """A block's parameters: a key of theirs, and what reads and verifies them."""
    checkpoint, builder = context.source(setting)
    slices = builder.layout.sources(index, checkpoint.names)
    absent = {part.source for part in slices.values()} - digests.keys()
    if absent:
        raise CheckpointError(f"block {index}: the task lists no digest for {sorted(absent)[:3]}")
    key = digest(["parameters", setting.source, index, dict(digests)])
    return key, partial(read_parameters, checkpoint, slices, digests)


def run_block(
    context: TaskContext,
    builder: BlockBuilder,
    index: int,
    parameters: Mapping[str, Tensor],
    online: Mapping[str, Hadamard],
    dtype: torch.dtype,
    *,
    lent: bool,
) -> Block:
    """The block on the device, with the transforms of its inputs that there are at inference."""
    linears = [name for group in builder.layout.block_linears(index) for name in group]
    apart = {name: parameters[f"{name}.weight"] for name in linears if lent and is_expert(name)}
    rest = {name: tensor for name, tensor in parameters.items() if name.removesuffix(".weight") not in apart}
    block = builder.block(index, rest, context.device, dtype, absent=apart)
    for name, weight in apart.items():
        block.replace(name, LentLinear(weight, block.linear(name).bias))
    for name, transform in online.items():
        block.transform_input(name, transform)
    return block


def smoothed(
    context: TaskContext,
    builder: BlockBuilder,
    index: int,
    loaded: LoadedBlock,
    scales: Mapping[SharedInputGroup, Tensor],
    dtype: torch.dtype,
) -> LoadedBlock:
    """The block with the inputs of `scales`' groups divided by them [in], which computes the same."""
    parameters = fold(
        family_of(builder.config.model_type), scales, loaded.parameters, loaded.online, heads=loaded.block.heads
    )
    block = run_block(context, builder, index, parameters, loaded.online, dtype, lent=loaded.lent)
    return replace(loaded, parameters=parameters, block=block)
