"""Validation of an artifact on a range of windows, block by block.

The original, the quantized model (without branches and residual stores) and the compensated one (decoding, and in prefill)
advance together, one block of each in memory at a time, on the same tokens, in float32. What is claimed without compensation
is measured without it. A window's numbers depend on its batch alone, so whole batches can be spread over workers and put
together in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterweight.workers.block import install
from counterweight.workers.compressed import CompressedModel
from counterweight.workers.errors import RequestError
from counterweight.workers.metrics import METRICS, Comparison
from counterweight.workers.models.block_builder import Block
from counterweight.workers.parallel import OrderedPool
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED, PREFILL, QUANTIZED, WindowMetrics

Blocks = Callable[[int], Mapping[str, Block]]
"""Index -> the block under each variant."""


def advance(
    hidden: Mapping[str, Sequence[Tensor]], blocks: Blocks, count: int, pool: OrderedPool
) -> dict[str, list[Tensor]]:
    """Runs each variant's hidden states (a list of batches) through its own blocks."""
    current = {variant: list(batches) for variant, batches in hidden.items()}
    for index in range(count):
        variants = blocks(index)
        for variant, batches in current.items():
            current[variant] = list(pool.map(variants[variant].run, batches))
    return current


def variants_of(model: CompressedModel) -> dict[str, str]:
    """Variant -> the variant that is measured for it, because both are one model: itself, or the quantized model."""
    forms = model.ledger.formats.values()
    branches, stores = any(form.rank for form in forms), any(form.residual is not None for form in forms)
    found = {BASELINE: BASELINE, QUANTIZED: QUANTIZED, COMPENSATED: COMPENSATED if branches or stores else QUANTIZED}
    return found | {PREFILL: PREFILL if branches else QUANTIZED} if stores else found


def compressed_blocks(
    model: CompressedModel, index: int, variants: Iterable[str], device: torch.device
) -> dict[str, Block]:
    """Block `index` of an artifact, as each variant runs it."""
    block, linears = model.block(index, device, torch.float32)
    blocks: dict[str, Block] = {}
    for variant in variants:
        blocks[variant] = block.replica()
        install(blocks[variant], linears, compensated=variant != QUANTIZED, decode_only=variant == PREFILL)
    return blocks


@torch.no_grad()
def measure(
    hidden: Mapping[str, Sequence[Tensor]],
    tokens: Sequence[Tensor],
    heads: Mapping[str, nn.Module],
    pool: OrderedPool,
) -> dict[str, list[WindowMetrics]]:
    """Metrics per window from the last hidden states; heads: variant -> its own."""

    def one(batch: int) -> dict[str, list[WindowMetrics]]:
        found: dict[str, list[WindowMetrics]] = {variant: [] for variant in hidden}
        for row, ids in enumerate(tokens[batch]):
            reference = _log_probabilities(heads[BASELINE], hidden[BASELINE][batch][row])
            for variant in hidden:
                own = (
                    reference
                    if variant == BASELINE
                    else _log_probabilities(heads[variant], hidden[variant][batch][row])
                )
                found[variant].append(_window(variant, reference, own, ids))
        return found

    merged: dict[str, list[WindowMetrics]] = {variant: [] for variant in hidden}
    for found in pool.map(one, range(len(tokens))):
        for variant, windows in found.items():
            merged[variant] += windows
    return merged


def _log_probabilities(head: nn.Module, hidden: Tensor) -> Tensor:
    return functional.log_softmax(head(hidden.unsqueeze(0))[0].float(), dim=-1)  # [length, vocabulary]


def _window(variant: str, reference: Tensor, own: Tensor, ids: Tensor) -> WindowMetrics:
    """RequestError where the variant's logits make no number: a model whose weights are too large, or codes that spoil it."""
    window = Comparison(reference, own, ids)
    found = {metric.name: metric.of_window(window) for metric in METRICS}
    for name, value in found.items():
        if not math.isfinite(value):
            raise RequestError(
                f"{variant}: {name} of a window is {value}: expected finite logits, from the final norm and lm_head too"
            )
    return found
