"""Training the compressed model as a whole behind LRC's closed form: perplexity on two texts, of reloaded artifacts.

    python benchmarks/distillation.py llama --rank 0.1 [--models DIR] [--data DIR] [--only ROW ...] [--record]

W4A4 per channel, rotated, as the tables w4a4-* of `recipes.py`: calibration 128 x 256 tokens of WikiText-2 valid,
evaluation 160 windows of WikiText-2 test and 64 windows of the standard library's documentation (`pydoc_data.topics`).
Trained on `--trained` windows, half of WikiText-2 valid and half of docstrings of the standard library's sources; no window
of either test text is among them. Held out: the next 16 windows of WikiText-2 valid, and 16 windows of source code, a kind
of text that is not trained on.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
from pathlib import Path
from typing import Any

from common import ROOT, machine, record, table, versions
from recipes import Size, documentation, lrc, row, run, seeded, w4a4

from counterweight.pipeline.artifact import REPORT, Published
from counterweight.pipeline.pool import PoolSize, RayPool, cluster, threads_per_worker
from counterweight.workers.calibration.standard_library import standard_library_files
from counterweight.workers.storage import open_store

LEAST = 200
"""Characters of a docstring that counts as prose."""


def docstrings(output: Path) -> str:
    """The docstrings of the standard library's `train` part, as a file below `output`; its URI."""
    found: list[str] = []
    for path in standard_library_files("train"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                found += [text] if text is not None and len(text) > LEAST else []
    place = output / "docstrings.txt"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("\n\n".join(found), encoding="utf-8")
    return place.as_uri()


def trials(
    rank: float, valid: str, prose: str, windows: int, held_out: int, other: str | None = None
) -> dict[str, dict[str, Any]]:
    """Row of the table -> what `recipes.run` takes. windows: that are trained on; held_out: of each held-out text. other: URI
    of a text that is not trained on; None for source code of the standard library."""
    half = windows // 2
    wikitext = {"source": {"uri": valid}}
    mixed = [{**wikitext, "sequences": half}, {"source": {"uri": prose}, "sequences": half}]
    kept_back = [
        {**wikitext, "sequences": held_out, "skip": windows},
        {
            "source": {"kind": "standard_library", "part": "evaluation"} if other is None else {"uri": other},
            "sequences": held_out,
        },
    ]

    def trained(texts: list[dict[str, Any]], **training: Any) -> dict[str, Any]:
        recipe: dict[str, Any] = w4a4(lrc(rank))
        return {**recipe, "distillation": {"texts": texts, "held_out": kept_back, "training": training}}

    return {
        "QuaRot + GPTQ": w4a4(),
        "LRC": w4a4(lrc(rank)),
        "LRC, all trained": trained(mixed),
        "LRC, factors trained": trained(mixed, scales=False, norms=False),
        "LRC, scales and norms trained": trained(mixed, factors=False),
        "LRC, all trained on WikiText alone": trained([{**wikitext, "sequences": windows}]),
    }


def outcome(published: list[Published]) -> str:
    """KL of the held-out texts before and after, of the first artifact; empty where nothing was trained."""
    found = json.loads(open_store(published[0].uri).read(REPORT)).get("distillation")
    if found is None:
        return ""
    first, last = found["divergences"][0], found["divergences"][found["kept"]]
    return "; ".join(f"{before:.4f} to {after:.4f}" for before, after in zip(first, last, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rank", type=float, default=0.1, help="share of full rank")
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "recipes")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--trained", type=int, default=1024, help="windows that are trained on")
    parser.add_argument("--held-out", type=int, default=16, help="windows of each held-out text")
    parser.add_argument("--prose", type=Path, help="text in the place of the docstrings")
    parser.add_argument("--other", type=Path, help="held-out text in the place of the source code")
    parser.add_argument("--only", nargs="+", default=[], help="rows to run, by name")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers')}."
    cpus = threads_per_worker(None, arguments.workers, available=sorted(os.sched_getaffinity(0)))
    jobs = Size(sequences=arguments.sequences, windows=arguments.windows, length=arguments.length)
    size = PoolSize(workers=arguments.workers, cpus=cpus, gpus=0)
    models, data, output = (path.resolve() for path in (arguments.models, arguments.data, arguments.output))
    second = documentation(output)
    valid = (data / "wikitext2" / "wiki.valid.txt").as_uri()
    prose = docstrings(output) if arguments.prose is None else arguments.prose.resolve().as_uri()
    other = None if arguments.other is None else arguments.other.resolve().as_uri()
    chosen = trials(arguments.rank, valid, prose, arguments.trained, arguments.held_out, other)
    header = [
        "recipe",
        "perplexity",
        "KL",
        "second text",
        "bits per weight",
        "factors",
        "residual",
        "seconds of blocks",
    ]
    rows: list[list[str]] = []
    original = ""
    with cluster("local", size):
        pool = RayPool(size)
        pool.devices()
        for name, recipe in chosen.items():
            if arguments.only and name not in arguments.only:
                continue
            published = [
                run(pool, one, models / arguments.model, data, output, jobs) for one in seeded(recipe, arguments.seeds)
            ]
            rows.append([*row(name, published, second), outcome(published)])
            print(*rows[-1], sep="  ", flush=True)
            baseline = published[0].document.baseline
            original = "" if baseline is None else f"The original `{arguments.model}`: {baseline.perplexity:.4f}."
    body = table([*header, "KL of held-out texts"], rows) + f"\n\n{original}"
    print(body, flush=True)
    if arguments.record:
        name = f"distillation-{arguments.model}-rank-{round(100 * arguments.rank)}"
        print(record(name, f"Distillation: {arguments.model}, rank {arguments.rank:.0%}", body, about))


if __name__ == "__main__":
    main()
