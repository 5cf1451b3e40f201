"""Mixtral: every MLP is sparse."""

from __future__ import annotations

from counterweight.workers.models.family import (
    ATTENTION,
    EXPERT,
    SPARSE_DOWN,
    SPARSE_READERS,
    ExpertLayout,
    ModelFamily,
)

FAMILY = ModelFamily(
    model_types=("mixtral",),
    groups=ATTENTION,
    reads={"input_layernorm": ATTENTION[0], "post_attention_layernorm": SPARSE_READERS},
    down=SPARSE_DOWN,
    renames={"mlp.": "block_sparse_moe."},
    experts=ExpertLayout(
        count_key="num_local_experts",
        on_disk={
            f"mlp.experts.{EXPERT}.gate_proj": f"block_sparse_moe.experts.{EXPERT}.w1",
            f"mlp.experts.{EXPERT}.up_proj": f"block_sparse_moe.experts.{EXPERT}.w3",
            f"mlp.experts.{EXPERT}.down_proj": f"block_sparse_moe.experts.{EXPERT}.w2",
        },
        labels={"w1": "gate (w1)", "w3": "up (w3)", "w2": "down (w2)"},
    ),
)
