"""Parts of a source model outside its blocks, and the whole of it where one process has to run it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.layout import Slice
from counterweight.workers.models.wrapper import TextNames


def outside(
    checkpoint: Checkpoint, builder: BlockBuilder, sha256: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Embedding, final norm and lm_head under their names; of a tied model the embedding is the lm_head.

    sha256: the digests of (at least) these tensors, where they are known.
    """
    names = builder.names
    wanted = [names.embedding, names.norm, *([] if builder.tied else [names.head])]
    tensors = checkpoint.read_many(wanted, sha256=None if sha256 is None else {name: sha256[name] for name in wanted})
    return {names.head: tensors[names.embedding], **tensors} if builder.tied else tensors


def read_head(checkpoint: Checkpoint, builder: BlockBuilder, sha256: Mapping[str, str]) -> dict[str, Tensor]:
    """Final norm and lm_head under their names. sha256: the digests of (at least) these tensors."""
    names = builder.names
    wanted = [names.norm, names.embedding if builder.tied else names.head]
    return head_of(checkpoint.read_many(wanted, sha256={name: sha256[name] for name in wanted}), names)


def head_of(tensors: Mapping[str, Tensor], names: TextNames) -> dict[str, Tensor]:
    """Final norm and lm_head among source tensors; of a tied model the embedding is the lm_head."""
    head = names.head if names.head in tensors else names.embedding
    return {names.norm: tensors[names.norm], names.head: tensors[head]}


def read_parameters(
    checkpoint: Checkpoint, slices: Mapping[str, Slice], sha256: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Parameters by name, contiguous. slices: where each lies, as `ModelLayout.sources` says it; sha256: of these tensors,
    verified where they are known.

    Of a tensor that holds all experts each is read by itself, and one at a time is turned round where the source has it
    transposed: an expert's memory is its own and is free when its linears are let go.
    """
    stacked = {part.source for part in slices.values() if part.expert is not None}
    plain = checkpoint.read_many(sorted({part.source for part in slices.values()} - stacked), sha256=sha256)
    experts = checkpoint.read_apart(sorted(stacked), sha256=sha256)
    found = {name: part.of(plain[part.source]) for name, part in slices.items() if part.expert is None}
    members: dict[tuple[str, int], list[str]] = {}
    for name, part in slices.items():
        if part.expert is not None:
            members.setdefault((part.source, part.expert), []).append(name)
    for (source, expert), names in members.items():
        matrix, experts[source][expert] = experts[source][expert], torch.empty(0)
        found |= {name: slices[name].within(matrix).contiguous() for name in names}
        del matrix
    return {name: found[name] for name in slices}


def whole(checkpoint: Checkpoint, builder: BlockBuilder, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The causal model with all its blocks in memory, read one after the other."""
    ends = outside(checkpoint, builder)
    model = builder.causal_shell(ends[builder.names.embedding], ends, device, dtype)
    for index in range(builder.blocks):
        parameters = read_parameters(checkpoint, builder.layout.sources(index, checkpoint.names))
        model.model.layers.append(builder.block(index, parameters, device, dtype).layer)
    return model.eval()
