"""OLMoE: every MLP is sparse; queries and keys pass a norm over all heads.

`clip_qkv` clips the values too, which commutes neither with rotating nor with scaling them. Models that have it are refused;
the published ones have none.
"""

from __future__ import annotations

from counterweight.workers.models.family import ATTENTION, SPARSE_DOWN, SPARSE_READERS, ExpertLayout, ModelFamily

FAMILY = ModelFamily(
    model_types=("olmoe",),
    groups=ATTENTION,
    reads={"input_layernorm": ATTENTION[0], "post_attention_layernorm": SPARSE_READERS},
    down=SPARSE_DOWN,
    only={"clip_qkv": (None,)},
    experts=ExpertLayout(count_key="num_experts"),
)
