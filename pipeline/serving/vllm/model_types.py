"""An artifact that stock software would run wrongly has a `model_type` that it does not know. With the plug-in its config is
read as that of its source, so that all of vLLM sees a model of the family."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from counterweight.workers.interchange.compressed_tensors import QUANT_METHOD
from counterweight.workers.models.families import families

SERVED = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "olmoe"}
)
"""Families that `tests/serving` runs in vLLM."""


def check_served(model_type: str) -> None:
    """ValueError for a family that nobody has run there."""
    if model_type not in SERVED:
        raise ValueError(
            f"model_type {model_type}: the plug-in for vLLM serves {', '.join(sorted(SERVED))}; counterweight.load_model runs "
            "all families"
        )


def register_model_types() -> None:
    """Makes `counterweight_<family>` known to transformers' AutoConfig, which vLLM reads configs with."""
    for model_type in families():
        if model_type in CONFIG_MAPPING:
            name = f"{QUANT_METHOD}_{model_type}"
            AutoConfig.register(name, _config_class(CONFIG_MAPPING[model_type], model_type, name), exist_ok=True)


def _config_class(base: type[PreTrainedConfig], model_type: str, name: str) -> type[PreTrainedConfig]:
    def from_dict(cls: type[PreTrainedConfig], /, config_dict: dict[str, Any], **options: Any) -> PreTrainedConfig:
        check_served(model_type)
        architectures = config_dict.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
        return base.from_dict({**config_dict, "model_type": model_type, "architectures": architectures}, **options)

    members = {"model_type": name, "from_dict": classmethod(from_dict), "__module__": __name__}
    return type(f"Counterweight{base.__name__}", (base,), members)
