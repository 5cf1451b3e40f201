"""Who reads and who writes what inside a block, as a table: what a transform must know of a family to undo itself.

Module names are globs, relative to the block: `*` stands for the number of an expert. A row names what blocks of the
family may hold, such as both MLPs of Qwen3-MoE, whose blocks are dense or sparse by configuration. The second linears of
the MLPs and the attention's output write the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from counterweight.workers.errors import UnsupportedModelError
from counterweight.workers.recipe.transforms import Rotation

Globs = tuple[str, ...]

ATTENTION: Globs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
DENSE_MLP: Globs = ("mlp.gate_proj", "mlp.up_proj")
SPARSE_MLP: Globs = ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
DENSE_DOWN: Globs = ("mlp.down_proj",)
SPARSE_DOWN: Globs = ("mlp.experts.*.down_proj",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """How the linears of a block are connected.

    reads: norm -> the linears (and router) that read its output, which nothing else does.
    value: its last output rows are the attention's values, head by head.
    output: reads the values that attention has mixed, head by head, and writes the residual stream.
    down: read the elementwise product inside an MLP, and write the residual stream.
    obstacle: why the residual stream cannot be rotated, None where it can.
    norm_offset: what a norm adds to its weight before it multiplies.
    """

    reads: Mapping[str, Globs]
    down: Globs
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    obstacle: str | None = None
    norm_offset: float = 0.0

    def norm_before(self, module: str) -> str | None:
        """The norm whose output `module` reads, None for a module that reads something else."""
        return next((norm for norm, readers in self.reads.items() if _matches(module, readers)), None)

    def is_down(self, module: str) -> bool:
        """Whether `module` is the second linear of an MLP."""
        return _matches(module, self.down)

    def writes_residual(self, module: str) -> bool:
        """Whether the output of `module` is added to the residual stream."""
        return module == self.output or self.is_down(module)


def _matches(module: str, globs: Globs) -> bool:
    return any(fnmatchcase(module, glob) for glob in globs)


DENSE = Wiring(reads={"input_layernorm": ATTENTION, "post_attention_layernorm": DENSE_MLP}, down=DENSE_DOWN)
GEMMA = Wiring(
    reads={"input_layernorm": ATTENTION, "pre_feedforward_layernorm": DENSE_MLP},
    down=DENSE_DOWN,
    norm_offset=1.0,
    obstacle="post_attention_layernorm and post_feedforward_layernorm scale each channel of what is added to it",
)

WIRINGS: Mapping[str, Wiring] = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": Wiring(
        reads={"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
        down=DENSE_DOWN,
        value="self_attn.qkv_proj",
    ),
    "mixtral": Wiring(
        reads={"input_layernorm": ATTENTION, "post_attention_layernorm": SPARSE_MLP},
        down=SPARSE_DOWN,
    ),
    "qwen3_moe": Wiring(
        reads={"input_layernorm": ATTENTION, "post_attention_layernorm": (*DENSE_MLP, *SPARSE_MLP)},
        down=(*DENSE_DOWN, *SPARSE_DOWN),
    ),
}


def wiring_of(model_type: str) -> Wiring:
    """The table's row for a `model_type`; UnsupportedModelError, listing the known ones, when there is none."""
    if model_type in WIRINGS:
        return WIRINGS[model_type]
    known = ", ".join(sorted(WIRINGS))
    raise UnsupportedModelError(f"config.json: model_type: {model_type!r}: expected one of {known}")


def rotation_problem(model_type: str, rotation: Rotation) -> str | None:
    """Why a family cannot be rotated as `rotation` asks; None where it can."""
    obstacle = wiring_of(model_type).obstacle
    if not rotation.residual or obstacle is None:
        return None
    return (
        f"rotation.residual: true: expected false for {model_type}, whose residual stream cannot be rotated: {obstacle}"
    )
