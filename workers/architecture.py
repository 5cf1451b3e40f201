"""Model knowledge, as tables: which linears a block has, who shares an input, what tensors are called on disk.

A family's block is run by transformers' own modules (see `skeleton`), so attention, masks, rotary embeddings and norms
are never restated here. What transformers does not say is what a compressor needs: the quantizable linears, grouped by
the input they share, and how the names in a checkpoint map to modules. A family that is not in `FAMILIES` is refused.

Module names are relative to a block (`self_attn.q_proj`); an expert's index stands as `{expert}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from counterweight.workers.errors import UnsupportedModelError

EXPERT = "{expert}"

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Linears of one expert."""

Siblings = tuple[str, ...]
"""Linears of one block that read the same input and therefore share its statistics, in output order."""

ATTENTION: tuple[Siblings, ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
GATED_MLP: tuple[Siblings, ...] = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """How a mixture-of-experts MLP is stored and how its experts become linears.

    module: the experts module inside a block (transformers fuses all experts into two 3-D parameters there).
    count_key: the config field that holds the number of experts.
    on_disk: expert linear -> its name in a checkpoint that keeps experts apart; both relative to the block.
    fused_on_disk: (gate_up, down) names of the 3-D tensors of a checkpoint that keeps them fused.
    """

    module: str
    count_key: str
    on_disk: Mapping[str, str]
    fused_on_disk: tuple[str, str]
    siblings: tuple[Siblings, ...] = (
        (f"mlp.experts.{EXPERT}.gate_proj", f"mlp.experts.{EXPERT}.up_proj"),
        (f"mlp.experts.{EXPERT}.down_proj",),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family.

    siblings: quantizable linears of a dense block, grouped by shared input.
    renames: module-name prefix -> on-disk prefix, relative to the block, for names that differ.
    experts: layout of the sparse MLP, or None for a dense family.
    eager_attention: the family's attention has a term (logit soft-capping) that the fused kernels leave out.
    """

    siblings: tuple[Siblings, ...]
    renames: Mapping[str, str]
    experts: ExpertLayout | None = None
    eager_attention: bool = False


DENSE = Family(siblings=(*ATTENTION, *GATED_MLP), renames={})

FAMILIES: Mapping[str, Family] = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "gemma2": Family(siblings=DENSE.siblings, renames={}, eager_attention=True),
    "gemma3_text": DENSE,
    "phi3": Family(
        siblings=(
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
        renames={},
    ),
    "mixtral": Family(
        siblings=ATTENTION,
        renames={"mlp.": "block_sparse_moe."},
        experts=ExpertLayout(
            module="mlp.experts",
            count_key="num_local_experts",
            on_disk={
                f"mlp.experts.{EXPERT}.gate_proj": f"block_sparse_moe.experts.{EXPERT}.w1",
                f"mlp.experts.{EXPERT}.up_proj": f"block_sparse_moe.experts.{EXPERT}.w3",
                f"mlp.experts.{EXPERT}.down_proj": f"block_sparse_moe.experts.{EXPERT}.w2",
            },
            fused_on_disk=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ),
    ),
    "qwen3_moe": Family(
        siblings=(*ATTENTION, *GATED_MLP),
        renames={},
        experts=ExpertLayout(
            module="mlp.experts",
            count_key="num_experts",
            on_disk={
                name: name
                for name in (
                    f"mlp.experts.{EXPERT}.gate_proj",
                    f"mlp.experts.{EXPERT}.up_proj",
                    f"mlp.experts.{EXPERT}.down_proj",
                )
            },
            fused_on_disk=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ),
    ),
}


def is_expert(module: str) -> bool:
    """Whether a linear, by its name in a block or in full, belongs to an expert: a router decides which tokens it sees."""
    return ".experts." in f".{module}."


def family_of(model_type: object) -> Family:
    """The table's entry for a `model_type`; UnsupportedModelError, listing the known ones, when there is none."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    raise UnsupportedModelError(f"config.json: model_type: {model_type!r}: expected one of {known}")


def sibling_groups(family: Family, linears: frozenset[str], experts: int) -> tuple[Siblings, ...]:
    """The groups of siblings that exist among the `linears` of one concrete block, experts written out, in table order.

    A family's table names what its blocks may hold: a Qwen3-MoE block is dense or sparse by configuration.
    """
    groups = list(family.siblings)
    if family.experts is not None:
        groups += [
            tuple(name.replace(EXPERT, str(expert)) for name in group)
            for expert in range(experts)
            for group in family.experts.siblings
        ]
    present = [tuple(name for name in group if name in linears) for group in groups]
    return tuple(group for group in present if group)
