"""Parts of a source model outside its blocks, and the whole of it where one process has to run it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.models.block_builder import BlockBuilder
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


def whole(checkpoint: Checkpoint, builder: BlockBuilder, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The causal model with all its blocks in memory, read one after the other."""
    ends = outside(checkpoint, builder)
    model = builder.causal_shell(ends[builder.names.embedding], ends, device, dtype)
    for index in range(builder.blocks):
        slices = builder.layout.sources(index, checkpoint.names)
        tensors = checkpoint.read_many({part.source for part in slices.values()})
        parameters = {name: part.of(tensors[part.source]) for name, part in slices.items()}
        model.model.layers.append(builder.block(index, parameters, device, dtype).layer)
    return model.eval()
