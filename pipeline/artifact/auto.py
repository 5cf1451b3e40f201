"""Artifacts in transformers' own words: `AutoModelForCausalLM.from_pretrained`, `AutoTokenizer`, `pipeline`.

Stock transformers refuses an artifact that it would run wrongly: its `model_type` is unknown to it (`workers.interchange`).
`register` makes these types known, and gives them to `load_model`, so that every tensor is verified and runs as it was
validated. An artifact that stock transformers reads by itself is left to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from counterweight.workers.interchange.compressed_tensors import QUANT_METHOD
from counterweight.workers.models.families import families

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Arguments of `from_pretrained` that say where a repository comes from."""

_OURS = ("compensated", "residual", "kernels")
"""Those of `load_model`."""

_HARMLESS = frozenset(
    {"_from_auto", "_from_pipeline", "adapter_kwargs", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors"}
)
"""Those that change nothing here: no code is ever run, and a block's weights are in memory at a time."""


class ArtifactConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of an artifact that only `load_model` runs."""

    def __init__(self, quant_method: str = QUANT_METHOD, **described: object) -> None:
        self.quant_method = quant_method
        self.described = described


class ArtifactQuantizer(HfQuantizer):  # type: ignore[misc]
    """What a loaded model says of how it is quantized: an artifact is copied, not saved again from a model."""

    def validate_environment(self, *_: object, **__: object) -> None:
        """Called by transformers' own loader, which a class other than an Auto class goes to."""
        raise ValueError(
            "an artifact of Counterweight: expected AutoModelForCausalLM.from_pretrained or counterweight.load_model: a "
            "model class by itself does not know how its layers run"
        )

    def is_serializable(self, *_: object, **__: object) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def mark(model: PreTrainedModel) -> None:
    """Lets `save_pretrained` refuse what it would write without its quantized weights."""
    model.hf_quantizer = ArtifactQuantizer(ArtifactConfig(), pre_quantized=True)


def register() -> None:
    """Makes artifacts known to transformers; once or more often."""
    for model_type in families():
        name = f"{QUANT_METHOD}_{model_type}"
        if model_type not in CONFIG_MAPPING or name in CONFIG_MAPPING:
            continue
        base = CONFIG_MAPPING[model_type]
        config = type(f"Counterweight{base.__name__}", (base,), {"model_type": name, "__module__": __name__})
        loader = type(f"Counterweight{model_type}", (_Loader,), {"config_class": config, "__module__": __name__})
        AutoConfig.register(name, config)
        AutoModelForCausalLM.register(config, loader)
        if base in TOKENIZER_MAPPING:
            AutoTokenizer.register(config, tokenizer_class=TOKENIZER_MAPPING[base], exist_ok=True)


register_quantization_config(QUANT_METHOD)(ArtifactConfig)
register_quantizer(QUANT_METHOD)(ArtifactQuantizer)


class _Loader:
    """Stands where transformers has a model's class."""

    config_class: type[PreTrainedConfig]

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *positional: object, **options: Any) -> PreTrainedModel:
        """As `load_model`, of a folder or of a repository of the hub. dtype: as transformers has it. device_map: one device.
        ValueError for an option that would not be followed."""
        from counterweight.pipeline.artifact.load import load_model

        if positional:
            raise ValueError(f"from_pretrained: {len(positional)} arguments behind the name: expected none")
        given: PreTrainedConfig | None = options.pop("config", None)
        folder = _folder(name, {key: options.pop(key) for key in _HUB if key in options})
        own = {key: options.pop(key) for key in _OURS if key in options}
        dtype = _dtype(options.pop("dtype", options.pop("torch_dtype", None)))
        device = _device(options.pop("device_map", None))
        attention = options.pop("attn_implementation", None) or getattr(given, "_attn_implementation_internal", None)
        unknown = sorted(key for key, value in options.items() if key not in _HARMLESS and value is not None)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: expected none of these for an artifact of Counterweight")
        model = load_model(folder.as_uri(), dtype=dtype, device=device, **own)
        if attention is not None:
            model.set_attn_implementation(attention)
        return model


def _folder(name: str | os.PathLike[str], hub: Mapping[str, Any]) -> Path:
    path = Path(name)
    return path.resolve() if path.is_dir() else Path(snapshot_download(str(name), **hub))


def _dtype(asked: object) -> torch.dtype | None:
    """None for the artifact's own, which `auto` means."""
    if asked in (None, "auto"):
        return None
    found = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: {asked!r}: expected auto or a floating-point dtype")
    return found


def _device(asked: object) -> str:
    """The one device that a device_map names; the CPU for none, as transformers has it."""
    if isinstance(asked, Mapping) and list(asked) == [""]:
        asked = asked[""]
    if asked is None:
        return "cpu"
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(asked, int):
        return f"cuda:{asked}"
    if isinstance(asked, str | torch.device) and str(asked).partition(":")[0] in ("cpu", "cuda"):
        return str(asked)
    raise ValueError(f"device_map: {asked!r}: expected auto or one device: a model of ours runs on one")
