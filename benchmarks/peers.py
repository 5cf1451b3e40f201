"""Four tools side by side, each in its own environment: CPU seconds, wall, peak memory, and perplexity of what is loaded again.

    python benchmarks/peers.py --model DIR --calibration TEXT --test TEXT \\
        --tool llmcompressor=ENVIRONMENT --tool gptqmodel=ENVIRONMENT --tool autoround=ENVIRONMENT [--repeats 7] [--record]

All are given the same windows of token ids and compute in float32 with one thread to a core. Runs are interleaved: each tool
once, then each once more. A tool that has no such recipe is left out of that row; one that fails is named with what it said.
Ours runs without Ray: as `counterweight` without validation, as `whole` with it. ENVIRONMENT: a folder with bin/python.
`--random HIDDEN LAYERS` takes a random Llama in place of the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from common import ROOT, Usage, adopt_orphans, machine, matrix_rates, measured, record, table, versions
from memory import make_model

PEERS = ROOT / "benchmarks" / "peers"
OURS = "counterweight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """tools: peers that have it."""

    bits: int
    group_size: int | None
    activations: int | None = None
    rotated: bool = False
    tools: tuple[str, ...]

    def ours(self) -> dict[str, object]:
        """As a manifest has it."""
        found: dict[str, object] = {"weights": {"bits": self.bits, "group_size": self.group_size}}
        if self.activations is not None:
            found["activations"] = {"bits": self.activations}
        return found | ({"transforms": [{"kind": "rotation"}]} if self.rotated else {})


RECIPES: Mapping[str, Recipe] = {
    "W4A16 g128": Recipe(bits=4, group_size=128, tools=("llmcompressor", "gptqmodel", "autoround")),
    "W3 per channel": Recipe(bits=3, group_size=None, tools=("llmcompressor", "gptqmodel", "autoround")),
    "W4A4 rotated": Recipe(bits=4, group_size=None, activations=4, rotated=True, tools=("llmcompressor",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """model: a folder. windows, held: token ids of calibration and of the text that perplexity is measured on."""

    model: Path
    windows: Sequence[Sequence[int]]
    held: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Run:
    """seconds: from tokens to checkpoint. usage: of the whole process."""

    seconds: float
    usage: Usage


def peer(tool: str, python: str, recipe: Recipe, inputs: Inputs, scratch: Path) -> Run:
    """One run; its checkpoint is in scratch/tool."""
    job = {
        "model": str(inputs.model),
        "output": str(scratch / tool),
        "windows": inputs.windows,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "activations": recipe.activations,
        "rotated": recipe.rotated,
    }
    path = scratch / f"{tool}.json"
    path.write_text(json.dumps(job))
    # GPTQModel asks for two workers, and a machine of two cores gives it one; threads that spin do no work of a tool's.
    environment = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    usage = measured([python, str(PEERS / "quantize.py"), tool, str(path)], scratch, environment)
    return Run(float(json.loads(usage.last_line)["seconds"]), usage)


def ours(recipe: Recipe, inputs: Inputs, scratch: Path, *, validated: bool) -> Run:
    """The same of ours; validated: with a validation on the held-out windows, which no peer does."""
    from safetensors.numpy import save_file

    name = "whole" if validated else OURS
    save_file({"input_ids": _array(inputs.windows)}, scratch / "calibration.safetensors")
    save_file({"input_ids": _array(inputs.held)}, scratch / "held.safetensors")
    length = len(inputs.windows[0])
    source = {"kind": "tokens", "uri": str(scratch / "calibration.safetensors")}
    calibration = {"source": source, "sequences": len(inputs.windows), "sequence_length": length, "held_out": 0}
    spec: dict[str, object] = {
        "model": {"uri": str(inputs.model)},
        "calibration": {**calibration, "compute_dtype": "float32"},
        "recipe": recipe.ours(),
        "output": {"uri": str(scratch / name)},
    }
    if validated:
        text = {"kind": "tokens", "uri": str(scratch / "held.safetensors")}
        spec["validation"] = {"text": text, "windows": len(inputs.held), "sequence_length": length}
    document = {"apiVersion": "counterweight/v1", "kind": "CompressionJob", "metadata": {"name": "peers"}, "spec": spec}
    manifest = scratch / f"{name}.json"
    manifest.write_text(json.dumps(document))
    command = [sys.executable, "-m", "counterweight.pipeline.cli", "run", str(manifest), "--address", "none"]
    usage = measured(command, ROOT, {})
    report = json.loads((Path(usage.last_line.removeprefix("file://")) / "report" / "report.json").read_text())
    # A worker begins a new measurement of its peak with each task, so the system knows that of the last one alone.
    peak = max(usage.peak, *(task["timing"]["host_peak_bytes"] for task in report["tasks"]))
    seconds = sum(report["stages"][stage] for stage in ("inventory", "blocks", "assemble"))
    return Run(seconds, replace(usage, peak=peak))


def _array(windows: Sequence[Sequence[int]]) -> object:
    import numpy as np

    return np.array(windows, dtype=np.int32)


def perplexity(loader: str, python: str, folder: str, held: Path) -> str:
    """Of an artifact that is loaded again; what was wrong where it is not."""
    command = [python, str(PEERS / "perplexity.py"), loader, folder, str(held)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return "fails: " + (done.stderr.strip().splitlines() or ["nothing said"])[-1][:80]
    return f"{json.loads(done.stdout.splitlines()[-1])['perplexity']:.3f}"


def compared(name: str, recipe: Recipe, inputs: Inputs, pythons: Mapping[str, str], repeats: int) -> list[list[str]]:
    """A row for each tool."""
    tools = [tool for tool in recipe.tools if tool in pythons]
    runs: dict[str, list[Run]] = {one: [] for one in (*tools, OURS, *(["whole"] if inputs.held else []))}
    failed: dict[str, str] = {}
    quality: dict[str, str] = {}
    for repeat in range(repeats):
        for one in runs:
            if one in failed:
                continue
            with tempfile.TemporaryDirectory() as directory:
                scratch = Path(directory)
                (scratch / "held.json").write_text(json.dumps(inputs.held))
                try:
                    if one in tools:
                        run, folder = peer(one, pythons[one], recipe, inputs, scratch), str(scratch / one)
                    else:
                        run = ours(recipe, inputs, scratch, validated=one == "whole")
                        folder = run.usage.last_line.removeprefix("file://")
                except subprocess.CalledProcessError as error:
                    failed[one] = (str(error.stderr).strip().splitlines() or ["nothing said"])[-1][:120]
                    print(name, one, "fails:", failed[one], flush=True)
                    continue
                runs[one].append(run)
                print(
                    f"{name} {one}: {run.seconds:.2f} s of {run.usage.wall:.2f}, {run.usage.cpu:.2f} CPU s", flush=True
                )
                if repeat == 0 and inputs.held:
                    loader = {"gptqmodel": "gptqmodel"}.get(one, "transformers") if one in tools else OURS
                    quality[one] = perplexity(loader, pythons.get(one, sys.executable), folder, scratch / "held.json")
    return [
        [name, one, *_cells(found), quality.get(one, "")] if found else [name, one, failed[one]] + [""] * 4
        for one, found in runs.items()
    ]


def _cells(runs: Sequence[Run]) -> list[str]:
    """Minimum and median of each figure; the most memory."""
    columns = ([run.seconds for run in runs], [run.usage.wall for run in runs], [run.usage.cpu for run in runs])
    return [
        *(f"{min(one):.1f} / {median(one):.1f}" for one in columns),
        f"{max(run.usage.peak for run in runs) / 2**20:.0f}",
    ]


def windows_of(model: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """The first windows of a text."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text()).ids
    if len(ids) < count * length:
        raise SystemExit(f"{text}: {len(ids)} tokens: expected at least {count * length}")
    return [ids[start : start + length] for start in range(0, count * length, length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--test", required=True, type=Path)
    parser.add_argument("--tool", action="append", default=[], metavar="NAME=ENVIRONMENT")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="those named; all when left out")
    parser.add_argument("--random", nargs=2, type=int, metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument(
        "--windows", type=int, default=160, help="of the test text; 0: no perplexity, and no row `whole`"
    )
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    adopt_orphans()
    pythons = {}
    for one in arguments.tool:
        name, _, folder = one.partition("=")
        pythons[name] = str(Path(folder).resolve() / "bin" / "python")
    about = f"{machine()}. {versions('torch', 'transformers')}. {matrix_rates()}"
    model, size = arguments.model.resolve(), arguments.length
    windows, held = (
        windows_of(model, text, count, size)
        for text, count in ((arguments.calibration, arguments.sequences), (arguments.test, arguments.windows))
    )
    with tempfile.TemporaryDirectory() as directory:
        if arguments.random:
            make_model(Path(directory), *arguments.random)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (Path(directory) / "model" / name).write_bytes((model / name).read_bytes())
            model = Path(directory) / "model"
        inputs = Inputs(model=model, windows=windows, held=held)
        rows: list[list[str]] = []
        for name in arguments.recipe or RECIPES:
            rows += compared(name, RECIPES[name], inputs, pythons, arguments.repeats)
    header = [
        "recipe",
        "tool",
        "tokens to checkpoint, s",
        "whole process, s",
        "CPU s",
        "peak, MiB",
        "perplexity, loaded again",
    ]
    body = (
        table(header, rows)
        + "\n\nOf times the least and the median; `whole`: ours with validation. Peak: of the largest process."
    )
    print(body)
    if arguments.record:
        what = "peers-random" if arguments.random else "peers"
        print(record(what, "Four tools side by side", body, about))


if __name__ == "__main__":
    main()
