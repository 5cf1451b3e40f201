"""llm-compressor's checkpoints: `W4A16` in groups of GROUP, or `W8A8`, GPTQ, in compressed-tensors.

python export_llmcompressor.py MODEL TEXT OUTPUT SCHEME GROUP SEQUENCES LENGTH
"""

from __future__ import annotations

import sys

from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM
from windows import tokenizer_and_windows


def main(path: str, text: str, output: str, scheme: str, *numbers: str) -> None:
    group, sequences, length = map(int, numbers)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    tokenizer, windows = tokenizer_and_windows(path, text, sequences, length)
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * length] * sequences})
    preset = preset_name_to_scheme(scheme, ["Linear"])
    if preset.weights.group_size is not None:
        preset.weights.group_size = group
    recipe = GPTQModifier(config_groups={"group_0": preset}, ignore=["lm_head"])
    oneshot(model=model, dataset=dataset, recipe=recipe, max_seq_length=length, num_calibration_samples=sequences)
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
