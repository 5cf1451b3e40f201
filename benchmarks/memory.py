"""Peak memory of a worker for models of one width and several depths: it must not grow with depth.

    python benchmarks/memory.py [--hidden 1024] [--layers 4 16] [--record]

Makes random Llama models (quality is not looked at), runs the whole job on an embedded Ray, one process per depth, and
reads the high-water mark of every block task from the report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, record, table, versions

MANIFEST = """
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {{name: memory-{layers}}}
spec:
  model: {{uri: model}}
  calibration: {{source: {{kind: tokens, uri: tokens.safetensors}}, sequences: 32, sequence_length: 256}}
  recipe: {{weights: {{bits: 4, group_size: 128}}}}
  resources: {{workers: 1}}
  output: {{uri: output}}
"""


def make_model(directory: Path, hidden: int, layers: int) -> None:
    """A random bf16 Llama and 32 windows of random tokens."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=4096,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "model")
    save_file({"input_ids": torch.randint(0, 4096, (32, 256))}, directory / "tokens.safetensors")


def run(directory: Path, layers: int) -> list[float]:
    """Peak MiB of each block task."""
    manifest = directory / "job.yaml"
    manifest.write_text(MANIFEST.format(layers=layers))
    command = [sys.executable, "-m", "counterweight.pipeline.cli", "run", str(manifest)]
    uri = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    report = json.loads((Path(uri.removeprefix("file://")) / "report" / "report.json").read_text())
    return [task["timing"]["host_peak_bytes"] / 2**20 for task in report["tasks"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers', 'ray')}."
    rows: list[list[str]] = []
    peaks: list[float] = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as scratch:
            make_model(Path(scratch), arguments.hidden, layers)
            size = sum(f.stat().st_size for f in (Path(scratch) / "model").glob("*.safetensors")) / 2**20
            found = run(Path(scratch), layers)
        peaks.append(max(found))
        rows.append([str(layers), f"{size:.0f}", f"{found[0]:.0f}", f"{found[-1]:.0f}", f"{max(found):.0f}"])
    body = table(["layers", "model, MiB", "first block's peak, MiB", "last block's", "highest"], rows)
    body += f"\n\nHighest peak, deepest over shallowest: {peaks[-1] / peaks[0]:.3f}."
    print(body)
    if arguments.record:
        print(record("memory", "Peak memory of a worker by depth", body, about))


if __name__ == "__main__":
    main()
