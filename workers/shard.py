"""A finished block as it is stored: a checkpoint shard, the factors and residual stores beside it, and the account of both."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from counterweight.kernels.residual import Correction
from counterweight.workers.block import CompressedLinear, tensor_bits
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.interchange.compressed_tensors import weight_names, weight_tensors
from counterweight.workers.interchange.peft import factor_names, factor_tensors
from counterweight.workers.interchange.residual_store import residual_names, residual_tensors
from counterweight.workers.loaded_block import LoadedBlock
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.parallel import in_parallel
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.made_from import made_from
from counterweight.workers.tasks.records import LedgerEntry, ModuleReport, Timing
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.workspace import Blob, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What of a block is stored: tensors of a checkpoint (of quantized linears and of what is kept), an adapter and residual
    stores, by their names. formats: of the linears among them, by full names as stored."""

    tensors: Mapping[str, Tensor]
    formats: Mapping[str, ModuleFormat]


def as_stored(
    builder: BlockBuilder,
    index: int,
    loaded: LoadedBlock,
    linears: Mapping[str, CompressedLinear],
    device: torch.device,
    *,
    kept: Container[str],
) -> Stored:
    """These linears of a block, and those of its parameters that are `kept`.

    loaded: with the parameters as they were solved, and the dtypes in which those that are kept are stored. device: on which
    codes are packed; one thread of a host took 10 s for a block of Mixtral-8x7B.
    """
    layout = builder.layout
    tensors: dict[str, Tensor] = {}
    formats: dict[str, ModuleFormat] = {}
    for module, linear in linears.items():
        name = layout.module_name(index, module)
        tensors |= {key: part.cpu() for key, part in weight_tensors(name, linear.weight.to(device)).items()}
        if linear.low_rank is not None:
            tensors |= factor_tensors(layout.stock_name(name), linear.low_rank)
        tensors |= {} if linear.residual is None else residual_tensors(name, linear.residual)
        formats[name] = _format(linear)
    for parameter in layout.block_parameters(index):
        if parameter in kept:
            tensors[layout.disk_name(index, parameter)] = loaded.parameters[parameter].to(loaded.dtypes[parameter])
    return Stored(tensors=tensors, formats=formats)


def kept_parameters(builder: BlockBuilder, spec: BlockSpec) -> list[str]:
    """Those of the block's parameters that no recipe applies to."""
    quantized = {f"{name}.weight" for name in spec.recipe}
    return [name for name in builder.layout.block_parameters(spec.index) if name not in quantized]


def write_block(
    spec: BlockSpec,
    builder: BlockBuilder,
    stored: Stored,
    reports: Sequence[ModuleReport],
    workspace: Workspace,
    timing: Timing,
) -> BlockRecord:
    """Stores the block as a finished checkpoint shard (its factors and residual stores too), and says what became of each
    parameter. stored: all linears and what is kept, in any order."""
    layout = builder.layout
    tensors: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    residuals: dict[str, Tensor] = {}
    formats: dict[str, ModuleFormat] = {}
    ledger: list[LedgerEntry] = []
    kept_bits = 0
    shapes = layout.block_parameters(spec.index)
    departures = {report.name: "; ".join(f"{f.step}: {f.cause}" for f in report.fallbacks) for report in reports}
    for parameter, part in layout.sources(spec.index, spec.tensors).items():
        name = layout.disk_name(spec.index, parameter)
        module = name.removesuffix(".weight")
        form = stored.formats.get(module) if parameter.endswith(".weight") else None
        if form is None:
            tensors[name] = stored.tensors[name]
            kept_bits += tensor_bits(tensors[name])
            ledger.append(LedgerEntry(source=part.source, shape=shapes[parameter], fate="kept", stored_as=(name,)))
            continue
        names = weight_names(module, form)
        tensors |= {key: stored.tensors[key] for key in names}
        if form.rank:
            of_branch = factor_names(layout.stock_name(module), form.factor_bits)
            factors |= {key: stored.tensors[key] for key in of_branch}
        residuals |= {key: stored.tensors[key] for key in residual_names(module, form)}
        formats[module] = form
        ledger.append(
            LedgerEntry(
                source=part.source,
                shape=shapes[parameter],
                fate="quantized",
                stored_as=names,
                reason=departures.get(parameter.removesuffix(".weight"), ""),
            )
        )
    (checkpoint, of_tensors), *others = _stored(workspace, [tensors, factors, residuals])
    assert checkpoint is not None  # a block has tensors
    (adapter, of_factors), (residual, of_residuals) = others
    return BlockRecord(
        index=spec.index,
        checkpoint=checkpoint,
        adapter=adapter,
        tensors=of_tensors,
        factors=of_factors,
        residual=residual,
        residuals=of_residuals,
        modules=tuple(
            report.model_copy(update={"name": layout.module_name(spec.index, report.name)}) for report in reports
        ),
        formats=formats,
        kept_bits=kept_bits,
        ledger=tuple(ledger),
        timing=timing,
        made_from=made_from(spec),
    )


def _stored(workspace: Workspace, parts: Sequence[Mapping[str, Tensor]]) -> list[tuple[Blob | None, dict[str, str]]]:
    """Each part as a blob, None where it is empty, and the digests of its tensors, which others find while one writes."""
    parts = [{name: tensor.cpu() for name, tensor in part.items()} for part in parts]
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing = [writer.submit(put_tensors, workspace, part) if part else None for part in parts]
        digests = [dict(zip(part, in_parallel(tensor_digest, list(part.values())), strict=True)) for part in parts]
        return [(None if blob is None else blob.result(), found) for blob, found in zip(writing, digests, strict=True)]


def _format(linear: CompressedLinear) -> ModuleFormat:
    weight, branch, activations = linear.weight, linear.low_rank, linear.activations
    return ModuleFormat.model_validate(
        {
            **asdict(weight.form),
            "activation_bits": None if activations is None else activations.bits,
            "activation_clip": 1.0 if activations is None else activations.clip,
            "activation_group_size": None if activations is None else activations.group_size,
            "rank": 0 if branch is None else branch.rank,
            "factor_bits": None if branch is None or branch.up_scale is None else branch.code_bits,
            "residual": None if linear.residual is None else _residual_format(linear.residual),
            "online": None if linear.transform is None else asdict(linear.transform),
        }
    )


def _residual_format(correction: Correction) -> dict[str, object]:
    return {
        "bits": correction.store.bits,
        "selection": correction.selection,
        "channels_per_chunk": correction.channels_per_chunk,
    }
