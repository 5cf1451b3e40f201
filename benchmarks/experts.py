"""Experts that saw few tokens: what to solve them on, by their error on tokens that nothing was solved on.

    python benchmarks/experts.py MODEL CALIBRATION TEST [--block 0] [--own 2 32 128] [--train 150] [--record NAME]

Chose the defaults of `workers/calibration/experts.py`. The experts of one block that are below their floor are solved (GPTQ,
4 bits) on their own tokens, on theirs and the layer's under each rule, on all of the layer's, and on the test tokens
themselves, which no calibration can beat by much; with --own, experts that have enough of their own are, on so many. Errors
are ||(W - Q) x||^2 / ||W x||^2 over test tokens: those that the router sends to the expert, and all. --train makes MODEL first:
a Qwen3-MoE of 64 experts, trained on CALIBRATION for so many steps, with the tokenizer that lies there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import mean

import torch
from common import machine, record, table, versions
from torch import Tensor

from counterweight.pipeline.model_source import open_model
from counterweight.workers.calibration.experts import ExpertCalibration, Starvation
from counterweight.workers.calibration.row_sample import RowSample
from counterweight.workers.calibration.shrinkage import shrunk
from counterweight.workers.calibration.source import TextSource
from counterweight.workers.calibration.statistics import InputStatistics, PackedMoments
from counterweight.workers.calibration.tokens import token_set
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.experts import LinearExperts
from counterweight.workers.recipe import Recipe

CPU = torch.device("cpu")
AT_A_TIME = 16
BOUND = "all test tokens themselves"


@dataclass(frozen=True)
class Routed:
    """Tokens of a layer [tokens, hidden], and the experts that each was sent to [tokens, k]."""

    rows: Tensor
    chosen: Tensor

    def of(self, expert: int) -> Tensor:
        """The tokens that an expert sees."""
        return self.rows[(self.chosen == expert).any(1)]


def windows(model: str, text: str, count: int, length: int) -> Tensor:
    """The first windows of a text, [count, length]."""
    source = TextSource(uri=Path(text).resolve().as_uri())
    tokenizer = open_model(Path(model).resolve().as_uri()).tokenizer()
    tokens = token_set(source, tokenizer, length=length, sequences=count, sampling="consecutive", seed=0, field="TEXT")
    return tokens.ids.long()


def routed(model: str, block: int, texts: Sequence[Tensor]) -> tuple[LinearExperts, list[Routed]]:
    """The experts of a block, and what each text sends them in the original model."""
    source = open_model(Path(model).resolve().as_uri())
    checkpoint, builder = Checkpoint.open(source.store), BlockBuilder(source.checkpoint.config)
    embed = builder.embedding(checkpoint.read(builder.names.embedding), CPU, torch.float32)
    with torch.no_grad():
        hidden = [[embed(part) for part in text.split(AT_A_TIME)] for text in texts]
    for index in range(block + 1):
        tensors = checkpoint.read_many(source.block_tensors(index))
        parts = source.layout.sources(index, source.checkpoint.names)
        parameters = {name: part.of(tensors[part.source]) for name, part in parts.items()}
        running = builder.block(index, parameters, CPU, torch.float32)
        ((_, experts),) = running.experts()
        seen: list[tuple[Tensor, Tensor]] = []
        handle = experts.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[:2]))
        hidden = [[running.run(part) for part in parts] for parts in hidden]
        handle.remove()
    found = []
    for text in hidden:
        own, seen = seen[: len(text)], seen[len(text) :]
        rows = torch.cat([rows.flatten(0, -2) for rows, _ in own])
        found.append(Routed(rows, torch.cat([chosen for _, chosen in own])))
    return experts, found


def rules(strengths: Sequence[float], samples: Sequence[float]) -> Iterator[tuple[str, ExpertCalibration | None]]:
    """Name -> options; None: own tokens alone."""
    yield "own tokens alone", None
    for sample in samples:
        for strength in strengths:
            options = ExpertCalibration(strength=strength, sample=sample)
            yield f"n0 {strength:g} x width, {sample:g} x hidden tokens of the layer", options
    yield "every token", ExpertCalibration(every_token=True)
    yield BOUND, None


def statistics(own: Tensor, layer: Tensor, kept: Tensor, options: ExpertCalibration | None) -> InputStatistics:
    """Of an expert's `own` inputs, of what it makes of the layer's tokens, and of those that are kept of them."""
    if options is None:
        return InputStatistics.of(own)
    if options.every_token:
        return InputStatistics.of(layer)
    width = own.shape[1]
    own_sums, layer_sums = (PackedMoments.of(InputStatistics.of(rows)) for rows in (own, kept))
    lack = Starvation(tokens=len(own), floor=options.floor_of(width), rows=len(kept), weight=options.weight_of(width))
    return shrunk(own_sums, layer_sums, lack).unpacked()


@torch.no_grad()
def errors(
    experts: LinearExperts,
    seen: Routed,
    test: Routed,
    chosen: Sequence[int],
    own: int | None,
    options: Sequence[Sequence[float]],
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(linear, rule) -> errors of each chosen expert on its own test tokens and on all. own: of its tokens, all for None."""
    strengths, samples = options
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for expert in chosen:
        mine = seen.of(expert)
        mine = mine if own is None else mine[:: max(1, len(mine) // own)][:own]
        for name in ("up_proj", "down_proj"):
            weight = experts.get_parameter(f"{expert}.{name}.weight")
            entering = Entering(experts, expert, name)
            mine_in, layer, judged = (
                entering(mine),
                entering(seen.rows),
                (entering(test.of(expert)), entering(test.rows)),
            )
            for rule, how in rules(strengths, samples):
                sample = RowSample(1 if how is None else how.rows_of(seen.rows.shape[1]))
                sample.add(seen.rows)
                kept = sample.rows()
                assert kept is not None, "rows were added"
                gathered = statistics(mine_in, layer, entering(kept), how)
                if rule == BOUND:
                    gathered = InputStatistics.of(judged[1])
                own_error, all_error = (error(weight, gathered, x) for x in judged)
                found.setdefault((name, rule), []).append((own_error, all_error))
    return found


@dataclass(frozen=True)
class Entering:
    """What enters a linear of an expert, given the tokens that the expert sees."""

    experts: LinearExperts
    expert: int
    name: str

    def __call__(self, rows: Tensor) -> Tensor:
        if self.name != "down_proj":
            return rows
        gate, up = (self.experts.get_submodule(f"{self.expert}.{name}") for name in ("gate_proj", "up_proj"))
        return self.experts.product(gate(rows), up(rows))


def error(weight: Tensor, gathered: InputStatistics, x: Tensor) -> float:
    """Of the output on x [tokens, in]; NaN without tokens."""
    group = next(size for size in (128, 64, 32) if weight.shape[1] % size == 0)
    weights = Recipe.model_validate({"weights": {"bits": 4, "group_size": group}}).weights
    codes = weights.quantize(weight, gathered, scale_dtype=torch.bfloat16).weight.dequantize()
    return float((x @ (weight - codes).T).square().sum() / (x @ weight.T).square().sum())


def train(model: Path, text: str, steps: int) -> None:
    """A Qwen3-MoE of 64 experts, two blocks, of which a token sees four; its tokenizer.json lies in `model` already."""
    from tokenizers import Tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    config = Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=64,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    made = Qwen3MoeForCausalLM(config)
    ids = torch.tensor(tokenizer.encode(Path(text).read_text()).ids)
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3)
    for step in range(steps):
        starts = torch.randint(len(ids) - 64, (16,))
        batch = torch.stack([ids[start : start + 64] for start in starts])
        loss = made(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
    made.to(torch.bfloat16).save_pretrained(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    for name, default in (
        ("block", 0),
        ("sequences", 128),
        ("windows", 160),
        ("length", 256),
        ("experts", 8),
        ("train", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--own", type=int, nargs="*", default=[])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 1.0, 4.0])
    parser.add_argument("--samples", type=float, nargs="+", default=[4.0, 16.0])
    parser.add_argument("--record")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers')}."
    if arguments.train:
        train(Path(arguments.model), arguments.calibration, arguments.train)
    texts = [
        windows(arguments.model, text, count, arguments.length)
        for text, count in ((arguments.calibration, arguments.sequences), (arguments.test, arguments.windows))
    ]
    experts, (seen, test) = routed(arguments.model, arguments.block, texts)
    counts = [len(seen.of(expert)) for expert in range(experts.experts)]
    floor = ExpertCalibration().floor_of(experts.hidden)
    body = [f"Block {arguments.block}: tokens by expert {', '.join(map(str, counts))}; floor {floor}."]
    for own in arguments.own or [None]:
        chosen = [expert for expert, count in enumerate(counts) if (count < floor) == (own is None)]
        chosen = [expert for expert in chosen if own is None or len(test.of(expert)) >= floor][: arguments.experts]
        if not chosen:
            continue
        found = errors(experts, seen, test, chosen, own, (arguments.strengths, arguments.samples))
        lines = []
        for (name, rule), judged in found.items():
            mine, everywhere = ([one[place] for one in judged if not isnan(one[place])] for place in (0, 1))
            figures = [each(values) if values else None for values in (mine, everywhere) for each in (mean, max)]
            lines.append([name, rule, *("" if figure is None else f"{1000 * figure:.2f}" for figure in figures)])
        which = f"Experts {', '.join(map(str, chosen))}, " + (
            "below the floor" if own is None else f"{own} of their tokens"
        )
        head = ["linear", "solved on", "own test tokens, mean", "worst", "all test tokens, mean", "worst"]
        body += ["", f"{which}; relative errors in thousandths:", "", table(head, lines)]
    text = "\n".join(body)
    print(text)
    if arguments.record:
        print(record(f"experts-{arguments.record}", "Experts that saw few tokens", text, about))


if __name__ == "__main__":
    main()
