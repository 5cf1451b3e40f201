"""Gemma 2: norms multiply by 1 + weight, and two more of them stand before the residual stream."""

from __future__ import annotations

from counterweight.workers.models.family import ATTENTION, GATED_MLP, ModelFamily

FAMILY = ModelFamily(
    model_types=("gemma2",),
    groups=(*ATTENTION, *GATED_MLP),
    reads={"input_layernorm": ATTENTION[0], "pre_feedforward_layernorm": GATED_MLP[0]},
    down=GATED_MLP[1],
    eager_attention=True,
    sizes=("query_pre_attn_scalar",),
    norm_offset=1.0,
    needs_beginning=True,
    obstacle="post_attention_layernorm and post_feedforward_layernorm scale each channel of what is added to it",
)
