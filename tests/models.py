"""Tiny models of every family, random but not trivial, and the checkpoints and texts that tests make of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging as transformers_logging

from counterweight.workers.models.families import family_of

VOCABULARY = 128

EMBEDDING, NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""Outside the blocks of a text model."""

OFFSET_NORMS = ("gemma", "qwen3_next", "qwen3_5")
"""Families whose norms scale by 1 + weight."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_MLA_ROPE = {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.5}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.5, 4.0, 7.0],
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    """A model: its family, and what of its config is not `BASE`. around: of a multimodal model, the config around that."""

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    around: Mapping[str, Any] = field(default_factory=dict)


BASE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
SHARED = {**MOE, "shared_expert_intermediate_size": 64}

DEEPSEEK = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_nextn_predict_layers": 1,
}
"""Every head has 12 rows of keys and 16 of values; experts are chosen in two of four groups of two."""

GLM = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 16,
    "num_nextn_predict_layers": 1,
}
"""Half of the channels of a head have a rotary embedding: `partial_rotary_factor` is 0.5 by default."""

DELTA_NET = {
    "head_dim": 16,
    "full_attention_interval": 2,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}

SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}

LLAMA4 = {
    **SPARSE,
    "head_dim": 16,
    "intermediate_size_mlp": 128,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 8,
    "floor_scale": 4,
}
"""A dense block of attention in chunks, then a sparse one without rotary embedding, where queries grow every four tokens."""

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
QWEN_AROUND = {
    "vision_config": QWEN_VISION,
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}

CASES: Mapping[str, Case] = {
    "llama": Case("llama"),
    "llama-rope": Case("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": Case("llama", {"rope_parameters": YARN_ROPE}),
    "llama-tied-biased": Case("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": Case("mistral", {"sliding_window": 8, "head_dim": 32}),
    "qwen2": Case("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "phi3": Case("phi3", {"sliding_window": 20}),
    "phi3-longrope": Case("phi3", {"rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 0.5}}),
    "gemma2": Case(
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    # Every sixth layer looks at everything, with a rotary embedding of its own.
    "gemma3_text": Case(
        "gemma3_text", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 16}
    ),
    "mixtral": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    # Every second layer has a window; yarn is what the family has where a config names no rotary embedding.
    "gpt_oss": Case(
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8, "swiglu_limit": 0.75},
    ),
    "deepseek_v3": Case("deepseek_v3", DEEPSEEK),
    "deepseek_v3-full-queries": Case(
        "deepseek_v3", {**DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": 0, "rope_parameters": YARN_MLA_ROPE}
    ),
    # V2 scores a group by its best expert, and its router has no bias.
    "deepseek_v2": Case("deepseek_v2", {**DEEPSEEK, "topk_method": "group_limited_greedy", "num_hidden_layers": 2}),
    "glm4_moe": Case("glm4_moe", {**GLM, "use_qk_norm": True}),
    "kimi_k2": Case("kimi_k2", {**DEEPSEEK, "num_hidden_layers": 2, "n_group": 1, "topk_group": 1}),
    "llama4_text": Case("llama4_text", LLAMA4),
    "minimax_m2": Case("minimax_m2", {**SPARSE, "head_dim": 16, "rotary_dim": 8}),
    "olmoe": Case("olmoe", SPARSE),
    "qwen2_moe": Case("qwen2_moe", {**SHARED, "mlp_only_layers": [1]}),
    # A block of Gated DeltaNet, then one of attention.
    "qwen3_next": Case("qwen3_next", {**SHARED, **DELTA_NET}),
    "qwen3_5_text": Case("qwen3_5_text", {**DELTA_NET, "rope_parameters": MROPE}),
    "qwen3_5_moe_text": Case("qwen3_5_moe_text", {**SHARED, **DELTA_NET, "rope_parameters": MROPE}),
    "qwen3_moe": Case("qwen3_moe", {**MOE, "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "gemma3": Case(
        "gemma3",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
        {"vision_config": VISION, "mm_tokens_per_image": 1, "image_token_index": 120},
    ),
    "mistral3": Case(
        "mistral3",
        {"head_dim": 16, "sliding_window": None},
        {
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 120,
            "tie_word_embeddings": False,
        },
    ),
    "llama4": Case(
        "llama4",
        LLAMA4,
        {
            "vision_config": {
                **VISION,
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "image_token_index": 120,
        },
    ),
    "qwen3_5": Case("qwen3_5", {**DELTA_NET, "rope_parameters": MROPE}, QWEN_AROUND),
    "qwen3_5_moe": Case("qwen3_5_moe", {**SHARED, **DELTA_NET, "rope_parameters": MROPE}, QWEN_AROUND),
}


def config_of(case: str | Case, **changes: Any) -> dict[str, Any]:
    """A config.json. changes: of the text model."""
    chosen = CASES[case] if isinstance(case, str) else case
    wrapper = family_of(chosen.family).wrapper
    config = {**BASE, **chosen.config, **changes}
    if wrapper is None:
        return {**config, "model_type": chosen.family}
    text = {**config, "model_type": wrapper.text_types[0]}
    return {**chosen.around, "text_config": text, "model_type": chosen.family}


def build(case: str | Case, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model in float32. Norms and biases are random too: a model whose norms are ones hides a lost norm."""
    chosen = CASES[case] if isinstance(case, str) else case
    family = family_of(chosen.family)
    described = config_of(chosen, **changes)
    del described["model_type"]
    config = CONFIG_MAPPING[family.known_as or chosen.family](**described)
    attention = {"attn_implementation": "eager"} if chosen.family in ("gemma2", "gpt_oss") else {}
    whole = AutoModelForCausalLM if family.wrapper is None else AutoModelForImageTextToText
    model = whole.from_config(config, **attention).float().eval()
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if chosen.family.startswith(OFFSET_NORMS) else 1.0
    for name, parameter in model.named_parameters():
        mean = 0.0 if "norm" not in name else 1.0 if "linear_attn" in name else centre
        values = torch.randn(parameter.shape, generator=generator) * 0.2 + mean
        parameter.data.copy_(values)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return model


