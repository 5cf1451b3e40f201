"""Names and shapes of a model's parts: which blocks there are, what they hold, where that lies in a checkpoint.

Plain data, which `block_builder` derives from a config.json with transformers' help and any process can work with, so that
the one who plans needs neither transformers nor a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import EXPERT, ModelFamily, SharedInputGroup, is_expert
from counterweight.workers.models.wrapper import TextNames

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = re.compile(r"(0|[1-9][0-9]{0,5})\.")


@dataclass(frozen=True, slots=True)
class Slice:
    """Where a module's parameter comes from: a whole source tensor, or a part of one that holds all experts.

    expert: its index on the first axis. transposed: the source holds the expert's matrix as [in, out]. rows: (start, stop,
    step) among the expert's outputs.
    """

    source: str
    expert: int | None = None
    rows: tuple[int, int, int] | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter, as a view of the source tensor."""
        return self.within(tensor if self.expert is None else tensor[self.expert])

    def within(self, part: Tensor) -> Tensor:
        """The same of the expert's part of the source tensor."""
        part = part.T if self.transposed else part
        return part if self.rows is None else part[slice(*self.rows)]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """parameters: name (relative to the block) -> shape, of buffers that are stored too. linears: those that can be quantized,
    grouped by shared input."""

    parameters: Mapping[str, tuple[int, ...]]
    linears: tuple[SharedInputGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """A whole model, of a multimodal one the text model. model_type: as transformers has it. names: what the checkpoint calls
    its parts. heads: attention's, of queries. vocabulary: rows of the embedding. tied: whether the head is the embedding.
    experts: of a sparse block, 0 without any; active_experts: of them, those that a token sees. kinds: the different blocks;
    kind_of: block -> its place among them. prediction_layers: how many layers for multi-token prediction a checkpoint has
    behind the blocks, which are no part of the model.
    """

    model_type: str
    names: TextNames
    hidden_size: int
    heads: int
    vocabulary: int
    tied: bool
    experts: int
    active_experts: int
    kinds: tuple[BlockLayout, ...]
    kind_of: tuple[int, ...]
    prediction_layers: int = 0

    @property
    def family(self) -> ModelFamily:
        return family_of(self.model_type)

    @property
    def blocks(self) -> int:
        return len(self.kind_of)

    def block_parameters(self, index: int) -> Mapping[str, tuple[int, ...]]:
        """Parameter name (relative to the block) -> shape."""
        return self.kinds[self.kind_of[index]].parameters

    def block_linears(self, index: int) -> tuple[SharedInputGroup, ...]:
        """The quantizable linears of block `index`, grouped by shared input."""
        return self.kinds[self.kind_of[index]].linears

    def predicts_further(self, name: str) -> bool:
        """Whether a tensor belongs to a layer for multi-token prediction: under a prefix, or where further blocks would lie."""
        prefix = self.family.prediction_prefix
        if prefix is not None and name.startswith(prefix):
            return True
        found = _INDEX.match(name.removeprefix(self.names.blocks)) if name.startswith(self.names.blocks) else None
        return found is not None and self.blocks <= int(found[1]) < self.blocks + self.prediction_layers

    def is_beside(self, name: str) -> bool:
        """Whether a tensor belongs to what a multimodal model has beside its text model."""
        wrapper = self.family.wrapper
        return wrapper is not None and wrapper.holds(name)

    def writes_beside(self, name: str) -> bool:
        """Whether a tensor beside the text model writes the residual stream at the places of images."""
        wrapper = self.family.wrapper
        return wrapper is not None and wrapper.writes_residual(name)

    def active_share(self, linear: str) -> float:
        """Share of the tokens that reach a block's linear: each expert sees its own only."""
        return self.active_experts / self.experts if is_expert(linear) else 1.0

    def sources(self, index: int, available: Iterable[str]) -> dict[str, Slice]:
        """Parameter of block `index` -> where it lies in the checkpoint whose tensor names are `available`."""
        names = frozenset(available)
        prefix = self._prefix(index)
        result: dict[str, Slice] = {}
        for parameter, shape in self.block_parameters(index).items():
            result[parameter] = self._source(prefix, parameter, shape, names)
        return result

    def expected(self, available: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold -> its shape. `available` decides between fused and apart."""
        names = frozenset(available)
        hidden, vocabulary = self.hidden_size, self.vocabulary
        shapes: dict[str, tuple[int, ...]] = {self.names.embedding: (vocabulary, hidden), self.names.norm: (hidden,)}
        if not self.tied:
            shapes[self.names.head] = (vocabulary, hidden)
        for index in range(self.blocks):
            for parameter, shape in self.block_parameters(index).items():
                source = self._source(self._prefix(index), parameter, shape, names)
                if source.expert is not None:
                    outputs = shape[0] if source.rows is None else 2 * shape[0]
                    one = (outputs, *shape[1:])
                    shape = (self.experts, *(reversed(one) if source.transposed else one))
                shapes[source.source] = shape
        return shapes

    def disk_name(self, index: int, parameter: str) -> str:
        """On-disk name of a block's parameter in a checkpoint that keeps experts apart (how we write it)."""
        return self._apart(self._prefix(index), parameter)

    def module_name(self, index: int, linear: str) -> str:
        """On-disk name of a block's linear, likewise: that of its weight without the suffix."""
        return self.disk_name(index, f"{linear}.weight").removesuffix(".weight")

    def stock_name(self, module: str) -> str:
        """What transformers calls a module of the blocks, given its on-disk name."""
        return self.family.names[0].base + module.removeprefix(self.names.base)

    def _prefix(self, index: int) -> str:
        return f"{self.names.blocks}{index}."

    def _apart(self, prefix: str, parameter: str) -> str:
        return prefix + _stored(self.model_type, parameter)

    def _is_sparse(self, parameter: str) -> bool:
        return _is_sparse(self.family, parameter)

    def _source(self, prefix: str, parameter: str, shape: tuple[int, ...], names: frozenset[str]) -> Slice:
        layout = self.family.experts
        apart = self._apart(prefix, parameter)
        if apart in names or layout is None or not self._is_sparse(parameter):
            return Slice(apart)
        if not parameter.startswith(f"{layout.module}."):
            plain = prefix + parameter
            return Slice(plain if plain in names else apart)
        expert, projection, kind = parameter.removeprefix(f"{layout.module}.").split(".")
        fused = layout.fused_on_disk if kind == "weight" else layout.fused_biases_on_disk
        if fused is None:
            return Slice(apart)
        gate_up, down = (prefix + name for name in fused)
        transposed = layout.transposed and kind == "weight"
        if projection == "down_proj":
            return Slice(down, int(expert), transposed=transposed) if down in names else Slice(apart)
        if gate_up not in names:
            return Slice(apart)
        is_up, outputs = projection == "up_proj", shape[0]
        rows = (int(is_up), 2 * outputs, 2) if layout.interleaved else (is_up * outputs, (is_up + 1) * outputs, 1)
        return Slice(gate_up, int(expert), rows, transposed)


@lru_cache(maxsize=8192)  # the blocks of a model have the same parameters
def _stored(model_type: str, parameter: str) -> str:
    """On-disk name of a parameter relative to its block, in a checkpoint that keeps experts apart."""
    family = family_of(model_type)
    layout = family.experts
    if layout is not None and parameter.startswith(f"{layout.module}."):
        expert = parameter.removeprefix(f"{layout.module}.").split(".", 1)[0]
        linear, _, kind = parameter.rpartition(".")
        for module, disk in layout.on_disk.items():
            if linear == module.replace(EXPERT, expert):
                return f"{disk.replace(EXPERT, expert)}.{kind}"
    for module, disk in family.renames.items():
        if parameter.startswith(module) and _is_sparse(family, parameter):
            return disk + parameter.removeprefix(module)
    return parameter


def _is_sparse(family: ModelFamily, parameter: str) -> bool:
    return family.experts is not None and parameter.startswith(family.experts.mlp)
