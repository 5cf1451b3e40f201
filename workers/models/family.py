"""What a model family is: a value that says all that transformers does not, in one place.

A family's block is run by transformers' own modules (see `block_builder`), so attention, masks, rotary embeddings and norms
are never restated. What a compressor needs beside them: the linears that can be quantized, grouped by the input that they
share; what tensors are called on disk; how experts are stored; who reads and who writes what, so that a transform can be
folded into its neighbours. A model whose family has no file in `families` is refused.

Module names are relative to a block (`self_attn.q_proj`). An expert's index stands as `{expert}` in names, and as `*` in globs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from counterweight.workers.models.wrapper import TextNames, Wrapper

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = "{expert}"

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Linears of one expert."""

SharedInputGroup = tuple[str, ...]
"""Linears of one block that read the same input and therefore share its statistics, in output order."""

Globs = tuple[str, ...]

Product = Callable[["Tensor", "Tensor"], "Tensor"]
"""(gate, up), each [..., intermediate] -> the input of down_proj, same shape."""

Values = Literal["all", "last", "last of each head"]
"""Which output rows of a linear are the attention's values: all of them; the last of the whole; the last of each head's."""

SizeProblem = Callable[[Mapping[str, int]], str | None]
"""What is wrong with the sizes of a config.json (those that are given, each within its bounds), None when nothing is."""


def no_size_problem(sizes: Mapping[str, int]) -> str | None:
    """For families whose sizes need to fit together in no way of their own."""
    return None


