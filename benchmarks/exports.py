"""Checkpoints of other tools, each made by its own library in an environment of its own, measured by `counterweight compare`.

    python benchmarks/exports.py --model DIR --text FILE --validation FILE [--only NAME ...] [--keep FOLDER] [--record]
    python benchmarks/exports.py --fixtures FOLDER

Environments are made under `build/peers/` the first time (2 to 3 GB each). Beside our perplexity stands that of the tool's own
environment, on the same windows; a relative difference above `--tolerance` fails. `--keep`: where checkpoints
stay, and are found by the next run. `--fixtures` makes what
`tests/workers/foreign` reads: a tiny random model through every tool, with the logits that the tool's environment has of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, environment, machine, record, table, versions

PEERS = ROOT / "benchmarks" / "peers"
TORCH = "torch==2.13.0"
SEQUENCES, LENGTH = 8, 128
"""Calibration: the format is what is looked at, not what the tool can do."""
WINDOWS, WINDOW = 16, 256


@dataclass(frozen=True, slots=True)
class Export:
    """A checkpoint. environment: which of `REQUIREMENTS` writes it. script: in `peers/`. settings: its arguments behind the
    output. reader: the environment that reads it again, where the tool does not read what it wrote."""

    environment: str
    script: str
    settings: tuple[str, ...]
    reader: str | None = None


REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "llmcompressor": (TORCH, "llmcompressor==0.14.0.1"),
    "gptqmodel": (TORCH, "gptqmodel==7.6.0"),
    "autoround": (TORCH, "auto-round==0.16.1"),
    # The last release, and the last versions of its neighbours that it runs with.
    "autoawq": (TORCH, "autoawq==0.2.9", "transformers==4.51.3", "datasets<4", "accelerate<1.8"),
}

EXPORTS: Mapping[str, Export] = {
    "llm-compressor W4A16": Export("llmcompressor", "export_llmcompressor.py", ("W4A16",)),
    "llm-compressor W8A8": Export("llmcompressor", "export_llmcompressor.py", ("W8A8",)),
    "GPTQModel W4": Export("gptqmodel", "export_gptqmodel.py", ("gptq",)),
    "GPTQModel W4, format v2": Export("gptqmodel", "export_gptqmodel.py", ("gptq_v2",)),
    "AutoRound W4": Export("autoround", "export_autoround.py", ("auto_round",)),
    "AutoRound W4 as GPTQ": Export("autoround", "export_autoround.py", ("auto_gptq",), "gptqmodel"),
    "AutoRound W4 as AWQ": Export("autoround", "export_autoround.py", ("auto_awq",), "autoawq"),
    "AutoAWQ W4": Export("autoawq", "export_autoawq.py", ()),
}


def python_of(name: str) -> str:
    return environment(ROOT / "build" / "peers" / name, REQUIREMENTS[name])


def in_peer(name: str, script: str, *arguments: object) -> str:
    """The last line that a script of `peers/` prints in an environment. Its log goes to stderr when it fails."""
    # Names where a thread of the tool's own would fight with torch's for the cores.
    quiet = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python_of(name), str(PEERS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **quiet},
        cwd=tempfile.gettempdir(),  # where tools that write logs beside their caller may do so
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{name}: {script}: {done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


def reader(export: Export) -> str:
    return export.reader or export.environment


def made(export: Export, model: Path, text: Path, output: Path, group: int, sequences: int, length: int) -> Path:
    """The checkpoint. group: weights that share a scale, where the scheme has groups."""
    in_peer(export.environment, export.script, model, text, output, *export.settings, group, sequences, length)
    return written(output)


def written(output: Path) -> Path:
    """Where in its output a tool put its checkpoint: AutoRound makes a folder of its own."""
    (found,) = [path.parent for path in (*output.glob("config.json"), *output.glob("*/config.json"))]
    return found


def slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def compared(checkpoints: Mapping[str, Path], arguments: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Name -> what `counterweight compare` says."""
    command = [str(Path(sys.executable).parent / "counterweight"), "compare", *map(str, checkpoints.values()), "--json"]
    command += ["--against", arguments.model, "--text", arguments.validation]
    command += ["--windows", str(WINDOWS), "--sequence-length", str(WINDOW)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(zip(["the original", *checkpoints], json.loads(found), strict=True))


def measure(arguments: argparse.Namespace, scratch: Path) -> int:
    names = arguments.only or list(EXPORTS)
    model, text = Path(arguments.model).resolve(), Path(arguments.text).resolve()
    places = {name: scratch / slug(name) for name in names}
    checkpoints = {
        name: written(place) if place.exists() else made(EXPORTS[name], model, text, place, 128, SEQUENCES, LENGTH)
        for name, place in places.items()
    }
    own = {
        name: json.loads(
            in_peer(
                reader(EXPORTS[name]),
                "text_perplexity.py",
                path,
                model,
                Path(arguments.validation).resolve(),
                WINDOWS,
                WINDOW,
            )
        )
        for name, path in checkpoints.items()
    }
    rows, worst = [], 0.0
    for name, row in compared(checkpoints, arguments).items():
        quality = row["texts"]["text"]  # type: ignore[index]
        cells = [name, str(row["kind"]), f"{row['bits']:.3f}", f"{quality['perplexity']:.4f}", f"{quality['kl']:.5f}"]
        if name in own:
            difference = abs(quality["perplexity"] / own[name]["perplexity"] - 1)
            worst = max(worst, difference)
            cells += [f"{own[name]['perplexity']:.4f}", f"{difference:.1e}", own[name]["dtype"]]
        rows.append(cells + [""] * (8 - len(cells)))
    head = ["checkpoint", "kind", "bits", "perplexity", "KL", "of the tool", "relative difference", "its dtype"]
    body = table(head, rows)
    print(body)
    if arguments.record:
        tools = "; ".join(f"{name}: {', '.join(REQUIREMENTS[name])}" for name in REQUIREMENTS)
        about = f"{machine()}; {versions('counterweight', 'torch', 'transformers', 'compressed-tensors')}. {tools}."
        print(record("exports", "Other tools' checkpoints", body, about))
    return 0 if worst <= arguments.tolerance else 1


def fixtures(folder: Path, names: Iterable[str], scratch: Path) -> int:
    """A model of one block through every tool: config.json, weights, and logits of a few ids in expected.safetensors."""
    sys.path.insert(0, str(ROOT))
    from tests.models import checkpoint, write_text

    model, text = scratch / "model", write_text(scratch / "text.txt", 8 * 64)
    checkpoint("llama", model, num_hidden_layers=1, intermediate_size=64)
    for index, name in enumerate(names):
        export = EXPORTS[name]
        found = made(export, model, text, scratch / str(index), 32, 4, 64)
        place = folder / slug(name)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        in_peer(reader(export), "logits.py", found, place / "expected.safetensors")
        for file in ("config.json", "model.safetensors"):
            shutil.copy(found / file, place / file)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text", help="calibration")
    parser.add_argument("--validation")
    parser.add_argument("--only", action="append", choices=list(EXPORTS))
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--fixtures", type=Path)
    arguments = parser.parse_args()
    if arguments.fixtures is None and None in (arguments.model, arguments.text, arguments.validation):
        parser.error("--model, --text and --validation, or --fixtures")
    with tempfile.TemporaryDirectory(prefix="exports-") as scratch:
        if arguments.fixtures is not None:
            return fixtures(arguments.fixtures.resolve(), arguments.only or EXPORTS, Path(scratch))
        return measure(arguments, Path(scratch) if arguments.keep is None else arguments.keep.resolve())


if __name__ == "__main__":
    sys.exit(main())
