"""Output error of single blocks quantized by rounding, GPTQ, LWC, LSI and both, on sequences that none of them saw.

    python benchmarks/tuning.py MODEL TEXT [--set epochs=20 lr_increments=0.01]

Chose the defaults of `workers/recipe/tuning.py`. TEXT (a file) is cut in two: `--sequences` to calibrate on, of which tuning
holds some out itself, and as many from its end to measure on. Each block sees the original model's hidden states.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import machine, table
from torch import Tensor

from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.weights import StoredWeight
from counterweight.pipeline.model_source import open_model
from counterweight.workers.calibration.source import TextSource
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.calibration.tokens import token_set
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ, RTN, Quantizer
from counterweight.workers.methods.scales import MeanSquare
from counterweight.workers.methods.tuning import Tuning
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.tuning import LinearFormat, TuningResult, tune

CPU = torch.device("cpu")
QUANTIZERS: Mapping[str, Quantizer] = {
    "RTN": RTN(),
    "RTN, scales searched": RTN(scale=MeanSquare()),
    "GPTQ": GPTQ(),
}
TUNINGS: Mapping[str, Mapping[str, object]] = {
    "LWC": {"increments": False},
    "LSI": {"clipping": False},
    "LSI + LWC": {},
    "LSI + LWC, block 64": {"block": 64},
    "LSI + LWC + LET": {"transforms": True},
}


@dataclass(frozen=True)
class Problem:
    """A block, and hidden states before and after it: to calibrate on, and to measure on."""

    block: Block
    calibration: tuple[list[Tensor], list[Tensor]]
    unseen: tuple[Tensor, Tensor]

    def error(self, block: Block) -> float:
        """||output - target||^2 / ||target||^2 on the unseen sequences."""
        inputs, targets = self.unseen
        return float((block.run(inputs) - targets).square().sum() / targets.square().sum())


def problems(model: str, text: str, blocks: int, sequences: int, length: int) -> list[Problem]:
    """The first `blocks` blocks of the model with their hidden states."""
    source = open_model(Path(model).resolve().as_uri())
    tokens = token_set(
        TextSource(uri=Path(text).resolve().as_uri()),
        source.tokenizer(),
        length=length,
        sequences=None,
        sampling="consecutive",
        seed=0,
        field="TEXT",
    ).ids
    builder = BlockBuilder(source.checkpoint.config, frozenset(source.checkpoint.names))
    checkpoint = Checkpoint.open(source.store)
    embed = builder.embedding(checkpoint.read(builder.names.embedding), CPU, torch.float32)
    with torch.no_grad():
        seen, unseen = (embed(part.long()) for part in (tokens[:sequences], tokens[-sequences:]))
    found = []
    for index in range(blocks):
        tensors = checkpoint.read_many(source.block_tensors(index))
        parts = source.layout.sources(index, source.checkpoint.names)
        parameters = {name: part.of(tensors[part.source]) for name, part in parts.items()}
        block = builder.block(index, parameters, CPU, torch.float32)
        after_seen, after_unseen = block.run(seen), block.run(unseen)
        found.append(Problem(block, ([seen], [after_seen]), (unseen, after_unseen)))
        seen, unseen = after_seen, after_unseen
    return found


def solved(problem: Problem, quantizer: Quantizer, format: WeightFormat) -> Block:
    """The block, every linear quantized for itself."""
    replica = problem.block.replica()
    weights: dict[str, StoredWeight] = {}

    def take(group: SharedInputGroup, rows: Tensor) -> None:
        statistics = InputStatistics.of(rows)
        for name in group:
            weight = replica.linear(name).weight.detach()
            weights[name] = quantizer.quantize(weight, statistics, format, scale_dtype=torch.bfloat16).weight

    for group in replica.groups:
        replica.linear(group[0]).register_forward_pre_hook(lambda _, x, group=group: take(group, x[0]))
    replica.run(problem.calibration[0][0])
    return installed(problem.block, weights)


def tuned(problem: Problem, format: WeightFormat, options: Tuning) -> tuple[Block, TuningResult]:
    """The block, tuned, with its norms."""
    names = [name for group in problem.block.groups for name in group]
    formats = dict.fromkeys(names, LinearFormat(weights=format, scale_dtype=torch.bfloat16))
    result = tune(problem.block, *problem.calibration, formats, options)
    block = installed(problem.block, result.weights)
    for name, value in result.norms.items():
        norm = block.layer.get_submodule(name.removesuffix(".weight"))
        norm.weight = torch.nn.Parameter(value.float())
    return block, result


def installed(block: Block, weights: Mapping[str, StoredWeight]) -> Block:
    """A copy of the block with these weights."""
    replica = block.replica()
    for name, weight in weights.items():
        replica.replace(name, CompensatedLinear(weight, bias=block.linear(name).bias))
    return replica


def rows(
    problem: Problem, format: WeightFormat, settings: Mapping[str, object], only: Sequence[str]
) -> list[list[str]]:
    """A line per method: its error, and how training went."""
    lines = []
    for name, quantizer in QUANTIZERS.items():
        if not only:
            lines.append([name, f"{problem.error(solved(problem, quantizer, format)):.5f}", "", "", "", ""])
    for name, fields in TUNINGS.items():
        if only and name not in only:
            continue
        started = time.perf_counter()
        block, result = tuned(problem, format, Tuning.model_validate({**settings, **fields}))
        spent = time.perf_counter() - started
        won = [f"{1 - errors[result.epoch] / errors[0]:.0%}" for errors in (result.train, result.held_out)]
        epochs = f"{result.epoch} of {len(result.held_out) - 1}"
        lines.append([name, f"{problem.error(block):.5f}", *won, epochs, f"{spent:.1f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--group", type=int)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="methods to run, by name")
    parser.add_argument("--set", nargs="+", default=[], help="options of the tuning, NAME=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Options are numbers; a whole one must not become a float.
    pairs = (item.split("=", 1) for item in arguments.set)
    settings = {name: float(text) if {".", "e"} & set(text) else int(text) for name, text in pairs}
    print(machine())
    found = problems(arguments.model, arguments.text, arguments.blocks, arguments.sequences, arguments.length)
    for index, problem in enumerate(found):
        for bits in arguments.bits:
            format = WeightFormat(bits=bits, group_size=arguments.group, symmetric=not arguments.asymmetric)
            header = ["method", "error, unseen", "training won", "held out won", "epoch", "seconds"]
            print(f"\nblock {index}, {bits} bits\n")
            print(table(header, rows(problem, format, settings, arguments.only)), flush=True)


if __name__ == "__main__":
    main()
