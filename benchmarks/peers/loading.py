"""A checkpoint as the libraries of the environment that wrote it load it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def loaded(path: str) -> PreTrainedModel:
    """Through transformers, in float32 where the tool allows it; through the tool itself where transformers needs more."""
    method = json.loads((Path(path) / "config.json").read_text())["quantization_config"]["quant_method"]
    own = {"gptq": _gptqmodel, "awq": _autoawq}.get(method)
    model: PreTrainedModel | None = None if own is None else own(path)
    return (model or AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)).eval()


def _gptqmodel(path: str) -> PreTrainedModel | None:
    """None where GPTQModel is not installed. It computes in half precision alone."""
    try:
        from gptqmodel import BACKEND, GPTQModel
    except ImportError:
        return None
    model: PreTrainedModel = GPTQModel.load(path, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    return model


def _autoawq(path: str) -> PreTrainedModel | None:
    """None where AutoAWQ is not installed. Its layers want a GPU or ipex: the plain model, of weights that it unpacks."""
    try:
        from awq.utils.packing_utils import dequantize_gemm
    except ImportError:
        return None
    tensors = load_file(Path(path) / "model.safetensors")
    config = AutoConfig.from_pretrained(path)
    settings = config.quantization_config
    for layer in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = [tensors.pop(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales")]
        weight = dequantize_gemm(*parts, settings["bits"], settings["group_size"])
        tensors[f"{layer}.weight"] = weight.T.contiguous()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model
