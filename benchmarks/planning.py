"""What `counterweight plan` itself takes: CPU seconds and memory of the command on the shapes of published models.

    python benchmarks/planning.py [MODEL ...] [--repeats 3] [--device H100-80G] [--record]

The whole command, from its interpreter's start: the manifest, a file of prepared tokens, every header, memory, arithmetic and
the simulated schedule of 8 workers and of one. The least of the repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import Usage, machine, measured, record, table, versions
from plans import RECIPES, job_of
from true_shapes import Shape, make, shapes

MOST = 5.0
"""CPU seconds that the project wants of any shape."""


def write_tokens(path: Path, sequences: int, length: int) -> None:
    """Prepared tokens, all of them zero."""
    size = 4 * sequences * length
    entry = {"input_ids": {"dtype": "I32", "shape": [sequences, length], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def manifest(shape: Shape, recipe: str, folder: Path) -> Path:
    """The manifest of a model in `folder`, on tokens that lie beside it."""
    job = job_of(shape.name, (folder / "model").as_uri(), RECIPES[recipe], workers=8)
    document = job.model_dump(mode="json", by_alias=True)
    tokens = {"kind": "tokens", "uri": (folder / "tokens.safetensors").as_uri()}
    document["spec"]["calibration"]["source"] = tokens
    document["spec"]["validation"]["text"] = tokens
    document["spec"]["output"]["uri"] = (folder / "output").as_uri()
    path = folder / "job.json"
    path.write_text(json.dumps(document))
    return path


def usage(shape: Shape, recipe: str, device: str, repeats: int, layers: int | None) -> tuple[Usage, int]:
    """The least of some runs, and how many tensors the model has."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(shape.with_layers(layers or shape.config["num_hidden_layers"]), folder / "model")
        write_tokens(folder / "tokens.safetensors", 512, 2048)
        command = [sys.executable, "-m", "counterweight.pipeline.cli", "plan", str(manifest(shape, recipe, folder))]
        runs = [measured([*command, "--device", device], folder, {}) for _ in range(repeats)]
        index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())
        return min(runs, key=lambda run: run.cpu), len(index["weight_map"])


def body_of(models: Sequence[str], device: str, repeats: int, layers: int | None) -> str:
    """The table."""
    rows = []
    for model in models:
        for recipe in RECIPES:
            found, tensors = usage(shapes()[model], recipe, device, repeats, layers)
            figures = [f"{found.cpu:.2f}", f"{found.wall:.2f}", f"{found.peak / 2**20:.0f}"]
            rows.append([model, recipe, f"{tensors:,}", *figures])
            print(*rows[-1], sep=" | ", flush=True)
    return table(["model", "recipe", "tensors", "CPU s", "wall s", "peak, MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(shapes())}; default: all")
    parser.add_argument("--device", default="H100-80G")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    body = body_of(arguments.models or list(shapes()), arguments.device, arguments.repeats, arguments.layers)
    about = (
        f"{machine()}. {versions('pydantic')}. The least of {arguments.repeats} runs; wanted: at most {MOST:.0f} CPU s."
    )
    print(body)
    if arguments.record:
        print(record("planning", f"What a plan takes, for 8 workers with a {arguments.device}", body, about))


if __name__ == "__main__":
    main()
