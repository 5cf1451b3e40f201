"""A config.json that nobody has checked, to a configuration that transformers accepts and can run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from counterweight.workers.checkpoint.refusal import show
from counterweight.workers.errors import CheckpointError, UnsupportedModelError
from counterweight.workers.models.config_values import bounds, check_values, said
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import ModelFamily


def parse_config(config: Mapping[str, Any], *, headless: bool = True) -> PreTrainedConfig:
    """The config of a `model_type` that transformers knows, of a multimodal model that of its text model; `config` stays as it
    is. headless: the checkpoint has no lm_head, which tells whether it is tied where a multimodal model's config does not say.

    CheckpointError for sizes out of bounds, for what transformers refuses, and for what it builds but cannot run.
    """
    family = family_of(config.get("model_type"))
    text = _text_part(config)
    model_type = family.known_as or str(text["model_type"])
    _sizes(family, text.get)  # whose bounds are narrower than those of any config's values
    check_values(config)
    try:
        # A deep copy: transformers writes defaults into nested dictionaries such as `rope_parameters`.
        fields = {**copy.deepcopy(dict(text)), "model_type": model_type}
        if family.wrapper is not None:
            fields["tie_word_embeddings"] = _tied(config, headless)
        parsed: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(fields)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json: transformers refuses it: {said(error)}") from error
    # Again, as transformers understood it: a field may have another name, and defaults.
    _check_fit(family, _sizes(family, lambda field: getattr(parsed, field, None)))
    _check_attention(family, parsed)
    for field, served in family.only.items():
        if (value := getattr(parsed, field, None)) not in served:
            raise CheckpointError(f"config.json: {field}: {value!r}: expected {' or '.join(map(repr, served))}")
    parsed.return_dict = True
    return parsed


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that says what the text model is: the whole, or `text_config` of a multimodal model.
    CheckpointError where that is of a model that this family does not wrap."""
    wrapper = family_of(config.get("model_type")).wrapper
    if wrapper is None:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json: text_config: {show(text)}: expected an object")
    if text.get("model_type") not in wrapper.text_types:
        expected = " or ".join(wrapper.text_types)
        raise UnsupportedModelError(
            f"config.json: text_config.model_type: {show(text.get('model_type'))}: expected {expected}"
        )
    return text


def _tied(config: Mapping[str, Any], headless: bool) -> bool:
    # transformers looks at the outer config, whose default says nothing of checkpoints that older versions wrote: it has the
    # last word only where it is written out.
    said = config.get("tie_word_embeddings")
    if said is not None and not isinstance(said, bool):
        raise CheckpointError(f"config.json: tie_word_embeddings: {show(said)}: expected true or false")
    return headless if said is None else said


def _sizes(family: ModelFamily, said: Callable[[str], object]) -> dict[str, int]:
    """The sizes that a config says, all within their bounds; CheckpointError for another."""
    sizes: dict[str, int] = {}
    for field, (least, most) in bounds(family).items():
        value = said(field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise CheckpointError(f"config.json: {field}: {value!r}: expected an integer from {least} to {most}")
        sizes[field] = value
    return sizes


def _check_attention(family: ModelFamily, config: PreTrainedConfig) -> None:
    """What transformers accepts in a config and then fails on when a block runs."""
    kinds = getattr(config, "layer_types", None) or []
    if unknown := [kind for kind in kinds if kind not in family.layer_types]:
        expected = " or ".join(family.layer_types)
        raise CheckpointError(f"config.json: layer_types: {unknown[0]!r}: expected {expected}")
    if "sliding_attention" in kinds and getattr(config, "sliding_window", None) is None:
        raise CheckpointError(
            "config.json: sliding_window: null: expected an integer, for its layers of sliding_attention"
        )
    if (size := getattr(config, "head_dim", None) or 0) % 2:
        raise CheckpointError(
            f"config.json: head_dim: {size}: expected an even number, which a rotary embedding turns in pairs"
        )


def _check_fit(family: ModelFamily, sizes: Mapping[str, int]) -> None:
    counts = () if family.experts is None else (family.experts.count_key, family.experts.active_key)
    for field in ("num_attention_heads", "num_key_value_heads", *counts):
        if field not in sizes:
            raise CheckpointError(f"config.json: {field}: None: expected an integer")
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % groups:
        raise CheckpointError(
            f"config.json: num_key_value_heads: {groups}: expected a divisor of num_attention_heads, {heads}"
        )
    if (layout := family.experts) is not None and sizes[layout.active_key] > sizes[layout.count_key]:
        raise CheckpointError(
            f"config.json: {layout.active_key}: {sizes[layout.active_key]}: "
            f"expected at most {sizes[layout.count_key]}, the experts"
        )
    if (problem := family.size_problem(sizes)) is not None:
        raise CheckpointError(f"config.json: {problem}")
