"""Branches side by side at equal bits: what the literature proposes beside LRC, on text that none of them saw.

    python benchmarks/branches.py [MODEL] [--budget 2.37] [--only ROW ...] [--record]

W4 A4 per channel, rotated and smoothed. Every row may spend `--budget` bits per weight beside codes of 4 bits and their scales,
in factors or in a second weight; bits are counted all in, and the few rows that take others say so. Calibration on WikiText-2
valid. Measured on WikiText-2 test: the relative error of each linear's output where the blocks before are the original's, mean
over all linears; and the model with every linear replaced, this also on the standard library's documentation
(`pydoc_data.topics`). In memory, one process. `branch_methods.py` has the methods.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from branch_methods import (
    Method,
    Replacement,
    affordable,
    corrected,
    deflated,
    direction_bits,
    exact,
    no_branch,
    preserved,
    serq,
    unquantized_channels,
    whitened,
)
from common import ROOT, machine, record, table, versions
from in_memory import Model, Size, Stage, gathered, opened, replaced
from quality import documentation
from torch import Tensor

from counterweight.pipeline.allocation import Candidate, allocate
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.lrc import initial_problem
from counterweight.workers.compensation.objective import energy
from counterweight.workers.compensation.regression import spectrum
from counterweight.workers.methods.activations import Activations
from counterweight.workers.methods.compensations import LRC
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.methods.transforms import Rotation, Smoothing
from counterweight.workers.methods.weights import Weights
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.recipe import Recipe

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Ranks at which the measured curve of a layer is solved, as multiples of the rank that it would have by itself."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """method: of one linear. ranks: how the model's budget is dealt out: alike, by the gains that LRC predicts, or by errors
    measured at several ranks. shared: linears with one input have one down factor. propagated: solved on the inputs that
    compressed blocks make."""

    method: Method
    ranks: Literal["alike", "predicted", "measured"] = "alike"
    shared: bool = False
    propagated: bool = False


INT4: Method = partial(corrected, bits=4, last="codes")
MIXED = Weights(quantizer=GPTQ(target="mixed", mix=0.25))
ROWS: Mapping[str, Row] = {
    "QuaRot + GPTQ, no branch": Row(method=no_branch),
    "weights exact, inputs quantized": Row(method=exact),
    "no branch, codes of 8 bits": Row(method=partial(no_branch, weights=Weights(bits=8))),
    "LRC, int4, codes last": Row(method=INT4),
    "LRC, bf16": Row(method=partial(corrected, bits=16, last="branch")),
    "LRC, int8": Row(method=partial(corrected, bits=8, last="branch")),
    "SERQ": Row(method=serq),
    "SERQ, salient channels unquantized": Row(method=unquantized_channels),
    "SRR, int4": Row(method=partial(preserved, bits=4)),
    "SRR, int4, all preserved": Row(method=partial(preserved, bits=4, share=1.0)),
    "H-SVDQuant, bf16": Row(method=partial(deflated, bits=16)),
    "H-SVDQuant, bf16, rank 8": Row(method=partial(deflated, bits=16, rank=8)),
    "whitened SVD, int4": Row(method=partial(whitened, bits=4)),
    "LRC, int4, a tenth reconstructs": Row(method=partial(preserved, bits=4, share=0.9, of="lost")),
    "LRC, int4, codes last, down factor shared": Row(method=INT4, shared=True),
    "LRC, int4, codes last, mixed target": Row(method=partial(corrected, bits=4, last="codes", weights=MIXED)),
    "LRC, int4, codes last, regressed target": Row(
        method=partial(corrected, bits=4, last="codes", weights=Weights(quantizer=GPTQ(target="regressed")))
    ),
    "LRC, int4, codes last, ranks predicted": Row(method=INT4, ranks="predicted"),
    "LRC, int4, codes last, ranks measured": Row(method=INT4, ranks="measured"),
    "LRC, int4, codes last, codes of 3 bits": Row(
        method=partial(corrected, bits=4, last="codes", weights=Weights(bits=3))
    ),
    "LRC, int4, codes last, propagated, mixed target (GPTAQ, QEP)": Row(
        method=partial(corrected, bits=4, last="codes", weights=MIXED), propagated=True
    ),
    "LRC, int4, codes last, propagated": Row(method=INT4, propagated=True),
    "LRC, int4": Row(method=partial(corrected, bits=4, last="branch")),
    "LRC, int8, codes last": Row(method=partial(corrected, bits=8, last="codes")),
    "H-SVDQuant, int4": Row(method=partial(deflated, bits=4)),
    "SRR, bf16": Row(method=partial(preserved, bits=16)),
    "whitened SVD, int4, anticipated 0.9": Row(method=partial(whitened, bits=4, anticipation=0.9)),
    "LRC, int4, a quarter reconstructs": Row(method=partial(preserved, bits=4, share=0.75, of="lost")),
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Linears that are solved as one. weight: [out, in] float32, one below the other."""

    names: tuple[str, ...]
    weight: Tensor
    statistics: InputStatistics

    def parts(self, replacement: Replacement, rows: Sequence[int]) -> dict[str, Replacement]:
        """The replacement of each linear, of so many rows, with its share of the bits."""
        total, branch, found, start = sum(rows), replacement.branch, {}, 0
        for name, count in zip(self.names, rows, strict=True):
            own = slice(start, start + count)
            found[name] = Replacement(
                dense=replacement.dense[own],
                branch=None if branch is None else replace(branch, up=branch.up[own]),
                bits=replacement.bits * count // total,
            )
            start += count
        return found


