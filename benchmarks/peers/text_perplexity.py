"""Perplexity of a checkpoint as the environment of the tool that wrote it computes it.

    python text_perplexity.py MODEL TOKENIZER TEXT WINDOWS LENGTH

Prints one JSON line: mean negative log-likelihood over windows, exponentiated.
"""

from __future__ import annotations

import json
import math
import os
import sys
from unittest.mock import patch

import torch
from loading import loaded
from windows import tokenizer_and_windows


def main(path: str, tokenizer: str, text: str, *numbers: str) -> None:
    sequences, length = map(int, numbers)
    _, windows = tokenizer_and_windows(tokenizer, text, sequences, length)
    model = loaded(path)
    losses = []
    with torch.no_grad():
        for ids in windows:
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(json.dumps({"perplexity": math.exp(sum(losses) / len(losses)), "dtype": dtype}))


if __name__ == "__main__":
    with patch.object(os, "cpu_count", lambda: 4):  # for GPTQModel, see export_gptqmodel.py
        main(*sys.argv[1:])
