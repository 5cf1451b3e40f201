"""The layout of a usual model from its config.json alone: what `BlockBuilder` says of it, without transformers.

Only of configs in which nothing is unusual; of any other `plain_layout` says nothing, and whoever asks has transformers build
the model. `tests/workers/models/test_plain.py` compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from counterweight.workers.models import plain_blocks
from counterweight.workers.models.config_values import bounds
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import ModelFamily
from counterweight.workers.models.layout import BlockLayout, ModelLayout
from counterweight.workers.models.plain_blocks import Config, Parameters

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)
"""That a config has to spell out here, whatever default its class has."""

Usual = Mapping[str, Callable[[Any], bool]]
"""Field -> whether what it says is usual."""


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _usual_rope(value: object) -> bool:
    """No scaling, Llama 3's, or YaRN."""
    if value is None:
        return True
    if not isinstance(value, Mapping):
        return False
    numbers = {key: number for key, number in value.items() if key not in ("rope_type", "type")}
    needed, known = _ROPES.get(str(value.get("rope_type", value.get("type"))), ({""}, set()))
    if not needed <= numbers.keys() <= needed | known or not all(map(_number, numbers.values())):
        return False
    return bool(numbers.get("factor", 1) >= 1 and numbers.get("beta_fast", 32) > numbers.get("beta_slow", 1))


_ROPES: Mapping[str, tuple[set[str], set[str]]] = {
    "default": (set(), {"rope_theta"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, {"rope_theta"}),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"rope_theta", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    ),
}
"""Kind -> what it has to say, and what it may say beside that."""


def _any(value: object) -> bool:
    return not isinstance(value, Mapping)


def _boolean(value: object) -> bool:
    return isinstance(value, bool)


def _is(*allowed: object) -> Callable[[object], bool]:
    return lambda value: value in allowed


_USUAL: Usual = {
    **dict.fromkeys(SIZES, _number),
    **dict.fromkeys(("max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range"), _number),
    **dict.fromkeys(
        ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"), _any
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "attention_dropout"), _any),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), _boolean),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _usual_rope),
    "head_dim": lambda value: value is None or _number(value),
    "hidden_act": _is("silu"),
    "pretraining_tp": _is(1),
    "use_sliding_window": _is(False),
    "sliding_window": _is(None),
    "max_window_layers": _number,
    "layer_types": lambda value: value is None or set(value) == {"full_attention"},
}
"""Of every model."""

_ROUTED: Usual = {
    "num_experts_per_tok": _number,
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"), _any),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A model_type. blocks: config -> parameters of each kind of block, and which block is of which. needed: further sizes that
    a config has to spell out. usual: further fields. renamed: what transformers writes a field as -> what publishers do."""

    blocks: Callable[[Config], tuple[list[Parameters], list[int]]]
    needed: tuple[str, ...] = ()
    usual: Usual = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


_KINDS: Mapping[str, _Kind] = {
    "llama": _Kind(blocks=plain_blocks.dense),
    "mistral": _Kind(blocks=plain_blocks.dense),
    "qwen2": _Kind(blocks=plain_blocks.dense),
    "qwen3": _Kind(blocks=plain_blocks.dense, needed=("head_dim",)),
    "mixtral": _Kind(
        blocks=plain_blocks.mixtral,
        needed=("num_local_experts", "num_experts_per_tok"),
        usual={**_ROUTED, "num_local_experts": _number},
    ),
    "qwen3_moe": _Kind(
        blocks=plain_blocks.qwen3_moe,
        needed=("head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        usual={
            **_ROUTED,
            **dict.fromkeys(("num_experts", "moe_intermediate_size"), _number),
            "decoder_sparse_step": _is(1),
            "mlp_only_layers": _is(None, []),
            "norm_topk_prob": _boolean,
        },
        renamed={"num_local_experts": "num_experts"},
    ),
    "deepseek_v3": _Kind(
        blocks=plain_blocks.deepseek_v3,
        needed=plain_blocks.DEEPSEEK_SIZES,
        usual={
            **_ROUTED,
            **dict.fromkeys(plain_blocks.DEEPSEEK_SIZES, _number),
            **dict.fromkeys(("first_k_dense_replace", "num_nextn_predict_layers"), _count),
            **dict.fromkeys(("norm_topk_prob", "rope_interleave", "seq_aux"), _boolean),
            **dict.fromkeys(("routed_scaling_factor", "aux_loss_alpha", "ep_size"), _number),
            "attention_bias": _is(False),
            **dict.fromkeys(("head_dim", "qk_head_dim"), _any),
            "moe_layer_freq": _is(1),
            "scoring_func": _is("sigmoid"),
            "topk_method": _is("noaux_tc"),
        },
    ),
}


def plain_layout(config: Mapping[str, Any], stored: Container[str]) -> ModelLayout | None:
    """The layout of a model of one of the `_KINDS` with this config.json; None for anything else, and for a config that says
    what is not usual, or leaves out a size. stored: as for `BlockBuilder`."""
    kind = _KINDS.get(str(config.get("model_type")))
    if kind is None:
        return None
    config = {kind.renamed.get(name, name): value for name, value in config.items()}
    if any(config.get(name) is None for name in (*SIZES, *kind.needed)):
        return None
    usual = {**_USUAL, **kind.usual}
    if any(name not in usual or not usual[name](value) for name, value in config.items()):
        return None
    family = family_of(config["model_type"])
    if not _fits(config, family):
        return None
    kinds, kind_of = kind.blocks(config)
    experts, active = (
        (0, 0) if family.experts is None else (config[family.experts.count_key], config[family.experts.active_key])
    )
    return ModelLayout(
        model_type=config["model_type"],
        names=family.names_among(stored),
        hidden_size=config["hidden_size"],
        heads=config["num_attention_heads"],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        experts=experts,
        active_experts=active,
        kinds=tuple(_block(family, parameters, experts) for parameters in kinds),
        kind_of=tuple(kind_of),
        prediction_layers=0 if family.prediction_layers is None else config.get(family.prediction_layers, 0),
    )


def _fits(config: Config, family: ModelFamily) -> bool:
    """Whether sizes are within their bounds and fit together."""
    sizes = {name: config[name] for name in bounds(family) if config.get(name) is not None}
    if not all(
        isinstance(size, int) and least <= size <= most
        for name, (least, most) in bounds(family).items()
        if (size := sizes.get(name)) is not None
    ):
        return False
    hidden, heads, groups = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if (turned := sizes.get("qk_rope_head_dim")) is not None:  # of latent attention, at whose sizes the family looks
        sizes.setdefault("head_dim", turned)
        if config.get("qk_head_dim", sizes["qk_nope_head_dim"] + turned) != sizes["qk_nope_head_dim"] + turned:
            return False
    elif heads % groups or plain_blocks.head_width(config) % 2 or ("head_dim" not in sizes and hidden % heads):
        return False
    if family.experts is not None and sizes[family.experts.active_key] > sizes[family.experts.count_key]:
        return False
    return family.size_problem(sizes) is None


def _block(family: ModelFamily, parameters: Parameters, experts: int) -> BlockLayout:
    linears = frozenset(name.removesuffix(".weight") for name, shape in parameters.items() if len(shape) == 2)
    return BlockLayout(parameters=parameters, linears=family.groups_among(linears, experts))
