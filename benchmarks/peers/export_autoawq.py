"""AutoAWQ's checkpoints: 4 bits in groups, `gemm`.

python export_autoawq.py MODEL TEXT OUTPUT GROUP SEQUENCES LENGTH
"""

from __future__ import annotations

import sys

from awq import AutoAWQForCausalLM
from windows import tokenizer_and_windows


def main(path: str, text: str, output: str, *numbers: str) -> None:
    group, sequences, length = map(int, numbers)
    tokenizer, windows = tokenizer_and_windows(path, text, sequences, length)
    model = AutoAWQForCausalLM.from_pretrained(path, device_map="cpu")
    settings = {"zero_point": True, "q_group_size": group, "w_bit": 4, "version": "GEMM"}
    model.quantize(
        tokenizer, quant_config=settings, calib_data=windows, max_calib_samples=sequences, max_calib_seq_len=length
    )
    model.save_quantized(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
