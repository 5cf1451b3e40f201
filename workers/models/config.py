"""A config.json that nobody has checked, to a configuration that transformers accepts and can run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from counterweight.workers.errors import CheckpointError
from counterweight.workers.models.families import families, family_of

MAX_LAYERS = 1024
"""More layers than any published model; a config that claims more is refused before anything is built."""

MAX_EXPERTS = 1024
"""Of one block; twice the most that a published model has. Each becomes three modules, which take half a millisecond."""

MAX_WIDTH = 1 << 20
"""Bound on every other size in a config: a hostile file must not make us build (even on the meta device) without limit."""

ATTENTION_KINDS = ("full_attention", "sliding_attention")
"""What `layer_types` may say of a block of the families that are known."""

SIZE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "query_pre_attn_scalar",
)


def bounds() -> dict[str, int]:
    """Field of a config -> the most that it may say."""
    layouts = [family.experts for family in families().values() if family.experts is not None]
    experts = {key: MAX_EXPERTS for layout in layouts for key in (layout.count_key, layout.active_key)}
    return {**dict.fromkeys(SIZE_FIELDS, MAX_WIDTH), "num_hidden_layers": MAX_LAYERS, **experts}


def parse_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a `model_type` that transformers knows; `config` stays as it is.

    CheckpointError for sizes out of bounds, for what transformers refuses, and for what it builds but cannot run.
    """
    _check_sizes(config)
    try:
        # A deep copy: transformers writes defaults into nested dictionaries such as `rope_parameters`.
        parsed: PreTrainedConfig = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json: transformers refuses it: {error}") from error
    _check_divisions(parsed)
    _check_attention(parsed)
    parsed.return_dict = True
    return parsed


def _check_sizes(config: Mapping[str, Any]) -> None:
    for field, bound in bounds().items():
        value = config.get(field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= bound:
            raise CheckpointError(f"config.json: {field}: {value!r}: expected an integer from 1 to {bound}")


def _check_attention(config: PreTrainedConfig) -> None:
    """What transformers accepts in a config and then fails on when a block runs."""
    kinds = getattr(config, "layer_types", None) or []
    if unknown := [kind for kind in kinds if kind not in ATTENTION_KINDS]:
        expected = " or ".join(ATTENTION_KINDS)
        raise CheckpointError(f"config.json: layer_types: {unknown[0]!r}: expected {expected}")
    if "sliding_attention" in kinds and getattr(config, "sliding_window", None) is None:
        raise CheckpointError(
            "config.json: sliding_window: null: expected an integer, for its layers of sliding_attention"
        )
    if getattr(config, "head_dim", None) == 1:
        raise CheckpointError(
            "config.json: head_dim: 1: expected an even number, which a rotary embedding turns in pairs"
        )


def _check_divisions(config: PreTrainedConfig) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise CheckpointError(
            f"config.json: num_key_value_heads: {groups}: expected a divisor of num_attention_heads, {heads}"
        )
    layout = family_of(config.model_type).experts
    if layout is None:
        return
    experts, active = getattr(config, layout.count_key), getattr(config, layout.active_key)
    if active > experts:
        raise CheckpointError(f"config.json: {layout.active_key}: {active}: expected at most {experts}, the experts")
