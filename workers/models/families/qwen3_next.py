"""Qwen3-Next: Qwen2-MoE in most of whose blocks a Gated DeltaNet takes the place of attention.

Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): `in_proj_*` write queries, keys, values, an output gate and two gates of
the recurrence; a short convolution and the recurrence follow, a norm per head and the output gate, and out_proj. Attention, in
every fourth block, has an output gate too, which q_proj writes. Norms multiply by 1 + weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from counterweight.workers.models.families import qwen2_moe
from counterweight.workers.models.family import ModelFamily, SharedInputGroup


def size_problem(sizes: Mapping[str, int]) -> str | None:
    """What transformers builds and cannot run."""
    values, keys = sizes["linear_num_value_heads"], sizes["linear_num_key_heads"]
    if values % keys:
        return f"linear_num_key_heads: {keys}: expected a divisor of linear_num_value_heads, {values}"
    return None


def with_delta_net(base: ModelFamily, model_types: tuple[str, ...], inputs: SharedInputGroup) -> ModelFamily:
    """`base` with a Gated DeltaNet in some blocks, whose projections of its input are `inputs`."""
    outputs = ("linear_attn.out_proj",)
    return replace(
        base,
        model_types=model_types,
        groups=(*base.groups, inputs, outputs),
        reads={**base.reads, "input_layernorm": (*base.reads["input_layernorm"], *inputs)},
        writes=outputs,
        labels={**base.labels, "linear_attn.": "DeltaNet: "},
        sizes=(
            *base.sizes,
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
        ),
        size_problem=size_problem,
        partial_rotary=True,
        layer_types=("full_attention", "linear_attention"),
        prediction_prefix="mtp.",
        value_obstacle="a gate multiplies each channel of what attention has mixed",
        norm_offset=1.0,
    )


FAMILY = with_delta_net(qwen2_moe.FAMILY, ("qwen3_next",), ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"))
