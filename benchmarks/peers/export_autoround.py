"""AutoRound's checkpoints: 4 bits in groups, in the format that it calls FORMAT (`auto_round`, `auto_gptq`, `auto_awq`, ...).

python export_autoround.py MODEL TEXT OUTPUT FORMAT GROUP SEQUENCES LENGTH
"""

from __future__ import annotations

import sys

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM
from windows import tokenizer_and_windows

ITERATIONS = 20
"""A tenth of its default: the format is what is looked at."""


def main(path: str, text: str, output: str, form: str, *numbers: str) -> None:
    group, sequences, length = map(int, numbers)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    tokenizer, windows = tokenizer_and_windows(path, text, sequences, length)
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length)} for ids in windows]
    tuned = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=group,
        iters=ITERATIONS,
        dataset=batches,
        nsamples=sequences,
        seqlen=length,
        device_map="cpu",
    )
    tuned.quantize_and_save(output, format=form)


if __name__ == "__main__":
    main(*sys.argv[1:])