ATTENTION: tuple[SharedInputGroup, ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
GATED_MLP: tuple[SharedInputGroup, ...] = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
SPARSE_READERS: Globs = ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
SPARSE_DOWN: Globs = ("mlp.experts.*.down_proj",)
EXPERTS_APART: Mapping[str, str] = {
    name: name for name in (f"mlp.experts.{EXPERT}.{projection}" for projection in PROJECTIONS)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """How a mixture-of-experts MLP is stored and how its experts become linears.

    module: the experts module inside a block (transformers fuses all experts into two 3-D parameters there).
    count_key: the config field that holds the number of experts.
    on_disk: expert linear -> its name in a checkpoint that keeps experts apart; both relative to the block. Most families
    have one name for both.
    fused_on_disk: (gate_up, down) names of the 3-D tensors of a checkpoint that keeps them fused, laid out as in transformers'
    module: [experts, out, in], or [experts, in, out] where transposed. The outputs of gate_up are all of gate_proj, then all of
    up_proj; where interleaved, they alternate (gate_proj 0::2, up_proj 1::2).
    fused_biases_on_disk: likewise of their biases [experts, out]; None for experts without biases.
    product: transformers' fused module -> what its experts compute between their linears; None for act_fn(gate) * up.
    stock_refusal: why stock loaders cannot read a checkpoint that keeps the experts apart; None where they can.
    active_key: the config field that holds how many experts a token sees.
    routers: names of routers, which stay as they are, in compressed-tensors' words.
    scaled_inputs: the router scales what an expert is given rather than what it gives.
    labels: last part of an on-disk name -> what the report calls it, where the name says nothing to a reader.
    """

    count_key: str
    module: str = "mlp.experts"
    on_disk: Mapping[str, str] = field(default_factory=lambda: EXPERTS_APART)
    fused_on_disk: tuple[str, str] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    active_key: str = "num_experts_per_tok"
    routers: tuple[str, ...] = ("re:.*[.]gate$",)
    labels: Mapping[str, str] = field(default_factory=dict)
    scaled_inputs: bool = False
    transposed: bool = False
    interleaved: bool = False
    fused_biases_on_disk: tuple[str, str] | None = None
    product: Callable[[Any], Product] | None = None
    stock_refusal: str | None = None
    groups: tuple[SharedInputGroup, ...] = (
        (f"mlp.experts.{EXPERT}.gate_proj", f"mlp.experts.{EXPERT}.up_proj"),
        (f"mlp.experts.{EXPERT}.down_proj",),
    )

    @property
    def mlp(self) -> str:
        """Prefix of the names of a sparse MLP's parts."""
        return self.module.rpartition(".")[0] + "."


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """One model family.

    model_types: of config.json. known_as: the one that transformers has for them, where it has none of these. groups:
    quantizable linears of a dense block, grouped by shared input; a name may be absent in some blocks. renames: module-name
    prefix -> on-disk prefix, relative to the block, for names that differ. experts: layout of the sparse MLP, None for a dense
    family. eager_attention: the family's attention has a term (logit soft-capping, sinks) that the fused kernels leave out.

    names: what checkpoints call the parts of the model; as transformers' own modules are called first. wrapper: of a
    multimodal model, what is around its text model, which all else here speaks of; None for a text model.

    What its config.json may say beside what every model's says:
    sizes: fields that hold a size, from 1 to `config_values.MAX_WIDTH`. size_problem: what they must have to do with each
    other. only: field -> the values that are served, of those that transformers knows. partial_rotary: attention can turn the
    first channels of a head only (`partial_rotary_factor`); elsewhere a rotary embedding has to have the width of a head.
    layer_types: what that field may say of a block.
    prediction_layers: field that holds how many layers for multi-token prediction a checkpoint has behind its blocks, which
    transformers does not run and artifacts leave out. prediction_prefix: of such layers' tensors, where they lie elsewhere.

    How the linears of a block are connected:
    reads: norm of the residual stream -> the linears (and router) that read its output, which nothing else does.
    latents: likewise, for norms of something else: of what a linear inside the block has written.
    value: some of its output rows are the attention's values, head by head; values: which; queries and keys are the others.
    output: reads the values that attention has mixed, head by head, and writes the residual stream.
    writes: linears that write the residual stream beside these and take in no scales: of blocks without attention.
    down: read the elementwise product inside an MLP, and write the residual stream. up: last part of the name of the linear
    whose last rows are a factor of that product; None where the product is not linear in any of its factors.
    labels: prefix of a linear's name in a block -> what the report puts before its last part (for experts, see there).
    obstacle: why the residual stream cannot be rotated, None where it can. value_obstacle: likewise of values.
    norm_offset: what a norm adds to its weight before it multiplies.

    needs_beginning: a text without the tokenizer's token for a beginning is nothing that the model knows: its perplexity on one
    is that of noise, so every window has to have it.
    """

    model_types: tuple[str, ...]
    groups: tuple[SharedInputGroup, ...]
    reads: Mapping[str, Globs]
    down: Globs
    known_as: str | None = None
    names: tuple[TextNames, ...] = (TextNames(),)
    wrapper: Wrapper | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    experts: ExpertLayout | None = None
    eager_attention: bool = False
    sizes: tuple[str, ...] = ()
    size_problem: SizeProblem = no_size_problem
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    partial_rotary: bool = False
    layer_types: tuple[str, ...] = ("full_attention", "sliding_attention")
    prediction_layers: str | None = None
    prediction_prefix: str | None = None
    latents: Mapping[str, Globs] = field(default_factory=dict)
    value: str = "self_attn.v_proj"
    values: Values = "all"
    output: str = "self_attn.o_proj"
    writes: Globs = ()
    up: str | None = "up_proj"
    labels: Mapping[str, str] = field(default_factory=dict)
    obstacle: str | None = None
    value_obstacle: str | None = None
    norm_offset: float = 0.0
    needs_beginning: bool = False

    @property
    def norms(self) -> Mapping[str, Globs]:
        """Norm -> what reads its output, of the residual stream and of latents."""
        return {**self.reads, **self.latents}

    def norm_before(self, module: str) -> str | None:
        """The norm whose output `module` reads, None for a module that reads something else."""
        return next((norm for norm, readers in self.norms.items() if _matches(module, readers)), None)

    def value_rows(self, rows: int, heads: int, width: int) -> slice | list[int]:
        """Which of the `rows` outputs of `value` are values, in the order of attention's heads: `width` in `heads` heads."""
        if self.values != "last of each head":
            return slice(rows - width, rows)
        each, own = rows // heads, width // heads
        return [row for head in range(1, heads + 1) for row in range(head * each - own, head * each)]

    def producer_rows(
        self, group: SharedInputGroup, shapes: Mapping[str, tuple[int, ...]], heads: int
    ) -> tuple[str, slice | list[int]] | None:
        """The parameter, and which of its elements or rows, that can take the scales of a group's input in; None when there is
        none. shapes: of the block's parameters. heads: attention's, of queries."""
        norm = self.norm_before(group[0])
        if norm is not None:
            modules = (name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
            shared = any(module not in group and self.norm_before(module) == norm for module in modules)
            return None if shared else (f"{norm}.weight", slice(None))
        width = shapes[f"{group[0]}.weight"][1]
        if self.is_down(group[0]):
            if self.up is None:
                return None
            parent = group[0].rpartition(".")[0]
            name = f"{parent}.{self.up}.weight"
            return name, slice(shapes[name][0] - width, None)
        if group[0] == self.output:
            name = f"{self.value}.weight"
            rows = shapes[name][0]
            # Grouped queries read the same values: one row of values would need several scales.
            alike = {"all": rows == width, "last": rows == 3 * width, "last of each head": rows % heads == 0}
            return (name, self.value_rows(rows, heads, width)) if alike[self.values] else None
        return None

    def is_down(self, module: str) -> bool:
        """Whether `module` is the second linear of an MLP."""
        return _matches(module, self.down)

    def writes_residual(self, module: str) -> bool:
        """Whether the output of `module` is added to the residual stream."""
        return module == self.output or self.is_down(module) or _matches(module, self.writes)

    @property
    def ends(self) -> frozenset[str]:
        """Every name that a tensor outside the blocks may have."""
        return frozenset(name for names in self.names for name in (names.embedding, names.norm, names.head))

    def spellings(self, module: str) -> tuple[str, ...]:
        """What transformers calls a module of the blocks, or the lm_head: `module` as in `names[0]`, and, of a multimodal
        model, as in the text model alone, which `AutoModelForCausalLM` makes of some."""
        own, alone = self.names[0], TextNames()
        if f"{module}.weight" == own.head:
            return tuple(dict.fromkeys((module, alone.head.removesuffix(".weight"))))
        return tuple(dict.fromkeys((module, alone.base + module.removeprefix(own.base))))

    def names_among(self, stored: Container[str]) -> TextNames:
        """What a checkpoint with these tensors calls the parts of the model; the first of `names` where it has none of them."""
        return next((names for names in self.names if names.among(stored)), self.names[0])

    def groups_among(self, linears: frozenset[str], experts: int) -> tuple[SharedInputGroup, ...]:
        """The groups that exist among the `linears` of one concrete block, experts written out, in the family's order."""
        groups = list(self.groups)
        if self.experts is not None:
            groups += [
                tuple(name.replace(EXPERT, str(expert)) for name in group)
                for expert in range(experts)
                for group in self.experts.groups
            ]
        present = [tuple(name for name in group if name in linears) for group in groups]
        return tuple(group for group in present if group)


def is_expert(module: str) -> bool:
    """Whether a linear, by its name in a block or in full, belongs to an expert: a router decides which tokens it sees."""
    return ".experts." in f".{module}."


def expert_of(module: str) -> int:
    """The expert to which a linear belongs, by its name in a block; ValueError for one that is not an expert's."""
    return int(f".{module}".partition(".experts.")[2].partition(".")[0])


def _matches(module: str, globs: Globs) -> bool:
    return any(fnmatchcase(module, glob) for glob in globs)
