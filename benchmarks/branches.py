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
from recipes import documentation
from torch import Tensor, nn
from torch.nn import functional

from counterweight.kernels.formats import ActivationFormat
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.pipeline.allocation import Candidate, allocate
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.workers.calibration.source import TextSource
from counterweight.workers.calibration.statistics import Gathering, InputStatistics
from counterweight.workers.calibration.tokens import token_set
from counterweight.workers.compensation.lrc import energy
from counterweight.workers.compensation.regression import spectrum
from counterweight.workers.evaluation import advance, measure
from counterweight.workers.methods.activations import Activations
from counterweight.workers.methods.compensations import LRC
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.methods.transforms import Rotation, Smoothing
from counterweight.workers.methods.weights import Weights
from counterweight.workers.metrics import kl, perplexity
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.models.layout import EMBEDDING, LM_HEAD, NORM
from counterweight.workers.models.source import outside
from counterweight.workers.parallel import OrderedPool
from counterweight.workers.prepare import prepare
from counterweight.workers.recipe import Recipe
from counterweight.workers.shards import RunningStatistics, run_shards
from counterweight.workers.tasks.evaluate import BASELINE
from counterweight.workers.transforms.smoothing import fold

CPU, POOL, BATCH = torch.device("cpu"), OrderedPool(1), 16
TRIAL = "trial"
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
ROWS: Mapping[str, Row] = {
    "QuaRot + GPTQ, no branch": Row(method=no_branch),
    "no branch, codes of 8 bits": Row(method=partial(no_branch, weights=Weights(bits=8))),
    "weights exact, inputs quantized": Row(method=exact),
    "whitened SVD, bf16": Row(method=partial(whitened, bits=16)),
    "whitened SVD, int8": Row(method=partial(whitened, bits=8)),
    "whitened SVD, int4": Row(method=partial(whitened, bits=4)),
    "whitened SVD, int4, anticipated 0.9": Row(method=partial(whitened, bits=4, anticipation=0.9)),
    "SERQ": Row(method=serq),
    "SERQ, salient channels unquantized": Row(method=unquantized_channels),
    "SRR, bf16": Row(method=partial(preserved, bits=16)),
    "SRR, int4": Row(method=partial(preserved, bits=4)),
    "SRR, int4, three quarters preserved": Row(method=partial(preserved, bits=4, share=0.75)),
    "SRR, int4, all preserved": Row(method=partial(preserved, bits=4, share=1.0)),
    "H-SVDQuant, bf16, rank 8": Row(method=partial(deflated, bits=16, rank=8)),
    "H-SVDQuant, bf16": Row(method=partial(deflated, bits=16)),
    "H-SVDQuant, int8": Row(method=partial(deflated, bits=8)),
    "H-SVDQuant, int4": Row(method=partial(deflated, bits=4)),
    "LRC, bf16": Row(method=partial(corrected, bits=16, last="branch")),
    "LRC, int8": Row(method=partial(corrected, bits=8, last="branch")),
    "LRC, int8, codes last": Row(method=partial(corrected, bits=8, last="codes")),
    "LRC, int4": Row(method=partial(corrected, bits=4, last="branch")),
    "LRC, int4, codes last": Row(method=INT4),
    "LRC, int4, a tenth reconstructs": Row(method=partial(preserved, bits=4, share=0.9, of="lost")),
    "LRC, int4, a quarter reconstructs": Row(method=partial(preserved, bits=4, share=0.75, of="lost")),
    "LRC, int4, half reconstructs": Row(method=partial(preserved, bits=4, share=0.5, of="lost")),
    "LRC, int4, codes last, regressed target": Row(
        method=partial(corrected, bits=4, last="codes", weights=Weights(quantizer=GPTQ(target="regressed")))
    ),
    "LRC, int4, codes last, mixed target": Row(
        method=partial(corrected, bits=4, last="codes", weights=Weights(quantizer=GPTQ(target="mixed", mix=0.25)))
    ),
    "LRC, int4, codes last, propagated": Row(method=INT4, propagated=True),
    "LRC, int4, codes last, propagated, mixed target (GPTAQ, QEP)": Row(
        method=partial(corrected, bits=4, last="codes", weights=Weights(quantizer=GPTQ(target="mixed", mix=0.25))),
        propagated=True,
    ),
    "LRC, int4, codes last, ranks predicted": Row(method=INT4, ranks="predicted"),
    "LRC, int4, codes last, ranks measured": Row(method=INT4, ranks="measured"),
    "LRC, int4, codes last, down factor shared": Row(method=INT4, shared=True),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A block in the recipe's coordinates. inputs: batches of calibration [sequences, length, hidden] in the original model;
    statistics, unseen: of its linears' inputs on calibration and held-out text."""

    block: Block
    gatherings: Mapping[SharedInputGroup, Gathering]
    inputs: list[Tensor]
    statistics: Mapping[SharedInputGroup, InputStatistics]
    unseen: Mapping[SharedInputGroup, InputStatistics]


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


@dataclass(frozen=True, kw_only=True)
class Text:
    """Batches of tokens [windows, length]; hidden states behind the embedding, and behind the original's last block."""

    tokens: list[Tensor]
    hidden: list[Tensor]
    original: list[Tensor]


class Simulated(nn.Module):
    """A linear as its replacement computes it."""

    def __init__(self, replacement: Replacement, activations: ActivationFormat, transform: Hadamard | None) -> None:
        super().__init__()
        self._replacement, self._activations, self._transform = replacement, activations, transform

    def forward(self, x: Tensor) -> Tensor:
        if self._transform is not None:
            x = self._transform.apply(x)
        y = functional.linear(fake_quantize_activations(x, self._activations), self._replacement.dense)
        if self._replacement.branch is None:
            return y
        up, down = self._replacement.branch.factors(x.dtype)
        return y + functional.linear(functional.linear(x, down), up)


# -- the model --------------------------------------------------------------------------------------------------------


def staged(source: ModelSource, recipe: Recipe, seen: list[Tensor], unseen: list[Tensor]) -> list[Stage]:
    """Every block, rotated and smoothed, with what enters its linears. seen, unseen: hidden states behind the embedding."""
    builder, rotation = BlockBuilder(source.checkpoint.config), recipe.rotation
    heads, values = builder.config.num_attention_heads, builder.config.num_key_value_heads
    stages = []
    for index in range(builder.blocks):
        tensors = source.checkpoint.read_many(source.block_tensors(index))
        slices = source.layout.sources(index, source.checkpoint.names)
        parameters = {name: part.of(tensors[part.source]) for name, part in slices.items()}
        online: dict[str, Hadamard] = {}
        if rotation is not None:
            parameters, online = rotation.block(builder.config.model_type, parameters, heads, values)
        block = filled(builder, index, parameters, online)
        own = {name: recipe.for_module(name) for group in block.groups for name in group}
        recipes = {name: found for name, found in own.items() if found is not None}
        chosen = prepare(block, recipes, parameters, builder.family, online, partial(seen.__getitem__, 0))
        if chosen.scales:
            parameters = fold(builder.family, chosen.scales, parameters, online, heads=heads)
            block = filled(builder, index, parameters, online)
        inputs = seen
        seen, statistics = gathered(block, chosen.gatherings, seen)
        unseen, held_out = gathered(block, chosen.gatherings, unseen)
        stages.append(
            Stage(block=block, gatherings=chosen.gatherings, inputs=inputs, statistics=statistics, unseen=held_out)
        )
    return stages


def filled(
    builder: BlockBuilder, index: int, parameters: Mapping[str, Tensor], online: Mapping[str, Hadamard]
) -> Block:
    block = builder.block(index, parameters, CPU, torch.float32)
    for name, transform in online.items():
        block.transform_input(name, transform)
    return block


def gathered(
    block: Block,
    gatherings: Mapping[SharedInputGroup, Gathering],
    inputs: Sequence[Tensor],
    originals: Sequence[Tensor] = (),
) -> tuple[list[Tensor], dict[SharedInputGroup, InputStatistics]]:
    """What the block makes of its inputs (of the originals, where there are any), and the statistics."""
    sums = RunningStatistics(block, gatherings)
    loads, meant = ([partial(_same, batch) for batch in batches] for batches in (inputs, originals))
    return run_shards(block, loads, _same, sums, POOL, meant), sums.result()


def _same(batch: Tensor) -> Tensor:
    return batch


def replaced(stage: Stage, replacements: Mapping[str, Replacement]) -> Block:
    """The block with these linears."""
    block = stage.block.replica()
    for group in block.groups:
        activations = stage.statistics[group].activations
        if activations is None:
            raise ValueError(f"{group[0]}: its input is not quantized: expected a recipe with activations")
        for name in group:
            block.replace(name, Simulated(replacements[name], activations, block.transforms.get(name)))
    return block


# -- a row --------------------------------------------------------------------------------------------------------------


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
    problem = LRC().gain_problem(weight, layer.statistics)
    assert problem is not None
    squares = spectrum(problem[0] @ problem[1])[0].square()[: min(weight.shape)]
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


def cells(row: Row, stages: Sequence[Stage], budget: float, head: nn.Module, texts: Sequence[Text]) -> list[str]:
    """Bits per weight; errors of the linears on calibration and held-out text; perplexity and KL of each text; seconds."""
    started = time.perf_counter()
    found = solved(row, stages, budget)
    seconds = time.perf_counter() - started
    blocks = [replaced(stage, own) for stage, own in zip(stages, found, strict=True)]
    bits = sum(one.bits for own in found for one in own.values())
    weights = sum(one.dense.numel() for own in found for one in own.values())
    errors = (
        ["", ""] if row.propagated else [f"{mean(each):.5f}" for each in zip(*errors_of(stages, found), strict=True)]
    )
    return [
        f"{bits / weights:.2f}",
        *errors,
        *(cell for text in texts for cell in quality(text, blocks, head)),
        f"{seconds:.0f}",
    ]


def errors_of(stages: Sequence[Stage], found: Sequence[Mapping[str, Replacement]]) -> list[tuple[float, float]]:
    """Of each linear, on calibration and held-out text."""
    return [
        (
            own[name].error(stage.block.linear(name).weight, stage.statistics[group]),
            own[name].error(stage.block.linear(name).weight, stage.unseen[group]),
        )
        for stage, own in zip(stages, found, strict=True)
        for group in stage.block.groups
        for name in group
    ]


def quality(text: Text, blocks: Sequence[Block], head: nn.Module) -> list[str]:
    """Perplexity, and KL from the original."""
    hidden = advance({TRIAL: text.hidden}, lambda index: {TRIAL: blocks[index]}, len(blocks), POOL)
    both = {BASELINE: text.original, **hidden}
    windows = measure(both, text.tokens, dict.fromkeys(both, head), POOL)[TRIAL]
    return [
        f"{metric.over_windows([window[metric.name] for window in windows]):{digits}}"
        for metric, digits in ((perplexity.METRIC, ".2f"), (kl.METRIC, ".5f"))
    ]


def batches(source: ModelSource, uri: str, length: int, windows: int) -> list[Tensor]:
    """The first windows of a text, [windows, length] in all."""
    found = token_set(
        TextSource(uri=uri),
        source.tokenizer(),
        length=length,
        sequences=windows,
        sampling="consecutive",
        seed=0,
        field="text",
    )
    return list(found.ids.long().split(BATCH))


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
    source = open_model(arguments.model.resolve().as_uri())
    builder, rotation = BlockBuilder(source.checkpoint.config), Rotation(seed=arguments.seed)
    recipe = Recipe(
        transforms=(rotation, Smoothing()), weights=Weights(bits=4), activations=Activations(bits=4, clip=0.9)
    )
    tensors = {name: tensor.float() for name, tensor in outside(source.checkpoint, builder).items()}
    embed = builder.embedding(rotation.embedding(tensors[EMBEDDING]), CPU, torch.float32)
    ends = rotation.outside({name: tensors[name] for name in (NORM, LM_HEAD)}, builder.family.norm_offset)[0]
    head = builder.head(ends, CPU, torch.float32)
    wikitext = arguments.data.resolve() / "wikitext2"
    second = (
        documentation(arguments.output.resolve()) if arguments.second is None else arguments.second.resolve().as_uri()
    )
    valid = batches(source, (wikitext / "wiki.valid.txt").as_uri(), arguments.length, arguments.sequences)
    tests = [
        batches(source, uri, arguments.length, arguments.windows)
        for uri in ((wikitext / "wiki.test.raw").as_uri(), second)
    ]
    with torch.no_grad():
        seen, *hidden = ([embed(batch) for batch in text] for text in (valid, *tests))
    stages = staged(source, recipe, seen, hidden[0])
    texts = [text_of(tokens, own, stages) for tokens, own in zip(tests, hidden, strict=True)]
    header = ["row", "bits", "error, calibration", "error, held out"]
    header += ["perplexity", "KL", "second text", "its KL", "seconds"]
    rows = []
    for name, row in ROWS.items():
        if not arguments.only or name in arguments.only:
            rows.append([name, *cells(row, stages, arguments.budget, head, texts)])
            print(*rows[-1], sep="  ", flush=True)
    originals = (quality(text, [stage.block for stage in stages], head)[0] for text in texts)
    body = table(header, rows) + f"\n\nThe original `{arguments.model.name}`: {' and '.join(originals)}."
    print(body, flush=True)
    if arguments.record:
        print(record("branches", f"Branches at equal bits: {arguments.model.name}", body, about))


def text_of(tokens: list[Tensor], hidden: list[Tensor], stages: Sequence[Stage]) -> Text:
    original = advance({BASELINE: hidden}, lambda index: {BASELINE: stages[index].block}, len(stages), POOL)
    return Text(tokens=tokens, hidden=hidden, original=original[BASELINE])


if __name__ == "__main__":
    main()
