"""Routers of compressed models: what raises how often they choose as the original's do.

    python benchmarks/routers.py CALIBRATION TEST ARTIFACT ... [--record]

Each artifact is judged as it is, and with routers that were fitted to what they read in it: block after block, on the
calibration text, to the logits of the original's router on the same tokens, by least squares (ridge, toward the router as it
was) or by the divergence of the experts' probabilities (Adam). Router agreement is the share of test tokens that go to the same
experts as in the original, whose router sees the original's activations. A router itself is kept in 16 bits, and reads its
norm's output unquantized under every recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from common import machine, record, table, versions
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from counterweight import load_model
from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.model_source import open_model
from counterweight.workers.calibration.source import TextSource
from counterweight.workers.calibration.tokens import token_set

AT_A_TIME = 16
Fit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(router [experts, hidden], what it reads [tokens, hidden], the original's logits [tokens, experts]) -> another router."""


def least_squares(weight: Tensor, x: Tensor, logits: Tensor) -> Tensor:
    """Toward the logits, of which only differences between experts count; ridge of 1 % of the mean energy of x."""
    wide = x.double()
    gram = wide.T @ wide
    missing = logits.double() - wide @ weight.double().T
    missing -= missing.mean(-1, keepdim=True)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(damped, wide.T @ missing)
    return weight + solution.T.to(weight.dtype)


def divergence(weight: Tensor, x: Tensor, logits: Tensor) -> Tensor:
    """Toward the probabilities, a convex problem: 200 steps of Adam on all tokens."""
    found = weight.detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([found], lr=1e-3 * float(weight.float().std()) * 10)
    aim = functional.log_softmax(logits.float(), -1)
    with torch.enable_grad():
        for _ in range(200):
            own = functional.log_softmax(x.float() @ found.T, -1)
            loss = functional.kl_div(own, aim, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found.detach().to(weight.dtype)


FITS: Mapping[str, Fit] = {"routers by least squares": least_squares, "routers by divergence": divergence}


def routers(model: nn.Module) -> list[nn.Module]:
    """In block order."""
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


@contextmanager
def watched(model: nn.Module, blocks: range) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Block -> what its router reads [tokens, hidden] and makes of it [tokens, experts], of each batch that is run."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {block: [] for block in blocks}

    def look(block: int, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].flatten(0, -2).float()
        seen[block].append((x, x @ module.get_parameter("weight").float().T))
        if len(blocks) == 1:
            raise Enough

    every = routers(model)
    hooks = [
        every[block].register_forward_pre_hook(lambda module, given, block=block: look(block, module, given))
        for block in blocks
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Enough(Exception):
    """What was asked for has been seen."""


def looked_at(model: PreTrainedModel, ids: Tensor, blocks: range) -> dict[int, tuple[Tensor, Tensor]]:
    """Block -> inputs and logits of its router on these windows."""
    with torch.no_grad(), watched(model, blocks) as seen:
        for batch in ids.split(AT_A_TIME):
            with suppress(Enough):
                model.base_model(batch)
    return {
        block: (torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])) for block, found in seen.items()
    }


@torch.no_grad()
def fit(model: PreTrainedModel, ids: Tensor, wanted: Mapping[int, tuple[Tensor, Tensor]], how: Fit) -> None:
    """Replaces the routers one after the other, because the one before decides what the next one reads."""
    for block, router in enumerate(routers(model)):
        x, weight = looked_at(model, ids, range(block, block + 1))[block][0], router.get_parameter("weight")
        weight.copy_(how(weight, x, wanted[block][1]))


@dataclass(frozen=True)
class Bench:
    """original: in float32. test: windows of tokens. wanted, reference: see `looked_at`, of the original on calibration and on
    test windows."""

    original: PreTrainedModel
    test: Tensor
    wanted: Mapping[int, tuple[Tensor, Tensor]]
    reference: Mapping[int, tuple[Tensor, Tensor]]

    @torch.no_grad()
    def judged(self, model: PreTrainedModel) -> list[str]:
        """Perplexity, KL from the original, mean agreement and that of each block."""
        active: int = self.original.config.num_experts_per_tok
        losses, divergences = [], []
        every = routers(model)
        with watched(model, range(len(every))) as seen:
            for batch in self.test.split(AT_A_TIME):
                aim = functional.log_softmax(self.original(batch).logits.float(), -1)
                own = functional.log_softmax(model(batch).logits.float(), -1)
                losses.append(functional.nll_loss(own[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
                divergences.append((aim.exp() * (aim - own)).sum(-1).flatten())
        shares = []
        for block, found in seen.items():
            mine, theirs = (
                logits.topk(active).indices.sort().values
                for logits in (torch.cat([y for _, y in found]), self.reference[block][1])
            )
            shares.append(float((mine == theirs).all(-1).double().mean()))
        perplexity, kl = torch.cat(losses).mean().exp(), torch.cat(divergences).mean()
        return [
            f"{perplexity:.3f}",
            f"{kl:.5f}",
            f"{sum(shares) / len(shares):.4f}",
            " ".join(f"{share:.3f}" for share in shares),
        ]


def windows(model: str, text: str, count: int, length: int) -> Tensor:
    """The first windows of a text."""
    source, tokenizer = (
        TextSource(uri=Path(text).resolve().as_uri()),
        open_model(Path(model).resolve().as_uri()).tokenizer(),
    )
    return token_set(
        source, tokenizer, length=length, sequences=count, sampling="consecutive", seed=0, field="TEXT"
    ).ids.long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    for name, default in (("sequences", 64), ("windows", 64), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers')}."
    uris = [Path(place).resolve().as_uri() for place in arguments.artifacts]
    documents = {uri: open_artifact(uri)[1] for uri in uris}
    (model,) = {document.base_model.uri.removeprefix("file://") for document in documents.values()}
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    calibration = windows(model, arguments.calibration, arguments.sequences, arguments.length)
    test = windows(model, arguments.test, arguments.windows, arguments.length)
    blocks = range(len(routers(original)))
    bench = Bench(original, test, *(looked_at(original, ids, blocks) for ids in (calibration, test)))
    lines = []
    for uri, document in documents.items():
        for how in (None, *FITS):
            compressed = load_model(uri, dtype=torch.float32)
            if how is not None:
                fit(compressed, calibration, bench.wanted, FITS[how])
            lines.append([document.name, how or "as they were", *bench.judged(compressed)])
            print(*lines[-1], sep=" | ", flush=True)
    text = table(["artifact", "routers", "perplexity", "KL", "router agreement", "by block"], lines)
    print(text)
    if arguments.record:
        print(record("routers", "Router agreement", text, about))


if __name__ == "__main__":
    main()
