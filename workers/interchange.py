"""The artifact in other people's terms: compressed-tensors for the codes, PEFT for the low-rank branch.

What a stock loader can represent is written so that it loads with the right logits; what it cannot is written so that it
*refuses*. transformers skips a quantization method it does not know and then starts from random weights, so refusal
needs an unknown `model_type` as well as our own `quant_method`; PEFT refuses an unknown `peft_type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank, QuantizedWeight
from counterweight.kernels.packing import from_checkpoint, to_checkpoint
from counterweight.kernels.residual import Correction, ResidualStore
from counterweight.workers.architecture import Family, is_expert
from counterweight.workers.errors import CheckpointError
from counterweight.workers.tasks import ModuleFormat

QUANT_METHOD = "counterweight"
"""`quant_method` of an artifact that only our own loader may open; also the prefix of its `model_type`."""

ADAPTER_PREFIX = "base_model.model."
EXPERT_TARGET = "re:.*[.]experts[.].*"

PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""Tensors of one quantized linear, after its name and a dot; the last only for an asymmetric grid."""


def weight_tensors(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A quantized linear's tensors under their checkpoint names."""
    return {f"{module}.{name}": tensor for name, tensor in to_checkpoint(weight).items()}


def factor_tensors(module: str, branch: LowRank) -> dict[str, Tensor]:
    """A low-rank branch under PEFT's names: lora_A [rank, in], lora_B [out, rank]; of integer codes their steps too."""
    tensors = (branch.down, branch.up, branch.down_scale, branch.up_scale)
    names = factor_names(module, 8 if branch.up_scale is not None else None)
    return {name: tensor.contiguous() for name, tensor in zip(names, tensors, strict=False) if tensor is not None}


def factor_names(module: str, bits: int | None) -> tuple[str, ...]:
    """Names of a branch's tensors: A (down), B (up), and the steps of both when they are codes of `bits`."""
    names = (f"{ADAPTER_PREFIX}{module}.lora_A", f"{ADAPTER_PREFIX}{module}.lora_B")
    kinds = ("weight",) if bits is None else ("weight", "scale")
    return tuple(f"{name}.{kind}" for kind in kinds for name in names)


RESIDUAL = ("residual_packed", "residual_scale", "residual_thresholds")
STATIC = "residual_importance"


def residual_names(module: str, form: ModuleFormat) -> tuple[str, ...]:
    """Names of the tensors of a linear's residual store; none when it has none."""
    if form.residual is None:
        return ()
    parts = (*RESIDUAL, STATIC) if form.residual.selection == "static" else RESIDUAL
    return tuple(f"{module}.{part}" for part in parts)


def residual_tensors(module: str, correction: Correction) -> dict[str, Tensor]:
    """A residual store under its names: rows by input channel, packed; scales by output channel; thresholds."""
    store = correction.store
    tensors = dict(zip(RESIDUAL, (store.packed, store.scale, store.thresholds), strict=True))
    if correction.selection == "static" and correction.importance is not None:
        tensors[STATIC] = correction.importance
    return {f"{module}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def read_residual(
    tensors: Mapping[str, Tensor], module: str, form: ModuleFormat, shape: tuple[int, int]
) -> Correction | None:
    """The residual of `module`, a linear of `shape` [out, in]; CheckpointError when its tensors are not of that shape."""
    if form.residual is None:
        return None
    local = {name.rsplit(".", 1)[1]: tensor for name, tensor in tensors.items()}
    packed, scale, thresholds = (local[name] for name in RESIDUAL)
    rows, columns = shape
    words = -(-rows * form.residual.bits // 32)
    found = (tuple(packed.shape), tuple(scale.shape), tuple(thresholds.shape))
    if found != ((columns, words), (rows,), (columns,)) or packed.dtype != torch.int32:
        raise CheckpointError(f"residual: {module}: shapes {found}: expected those of a layer [{rows}, {columns}]")
    store = ResidualStore(packed=packed, scale=scale, thresholds=thresholds, out_features=rows, bits=form.residual.bits)
    return Correction(
        store=store,
        selection=form.residual.selection,
        channels_per_chunk=form.residual.channels_per_chunk,
        importance=local.get(STATIC),
    )


def read_weight(tensors: Mapping[str, Tensor], module: str, form: ModuleFormat) -> QuantizedWeight:
    """The quantized linear `module` from its stored tensors; CheckpointError when they are not what `form` says."""
    local = {name.rsplit(".", 1)[1]: tensor for name, tensor in tensors.items()}
    try:
        return from_checkpoint(local, bits=form.bits, group_size=form.group_size, symmetric=form.symmetric)
    except ValueError as error:
        raise CheckpointError(f"{module}: {error}") from error


def read_branch(adapter: Mapping[str, Tensor], module: str, form: ModuleFormat) -> LowRank | None:
    """The low-rank branch of `module`, or None when its format has rank 0; CheckpointError when shapes disagree."""
    if form.rank == 0:
        return None
    down, up, *steps = (adapter[name] for name in factor_names(module, form.factor_bits))
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != form.rank or up.shape[1] != form.rank:
        raise CheckpointError(f"adapter: {module}: {list(up.shape)} x {list(down.shape)}: expected rank {form.rank}")
    if not steps:
        return LowRank(up=up, down=down)
    if up.dtype != torch.int8 or down.dtype != torch.int8 or any(tuple(step.shape) != (form.rank,) for step in steps):
        raise CheckpointError(f"adapter: {module}: expected int8 codes and {form.rank} steps for each factor")
    return LowRank(up=up, down=down, up_scale=steps[1], down_scale=steps[0])


def scale_dtype(module: str, source: torch.dtype) -> torch.dtype:
    """Dtype in which a linear's scales are stored.

    The source's, but float32 for experts: transformers dequantizes experts in the dtype of their scales when it fuses
    them, so 16-bit scales would give other logits than ours (relative error 4e-3 to 1e-2 on the reference Mixtral).
    """
    return torch.float32 if is_expert(module) else source


def refusal_of_weights(formats: Mapping[str, ModuleFormat], experts: Sequence[str]) -> str | None:
    """Why stock transformers cannot represent these weights, or None when it can.

    experts: names of all expert linears of the model. Dense layers can have any mixture of schemes. Two things have a
    standard form that transformers 5.23 with compressed-tensors 0.20 does not load yet, and says so: zero points of dense
    layers, and experts in 16 bits beside quantized layers. They are written in that form, which its decompressor reads.
    """
    forms = formats.values()
    if any(form.online is not None for form in forms):
        return "online Hadamard transforms: transformers ignores them, and the logits would be noise"
    if any(form.activation_clip != 1 or form.activation_group_size is not None for form in forms):
        return "activations with a clip or in groups: transformers quantizes whole tokens to their maximum"
    if not experts:
        return None
    kinds = {_scheme(formats[name]) if name in formats else None for name in experts}
    if kinds == {None}:
        return None
    if len(kinds) > 1:
        return "experts of more than one format: transformers fuses all experts of a block into one tensor"
    (kind,) = kinds
    if kind is not None and not kind[2]:
        return "experts on an asymmetric grid: transformers ignores their zero points"
    if kind is not None and kind[3] is not None:
        return "experts with quantized activations: transformers runs them on unquantized activations"
    return None


def refusal_of_adapter(formats: Mapping[str, ModuleFormat], family: Family) -> str | None:
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


def artifact_config(
    source: Mapping[str, Any], formats: Mapping[str, ModuleFormat], linears: Sequence[str], family: Family
) -> dict[str, Any]:
    """config.json of the artifact: the source's, with the quantization in compressed-tensors' form.

    linears: names of all linears inside the blocks, quantized or kept, as stored.
    """
    config = {**source}
    experts = [name for name in linears if is_expert(name)]
    reason = refusal_of_weights(formats, experts)
    if reason is not None:
        config["model_type"] = f"{QUANT_METHOD}_{source['model_type']}"
        config["architectures"] = []
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "base_model_type": source["model_type"],
            "reason": reason,
        }
        transforms = transform_groups(formats)
        if transforms:
            config["quantization_config"]["transform_config"] = {"config_groups": transforms}
        return config
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": _groups(formats),
        "ignore": _ignored(formats, linears, family),
        "kv_cache_scheme": None,
    }
    return config


