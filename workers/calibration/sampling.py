"""Calibration text that a model writes itself (data-free calibration: Liu et al., "LLM-QAT", 2023, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from counterweight.workers.errors import RequestError
from counterweight.workers.quantization.inputs import check_activations

BATCH = 16
"""Sequences that are drawn together; part of the result, because a batch's random numbers are."""


def sample(model: PreTrainedModel, sequences: int, length: int, *, temperature: float, seed: int) -> Tensor:
    """Windows of `length` tokens [sequences, length] int64 that a causal model draws one after the other.

    Each begins with the config's bos_token_id, or where it has none with any token of the vocabulary. Nothing is cut off from
    the distribution but its shape by `temperature`, and an end-of-sequence token ends nothing. The same arguments give the
    same tokens on the same kind of device; torch's global generators are left as they were. RequestError for a token that the
    model does not have, and for logits that are not finite.
    """
    device = next(model.parameters()).device
    beginning = getattr(model.config, "bos_token_id", None)
    if isinstance(beginning, int) and not 0 <= beginning < model.config.vocab_size:
        raise RequestError(f"config.json: bos_token_id: {beginning}: expected a token below {model.config.vocab_size}")
    with torch.no_grad():
        tried = torch.tensor([[beginning if isinstance(beginning, int) else 0]], device=device)
        check_activations("the model's prediction behind its first token", model(tried, use_cache=False).logits)
    options = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=length - 1, pad_token_id=0
    )
    drawn: list[Tensor] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for start in range(0, sequences, BATCH):
            torch.manual_seed(seed + start)
            rows = min(BATCH, sequences - start)
            if isinstance(beginning, int):
                first = torch.full((rows, 1), beginning)
            else:
                first = torch.randint(model.config.vocab_size, (rows, 1))
            first = first.to(device)
            drawn.append(model.generate(first, attention_mask=torch.ones_like(first), generation_config=options).cpu())
    return torch.cat(drawn)


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """The most probable token after `prompts` [prompts, length] int64, again and again: [prompts, new_tokens] int64, on the
    CPU. An end-of-sequence token ends nothing."""
    options = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    found: Tensor = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=options)
    return found[:, prompts.shape[1] :].cpu()
