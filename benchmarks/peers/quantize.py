"""One job of a peer, run in its own environment by `benchmarks/peers.py`.

    python quantize.py TOOL JOB.json

JOB.json: model, output: folders; windows: token ids; bits, group_size (null: one scale for each row), activations (bits of
inputs, null: they stay), rotated. Prints one JSON line: seconds of quantizing and saving, imports and loading left out.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

Job = dict[str, Any]

BATCH = 8


def llmcompressor(job: Job) -> float:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    weights = {"num_bits": job["bits"], "type": "int", "symmetric": True}
    if job["group_size"] is None:
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": job["group_size"]}
    inputs = None
    if job["activations"] is not None:
        asked = {"num_bits": job["activations"], "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        inputs = QuantizationArgs(**asked)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=inputs)
    recipe = [GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]
    if job["rotated"]:
        recipe.insert(0, SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"))
    windows = job["windows"]
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        batch_size=BATCH,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["output"], save_compressed=True)
    return time.perf_counter() - started


def gptqmodel(job: Job) -> float:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    per_row = job["group_size"] is None
    # Its default, which asks for groups.
    aware = {"act_group_aware": False} if per_row else {}
    config = QuantizeConfig(bits=job["bits"], group_size=-1 if per_row else job["group_size"], **aware)
    model = GPTQModel.load(job["model"], config, dtype=torch.float32)
    data = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in job["windows"]]
    started = time.perf_counter()
    model.quantize(data, batch_size=BATCH)
    model.save(job["output"])
    return time.perf_counter() - started


def autoround(job: Job) -> float:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    windows = torch.tensor(job["windows"])
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        bits=job["bits"],
        group_size=-1 if job["group_size"] is None else job["group_size"],
        sym=True,
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=BATCH,
        dataset=[{"input_ids": batch} for batch in windows.split(BATCH)],
    )
    started = time.perf_counter()
    rounding.quantize_and_save(job["output"], format="llm_compressor" if job["activations"] else "auto_round")
    return time.perf_counter() - started


TOOLS = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "autoround": autoround}


def main() -> None:
    tool, path = sys.argv[1:]
    with open(path) as file:
        job = json.load(file)
    print(json.dumps({"seconds": TOOLS[tool](job)}))


if __name__ == "__main__":
    main()