def layers_of(stage: Stage, statistics: Mapping[SharedInputGroup, InputStatistics], *, shared: bool) -> list[Layer]:
    """The block's linears, each by itself, or those with one input as one."""
    found = []
    for group in stage.block.groups:
        for names in [group] if shared else [(name,) for name in group]:
            weight = torch.cat([stage.block.linear(name).weight.detach() for name in names])
            found.append(Layer(names=tuple(names), weight=weight, statistics=statistics[group]))
    return found


def dealt_out(row: Row, layers: Sequence[Layer], budget: float) -> list[int]:
    """Bits of each layer beside its codes; `budget` per weight of all of them."""
    alike = [int(budget * layer.weight.numel()) for layer in layers]
    if row.ranks == "alike":
        return alike
    curve = predicted if row.ranks == "predicted" else partial(measured, row.method)
    candidates = {
        (place, layer.names[0]): Candidate(
            rows=layer.weight.shape[0], columns=layer.weight.shape[1], gains=curve(layer, own), factor_bits=4
        )
        for place, (layer, own) in enumerate(zip(layers, alike, strict=True))
    }
    ranks = allocate(candidates, budget)
    return [ranks[key] * candidate.cost for key, candidate in candidates.items()]


def predicted(layer: Layer, bits: int) -> list[float]:
    """What each further rank takes off the relative error, by Init-LRC's singular values."""
    del bits
    weight = layer.weight.double()
    matrix, root = initial_problem(weight, layer.statistics, LRC().damping)
    squares = spectrum(matrix @ root)[0].square()[: min(weight.shape)]
    return [float(gain) for gain in squares / energy(weight, layer.statistics)]


def measured(method: Method, layer: Layer, bits: int) -> list[float]:
    """The same, of the error on the calibration tokens at the ranks of `GRID`, straight lines between them."""
    alone, cost = affordable(layer.weight, bits, 4), direction_bits(len(layer.weight), layer.weight.shape[1], 4)
    ranks = sorted({min(round(share * alone), *layer.weight.shape) for share in GRID})
    errors = [
        method(layer.weight, layer.statistics, rank * cost).error(layer.weight, layer.statistics) for rank in ranks
    ]
    gains: list[float] = []
    for low, high, before, after in zip(ranks, ranks[1:], errors, errors[1:], strict=False):
        gain = (before - after) / (high - low)
        gains += [min([gain, *gains[-1:]])] * (high - low)
    return gains


def solved(row: Row, stages: Sequence[Stage], budget: float) -> list[dict[str, Replacement]]:
    """Each block's linears."""
    if row.propagated:
        return propagated(row, stages, budget)
    layers = [layers_of(stage, stage.statistics, shared=row.shared) for stage in stages]
    bits = iter(dealt_out(row, [layer for own in layers for layer in own], budget))
    return [block_of(row, stage, own, [next(bits) for _ in own]) for stage, own in zip(stages, layers, strict=True)]


