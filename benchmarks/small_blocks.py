"""CPU seconds of one more block of a model whose blocks are small, and what of them is neither forward pass nor solve.

    python benchmarks/small_blocks.py [--blocks 20 60] [--record]

Two jobs in this process, on one thread and without validation, which differ in their number of blocks: W4 GPTQ of a random
Llama of hidden 32 on 16 x 32 tokens. The difference of their CPU seconds by that of their blocks, the least of some repeats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import ROOT, machine, record, table, versions

sys.path.insert(0, str(ROOT))

from counterweight.workers import block
from counterweight.workers.models.block_builder import Block
from tests.inprocess import run_job
from tests.models import checkpoint

RECIPE = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq"}}}
CALIBRATION = {"sequences": 16, "sequence_length": 32}
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Timed:
    """CPU seconds that functions took, while they are timed."""

    def __init__(self) -> None:
        self.seconds = {"forward": 0.0, "solve": 0.0}

    def wrap(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[what] += time.process_time() - started

        return timed


def seconds(model: Path) -> dict[str, float]:
    """CPU seconds of a job: all, and of these forward passes and solves."""
    timed = Timed()
    with (
        tempfile.TemporaryDirectory() as output,
        patch.object(Block, "run", timed.wrap("forward", Block.run)),
        patch.object(block, "_solve", timed.wrap("solve", vars(block)["_solve"])),
    ):
        started = time.process_time()
        run_job(model, Path(output), RECIPE, calibration=CALIBRATION)
        return {"all": time.process_time() - started, **timed.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs=2, type=int, default=(20, 60), metavar=("FEW", "MANY"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers')}"
    few, many = arguments.blocks
    runs: dict[int, list[dict[str, float]]] = {few: [], many: []}
    with tempfile.TemporaryDirectory() as place:
        models = {blocks: Path(place) / str(blocks) for blocks in runs}
        for blocks, model in models.items():
            checkpoint("llama", model, num_hidden_layers=blocks, **SIZES)
        seconds(models[few])  # what is made once in a process
        for _ in range(arguments.repeats):
            for blocks, model in models.items():
                runs[blocks].append(seconds(model))
    least = {blocks: {part: min(run[part] for run in found) for part in found[0]} for blocks, found in runs.items()}
    each = {part: (least[many][part] - least[few][part]) / (many - few) for part in least[few]}
    rest = each["all"] - each["forward"] - each["solve"]
    rows = [[f"{1000 * part:.1f}" for part in (each["all"], each["forward"], each["solve"], rest)]]
    body = table(["all, CPU ms", "forward pass", "solving seven linears", "the rest"], rows)
    print(body)
    if arguments.record:
        print(record("small-blocks", "One more small block", body, about))


if __name__ == "__main__":
    main()