def save(
    model: PreTrainedModel, directory: Path, dtype: torch.dtype = torch.float32, *, shard_size: str = "1GB"
) -> Path:
    """A checkpoint as transformers writes it, with a tokenizer. Rounds the model's own weights to `dtype` on the way, so
    that it stays the checkpoint's equal."""
    transformers_logging.disable_progress_bar()
    _cast(model, dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    _cast(model, torch.float32)
    write_tokenizer(directory)
    return directory


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for parameter in model.parameters():  # not the buffers: rotary frequencies are never stored, and stay float32
        parameter.data = parameter.data.to(dtype)


def save_fused(model: PreTrainedModel, directory: Path) -> Path:
    """A checkpoint of a mixture of experts under transformers' own module names: experts fused, two tensors a block."""
    save(model, directory)
    (directory / "model.safetensors").unlink()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.endswith(".experts.gate_up_proj") for name in tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def save_block_scaled(model: PreTrainedModel, directory: Path, *, block: tuple[int, int] = (24, 16)) -> Path:
    """A bfloat16 checkpoint whose blocks' linears are F8_E4M3 with a scale per block, as DeepSeek-V3 is published. Gives the
    model's own weights the decoded values, so that it stays the checkpoint's equal."""
    save(model, directory, torch.bfloat16)
    tensors = read_tensors(directory)
    linears = [name for name in tensors if name.endswith(("_proj.weight", "with_mqa.weight"))]
    for name in linears:
        codes, scale = block_scaled(tensors[name].float(), block)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    decoded = {name: decoded_by_hand(tensors[name], tensors[f"{name}_scale_inv"], block) for name in linears}
    save(model, directory / "decoded", torch.bfloat16)
    save_file(
        {**{name: tensor for name, tensor in tensors.items() if "_scale_inv" not in name}, **decoded},
        directory / "decoded" / "model.safetensors",
        metadata={"format": "pt"},
    )
    filled = AutoModelForCausalLM.from_pretrained(directory / "decoded", dtype=torch.float32)
    model.load_state_dict(filled.state_dict())
    shutil.rmtree(directory / "decoded")
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    (directory / "config.json").write_text(json.dumps({**read_config(directory), "quantization_config": scheme}))
    return directory


def save_mxfp4(model: PreTrainedModel, directory: Path) -> Path:
    """A bfloat16 checkpoint of gpt-oss with random experts in MXFP4, as it is published. Gives the model's own weights the
    decoded values, as transformers decodes them, so that it stays the checkpoint's equal."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    save(model, directory, torch.bfloat16)
    tensors, draw = read_tensors(directory), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        codes = torch.randint(256, (experts, out, width // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, out, width // 32), generator=draw, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        model.get_parameter(name).data.copy_(convert_moe_packed_tensors(codes, scales))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    scheme = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (directory / "config.json").write_text(json.dumps({**read_config(directory), "quantization_config": scheme}))
    return directory


def block_scaled(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes F8_E4M3 [out, in] of a weight and their scales, float32, one per block."""
    (rows, columns), (out, width) = block, weight.shape
    scale = torch.empty(-(-out // rows), -(-width // columns))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def decoded_by_hand(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight, element by element: sign, exponent and mantissa of each code, times the scale of its block."""
    bytes_, scales = codes.view(torch.uint8).tolist(), scale.tolist()
    rows = []
    for i, row in enumerate(bytes_):
        values = []
        for j, byte in enumerate(row):
            exponent, mantissa = byte >> 3 & 15, byte & 7
            magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            values.append((-magnitude if byte >> 7 else magnitude) * scales[i // block[0]][j // block[1]])
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64).float().bfloat16()


def checkpoint(
    case: str | Case, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Builds and saves; returns the model in float32, with the values that the checkpoint holds."""
    model = build(case, **changes)
    save(model, directory, dtype)
    family = CASES[case].family if isinstance(case, str) else case.family
    if family_of(family).known_as is not None:
        (directory / "config.json").write_text(json.dumps({**read_config(directory), "model_type": family}))
    return model


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, parsed."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, as stored."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of words `w0`, `w1`, ...: word i has the id i."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_text(path: Path, tokens: int, *, seed: int = 0) -> Path:
    """A text of `tokens` random words of `write_tokenizer`."""
    draw = random.Random(seed)
    path.write_text(" ".join(f"w{draw.randrange(VOCABULARY)}" for _ in range(tokens)))
    return path


def token_ids(sequences: int, length: int, *, seed: int = 0) -> Tensor:
    """Random token ids [sequences, length] int64."""
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
