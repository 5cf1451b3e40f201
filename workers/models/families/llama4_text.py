"""Llama 4, the text model: blocks are dense or sparse, attend in chunks with rotary embeddings or to everything without.

A router scales what an expert is given (by the sigmoid of its logit), not what it gives; a shared expert sees every token.
"""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.models.family import (
    ATTENTION,
    EXPERT,
    PROJECTIONS,
    ExpertLayout,
    ModelFamily,
    SharedInputGroup,
)

MLPS: tuple[SharedInputGroup, ...] = (
    ("feed_forward.gate_proj", "feed_forward.up_proj"),
    ("feed_forward.down_proj",),
    ("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
    ("feed_forward.shared_expert.down_proj",),
)


def size_problem(sizes: Mapping[str, int]) -> str | None:
    """What transformers builds and cannot run."""
    return None if "attention_chunk_size" in sizes else "attention_chunk_size: None: expected an integer"


FAMILY = ModelFamily(
    model_types=("llama4_text",),
    groups=(*ATTENTION, *MLPS),
    reads={
        "input_layernorm": ATTENTION[0],
        "post_attention_layernorm": (
            *MLPS[0],
            *MLPS[2],
            "feed_forward.router",
            "feed_forward.experts.*.gate_proj",
            "feed_forward.experts.*.up_proj",
        ),
    },
    down=(*MLPS[1], *MLPS[3], "feed_forward.experts.*.down_proj"),
    labels={"feed_forward.shared_expert.": "shared expert: "},
    sizes=("intermediate_size_mlp", "attention_chunk_size", "floor_scale"),
    size_problem=size_problem,
    layer_types=("full_attention", "chunked_attention"),
    experts=ExpertLayout(
        module="feed_forward.experts",
        count_key="num_local_experts",
        routers=("re:.*[.]router$",),
        on_disk={name: name for name in (f"feed_forward.experts.{EXPERT}.{part}" for part in PROJECTIONS)},
        fused_on_disk=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        scaled_inputs=True,
        transposed=True,
        stock_refusal="experts of Llama 4 apart: transformers has only tensors of all experts, and starts from random ones",
        groups=(
            (f"feed_forward.experts.{EXPERT}.gate_proj", f"feed_forward.experts.{EXPERT}.up_proj"),
            (f"feed_forward.experts.{EXPERT}.down_proj",),
        ),
    ),
)
