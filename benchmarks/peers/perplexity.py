"""Perplexity of an artifact as it is loaded again, in the environment of who made it; run by `benchmarks/peers.py`.

    python perplexity.py LOADER FOLDER WINDOWS.json

LOADER: transformers, gptqmodel (bfloat16, which its kernels ask for) or counterweight. Prints one JSON line.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch


def load(loader: str, folder: str) -> Any:
    if loader == "counterweight":
        import counterweight

        return counterweight.load_model(Path(folder).resolve().as_uri(), dtype=torch.float32)
    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.bfloat16)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    loader, folder, path = sys.argv[1:]
    model = load(loader, folder)
    windows = torch.tensor(json.loads(Path(path).read_text()))
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    print(json.dumps({"perplexity": math.exp(sum(losses) / len(losses))}))


if __name__ == "__main__":
    main()
