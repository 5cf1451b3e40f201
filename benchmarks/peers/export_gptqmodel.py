"""GPTQModel's checkpoints: 4 bits in groups, GPTQ, in its own format.

python export_gptqmodel.py MODEL TEXT OUTPUT FORMAT GROUP SEQUENCES LENGTH
"""

from __future__ import annotations

import os
import sys
from unittest.mock import patch

from gptqmodel import GPTQModel, QuantizeConfig
from windows import tokenizer_and_windows


def main(path: str, text: str, output: str, form: str, *numbers: str) -> None:
    group, sequences, length = map(int, numbers)
    _, windows = tokenizer_and_windows(path, text, sequences, length)
    model = GPTQModel.load(path, QuantizeConfig(bits=4, group_size=group, format=form), device="cpu")
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows], batch_size=1)
    model.save(output)


if __name__ == "__main__":
    # With 2 cores it refuses to start: a pool of 2 workers below a pool of 1 (7.6.0).
    with patch.object(os, "cpu_count", lambda: 4):
        main(*sys.argv[1:])
