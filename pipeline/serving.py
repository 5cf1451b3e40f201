"""An artifact as a transformers model whose quantized layers are our own."""

from __future__ import annotations

import json
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from pipeline.artifact import open_artifact
from workers.block import install
from workers.compressed import CompressedModel

GENERATION_CONFIG = "generation_config.json"


def load_model(
    uri: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    compensated: bool = True,
    residual: Literal["decode", "all"] = "decode",
) -> PreTrainedModel:
    """The artifact at `uri` (its root, or the root of its name for the latest), every byte verified.

    dtype: of activations and kept weights; None for the embedding's. compensated: with the low-rank branches and residual
    stores. residual: which tokens the stores correct, those that come one at a time or all. One block's dense weights are
    in memory at a time; quantized layers stay quantized. RequestError when there is no artifact, CheckpointError when it
    is not what its ledger says.
    """
    store, document = open_artifact(uri)
    model = CompressedModel.open(store)
    place = torch.device(device)
    embedding = model.embedding()
    kind = embedding.dtype if dtype is None else dtype
    shell = model.skeleton.causal_shell(embedding, model.head(), place, kind)
    for index in range(model.skeleton.blocks):
        block, linears = model.block(index, place, kind)
        install(block, linears, compensated=compensated, decode_only=residual == "decode")
        shell.model.layers.append(block.layer)
    if GENERATION_CONFIG in document.files:
        text = store.read(GENERATION_CONFIG, sha256=document.files[GENERATION_CONFIG].sha256)
        shell.generation_config = GenerationConfig.from_dict(json.loads(text))
    return shell.eval()