def propagated(row: Row, stages: Sequence[Stage], budget: float) -> list[dict[str, Replacement]]:
    """Each block's linears, solved on what the compressed blocks before make of the calibration text."""
    inputs, found = stages[0].inputs, []
    for stage in stages:
        _, statistics = gathered(stage.block, stage.gatherings, inputs, stage.inputs)
        layers = layers_of(stage, statistics, shared=row.shared)
        found.append(block_of(row, stage, layers, dealt_out(row, layers, budget)))
        inputs = list(map(replaced(stage, found[-1]).run, inputs))
    return found


def block_of(row: Row, stage: Stage, layers: Sequence[Layer], bits: Sequence[int]) -> dict[str, Replacement]:
    found: dict[str, Replacement] = {}
    for layer, own in zip(layers, bits, strict=True):
        rows = [len(stage.block.linear(name).weight) for name in layer.names]
        found |= layer.parts(row.method(layer.weight, layer.statistics, own), rows)
    return found


def cells(row: Row, model: Model, budget: float) -> list[str]:
    """Bits per weight; errors of the linears on calibration and held-out text; perplexity and KL of each text; seconds."""
    started = time.perf_counter()
    found = solved(row, model.stages, budget)
    seconds = time.perf_counter() - started
    blocks = [replaced(stage, own) for stage, own in zip(model.stages, found, strict=True)]
    bits = sum(one.bits for own in found for one in own.values())
    weights = sum(one.dense.numel() for own in found for one in own.values())
    errors = ["", ""]
    if not row.propagated:
        errors = [f"{mean(each):.5f}" for each in zip(*errors_of(model.stages, found), strict=True)]
    return [f"{bits / weights:.2f}", *errors, *model.quality(blocks), f"{seconds:.0f}"]


def errors_of(stages: Sequence[Stage], found: Sequence[Mapping[str, Replacement]]) -> list[tuple[float, float]]:
    """Of each linear, on calibration and held-out text."""
    errors = []
    for stage, own in zip(stages, found, strict=True):
        for group in stage.block.groups:
            for name in group:
                weight = stage.block.linear(name).weight.detach()
                texts = (stage.statistics[group], stage.unseen[group])
                errors.append((own[name].error(weight, texts[0]), own[name].error(weight, texts[1])))
    return errors


def parsed() -> argparse.Namespace:
    shared = ROOT.parent / "shared"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=shared / "models" / "llama", help="a dense model")
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--second", type=Path, help="text in the place of the documentation")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "branches", help="where that text is written")
    parser.add_argument("--budget", type=float, default=2.37, help="bits per weight beside codes and scales")
    parser.add_argument("--seed", type=int, default=0, help="of the rotation")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", nargs="+", default=[], choices=ROWS, metavar="ROW", help="rows to run, by name")
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    about = f"{machine()}. {versions('torch', 'transformers')}."
    torch.set_num_threads(1)
    recipe = Recipe(
        transforms=(Rotation(seed=arguments.seed), Smoothing()),
        weights=Weights(bits=4),
        activations=Activations(bits=4, clip=0.9),
    )
    wikitext, second = arguments.data.resolve() / "wikitext2", arguments.second
    tests = [
        (wikitext / "wiki.test.raw").as_uri(),
        documentation(arguments.output.resolve()) if second is None else second.resolve().as_uri(),
    ]
    size = Size(sequences=arguments.sequences, windows=arguments.windows, length=arguments.length)
    model = opened(arguments.model.resolve().as_uri(), recipe, (wikitext / "wiki.valid.txt").as_uri(), tests, size)
    first, _, other, _ = model.quality([stage.block for stage in model.stages])
    header = ["row", "bits", "error, calibration", "error, held out"]
    header += ["perplexity", "KL", "second text", "its KL", "seconds"]
    rows: list[list[str]] = []
    for name, row in ROWS.items():
        if arguments.only and name not in arguments.only:
            continue
        rows.append([name, *cells(row, model, arguments.budget)])
        print(*rows[-1], sep="  ", flush=True)
        body = table(header, rows)
        body += f"\n\nThe original `{arguments.model.name}`: {first}, and {other} on the second text."
        if arguments.record:  # each time, so that a run that is stopped leaves its rows
            record("branches", f"Branches at equal bits: {arguments.model.name}", body, about)
    print(body, flush=True)


if __name__ == "__main__":
    main()
