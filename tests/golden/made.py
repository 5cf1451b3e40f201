"""What a golden recipe's job stores: the digest of every tensor, and values sampled from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from counterweight.kernels.weights import StoredWeight
from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.block import CompressedLinear
from counterweight.workers.compressed import CompressedModel
from counterweight.workers.storage import open_store
from tests.golden.recipes import Golden
from tests.golden.sources import LENGTH, write_model, write_tokens
from tests.inprocess import InProcessPool, local, run_job
from tests.models import read_tensors

CODES, SCALES, BRANCHES, CORRECTIONS, KEPT, ERRORS = "codes", "scales", "branches", "corrections", "kept", "errors"


@dataclass(frozen=True, kw_only=True)
class Made:
    """tensors: name -> sha256 (hex), of checkpoint, adapter and residual stores. values: kind -> samples, one dimension:

    codes       int8, less their zero points; of a negative scale with the other sign
    scales      float32, without their signs: codes and scale may change sign together
    branches    float32, of the products of the factors: factors themselves may turn or change sign together
    corrections float32, of the residuals as their stores know them
    kept        float32, of norms, embedding, head, routers and kept linears
    errors      float32, of each linear, relative: without, then with its branch
    """

    tensors: Mapping[str, str]
    values: Mapping[str, Tensor]


class Sources:
    """The models and tokens, written below a directory when they are first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def model(self, name: str) -> Path:
        """The checkpoint of a model of `MODELS`."""
        place = self.directory / name
        return place if place.exists() else write_model(name, place)

    def tokens(self, sequences: int) -> Path:
        """A file of prepared tokens."""
        place = self.directory / f"{sequences}.safetensors"
        return place if place.exists() else write_tokens(place, sequences)


def make(golden: Golden, sources: Sources, output: Path, pool: InProcessPool | None = None) -> Made:
    """Runs the job in this process, unvalidated; its files go below `output`. pool: of one worker unless another is given."""
    calibration = {
        "source": {"kind": "tokens", "uri": sources.tokens(golden.sequences).as_uri()},
        "sequences": golden.sequences,
        "sequence_length": LENGTH,
        "propagate": golden.propagate,
        "compute_dtype": golden.compute_dtype,
    }
    if golden.experts is not None:
        calibration["experts"] = dict(golden.experts)
    distillation = None
    if golden.training is not None:
        trained = golden.sequences * 7 // 8
        rest = {"sequences": golden.sequences - trained, "skip": trained}
        distillation = {
            "texts": [{"source": calibration["source"], "sequences": trained}],
            "held_out": [{"source": calibration["source"], **rest}],
            "training": dict(golden.training),
        }
    published = run_job(
        sources.model(golden.model),
        output,
        golden.recipe,
        calibration=calibration,
        distillation=distillation,
        pool=pool,
    )
    model = CompressedModel.open(open_store(published.uri))
    blocks = [model.block(index, torch.device("cpu"), torch.float32)[1] for index in range(model.builder.blocks)]
    modules = json.loads((local(published) / "report" / "report.json").read_text())["modules"]
    stored = read_tensors(local(published))
    kept = [stored[name] for name in sorted(stored) if name.rpartition(".")[0] not in model.ledger.formats]
    values = dict(_samples([block[name] for block in blocks for name in sorted(block)]))
    values[KEPT] = torch.cat([_sample(tensor.float(), 16) for tensor in kept])
    values[ERRORS] = torch.tensor(
        [module[error] for error in ("error_quantized", "error_compensated") for module in modules]
    )
    return Made(tensors=dict(sorted(model.ledger.tensors.items())), values=values)


def _samples(linears: list[CompressedLinear]) -> Iterator[tuple[str, Tensor]]:
    weights = [linear.weight for linear in linears]
    yield CODES, torch.cat([_sample(_codes(weight), 96) for weight in weights])
    yield SCALES, torch.cat([_sample(scale.float().abs(), 16) for weight in weights for scale in _scales(weight)])
    branches = [linear.low_rank.product() for linear in linears if linear.low_rank is not None]
    if branches:
        yield BRANCHES, torch.cat([_sample(branch, 24) for branch in branches])
    corrections = [linear.residual.store.dense() for linear in linears if linear.residual is not None]
    if corrections:
        yield CORRECTIONS, torch.cat([_sample(correction, 24) for correction in corrections])


def _codes(weight: StoredWeight) -> Tensor:
    """Codes [out, in] int8, or of a format without codes its signs."""
    return _centred(weight) if isinstance(weight, UniformWeight) else weight.dequantize().sign().to(torch.int8)


def _scales(weight: StoredWeight) -> list[Tensor]:
    return [tensor for tensor in weight.parts.values() if tensor.is_floating_point()]


def _centred(weight: UniformWeight) -> Tensor:
    """Codes [out, in] int8 as multiples of the scale's magnitude, counted from the zero point; beyond 8 bits clamped."""
    repeat = weight.codes.shape[1] // weight.scale.shape[1]
    codes = weight.codes.short()
    if weight.zero_point is not None:
        codes = codes - weight.zero_point.short().repeat_interleave(repeat, dim=1)
    signs = weight.scale.sign().short().repeat_interleave(repeat, dim=1)
    return (codes * signs).clamp(-128, 127).to(torch.int8)


def _sample(tensor: Tensor, count: int) -> Tensor:
    """`count` elements at places that are spread over rows and columns alike, the same ones each time."""
    flat = tensor.flatten()
    return flat if len(flat) <= count else flat[torch.arange(count) * 7919 % len(flat)]
