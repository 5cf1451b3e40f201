"""Dense layers of vLLM that run on an artifact's linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, LinearMethodBase, RowParallelLinear
from vllm.model_executor.utils import set_weight_attrs

from counterweight.pipeline.serving.artifact import KEPT, ServedArtifact
from counterweight.pipeline.serving.intake import Intake
from counterweight.pipeline.serving.served import served
from counterweight.pipeline.serving.shards import gathers, rank_columns, rank_rows, rank_slice
from counterweight.pipeline.serving.vllm.op import ServedLayer
from counterweight.workers.block import CompressedLinear

SHARDS = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the parts of a merged attention layer; those of gate_up are 0 and 1."""


class CounterweightLinear(LinearMethodBase):  # type: ignore[misc]
    """One layer of vLLM. modules: the artifact's linears that it consists of, in its order; one where the checkpoint has them
    fused as vLLM has, or where vLLM merges nothing."""

    def __init__(self, artifact: ServedArtifact, modules: list[str]) -> None:
        self.artifact, self.modules = artifact, modules
        self.intake = Intake(artifact, modules)

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *sizes: int,
        **described: Any,
    ) -> None:
        """Parameters of no elements under the names of the checkpoint, whose loaders hand over what is read: linears that vLLM
        merges differ in rank, and may differ in bits."""
        check_engine(self.artifact, self.modules)
        self.sizes = output_partition_sizes
        for name in self.intake.names:
            layer.register_parameter(name, entry(name, self._loader(name)))

    def _loader(self, name: str) -> Callable[..., None]:
        def load(param: Parameter, loaded_weight: Tensor, shard: str | int | None = None) -> None:
            index = 0 if shard is None else shard if isinstance(shard, int) else SHARDS[shard]
            self.intake.put(self.modules[index], name, loaded_weight)

        return load

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        self.intake.expect_all()
        names = self.intake.names
        device = getattr(layer, names[0]).device
        parts: list[nn.Module] = []
        gather = False
        for index, module in enumerate(self.modules):
            whole = self.intake.take(module)
            with naming(module):
                if isinstance(layer, RowParallelLinear):
                    part, gather = of_columns(whole, layer.tp_size, layer.tp_rank, device)
                    parts.append(part)
                else:
                    parts += [of_rows(whole, rows, device) for rows in self._rows(layer, index)]
        for name in names:
            delattr(layer, name)
        layer.counterweight = ServedLayer(parts, sum(self.sizes), gather=gather)

    def _rows(self, layer: LinearBase, index: int) -> list[slice | None]:
        """Which output channels of linear `index` this rank has; None for all."""
        if not isinstance(layer, ColumnParallelLinear) or layer.tp_size == 1:
            return [None]
        replicas = getattr(layer, "num_kv_head_replicas", 1)
        if len(self.modules) == len(self.sizes):
            rank = layer.tp_rank // replicas if index else layer.tp_rank
            return [slice(rank * self.sizes[index], (rank + 1) * self.sizes[index])]
        if replicas > 1:
            raise ValueError(f"heads of keys and values on {layer.tp_size} ranks: expected no more ranks than heads")
        rows: list[slice | None] = []
        start = 0
        for size in self.sizes:  # fused in the checkpoint: q of all ranks, then k, then v
            rows.append(slice(start + layer.tp_rank * size, start + (layer.tp_rank + 1) * size))
            start += layer.tp_size * size
        return rows

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.counterweight(x)
        return y if bias is None else y + bias


class Dense(nn.Module):
    """A linear that is not quantized, beside others that are."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def of_rows(whole: CompressedLinear | Tensor, rows: slice | None, device: torch.device) -> nn.Module:
    """A module for these output channels of a linear; None for all."""
    if isinstance(whole, Tensor):
        return Dense((whole if rows is None else whole[rows].clone()).to(device))
    return served((whole if rows is None else rank_rows(whole, rows)).to(device))


def of_columns(whole: CompressedLinear | Tensor, ranks: int, rank: int, device: torch.device) -> tuple[nn.Module, bool]:
    """A module for a rank's input channels of a linear; and whether it wants to be given those of all ranks."""
    if ranks == 1:
        return of_rows(whole, None, device), False
    if isinstance(whole, Tensor):
        return Dense(whole[:, rank_slice(whole.shape[1], ranks, rank)].clone().to(device)), False
    columns = rank_slice(whole.weight.shape[1], ranks, rank)
    gather = gathers(whole, columns.stop - columns.start)
    part = rank_columns(whole, columns).to(device)
    return served(part, own=columns if gather else None), gather


def entry(name: str, load: Callable[..., object]) -> Parameter:
    """A parameter of no elements that hands what vLLM loads into it to `load`. Its dtype is that of the tensors of this name,
    or wider: vLLM warns of others."""
    floating = name == KEPT[0] or name.endswith("scale")
    dtype = torch.float32 if floating else torch.int64 if name == "weight_shape" else torch.int32
    parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": load})
    return parameter


def check_engine(artifact: ServedArtifact, modules: list[str]) -> None:
    """ValueError, naming a linear, for what vLLM was asked for and a residual store cannot do."""
    engine = get_current_vllm_config()
    for module in modules:
        form = artifact.formats.get(module)
        if form is None or form.residual is None:
            continue
        if engine.speculative_config is not None:
            raise ValueError(f"{module}: residual store: it corrects one token of a request: expected no speculation")
        if captures_graphs():
            raise ValueError(f"{module}: residual store: which tokens it corrects changes: expected --enforce-eager")


def captures_graphs() -> bool:
    """Whether vLLM captures CUDA graphs, in which nothing may depend on what tokens are."""
    engine = get_current_vllm_config()
    graphs = engine.compilation_config.cudagraph_mode
    return engine.device_config.device_type != "cpu" and graphs not in (None, CUDAGraphMode.NONE)


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Puts a linear's name before what a ValueError inside says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error
