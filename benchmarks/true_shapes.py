"""Synthetic checkpoints with the shapes of published models (`shapes.yaml`), of any number of layers.

    python benchmarks/true_shapes.py list
    python benchmarks/true_shapes.py make Mixtral-8x7B --layers 2 --to DIR [--weights] [--narrow 8]

Without `--weights` files are sparse: headers and a hole, which takes kilobytes of disk whatever the model's size; that is
enough for `counterweight plan`. With `--weights` they hold random numbers in bfloat16. `--narrow` divides every width but a
head's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

DATA = Path(__file__).parent / "shapes.yaml"

SHARD_BYTES = 5_000_000_000
"""Of one file, as published checkpoints have it."""

BFLOAT16 = 2
"""Bytes of a number."""

DEVIATION = 0.02
"""Of a random weight; norms are ones."""

NARROWED = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "q_lora_rank",
    "kv_lora_rank",
)
"""Fields of a config that hold a width, or a number of heads of unchanged width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A published model. config: its config.json, as far as it decides what tensors there are. parameters: as published."""

    name: str
    config: Mapping[str, Any]
    parameters: float

    def with_layers(self, layers: int) -> dict[str, Any]:
        """The config of so many layers, at least one of them sparse in a sparse model. ValueError for none."""
        if layers < 1:
            raise ValueError(f"layers: {layers}: expected at least 1")
        config = {**self.config, "num_hidden_layers": layers}
        if "first_k_dense_replace" in config:
            config["first_k_dense_replace"] = min(config["first_k_dense_replace"], layers - 1)
        return config


def shapes() -> dict[str, Shape]:
    """Name -> model, of all in `shapes.yaml`."""
    read = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return {
        name: Shape(name=name, config=found["config"], parameters=float(found["parameters"]))
        for name, found in read.items()
    }


def narrowed(config: Mapping[str, Any], by: int) -> dict[str, Any]:
    """The config with every width divided by `by`; a head stays as wide as it is, and there is at least one."""
    heads = {"head_dim": config["hidden_size"] // config["num_attention_heads"]} if "q_lora_rank" not in config else {}
    return {
        **heads,
        **config,
        **{name: max(1, config[name] // by) for name in NARROWED if name in config},
    }


def make(config: Mapping[str, Any], to: Path, *, weights: bool = False, seed: int = 0, device: str = "cpu") -> Path:
    """Writes a checkpoint of this config.json, with the tensors that a plan expects of it; its folder. weights: random ones
    instead of holes, drawn on `device`. UnsupportedModelError, CheckpointError."""
    from counterweight.pipeline.model_source import describe

    tensors = describe(config, frozenset()).expected([])
    to.mkdir(parents=True, exist_ok=True)
    files = list(_files(tensors))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        path = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write(to / path, {name: tensors[name] for name in names}, seed + number if weights else None, device)
        weight_map |= dict.fromkeys(names, path)
    total = sum(_bytes(shape) for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    (to / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=1))
    return to


def _bytes(shape: tuple[int, ...]) -> int:
    return BFLOAT16 * prod(shape)


def _files(tensors: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of the tensors of each file, in their order."""
    names: list[str] = []
    size = 0
    for name, shape in tensors.items():
        if names and size + _bytes(shape) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(shape)
    yield names


def _write(path: Path, tensors: Mapping[str, tuple[int, ...]], seed: int | None, device: str) -> None:
    """One file: a header, and behind it random numbers, or a hole without a seed."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in tensors.items():
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, start + _bytes(shape)]}
        start += _bytes(shape)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if seed is None:
            file.truncate(8 + len(header) + start)
        else:
            for values in _random(tensors, seed, device):
                file.write(values.numpy().tobytes())


def _random(tensors: Mapping[str, tuple[int, ...]], seed: int, device: str) -> Iterator[Tensor]:
    """Values of each tensor as int16, the bits of bfloat16."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in tensors.items():
        is_norm = name.endswith("norm.weight")
        values = torch.ones(shape) if is_norm else torch.randn(shape, generator=generator, device=device) * DEVIATION
        yield values.to(torch.bfloat16).view(torch.int16).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and parameters")
    making = commands.add_parser("make", help="write a checkpoint")
    making.add_argument("model", choices=list(shapes()))
    making.add_argument("--to", type=Path, required=True, help="folder of the checkpoint")
    making.add_argument("--layers", type=int, help="default: all")
    making.add_argument("--weights", action="store_true", help="random numbers instead of holes")
    making.add_argument("--narrow", type=int, default=1, help="divide every width by this")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for name, shape in shapes().items():
            layers = shape.config["num_hidden_layers"]
            print(f"{name:16} {shape.config['model_type']:12} {layers:3} layers, {shape.parameters / 1e9:.1f} billion")
        return
    shape = shapes()[arguments.model]
    config = shape.with_layers(arguments.layers or shape.config["num_hidden_layers"])
    print(make(narrowed(config, arguments.narrow), arguments.to, weights=arguments.weights))


if __name__ == "__main__":
    main()
