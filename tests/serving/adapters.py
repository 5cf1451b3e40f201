"""An artifact in stock vLLM, without the plug-in, its `compensation/` as an adapter of vLLM's own LoRA route:
`python -m tests.serving.adapters ARTIFACT OUT.json`.

vLLM's LoRA layers on a CPU fail where log-probabilities of prompts are asked for (0.32), so only new tokens are looked at.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.serving.cases import ENERGY, LLAMA, W4, Served
from tests.serving.engine import ENVIRONMENT, NEW_TOKENS, PROMPTS, stand_in

RANKS = (8, 16, 32, 64, 128, 256)
"""That vLLM makes room for."""

ADAPTED: Mapping[str, Served] = {
    "W4A16 + SVD, a rank for each module": Served(LLAMA, {"weights": W4, "compensation": ENERGY}),
}
"""Cases beside those of `cases` that stock vLLM reads the codes of."""


def with_adapter(artifact: Path) -> list[dict[str, list[int] | list[float]]]:
    """Of each prompt the greedy tokens and their log-probabilities, with the adapter."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    largest = json.loads((artifact / "compensation" / "adapter_config.json").read_text())["r"]
    llm = LLM(
        model=str(artifact),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        enable_lora=True,
        max_lora_rank=min(rank for rank in RANKS if rank >= largest),
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0),
        use_tqdm=False,
        lora_request=LoRARequest("compensation", 1, str(artifact / "compensation")),
    )
    found = [output.outputs[0] for output in outputs]
    return [
        {
            "tokens": list(one.token_ids),
            "new": [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)],
        }
        for one in found
    ]


if __name__ == "__main__":
    os.environ.update({**ENVIRONMENT, **os.environ, "VLLM_PLUGINS": "none"})
    stand_in()
    Path(sys.argv[2]).write_text(json.dumps(with_adapter(Path(sys.argv[1]))))
