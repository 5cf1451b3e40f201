"""Artifacts of Counterweight as a quantization method of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from counterweight.pipeline.serving.artifact import ServedArtifact
from counterweight.pipeline.serving.vllm.experts import CounterweightExperts
from counterweight.pipeline.serving.vllm.linear import CounterweightLinear
from counterweight.pipeline.serving.vllm.model_types import check_served
from counterweight.workers.interchange.compressed_tensors import QUANT_METHOD
from counterweight.workers.ledger import LEDGER

BESIDE = ["*.json", "compensation/*", "residual/*"]
"""Files of a repository of the hub that vLLM's own loader does not fetch."""

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What vLLM merges, where a model does not say so before it makes its layers (Qwen3-MoE's dense blocks)."""


class CounterweightConfig(QuantizationConfig):  # type: ignore[misc]
    """Which of vLLM's layers run on which of the artifact's linears. It is pickled into vLLM's processes."""

    def __init__(self) -> None:
        super().__init__()
        self.artifact: ServedArtifact | None = None

    @classmethod
    def register(cls) -> None:
        """Makes the method known to vLLM; once or more often."""
        register_quantization_config(QUANT_METHOD)(cls)

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Kernels are compiled for sm_80 and newer."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CounterweightConfig:
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: PreTrainedConfig | None = None
    ) -> str | None:
        """Ours by name, or a compressed-tensors checkpoint that has our ledger beside it: vLLM's own loader would leave its
        branch and its residual store out. With `--quantization compressed-tensors` it is left to that loader all the same."""
        method = hf_quant_cfg.get("quant_method")
        if method == QUANT_METHOD:
            return QUANT_METHOD
        name = getattr(hf_config, "_name_or_path", "")
        if method != "compressed-tensors" or user_quant not in (None, QUANT_METHOD) or not name:
            return None
        ledger = cached_file(
            name,
            LEDGER,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if ledger is None else QUANT_METHOD

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """The only hook that is told where the model lies."""
        if hf_config is not None:
            check_served(hf_config.model_type)
        folder = Path(model_name)
        if not folder.is_dir():
            folder = Path(snapshot_download(model_name, revision=revision, allow_patterns=BESIDE))
        self.artifact = ServedArtifact.open(folder)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if self.artifact is None:
            raise ValueError("quantization: counterweight: expected an artifact that was made by Counterweight")
        formats = self.artifact.formats
        if isinstance(layer, RoutedExperts):
            place = prefix.removesuffix(".routed_experts")
            known = any(name.startswith(f"{place}.") for name in formats)
            return CounterweightExperts(self.artifact, layer.moe_config, place) if known else None
        if not isinstance(layer, LinearBase):
            return None
        modules = self._modules(prefix)
        if not any(module in formats for module in modules):
            return UnquantizedLinearMethod()
        return CounterweightLinear(self.artifact, modules)

    def _modules(self, prefix: str) -> list[str]:
        """The artifact's linears that one of vLLM's layers consists of: q, k, v of one that it merges, or itself."""
        assert self.artifact is not None
        place, _, name = prefix.rpartition(".")
        merged = {**MERGED, **self.packed_modules_mapping}
        if prefix in self.artifact.formats or name not in merged:
            return [prefix]
        return [f"{place}.{part}" for part in merged[name]]