def transform_groups(formats: Mapping[str, ModuleFormat]) -> dict[str, Any]:
    """The online transforms in the words of compressed-tensors' `TransformConfig`, for those that it has words for: its
    Hadamard matrices are ours for powers of two, in equal blocks (`head_dim`) or as a whole."""
    groups: dict[int, list[str]] = {}
    for name, form in formats.items():
        transform = form.hadamard
        if transform is None or transform.inner != 1 or transform.seed is not None:
            continue
        if transform.order & (transform.order - 1) == 0:
            groups.setdefault(transform.order, []).append(name)
    return {
        f"hadamard_{order}": {
            "type": "hadamard",
            "apply": [{"targets": names, "location": "input", "inverse": False, "ignore": []}],
            "randomize": False,
            "head_dim": order,
        }
        for order, names in groups.items()
    }


def source_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own config.json out of an artifact's; CheckpointError when the artifact is not one of ours."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        raise CheckpointError("config.json: no quantization_config: expected an artifact of Counterweight")
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if quantization.get("quant_method") == QUANT_METHOD:
        plain["model_type"] = quantization.get("base_model_type")
    return plain


def adapter_config(formats: Mapping[str, ModuleFormat], base: str, family: Family) -> dict[str, Any]:
    """adapter_config.json: a LoRA of scaling 1 with a rank per module. base: name of the artifact it belongs to."""
    ranks = {name: form.rank for name, form in formats.items() if form.rank}
    reason = refusal_of_adapter(formats, family)
    if reason is not None:
        return {"peft_type": QUANT_METHOD.upper(), "reason": reason, "rank_pattern": ranks}
    first = next(iter(ranks.values()))
    # PEFT reads pattern keys as regular expressions on the end of a module's name; a full name with dots escaped
    # matches that module alone.
    pattern = {_pattern(name): rank for name, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first,
        "lora_alpha": first,
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


Scheme = tuple[int, int | None, bool, int | None]


def _scheme(form: ModuleFormat) -> Scheme:
    return (form.bits, form.group_size, form.symmetric, form.activation_bits)


def _groups(formats: Mapping[str, ModuleFormat]) -> dict[str, Any]:
    """One group for all linears when one scheme fits, otherwise one per scheme with the names of its layers.

    With `dequantize=True`, which nobody needs for these files, transformers reads every dense layer by the first group
    that names no experts. Most bits first, and experts apart: then a layer of another group has too few words and
    loading fails, where fewer bits would have made other weights of the same words.
    """
    schemes: dict[tuple[Scheme, bool], list[str]] = {}
    for name, form in formats.items():
        schemes.setdefault((_scheme(form), is_expert(name)), []).append(name)
    if len({scheme for scheme, _ in schemes}) == 1:
        (scheme, _), *_ = schemes
        return {"group_0": _group(scheme, ["Linear"])}
    ordered = sorted(schemes.items(), key=lambda item: item[0][0][0], reverse=True)
    return {
        f"group_{index}": _group(scheme, [EXPERT_TARGET] if are_experts else names)
        for index, ((scheme, are_experts), names) in enumerate(ordered)
    }


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    bits, group_size, symmetric, activation_bits = scheme
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    activations = None
    if activation_bits is not None:
        activations = {
            "num_bits": activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    # The group names the format itself: with activations, compressed-tensors would otherwise infer one byte a weight.
    return {
        "targets": list(targets),
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }


def _ignored(formats: Mapping[str, ModuleFormat], linears: Sequence[str], family: Family) -> list[str]:
    kept = [name for name in linears if name not in formats]
    routers = ["re:.*[.]gate$"] if family.experts is not None else []
    return ["lm_head", *routers, *kept]
