"""Experts of vLLM's sparse layers that run on an artifact's linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from counterweight.kernels.backend import experts_on_kernels
from counterweight.pipeline.serving.artifact import ServedArtifact
from counterweight.pipeline.serving.intake import Intake
from counterweight.pipeline.serving.served import PackedLinear, linear_of
from counterweight.pipeline.serving.shards import rank_slice
from counterweight.pipeline.serving.vllm.linear import captures_graphs, check_engine, entry, naming, of_columns, of_rows
from counterweight.pipeline.serving.vllm.op import decoded_tokens, has_store
from counterweight.workers.block import CompressedLinear

GATE, DOWN, UP = "w1", "w2", "w3"
"""What vLLM calls an expert's linears, whatever the checkpoint does."""

Linears = Mapping[str, CompressedLinear | Tensor]
"""Of one expert, by what vLLM calls them."""

PARAMETERS = "w13", "w2"
"""Beginnings of its parameters' names: gate and up are one."""


class CounterweightExperts(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one sparse layer. place: the artifact's name of all of them, before an expert's number."""

    def __init__(self, artifact: ServedArtifact, moe: Any, place: str) -> None:
        super().__init__(moe)
        self.artifact, self.place = artifact, place

    def create_weights(self, layer: RoutedExperts, num_experts: int, *sizes: int, **described: Any) -> None:
        if layer.use_ep:
            raise ValueError(f"{self.place}: expert parallelism: expected tensor parallelism")
        if layer.activation != MoEActivation.SILU or layer.apply_router_weight_on_input:
            raise ValueError(f"{self.place}: experts of {layer.activation}: expected silu(gate) * up, weighted behind")
        self.on_disk = {
            GATE: layer.ckpt_gate_proj_name,
            DOWN: layer.ckpt_down_proj_name,
            UP: layer.ckpt_up_proj_name,
        }
        self.experts = num_experts
        modules = [self._module(expert, shard) for expert in range(num_experts) for shard in self.on_disk]
        check_engine(self.artifact, modules)
        self.graphs = captures_graphs()
        self.intake = Intake(self.artifact, modules)
        for name in self.intake.names:
            for part in PARAMETERS:
                layer.register_parameter(f"{part}_{name}", entry(name, self._load))

    def _module(self, expert: int, shard: str) -> str:
        return f"{self.place}.{expert}.{self.on_disk[shard]}"

    def _load(
        self,
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        name = weight_name.rpartition(".")[2].partition("_")[2]
        self.intake.put(self._module(expert_id, shard_id), name, loaded_weight)
        return True if return_success else None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        self.intake.expect_all()
        names = [f"{part}_{name}" for part in PARAMETERS for name in self.intake.names]
        device = getattr(layer, names[0]).device
        for name in names:
            delattr(layer, name)
        taken: Iterable[Linears] = map(self._take, range(self.experts))  # one expert unpacked at a time
        module = None
        if device.type != "cpu" and self.moe.tp_size == 1:
            taken = list(taken)
            module = together(taken, device)
        if module is None:
            if self.graphs:
                raise ValueError(f"{self.place}: experts that run one after the other: expected --enforce-eager")
            module = Experts([self._expert(expert, linears, device) for expert, linears in enumerate(taken)])
        layer.counterweight = module

    def _take(self, expert: int) -> Linears:
        return {shard: self.intake.take(self._module(expert, shard)) for shard in self.on_disk}

    def _expert(self, expert: int, linears: Linears, device: torch.device) -> Expert:
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        parts = {}
        for shard in (GATE, UP):
            linear = linears[shard]
            size = len(linear) if isinstance(linear, Tensor) else linear.weight.shape[0]
            with naming(self._module(expert, shard)):
                parts[shard] = of_rows(linear, None if ranks == 1 else rank_slice(size, ranks, rank), device)
        with naming(self._module(expert, DOWN)):
            down, gather = of_columns(linears[DOWN], ranks, rank, device)
        return Expert(parts[GATE], parts[UP], down, gather=gather)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object,
        shared_experts_input: object,
    ) -> Tensor:
        """x [tokens, hidden], topk_weights and topk_ids [tokens, k] -> [tokens, hidden]; inside vLLM's own operator."""
        y: Tensor = layer.counterweight(x, topk_ids, topk_weights)
        return y


class Expert(nn.Module):
    """down(silu(gate(x)) * up(x)). gather: whether `down` wants the channels of all ranks."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, *, gather: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.gather = gate, up, down, gather

    @property
    def has_store(self) -> bool:
        return any(has_store(part) for part in self.children())

    def forward(self, x: Tensor, decoded: Tensor | None) -> Tensor:
        inner = functional.silu(_run(self.gate, x, decoded)) * _run(self.up, x, decoded)
        if self.gather:
            inner = tensor_model_parallel_all_gather(inner)
        return _run(self.down, inner, decoded)


class Experts(nn.Module):
    """x [tokens, hidden], chosen [tokens, k] and their weights -> [tokens, hidden], one expert after the other."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        decoded = decoded_tokens(len(x)) if any(expert.has_store for expert in self.experts) else None
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            if not len(token):
                continue
            part = expert(x[token], None if decoded is None else decoded[token])
            y.index_add_(0, token, (part * weights[token, slot].unsqueeze(1)).to(y.dtype))
        return y


def together(experts: Sequence[Linears], device: torch.device) -> nn.Module | None:
    """A module that runs all experts on Triton's kernels, one launch a projection; None where that is not possible."""
    layers = []
    for expert in experts:
        own = {}
        for name, shard in (("gate_proj", GATE), ("up_proj", UP), ("down_proj", DOWN)):
            linear = expert[shard]
            if isinstance(linear, Tensor):
                return None
            own[name] = linear_of(linear.to(device))
        layers.append(own)
    return experts_on_kernels(layers, lambda gate, up: functional.silu(gate) * up)


def _run(part: nn.Module, x: Tensor, decoded: Tensor | None) -> Tensor:
    y: Tensor = part(x, decoded) if isinstance(part, PackedLinear) else part(x)
    return y
