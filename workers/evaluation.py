"""Validation of an artifact on a range of windows, block by block.

The quantized model (without branches and residual stores) and the compensated one (decoding, and in prefill) advance together,
one block of each in memory at a time, on the tokens that the original has run on before. What is claimed without compensation
is measured without it. A window's numbers depend on its batch alone, so whole batches can be spread over workers and put
together in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterweight.workers.block import install
from counterweight.workers.compressed import CompressedModel
from counterweight.workers.errors import RequestError
from counterweight.workers.metrics import METRICS, PROFILES, Comparison, Expected
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.routing import watched
from counterweight.workers.parallel import OrderedPool, piece_sequences
from counterweight.workers.tasks.evaluate import (
    BASELINE,
    COMPENSATED,
    HEAD_TOKENS,
    PREFILL,
    QUANTIZED,
    WindowMetrics,
    WindowProfiles,
)

Chosen = Sequence[Tensor | None]
"""The experts of the tokens of each batch, [tokens, experts] bool; None in a dense block."""


@dataclass(slots=True)
class Measured:
    """Of windows under one model, in order: their metrics, and what is measured along them."""

    metrics: tuple[WindowMetrics, ...] = ()
    profiles: tuple[WindowProfiles, ...] = ()

    @classmethod
    def of(cls, variant: str, window: Comparison) -> Measured:
        """One window. RequestError where the variant's logits make no number: a model whose weights are too large, or codes
        that spoil it."""
        measured = {metric.name: metric.of_window(window) for metric in METRICS}
        found = {name: value for name, value in measured.items() if value is not None}
        for name, value in found.items():
            if not math.isfinite(value):
                whose = "the original itself, before any compression" if variant == BASELINE else variant
                raise RequestError(
                    f"{whose}: {name} of a window is {value}: expected finite logits, from the final norm and lm_head too"
                )
        return cls((found,), ({profile.name: profile.of_window(window) for profile in PROFILES},))

    def add(self, other: Measured) -> None:
        """Takes in further windows."""
        self.metrics += other.metrics
        self.profiles += other.profiles


def advance(
    hidden: Mapping[str, Sequence[Tensor]],
    blocks: Iterable[Mapping[str, Block]],
    pool: OrderedPool,
    routed: Callable[[int, str, Chosen], None],
) -> dict[str, list[Tensor]]:
    """Runs each variant's hidden states (a list of batches [windows, length, hidden]) through its own blocks. routed: told of
    each block and variant what its router chose, of some windows after the others."""
    current = {variant: [_pieces(batch) for batch in batches] for variant, batches in hidden.items()}
    for index, variants in enumerate(blocks):
        for variant, batches in current.items():
            with watched(variants[variant]) as router:
                done = list(pool.map(router.run, chain.from_iterable(batches)))
            outputs = iter([output for output, _ in done])
            current[variant] = [[next(outputs) for _ in batch] for batch in batches]
            routed(index, variant, [chosen for _, chosen in done])
            del done, outputs
        del variants  # before the next one is loaded
    return {variant: [torch.cat(batch) for batch in batches] for variant, batches in current.items()}


def _pieces(batch: Tensor) -> list[Tensor]:
    """What one thread runs at a time of a batch of windows [windows, length, ...]: all on a GPU."""
    return [batch] if batch.is_cuda else list(batch.split(piece_sequences(batch.shape[1])))


def variants_of(model: CompressedModel) -> dict[str, str]:
    """Variant -> the variant that is measured for it, because both are one model: itself, or the quantized model."""
    forms = model.ledger.formats.values()
    branches, stores = any(form.rank for form in forms), any(form.residual is not None for form in forms)
    found = {BASELINE: BASELINE, QUANTIZED: QUANTIZED, COMPENSATED: COMPENSATED if branches or stores else QUANTIZED}
    return found | {PREFILL: PREFILL if branches else QUANTIZED} if stores else found


def compressed_blocks(
    model: CompressedModel, index: int, variants: Iterable[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Block]:
    """Block `index` of an artifact, as each variant runs it."""
    block, linears = model.block(index, device, dtype)
    if (
        device.type == "cpu"
    ):  # kernels multiply codes; here all pieces of all windows, and all variants, share one dense weight
        for linear in linears.values():
            linear.weight.hold(dtype)
    blocks: dict[str, Block] = {}
    for variant in variants:
        blocks[variant] = block.replica()
        install(blocks[variant], linears, compensated=variant != QUANTIZED, decode_only=variant == PREFILL)
    return blocks


@torch.no_grad()
def measure(
    hidden: Mapping[str, Iterable[Tensor]],
    ids: Tensor,
    heads: Mapping[str, nn.Module],
    pool: OrderedPool,
    routed: Mapping[str, Mapping[int, Sequence[float]]],
) -> dict[str, Measured]:
    """Numbers of each window under the original and under each variant, from what enters their final norms.

    hidden: variant, the original too -> batches [windows, length, hidden], which are taken as they are needed; ids: [windows,
    length]. heads: of each variant. routed: variant -> sparse block -> share of each window's tokens that go where the original
    sends them.
    """

    def one(window: tuple[int, Mapping[str, Tensor]]) -> dict[str, Measured]:
        index, states = window
        parts: dict[str, list[Comparison]] = {variant: [] for variant in hidden}
        for start in range(0, ids.shape[1], HEAD_TOKENS):
            positions = slice(start, start + HEAD_TOKENS)
            following = ids[index, 1:][positions]
            expected = Expected.of(_log_probabilities(heads[BASELINE], states[BASELINE][positions]))
            for variant, compared in parts.items():
                if variant == BASELINE:
                    compared.append(Comparison.of_original(expected, following))
                else:
                    own = _log_probabilities(heads[variant], states[variant][positions])
                    compared.append(Comparison.of(expected, own, following))
        return {
            variant: Measured.of(
                variant,
                Comparison.joined(compared, [shares[index] for shares in routed.get(variant, {}).values()]),
            )
            for variant, compared in parts.items()
        }

    merged = {variant: Measured() for variant in hidden}
    windows = zip(*(chain.from_iterable(batches) for batches in hidden.values()), strict=True)
    for found in pool.map(one, enumerate(dict(zip(hidden, states, strict=True)) for states in windows)):
        for variant, measured in found.items():
            merged[variant].add(measured)
    return merged


def _log_probabilities(head: nn.Module, hidden: Tensor) -> Tensor:
    return functional.log_softmax(head(hidden.unsqueeze(0))[0].float(), dim=-1)  # [positions, vocabulary]
