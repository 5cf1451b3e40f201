"""The layout of a plain dense model from its config.json alone: what `BlockBuilder` says of it, without transformers.

Only of configs in which nothing is unusual; of any other `plain_layout` says nothing, and whoever asks has transformers build
the model. `tests/workers/models/test_plain.py` compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from counterweight.workers.models.families import family_of
from counterweight.workers.models.layout import BlockLayout, ModelLayout

MOST = 1 << 20
"""Bound on a size; `config.py` has it too, but imports transformers."""

MOST_LAYERS = 1024

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)
"""That a config has to spell out here, whatever default its class has."""


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _default_rope(value: object) -> bool:
    """No scaling, or Llama 3's."""
    if value is None:
        return True
    if not isinstance(value, Mapping):
        return False
    numbers = {key: number for key, number in value.items() if key not in ("rope_type", "type")}
    kind = value.get("rope_type", value.get("type"))
    known = {"default": {"rope_theta"}, "llama3": _LLAMA3 | {"rope_theta"}}.get(str(kind), set())
    if kind == "llama3" and not numbers.keys() >= _LLAMA3:
        return False
    return bool(known) and numbers.keys() <= known and all(map(_number, numbers.values()))


_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def _any(value: object) -> bool:
    return not isinstance(value, Mapping)


_USUAL: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(SIZES, _number),
    **dict.fromkeys(("max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range"), _number),
    **dict.fromkeys(
        ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"), _any
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "attention_dropout"), _any),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _default_rope),
    "head_dim": lambda value: value is None or _number(value),
    "hidden_act": lambda value: value == "silu",
    "pretraining_tp": lambda value: value == 1,
    "use_sliding_window": lambda value: value is False,
    "sliding_window": lambda value: value is None,
    "max_window_layers": _number,
    "layer_types": lambda value: value is None or set(value) == {"full_attention"},
}
"""Field -> whether what it says is usual."""


def plain_layout(config: Mapping[str, Any], stored: Container[str]) -> ModelLayout | None:
    """The layout of a Llama, Mistral, Qwen2 or Qwen3 with this config.json; None for anything else, and for a config that says
    what is not usual, or leaves out a size. stored: as for `BlockBuilder`."""
    model_type = config.get("model_type")
    if model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        return None
    if any(field not in _USUAL or not _USUAL[field](value) for field, value in config.items()):
        return None
    head = config.get("head_dim")
    if any(field not in config for field in SIZES) or (head is None and model_type == "qwen3"):
        return None
    heads, groups, hidden = (config[field] for field in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    width = head or hidden // heads
    sizes = [config[field] for field in SIZES] + [width]
    if not all(isinstance(size, int) and size <= MOST for size in sizes) or config["num_hidden_layers"] > MOST_LAYERS:
        return None
    if heads % groups or width % 2 or (head is None and hidden % heads):
        return None
    parameters = _parameters(config, width)
    family = family_of(model_type)
    linears = frozenset(name.removesuffix(".weight") for name, shape in parameters.items() if len(shape) == 2)
    block = BlockLayout(parameters=parameters, linears=family.groups_among(linears, 0))
    return ModelLayout(
        model_type=model_type,
        names=family.names_among(stored),
        hidden_size=hidden,
        heads=heads,
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        experts=0,
        active_experts=0,
        kinds=(block,),
        kind_of=(0,) * config["num_hidden_layers"],
    )


def _parameters(config: Mapping[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    """Of a block, in the order of transformers' modules."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, values = (width * config[field] for field in ("num_attention_heads", "num_key_value_heads"))
    model_type = config["model_type"]
    asked = model_type in ("llama", "qwen3") and config.get("attention_bias", False)
    biased = {"q_proj": asked, "k_proj": asked, "v_proj": asked, "o_proj": asked}
    if model_type == "qwen2":
        biased = {"q_proj": True, "k_proj": True, "v_proj": True}
    shapes: dict[str, tuple[int, ...]] = {}
    attention = {"q_proj": (queries, hidden), "k_proj": (values, hidden), "v_proj": (values, hidden)}
    for name, shape in {**attention, "o_proj": (hidden, queries)}.items():
        shapes[f"self_attn.{name}.weight"] = shape
        if biased.get(name):
            shapes[f"self_attn.{name}.bias"] = shape[:1]
    if model_type == "qwen3":
        shapes |= {f"self_attn.{name}.weight": (width,) for name in ("q_norm", "k_norm")}
    for name, shape in {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}.items():
        shapes[f"mlp.{name}.weight"] = shape
        if model_type == "llama" and config.get("mlp_bias", False):
            shapes[f"mlp.{name}.bias"] = shape[:1]
    return shapes | {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
