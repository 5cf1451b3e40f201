"""Wall time of W4A16 g128 GPTQ, Counterweight against llm-compressor, interleaved on one machine.

    python benchmarks/speed.py --model DIR --text FILE [--repeats 3] [--sequences 128] [--length 256] [--record]

Makes an environment for each under `.benchmark-envs/` the first time, with what it declares to need and nothing else: what
tests need makes transformers and Ray load more when they start. Both read the same model, the same windows, and write a
checkpoint; neither validates. Two figures each: from tokens ready to checkpoint written, and the whole process
(for Counterweight with the start of an embedded Ray). `--set` changes our recipe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, environment, machine, record, table, versions

ENVIRONMENTS = ROOT / ".benchmark-envs"
PEER = "llmcompressor==0.14.0.1"
TORCH = "torch==2.13.0"

MANIFEST = """
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {{name: speed}}
spec:
  model: {{uri: {model}}}
  calibration:
    source: {{kind: text, uri: {text}}}
    sequences: {sequences}
    sequence_length: {length}
    sampling: consecutive
    compute_dtype: bfloat16
  recipe: {{weights: {{bits: 4, group_size: 128, quantizer: {{kind: gptq}}}}}}
  output: {{uri: {output}}}
"""


def peer_python() -> str:
    return environment(ENVIRONMENTS / "llmcompressor", [TORCH, PEER])


def our_python() -> str:
    return environment(
        ENVIRONMENTS / "counterweight", ["--constraint", str(ROOT / "constraints.txt"), "--editable", str(ROOT)]
    )


def output_of(command: list[str]) -> str:
    """The last line that a command prints, run where our packages are."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    return done.stdout.splitlines()[-1]


def peer(arguments: argparse.Namespace, scratch: Path) -> tuple[float, float]:
    """Seconds from tokens ready to checkpoint written, and of the process."""
    script = ROOT / "benchmarks" / "peers" / "llmcompressor_gptq.py"
    numbers = [str(arguments.sequences), str(arguments.length)]
    command = [peer_python(), str(script), arguments.model, arguments.text, str(scratch / "peer"), *numbers]
    started = time.perf_counter()
    line = output_of(command)
    wall = time.perf_counter() - started
    return json.loads(line)["quantize_and_save"], wall


def floor(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of what nobody's GPTQ can do without, whoever wrote it."""
    script = ROOT / "benchmarks" / "stock_floor.py"
    command = [our_python(), str(script), arguments.model, str(arguments.sequences), str(arguments.length)]
    seconds: dict[str, float] = json.loads(output_of(command))
    return seconds


def ours(arguments: argparse.Namespace, scratch: Path, python: str | None = None) -> tuple[float, float, float]:
    """The same two figures; tokens are ready when the stage after them begins. And what of it our own forward passes and
    statistics took."""
    manifest = scratch / "job.yaml"
    fields = {"model": arguments.model, "text": arguments.text}
    manifest.write_text(
        MANIFEST.format(
            **fields, sequences=arguments.sequences, length=arguments.length, output=(scratch / "ours").resolve()
        )
    )
    command = [python or our_python(), "-m", "counterweight.pipeline.cli", "run", str(manifest)]
    for override in arguments.set:
        command += ["--set", override]
    started = time.perf_counter()
    uri = output_of(command)
    wall = time.perf_counter() - started
    root = Path(uri.removeprefix("file://"))
    report = json.loads((root / "report" / "report.json").read_text())
    forward = sum(task["timing"]["forward"] for task in report["tasks"])
    return sum(report["stages"][name] for name in ("inventory", "blocks", "assemble")), wall, forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--alone", action="store_true", help="our side only, in the environment of this process")
    arguments = parser.parse_args()
    # The commands run elsewhere.
    arguments.model, arguments.text = (str(Path(path).resolve()) for path in (arguments.model, arguments.text))
    if arguments.alone:
        with tempfile.TemporaryDirectory() as scratch:
            found_alone = ours(arguments, Path(scratch), sys.executable)
        names = ("tokens ready to checkpoint", "whole process", "forward passes and statistics")
        print(*(f"{name} {seconds:.2f} s" for name, seconds in zip(names, found_alone, strict=True)), sep="\n")
        return
    peer_python()
    our_python()
    about = f"{machine()}. {versions('torch', 'transformers', 'ray')}; peer: {PEER} with {TORCH}."
    found: dict[str, list[tuple[float, ...]]] = {"llm-compressor": [], "counterweight": []}
    for _ in range(arguments.repeats):
        for name, measure in (("llm-compressor", peer), ("counterweight", ours)):
            with tempfile.TemporaryDirectory() as scratch:
                found[name].append(measure(arguments, Path(scratch)))
            print(name, *(f"{seconds:.2f} s" for seconds in found[name][-1]), flush=True)
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    rows = [
        [
            name,
            ", ".join(f"{run[0]:.2f}" for run in runs),
            f"{medians[name][0]:.2f}",
            ", ".join(f"{run[1]:.2f}" for run in runs),
            f"{medians[name][1]:.2f}",
        ]
        for name, runs in found.items()
    ]
    body = table(["", "tokens ready to checkpoint, s", "median", "whole process, s", "median"], rows)
    ratios = [medians["llm-compressor"][i] / medians["counterweight"][i] for i in range(2)]
    body += f"\n\nllm-compressor over Counterweight: {ratios[0]:.2f} from tokens to checkpoint, {ratios[1]:.2f} whole process."
    own = statistics.median(run[2] for run in found["counterweight"])
    least = floor(arguments)
    body += (
        "\n\nWhat nobody's GPTQ can do without, in stock transformers and torch (`benchmarks/stock_floor.py`): "
        f"one forward pass {least['forward']:.2f} s, x^T x in float32 {least['products']:.2f} s. "
        f"Our forward passes and statistics: {own:.2f} s (median). "
        f"A third of the peer's time: {medians['llm-compressor'][0] / 3:.2f} s."
    )
    print(body)
    if arguments.record:
        print(record("speed", "W4A16 g128 GPTQ against llm-compressor", body, about))


if __name__ == "__main__":
    main()
