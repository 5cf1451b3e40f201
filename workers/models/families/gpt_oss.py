"""gpt-oss: every MLP is sparse, its experts have biases, are fused transposed and interleaved, and clamp what they multiply.

Attention has a learned sink per head, a logit beside those of the tokens that takes weight and gives no value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from counterweight.workers.models.family import (
    ATTENTION,
    SPARSE_DOWN,
    ExpertLayout,
    ModelFamily,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """(up + 1) * gate * sigmoid(alpha * gate), gate clamped from above and up on both sides to `limit`."""

    alpha: float
    limit: float

    @classmethod
    def of(cls, fused: Any) -> ClampedSwiGLU:
        """That of transformers' `GptOssExperts`."""
        return cls(alpha=fused.alpha, limit=fused.limit)

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * (gate * self.alpha).sigmoid())


FAMILY = ModelFamily(
    model_types=("gpt_oss",),
    groups=ATTENTION,
    reads={
        "input_layernorm": ATTENTION[0],
        "post_attention_layernorm": ("mlp.router", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    },
    down=SPARSE_DOWN,
    up=None,
    eager_attention=True,
    experts=ExpertLayout(
        count_key="num_local_experts",
        routers=("re:.*[.]router$",),
        fused_biases_on_disk=("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
        transposed=True,
        interleaved=True,
        product=ClampedSwiGLU.of,
        stock_refusal="experts of gpt-oss apart: transformers has only tensors of all experts, and starts from random ones",
    ),
)
