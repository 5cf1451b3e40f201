"""Logits of a few ids under a checkpoint, in the environment of the tool that wrote it.

    python logits.py CHECKPOINT OUTPUT

Writes input_ids [1, 12] and logits [1, 12, vocabulary] float32, as safetensors.
"""

from __future__ import annotations

import os
import sys
from unittest.mock import patch

import torch
from loading import loaded
from safetensors.torch import save_file


def main(path: str, output: str) -> None:
    model = loaded(path)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = model(ids).logits.float()
    metadata = {"dtype": str(next(model.parameters()).dtype)}
    save_file({"input_ids": ids, "logits": logits.contiguous()}, output, metadata=metadata)


if __name__ == "__main__":
    with patch.object(os, "cpu_count", lambda: 4):  # for GPTQModel, see export_gptqmodel.py
        main(*sys.argv[1:])
