"""Generation on this machine: an artifact on our kernels against the model it was made from in transformers, interleaved.

    python benchmarks/generation.py --artifact URI [--tokens 64] [--prompt 32] [--repeats 5] [--record]

Both run in bfloat16, batch 1, greedily, for the same number of tokens; on a GPU when there is one. The first run of each warms
up and is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import machine, record, table, versions
from transformers import AutoModelForCausalLM, PreTrainedModel

from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.artifact.load import load_model
from counterweight.workers.storage.names import file_root


def seconds(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> float:
    """Of generating `tokens` tokens after the prompt."""
    started = time.perf_counter()
    with torch.no_grad():
        found = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    if found.is_cuda:
        torch.cuda.synchronize()
    assert found.shape[1] == prompt.shape[1] + tokens
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, document = open_artifact(arguments.artifact)
    original = AutoModelForCausalLM.from_pretrained(file_root(document.base_model.uri), dtype=torch.bfloat16).to(device)
    ways: dict[str, Callable[[], PreTrainedModel]] = {
        "original, transformers": lambda: original,
        "quantized, without compensation": lambda: load_model(
            arguments.artifact, device=device, dtype=torch.bfloat16, compensated=False
        ),
        "compensated": lambda: load_model(arguments.artifact, device=device, dtype=torch.bfloat16),
    }
    models = {name: load() for name, load in ways.items()}
    prompt = torch.randint(3, original.config.vocab_size, (1, arguments.prompt), device=device)
    found: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(arguments.repeats + 1):
        for name, model in models.items():
            taken = seconds(model, prompt, arguments.tokens)
            if repeat:
                found[name].append(taken)
    base = statistics.median(found["original, transformers"])
    rows = [
        [
            name,
            f"{1e3 * statistics.median(runs) / arguments.tokens:.2f}",
            f"{statistics.median(runs) / base:.2f}",
            f"{min(runs) / min(found['original, transformers']):.2f}",
        ]
        for name, runs in found.items()
    ]
    body = table(["", "ms per token, median", "times the original", "of the fastest runs"], rows)
    bits = document.bits_per_weight.total
    body += f"\n\n`{document.name}`, {bits:.2f} bits per weight, {arguments.tokens} tokens on {device}."
    print(body)
    if arguments.record:
        about = f"{machine()}. {versions('torch', 'transformers')}; {torch.get_num_threads()} threads."
        print(record(f"generation-{document.name}", "Generation", body, about))


if __name__ == "__main__":
    main()
