"""Artifacts in vLLM and in `load_model`, in one process: log-probabilities of prompts, greedy tokens and theirs.

`python -m tests.serving.engine OPTIONS.json OUT.json` does vLLM's part in a process of its own: {"artifact": folder, "engine":
arguments of `vllm.LLM`, "stand_in": whether a plain product takes the place of a kernel that wants AVX512}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterweight import load_model
from tests.models import VOCABULARY

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM wants to be told to run in one thread of this process."""

PROMPTS = [[(7 * i + 3 * j * i + 11) % VOCABULARY for i in range(1, 1 + n)] for j, n in enumerate((8, 40, 23))]
NEW_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """To one prompt: log-probabilities of its tokens but the first, the greedy tokens behind it, and theirs."""

    prompt: list[float]
    tokens: list[int]
    new: list[float]


def difference(one: list[Answer], other: list[Answer]) -> float:
    """The largest of log-probabilities; of tokens that were made, up to the first that is another."""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        same = next((i for i, (s, t) in enumerate(zip(a.tokens, b.tokens, strict=True)) if s != t), NEW_TOKENS)
        pairs = [*zip(a.prompt, b.prompt, strict=True), *zip(a.new[:same], b.new[:same], strict=True)]
        largest = max(largest, *(abs(x - y) for x, y in pairs))
    return largest


@torch.no_grad()
def ours(artifact: Path, *, noise: float = 0.0, seed: int = 0, **options: Any) -> list[Answer]:
    """What `load_model` answers in float32. noise: relative, on the embeddings: what a machine's rounding may do."""
    model = load_model(artifact.as_uri(), dtype=torch.float32, **options)
    if noise:
        embedding = model.get_input_embeddings().weight
        draw = torch.Generator().manual_seed(seed)
        embedding.data *= 1 + noise * torch.randn(embedding.shape, generator=draw)
    return [_answer(model, prompt) for prompt in PROMPTS]


def _answer(model: Any, prompt: list[int]) -> Answer:
    ids = torch.tensor([prompt])
    output = model(ids, use_cache=True)
    logs = output.logits[0].log_softmax(-1)
    last: Tensor = logs[-1]
    tokens, new = [], []
    for _ in range(NEW_TOKENS):
        tokens.append(int(last.argmax()))
        new.append(float(last.max()))
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        last = output.logits[0, -1].log_softmax(-1)
    return Answer(logs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(), tokens, new)


def vllm(artifact: Path, **options: Any) -> tuple[list[Answer], str | None, int]:
    """What vLLM answers, all prompts in one batch; the quantization method that it chose; bytes of its model's tensors."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4}
    llm = None
    try:
        llm = LLM(model=str(artifact), disable_log_stats=True, **{**defaults, **options})
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
        answers = []
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            before = [found[i].logprob for i, found in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            new = [found[i].logprob for i, found in zip(tokens, output.outputs[0].logprobs, strict=True)]
            answers.append(Answer(before, tokens, new))
        return answers, llm.llm_engine.model_config.quantization, sum(llm.apply_model(_bytes))
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _bytes(model: torch.nn.Module) -> int:
    """Of all tensors but tables of rotary embeddings, which no checkpoint has."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {tensor.data_ptr(): tensor.nbytes for name, tensor in named if "cos_sin_cache" not in name}
    return sum(tensors.values())


def stand_in() -> None:
    """A plain product in the place of vLLM's 4-bit kernel for CPUs, which processors with AVX512 have."""
    from vllm import _custom_ops

    def product(
        input: Tensor, q_weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, **_: object
    ) -> Tensor:
        assert zeros is None
        columns = input.shape[-1]
        words = q_weight.reshape(-1, columns, 2)  # blocks of 16 output channels, 8 codes a word
        codes = torch.stack([words >> 4 * place & 15 for place in range(8)], dim=-1) - 8
        weight = codes.permute(1, 0, 2, 3).reshape(columns, -1) * scales.repeat_interleave(
            columns // len(scales), dim=0
        )
        y = input @ weight.to(input.dtype)
        return y if bias is None else y + bias

    _custom_ops.cpu_gemm_wna16 = product


def main(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answers, or what was raised."""
    if request.get("stand_in"):
        stand_in()
    try:
        answers, method, _ = vllm(Path(request["artifact"]), **request.get("engine", {}))
    except Exception as error:  # noqa: BLE001  whatever vLLM says of an artifact is what is asked for here
        return {"error": f"{type(error).__name__}: {error}"}
    return {"answers": [asdict(answer) for answer in answers], "method": method}


if __name__ == "__main__":
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    requests = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([main(request) for request in requests]))
