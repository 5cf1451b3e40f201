"""llm-compressor's own W4A16 GPTQ, run in its own environment by `benchmarks/speed.py`.

    python llmcompressor_gptq.py MODEL TEXT OUTPUT SEQUENCES LENGTH

Prints one JSON line: seconds of the quantize call, and of quantizing and saving.
"""

from __future__ import annotations

import json
import sys
import time

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_path: str, text: str, output: str, sequences: int, length: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with open(text) as file:
        ids = tokenizer(file.read())["input_ids"]
    windows = [ids[start : start + length] for start in range(0, sequences * length, length)]
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * length] * sequences})
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        max_seq_length=length,
        num_calibration_samples=sequences,
        batch_size=8,
        shuffle_calibration_samples=False,
    )
    quantized = time.perf_counter() - started
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
    print(json.dumps({"quantize": quantized, "quantize_and_save": time.perf_counter() - started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
