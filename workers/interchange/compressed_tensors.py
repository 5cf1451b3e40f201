"""Weights in compressed-tensors' form: their names in the checkpoint, and the model's config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from counterweight.kernels.weights import StoredWeight, format_of
from counterweight.workers.errors import CheckpointError
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.models.family import ModelFamily, is_expert
from counterweight.workers.transforms.online import hadamard

QUANT_METHOD = "counterweight"
"""`quant_method` of an artifact that only our own loader may open; also the prefix of its `model_type`."""

EXPERT_TARGET = "re:.*[.]experts[.].*"


def weight_tensors(module: str, weight: StoredWeight) -> dict[str, Tensor]:
    """A quantized linear's tensors under their checkpoint names."""
    return {f"{module}.{name}": tensor for name, tensor in weight.tensors().items()}


def weight_names(module: str, form: ModuleFormat) -> tuple[str, ...]:
    """Names of the tensors of a quantized linear; CheckpointError for a format that nobody knows."""
    return tuple(f"{module}.{name}" for name in _format_of(module, form).names(form.weight))


def read_weight(tensors: Mapping[str, Tensor], module: str, form: ModuleFormat) -> StoredWeight:
    """The quantized linear `module` from its stored tensors; CheckpointError when they are not what `form` says."""
    local = {name.rsplit(".", 1)[1]: tensor for name, tensor in tensors.items()}
    try:
        return _format_of(module, form).from_tensors(local, form.weight)
    except ValueError as error:
        raise CheckpointError(f"{module}: {error}") from error


def _format_of(module: str, form: ModuleFormat) -> type[StoredWeight]:
    try:
        return format_of(form.kind)
    except ValueError as error:
        raise CheckpointError(f"{module}: {error}") from error


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
    for stored in sorted({form.kind for form in forms}):
        if (refusal := format_of(stored).refusal) is not None:
            return refusal
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


def artifact_config(
    source: Mapping[str, Any], formats: Mapping[str, ModuleFormat], linears: Sequence[str], family: ModelFamily
) -> dict[str, object]:
    """config.json of the artifact: the source's, with the quantization in compressed-tensors' form.

    formats: of quantized linears; linears: all of them inside the blocks, quantized or kept; by transformers' names for them.
    """
    config = {**source}
    experts = [name for name in linears if is_expert(name)]
    apart = family.experts.stock_refusal if family.experts is not None and experts else None
    reason = apart or refusal_of_weights(formats, experts)
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
        "config_groups": _groups(formats, family),
        "ignore": _ignored(formats, linears, family),
        "kv_cache_scheme": None,
    }
    return config


def transform_groups(formats: Mapping[str, ModuleFormat]) -> dict[str, object]:
    """The online transforms in the words of compressed-tensors' `TransformConfig`, for those that it has words for: its
    Hadamard matrices are ours for powers of two, in equal blocks (`head_dim`) or as a whole."""
    groups: dict[int, list[str]] = {}
    for name, form in formats.items():
        transform = hadamard(form)
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


def source_config(config: Mapping[str, object]) -> dict[str, object]:
    """The model's own config.json out of an artifact's; CheckpointError when the artifact is not one of ours."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        raise CheckpointError("config.json: no quantization_config: expected an artifact of Counterweight")
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if quantization.get("quant_method") == QUANT_METHOD:
        plain["model_type"] = quantization.get("base_model_type")
    return plain


Scheme = tuple[int, int | None, bool, int | None]


def _scheme(form: ModuleFormat) -> Scheme:
    return (form.bits, form.group_size, form.symmetric, form.activation_bits)


def _groups(formats: Mapping[str, ModuleFormat], family: ModelFamily) -> dict[str, object]:
    """One group for all linears when one scheme fits, otherwise one per scheme with the names of its layers.

    With `dequantize=True`, which nobody needs for these files, transformers reads every dense layer by the first group
    that names no experts. Most bits first, and experts apart: then a layer of another group has too few words and
    loading fails, where fewer bits would have made other weights of the same words.
    """
    schemes: dict[tuple[Scheme, bool], list[str]] = {}
    for name, form in formats.items():
        schemes.setdefault((_scheme(form), is_expert(name)), []).extend(family.spellings(name))
    if len({scheme for scheme, _ in schemes}) == 1:
        (scheme, _), *_ = schemes
        return {"group_0": _group(scheme, ["Linear"])}
    ordered = sorted(schemes.items(), key=lambda item: item[0][0][0], reverse=True)
    return {
        f"group_{index}": _group(scheme, [EXPERT_TARGET] if are_experts else names)
        for index, ((scheme, are_experts), names) in enumerate(ordered)
    }


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, object]:
    bits, group_size, symmetric, activation_bits = scheme
    weights: dict[str, object] = {
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


def _ignored(formats: Mapping[str, ModuleFormat], linears: Sequence[str], family: ModelFamily) -> list[str]:
    head = family.names[0].head.removesuffix(".weight")
    kept = [spelling for name in linears if name not in formats for spelling in family.spellings(name)]
    routers = family.experts.routers if family.experts is not None else ()
    beside = family.wrapper.ignored if family.wrapper is not None else ()
    return [*family.spellings(head), *beside, *routers, *kept]
