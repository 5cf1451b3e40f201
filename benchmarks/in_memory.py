"""A model in one process, block by block, in the coordinates of a recipe: what enters its linears, and what it is worth with
others in their place. `branches.py` compares methods with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from branch_methods import Replacement
from torch import Tensor, nn
from torch.nn import functional

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.workers.calibration.source import TextSource
from counterweight.workers.calibration.statistics import Gathering, InputStatistics
from counterweight.workers.calibration.tokens import token_set
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.evaluation import advance, measure
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.metrics import kl, perplexity
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.models.source import head_of, outside
from counterweight.workers.parallel import OrderedPool, SideBySide
from counterweight.workers.prepare import prepare
from counterweight.workers.recipe import Recipe
from counterweight.workers.shards import RunningStatistics, run_shards
from counterweight.workers.tasks.evaluate import BASELINE
from counterweight.workers.transforms.smoothing import fold

CPU, POOL, BATCH = torch.device("cpu"), OrderedPool(1), 16
TRIAL = "trial"


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
class Text:
    """Batches of tokens [windows, length]; hidden states behind the embedding, and behind the original's last block."""

    tokens: list[Tensor]
    hidden: list[Tensor]
    original: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Model:
    """texts: on which it is measured."""

    stages: list[Stage]
    head: nn.Module
    texts: list[Text]

    def quality(self, blocks: Sequence[Block]) -> list[str]:
        """Perplexity of these blocks on each text, and KL from the original."""
        found = []
        for text in self.texts:
            hidden = advance({TRIAL: text.hidden}, ({TRIAL: block} for block in blocks), POOL, lambda *_: None)
            heads = dict.fromkeys((BASELINE, TRIAL), self.head)
            windows = measure({BASELINE: text.original, **hidden}, torch.cat(text.tokens), heads, POOL, {})[TRIAL]
            for metric, digits in ((perplexity.METRIC, ".2f"), (kl.METRIC, ".5f")):
                found.append(f"{metric.over_windows([window[metric.name] for window in windows.metrics]):{digits}}")
        return found


@dataclass(frozen=True, kw_only=True)
class Size:
    """Windows to calibrate on, windows of each text to measure on, tokens of both."""

    sequences: int
    windows: int
    length: int


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


def opened(uri: str, recipe: Recipe, calibration: str, tests: Sequence[str], size: Size) -> Model:
    """A dense model, with what enters its linears on the `calibration` text and on the first of the `tests`, all URIs."""
    source = open_model(uri)
    builder, rotation = BlockBuilder(source.checkpoint.config, frozenset(source.checkpoint.names)), recipe.rotation
    if rotation is None:
        raise ValueError("recipe: no rotation: expected one")
    tensors = {name: tensor.float() for name, tensor in outside(Checkpoint.open(source.store), builder).items()}
    embed = builder.embedding(rotation.embedding(tensors[builder.names.embedding]), CPU, torch.float32)
    ends = rotation.outside(head_of(tensors, builder.names), builder.layout)[0]
    cuts = [(calibration, size.sequences), *((text, size.windows) for text in tests)]
    seen, *tokens = (batches(source, text, size.length, count) for text, count in cuts)
    with torch.no_grad():
        inputs, *hidden = ([embed(batch) for batch in text] for text in (seen, *tokens))
    stages = staged(source, recipe, rotation, inputs, hidden[0])
    texts = []
    for ids, own in zip(tokens, hidden, strict=True):
        original = advance({BASELINE: own}, ({BASELINE: stage.block} for stage in stages), POOL, lambda *_: None)
        texts.append(Text(tokens=ids, hidden=own, original=original[BASELINE]))
    return Model(stages=stages, head=builder.head(ends, CPU, torch.float32), texts=texts)


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


def staged(
    source: ModelSource, recipe: Recipe, rotation: Rotation, seen: list[Tensor], unseen: list[Tensor]
) -> list[Stage]:
    """Every block, rotated and smoothed, with what enters its linears. seen, unseen: hidden states behind the embedding."""
    builder = BlockBuilder(source.checkpoint.config, frozenset(source.checkpoint.names))
    checkpoint = Checkpoint.open(source.store)
    heads, values = builder.config.num_attention_heads, builder.config.num_key_value_heads
    stages = []
    for index in range(builder.blocks):
        tensors = checkpoint.read_many(source.block_tensors(index))
        slices = source.layout.sources(index, source.checkpoint.names)
        parameters = {name: part.of(tensors[part.source]) for name, part in slices.items()}
        parameters, online = rotation.block(builder.config.model_type, parameters, heads, values)
        block = filled(builder, index, parameters, online)
        own = {name: recipe.for_module(name) for group in block.groups for name in group}
        recipes = {name: found for name, found in own.items() if found is not None}
        chosen = prepare(block, recipes, parameters, builder.family, online, partial(seen.__getitem__, 0), judged=False)
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
) -> tuple[list[Tensor], Mapping[SharedInputGroup, InputStatistics]]:
    """What the block makes of its inputs (of the originals, where there are any), and the statistics."""
    sums = RunningStatistics(block, gatherings)
    loads, meant = ([partial(_same, batch) for batch in batches] for batches in (inputs, originals))
    return run_shards(block, loads, _same, sums, SideBySide(POOL), meant), sums.result()


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
