"""An artifact as a transformers model whose quantized layers are our own: `counterweight.load_model`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import torch
from transformers import GenerationConfig, PreTrainedModel

from counterweight.kernels.backend import Kernels
from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.artifact.auto import mark
from counterweight.pipeline.artifact.hub import located
from counterweight.pipeline.manifest.uris import from_here
from counterweight.workers.checkpoint.strict_json import parse_object
from counterweight.workers.compressed import CompressedModel
from counterweight.workers.errors import CheckpointError
from counterweight.workers.whole_model import assembled

if TYPE_CHECKING:
    from counterweight.kernels.gpu.host_memory import HostArena

GENERATION_CONFIG = "generation_config.json"
MAX_GENERATION_VALUES = 100_000

Corrected = Literal["decode", "all"]
"""Which tokens residual stores correct: those that come one at a time, or all."""


def load_model(
    uri: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    compensated: bool = True,
    residual: Corrected = "decode",
    kernels: Kernels = "auto",
) -> PreTrainedModel:
    """The artifact at `uri` (its root, or the root of its name for the latest), every byte verified, ready for `generate`.

    uri: a path, `file:`, `s3:`, or `hf:owner/name[@revision]`. device: `cpu` or `cuda`. dtype: of activations and kept weights;
    None for the embedding's. compensated: with the low-rank branches and residual stores.

    residual: what residual stores (QDEC) do for a text of several tokens that is given at once. `decode`: nothing, as DecDEC
    serves a prompt; they correct tokens that come one at a time, as `generate` makes them. A whole text then scores as the
    report's `compensated_prefill`. `all`: they correct every token, so that a whole text scores as if its tokens had come one
    at a time: the report's `compensated`. Without stores both are one.

    kernels: what layers run on. `torch`: plain torch, anywhere. `triton`: Triton kernels on a GPU, or under
    TRITON_INTERPRET=1. `auto`: Triton on a GPU for every layer that it has kernels for, torch otherwise. On a GPU residual rows
    stay in host memory, from where Triton's kernels read them.

    One block's dense weights are in memory at a time; quantized layers stay quantized. RequestError when there is no
    artifact, CheckpointError when it is not what its ledger says, ValueError for an unknown `residual` or `kernels` and when
    `triton` cannot run a layer here.
    """
    for name, value, known in (("residual", residual, get_args(Corrected)), ("kernels", kernels, get_args(Kernels))):
        if value not in known:
            raise ValueError(f"{name}: {value!r}: expected {', '.join(known[:-1])} or {known[-1]}")
    store, document = open_artifact(located(from_here(uri)))
    model = CompressedModel.open(store)
    place = torch.device(device)
    arena = _arena(model.residual_sizes) if compensated and place.type == "cuda" and kernels != "torch" else None
    shell = assembled(
        model,
        place,
        dtype,
        compensated=compensated,
        decode_only=residual == "decode",
        kernels=kernels,
        arena=arena,
    )
    if GENERATION_CONFIG in document.files:
        text = store.read(GENERATION_CONFIG, sha256=document.files[GENERATION_CONFIG].sha256)
        fields = parse_object(text, file=store.uri_of(GENERATION_CONFIG), max_values=MAX_GENERATION_VALUES)
        try:
            shell.generation_config = GenerationConfig.from_dict(fields)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{store.uri_of(GENERATION_CONFIG)}: transformers refuses it: {error}") from error
    mark(shell)
    return shell.eval()


def _arena(sizes: list[int]) -> HostArena | None:
    """Host memory for residual rows of these sizes in bytes; None for none, and where triton, which reads it, is missing."""
    if not sizes or find_spec("triton") is None:
        return None
    from counterweight.kernels.gpu.host_memory import HostArena

    return HostArena(HostArena.size_of(sizes))
