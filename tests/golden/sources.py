"""Tiny models and tokens that are the same bits on every machine: made of integers, never of a float generator.

`torch.randn` goes through logarithms and cosines, whose last bits depend on the processor. Sums of the bytes of Python's own
Mersenne Twister, divided by a power of two, do not.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.keys import digest
from tests.models import BASE, VOCABULARY, read_tensors, save

MODELS = {
    "dense": ("llama", {"intermediate_size": 192}, torch.float32),
    # As many values as queries: smoothing can reach the input of o_proj.
    "experts": (
        "mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "num_key_value_heads": 4,
            "head_dim": 16,
        },
        torch.bfloat16,
    ),
}
"""Name -> family, what of its config is not `BASE`, dtype of its checkpoint. Two blocks each."""

DIGESTS = {
    "dense": "73da4da8a34a523a6c22b9a714e251051f29dcf7cfb4f3afd6bbe81b1872628e",
    "experts": "c4d3e814246104cda6ada768562b9a8da9eaa645333f44c0380aa03597e6fa6a",
    "tokens": "4e6c2f051e08be6699e7c5784bec99dc8f01a5d4b1501d68f2e469695f256a85",
}
"""sha256 of the models' tensors, as `digest_of` takes it, and of the first 64 sequences of tokens."""

LENGTH = 32
"""Tokens of a sequence."""

DIRECTIONS = 4
"""How many directions of each weight are stronger than its noise."""


def write_model(name: str, directory: Path) -> Path:
    """The checkpoint of a model of `MODELS`. Norms have a few large channels, as trained models do."""
    family, changes, dtype = MODELS[name]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**BASE, **changes}))
    draw = random.Random(name)
    for parameter_name, parameter in sorted(model.named_parameters()):
        parameter.data.copy_(
            _norm(draw, *parameter.shape) if "norm" in parameter_name else _weight(draw, *parameter.shape)
        )
    return save(model, directory, dtype)


def write_tokens(path: Path, sequences: int) -> Path:
    """Random tokens, a file for a calibration source of the kind `tokens`: `input_ids` [sequences, LENGTH] int32."""
    drawn = random.Random("tokens").randbytes(sequences * LENGTH)
    ids = torch.tensor([byte % VOCABULARY for byte in drawn], dtype=torch.int32).reshape(sequences, LENGTH)
    save_file({"input_ids": ids}, path)
    return path


def digest_of(path: Path) -> str:
    """sha256 (hex) of the tensors in a file or a directory of files: of their names and contents."""
    tensors = load_file(path) if path.is_file() else read_tensors(path)
    return digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def exact(draw: random.Random, *shape: int) -> Tensor:
    """Numbers [*shape] float32 near a normal distribution of width 0.14: sums of four integers of 16 bits, over 2^18."""
    return _integers(draw, "<i2", 4, *shape).float() / (1 << 18)


def _weight(draw: random.Random, *shape: int) -> Tensor:
    """A weight [..., out, in] with `DIRECTIONS` strong directions, so that a branch of that rank is well defined."""
    up = _integers(draw, "i1", 1, *shape[:-1], DIRECTIONS)
    down = _integers(draw, "i1", 1, *shape[:-2], DIRECTIONS, shape[-1])
    return exact(draw, *shape) + (up @ down).float() / (1 << 16)


def _norm(draw: random.Random, width: int) -> Tensor:
    """A norm [width] near one with a few large channels."""
    values = exact(draw, width) + 1.0
    values[5::23] *= 4.0
    return values


def _integers(draw: random.Random, kind: str, terms: int, *shape: int) -> Tensor:
    """Sums of `terms` integers of numpy's type `kind` over its whole range, [*shape] int32."""
    count = terms * math.prod(shape)
    drawn = numpy.frombuffer(draw.randbytes(count * numpy.dtype(kind).itemsize), dtype=kind)
    return torch.from_numpy(drawn.astype(numpy.int32).reshape(terms, *shape).sum(0, dtype=numpy.int32))
