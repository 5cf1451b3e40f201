"""A causal model that is in memory as a whole, whoever wrote its checkpoint, measured beside the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from counterweight.kernels.backend import Kernels
from counterweight.workers.block import install
from counterweight.workers.compressed import CompressedModel
from counterweight.workers.errors import RequestError
from counterweight.workers.evaluation import Measured
from counterweight.workers.metrics import Comparison, Expected
from counterweight.workers.tasks.evaluate import BASELINE, QUANTIZED

if TYPE_CHECKING:
    from counterweight.kernels.gpu.host_memory import HostArena


def assembled(
    model: CompressedModel,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    compensated: bool = True,
    decode_only: bool = False,
    kernels: Kernels = "auto",
    arena: HostArena | None = None,
) -> PreTrainedModel:
    """An artifact's causal model, its quantized layers our own; see `block.install` for what the options mean. dtype: None for
    the embedding's."""
    embedding = model.embedding()
    dtype = dtype or embedding.dtype
    shell = model.builder.causal_shell(embedding, model.head(), device, dtype)
    for index in range(model.builder.blocks):
        block, linears = model.block(index, device, dtype)
        install(block, linears, compensated=compensated, decode_only=decode_only, kernels=kernels, arena=arena)
        shell.model.layers.append(block.layer)
    return shell.eval()


@torch.no_grad()
def measure_whole(
    model: PreTrainedModel,
    tokens: Sequence[Tensor],
    reference: Callable[[int], Tensor],
    done: Callable[[int], None],
) -> dict[str, Measured]:
    """Numbers of each window under the original and under `model`.

    tokens: batches [windows, length] of ids on the model's device. reference: batch -> the original's log-probabilities
    [windows, length, vocabulary] float32. done: told how many windows have been measured. RequestError for a model with another
    vocabulary.
    """
    found = {BASELINE: Measured(), QUANTIZED: Measured()}
    for batch, ids in enumerate(tokens):
        before = reference(batch)
        own = functional.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), dim=-1)
        if own.shape != before.shape:
            raise RequestError(f"a vocabulary of {own.shape[-1]}: expected {before.shape[-1]}, the original's")
        for row, window in enumerate(ids):
            expected = Expected.of(before[row])
            found[BASELINE].add(Measured.of(BASELINE, Comparison.of_original(expected, window[1:])))
            found[QUANTIZED].add(Measured.of("the model", Comparison.of(expected, own[row], window[1:])))
        done(len(found[BASELINE].metrics))
    return found
