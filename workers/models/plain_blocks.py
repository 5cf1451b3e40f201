"""Parameters of usual blocks, by the sizes of a config.json: names and shapes, in the order of transformers' modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from counterweight.workers.models.family import PROJECTIONS

Config = Mapping[str, Any]

Parameters = dict[str, tuple[int, ...]]
"""Name, relative to the block -> shape, [out, in] of a linear."""

DEEPSEEK_SIZES = (
    *("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
"""That a DeepSeek-V3 has beside those of every model."""


def head_width(config: Config) -> int:
    """Channels of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def dense(config: Config) -> tuple[list[Parameters], list[int]]:
    """Llama, Mistral, Qwen2, Qwen3."""
    mlp = _gated("mlp", config["intermediate_size"], config["hidden_size"])
    if config["model_type"] == "llama" and config.get("mlp_bias", False):
        mlp = _biased(mlp, PROJECTIONS)
    return [{**_attention(config), **mlp, **_norms(config)}], [0] * config["num_hidden_layers"]


def mixtral(config: Config) -> tuple[list[Parameters], list[int]]:
    """Every MLP is sparse."""
    mlp = {
        **_router(config["num_local_experts"], config),
        **_experts(config["num_local_experts"], config["intermediate_size"], config),
    }
    return [{**_attention(config), **mlp, **_norms(config)}], [0] * config["num_hidden_layers"]


def qwen3_moe(config: Config) -> tuple[list[Parameters], list[int]]:
    """Likewise, with a width of its own."""
    mlp = {
        **_experts(config["num_experts"], config["moe_intermediate_size"], config),
        **_router(config["num_experts"], config),
    }
    return [{**_attention(config), **mlp, **_norms(config)}], [0] * config["num_hidden_layers"]


def deepseek_v3(config: Config) -> tuple[list[Parameters], list[int]]:
    """Dense blocks first, then sparse ones with shared experts."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    width, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    sparse = {
        **_experts(experts, width, config),
        **_router(experts, config),
        "mlp.gate.e_score_correction_bias": (experts,),
        **_gated("mlp.shared_experts", width * config["n_shared_experts"], hidden),
    }
    mlps = [_gated("mlp", config["intermediate_size"], hidden), sparse]
    first = min(config.get("first_k_dense_replace", 3), layers)
    used = [mlp for mlp, count in zip(mlps, (first, layers - first), strict=True) if count]
    kind_of = [0] * first + [len(used) - 1] * (layers - first)
    return [{**_latent_attention(config), **mlp, **_norms(config)} for mlp in used], kind_of


def _attention(config: Config) -> Parameters:
    hidden, width, model_type = config["hidden_size"], head_width(config), config["model_type"]
    queries, values = (width * config[field] for field in ("num_attention_heads", "num_key_value_heads"))
    inputs = ("q_proj", "k_proj", "v_proj")
    shapes: Parameters = {
        **{
            f"self_attn.{name}.weight": (rows, hidden)
            for name, rows in zip(inputs, (queries, values, values), strict=True)
        },
        "self_attn.o_proj.weight": (hidden, queries),
    }
    if model_type == "qwen2":
        shapes = _biased(shapes, inputs)
    elif model_type in ("llama", "qwen3", "qwen3_moe") and config.get("attention_bias", False):
        shapes = _biased(shapes, (*inputs, "o_proj"))
    if model_type in ("qwen3", "qwen3_moe"):
        shapes |= {f"self_attn.{name}.weight": (width,) for name in ("q_norm", "k_norm")}
    return shapes


def _latent_attention(config: Config) -> Parameters:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries, keys, turned = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    straight, values = config["qk_nope_head_dim"], config["v_head_dim"]
    return {
        "self_attn.q_a_proj.weight": (queries, hidden),
        "self_attn.q_a_layernorm.weight": (queries,),
        "self_attn.q_b_proj.weight": (heads * (straight + turned), queries),
        "self_attn.kv_a_proj_with_mqa.weight": (keys + turned, hidden),
        "self_attn.kv_a_layernorm.weight": (keys,),
        "self_attn.kv_b_proj.weight": (heads * (straight + values), keys),
        "self_attn.o_proj.weight": (hidden, heads * values),
    }


def _gated(prefix: str, inner: int, hidden: int) -> Parameters:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return {f"{prefix}.{name}.weight": shape for name, shape in zip(PROJECTIONS, shapes, strict=True)}


def _experts(count: int, inner: int, config: Config) -> Parameters:
    each = (_gated(f"mlp.experts.{expert}", inner, config["hidden_size"]) for expert in range(count))
    return {name: shape for one in each for name, shape in one.items()}


def _router(experts: int, config: Config) -> Parameters:
    return {"mlp.gate.weight": (experts, config["hidden_size"])}


def _norms(config: Config) -> Parameters:
    return {f"{name}.weight": (config["hidden_size"],) for name in ("input_layernorm", "post_attention_layernorm")}


def _biased(parameters: Parameters, linears: tuple[str, ...]) -> Parameters:
    """With a bias behind the weight of each of these linears, by the last part of their names."""
    found: Parameters = {}
    for name, shape in parameters.items():
        found[name] = shape
        linear = name.removesuffix(".weight")
        if linear.rpartition(".")[2] in linears:
            found[f"{linear}.bias"] = shape[:1]
    return found
