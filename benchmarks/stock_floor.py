"""What no GPTQ of a model can do without, none of it our code: one forward pass through its blocks, and x^T x of every distinct
input of a linear. Run by `benchmarks/speed.py`.

    python benchmarks/stock_floor.py MODEL SEQUENCES LENGTH

transformers in the checkpoint's dtype, 32 sequences a batch; products in float32, of the symmetric ones only strips of the
lower triangle. All threads of the machine. Prints one JSON line: seconds of either, the least of three tries.
"""

from __future__ import annotations

import json
import sys

import torch
from gram import best, strips
from transformers import AutoModelForCausalLM

BATCH = 32
STRIP = 128  # columns; see benchmarks/gram.py
TRIES = 3


def main(model_path: str, sequences: int, length: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").eval()
    config = model.config
    ids = torch.randint(config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
    # q, k and v read one input, so do gate and up; o and down have their own.
    attended = config.num_attention_heads * config.head_dim
    widths = [config.hidden_size, attended, config.hidden_size, config.intermediate_size]
    inputs = [torch.randn(BATCH * length, width) for width in widths]

    def forward() -> None:
        for batch in ids.split(BATCH):
            model.model(batch, use_cache=False)

    def products() -> None:
        for _ in range(config.num_hidden_layers * sequences // BATCH):
            for x in inputs:
                strips(x, STRIP)

    with torch.inference_mode():
        milliseconds = {"forward": best(forward, TRIES), "products": best(products, TRIES)}
    print(json.dumps({name: value / 1e3 for name, value in milliseconds.items()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
