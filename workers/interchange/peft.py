"""Low-rank branches as a PEFT adapter: a LoRA of scaling 1 with a rank for each module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.weights.packing import pack, unpack
from counterweight.workers.errors import CheckpointError
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.interchange.compressed_tensors import QUANT_METHOD
from counterweight.workers.models.family import ModelFamily, is_expert

ADAPTER_PREFIX = "base_model.model."


def factor_tensors(module: str, branch: LowRank) -> dict[str, Tensor]:
    """A low-rank branch under PEFT's names: lora_A [rank, in], lora_B [out, rank]; of integer codes their steps too, and codes
    of 4 bits packed along `in` and `out`."""
    down, up, bits = branch.down, branch.up, None if branch.up_scale is None else branch.code_bits
    if bits == 4:
        down, up = pack(down, bits), pack(up, bits, dim=0)
    tensors = (down, up, branch.down_scale, branch.up_scale)
    names = factor_names(module, bits)
    return {name: tensor.contiguous() for name, tensor in zip(names, tensors, strict=False) if tensor is not None}


def factor_names(module: str, bits: Literal[4, 8] | None) -> tuple[str, ...]:
    """Names of a branch's tensors: A (down), B (up), and the steps of both when they are codes of `bits`."""
    names = (f"{ADAPTER_PREFIX}{module}.lora_A", f"{ADAPTER_PREFIX}{module}.lora_B")
    kinds = {None: ("weight",), 8: ("weight", "scale"), 4: ("weight_packed", "scale")}[bits]
    return tuple(f"{name}.{kind}" for kind in kinds for name in names)


def read_branch(
    adapter: Mapping[str, Tensor], module: str, form: ModuleFormat, shape: tuple[int, int]
) -> LowRank | None:
    """The low-rank branch of `module` with a weight of `shape` (out, in), or None when its format has rank 0; CheckpointError
    when shapes disagree."""
    if form.rank == 0:
        return None
    down, up, *steps = (adapter[name] for name in factor_names(module, form.factor_bits))
    if form.factor_bits == 4:
        try:
            up, down = unpack(up, 4, shape[0], dim=0), unpack(down, 4, shape[1])
        except ValueError as error:
            raise CheckpointError(f"adapter: {module}: packed factors: {error}") from error
    rows, columns = shape
    if tuple(up.shape) != (rows, form.rank) or tuple(down.shape) != (form.rank, columns):
        raise CheckpointError(
            f"adapter: {module}: factors {list(up.shape)} x {list(down.shape)}: expected rank {form.rank}, "
            f"[{rows}, {form.rank}] x [{form.rank}, {columns}]"
        )
    if not steps:
        return LowRank(up=up, down=down)
    if up.dtype != torch.int8 or down.dtype != torch.int8 or any(tuple(step.shape) != (form.rank,) for step in steps):
        raise CheckpointError(f"adapter: {module}: expected int8 codes and {form.rank} steps for each factor")
    return LowRank(up=up, down=down, up_scale=steps[1], down_scale=steps[0], code_bits=form.factor_bits or 8)


def refusal_of_adapter(formats: Mapping[str, ModuleFormat], family: ModelFamily) -> str | None:
    """Why stock PEFT cannot represent the branches, or None when it can.

    PEFT from 0.20 on fuses the adapters of experts as transformers fuses the experts, when all of them have one rank;
    0.18 loads the same files without a word and leaves the experts out. And since it knows experts by the last part of
    a name, it also takes a dense layer for one when the names are alike (Qwen3-MoE's dense blocks).
    """
    if any(form.factor_bits is not None for form in formats.values()):
        return "factors in integer codes: PEFT would read the codes as the factors"
    if family.experts is None:
        return None
    branches = [name for name, form in formats.items() if form.rank]
    if any(is_expert(name) for name in branches):
        return "low-rank branches on experts: PEFT has no linear layer to attach them to once experts are fused"
    projections = {name.rpartition(".")[2] for name in family.experts.on_disk.values()}
    if any(name.rpartition(".")[2] in projections for name in branches):
        return "low-rank branches on dense layers that are called as experts are: PEFT takes them for experts"
    return None


def adapter_config(formats: Mapping[str, ModuleFormat], base: str, family: ModelFamily) -> dict[str, object]:
    """adapter_config.json: a LoRA of scaling 1 with a rank per module. base: name of the artifact it belongs to."""
    ranks = {name: form.rank for name, form in formats.items() if form.rank}
    reason = refusal_of_adapter(formats, family)
    if reason is not None:
        return {"peft_type": QUANT_METHOD.upper(), "reason": reason, "rank_pattern": ranks}
    # What servers look at before they make room for it: the largest.
    largest = max(ranks.values())
    # PEFT reads pattern keys as regular expressions on the end of a module's name; a full name with dots escaped
    # matches that module alone.
    pattern = {_pattern(name): rank for name, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }


def _pattern(name: str) -> str:
    return "^" + name.replace(".", r"\.") + "$"
