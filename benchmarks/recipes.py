"""The compensation systems side by side: perplexity of reloaded artifacts on the reference models, one row per recipe.

    python benchmarks/recipes.py TABLE ... [--models DIR] [--data DIR] [--record]

TABLE: one of the names in `TABLES`. Calibration 128 x 256 tokens of WikiText-2 valid, evaluation the first 160 windows of
256 of WikiText-2 test and, with `--second`, 64 windows of the standard library's documentation (`pydoc_data.topics`).
lm_head and embeddings stay in 16 bits. Bits per weight are all in. Rows whose rotation is random are the mean of
`--seeds` seeds, with their spread. All jobs share `--workers` workers, to which the CPUs are dealt out; artifacts go to
`--output`, where finished ones are found again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from common import ROOT, machine, record, table, versions

from counterweight.pipeline.artifact import REPORT, Published
from counterweight.pipeline.evaluate import evaluate_artifact
from counterweight.pipeline.manifest import parse_manifest
from counterweight.pipeline.pool import PoolSize, RayPool, cluster, threads_per_worker
from counterweight.workers.storage import open_store

ROTATION = {"kind": "rotation"}
A4 = {"bits": 4, "clip": 0.9}
RTN_ABSMAX, RTN_SEARCHED = {"kind": "rtn"}, {"kind": "rtn", "scale": {"kind": "mse"}}


def w4a4(compensation: dict[str, Any] | None = None, quantizer: dict[str, Any] | None = None, **recipe: Any) -> Any:
    return {
        "transforms": [ROTATION],
        "weights": {"bits": 4, "quantizer": quantizer or {"kind": "gptq"}},
        "activations": A4,
        **({} if compensation is None else {"compensation": compensation}),
        **recipe,
    }


def w4a8(compensation: dict[str, Any] | None = None, **recipe: Any) -> Any:
    return {
        "weights": {"bits": 4, "quantizer": RTN_ABSMAX},
        "activations": {"bits": 8},
        **({} if compensation is None else {"compensation": compensation}),
        **recipe,
    }


def qdec(**residual: Any) -> Any:
    return {"weights": {"bits": 3, "quantizer": RTN_SEARCHED}, "residual": residual}


def tuned(bits: int, **tuning: Any) -> Any:
    return {"weights": {"bits": bits, "quantizer": RTN_ABSMAX}, "tuning": {"epochs": 6, **tuning}}


def svd(rank: float, **options: Any) -> dict[str, Any]:
    return {"kind": "svd", "rank": {"fraction": rank}, **options}


def lrc(rank: float, **options: Any) -> dict[str, Any]:
    return {"kind": "lrc", "rank": {"fraction": rank}, **options}


def aser(**options: Any) -> dict[str, Any]:
    return {"kind": "aser", "rank": {"count": 64}, **options}


ORDERING = {
    "QuaRot + GPTQ": w4a4(),
    "+ plain SVD, rank 10 %": w4a4(svd(0.1, whitening="none")),
    "+ whitened SVD, rank 10 %": w4a4(svd(0.1)),
    "LRC, rank 10 %": w4a4(lrc(0.1)),
    "LRC, rank 30 %": w4a4(lrc(0.3)),
}

BUDGETED = lrc(0.2, factor_bits=8) | {"rank": {"budget_bits": 2.37}}
SMOOTHING_TOO = [ROTATION, {"kind": "smoothing"}]
SMOOTHED = {
    **{name: {**recipe, "transforms": SMOOTHING_TOO} for name, recipe in ORDERING.items()},
    "LRC, int8, ranks shared out": w4a4(BUDGETED, transforms=SMOOTHING_TOO),
}

INT4 = {"factor_bits": 4, "refit": "none"}


def int4(rank: float) -> Any:
    """LRC with factors of 4 bits, whose rounding the codes make up for."""
    return w4a4(lrc(rank, **INT4), transforms=SMOOTHING_TOO)


GPTQ4 = {"bits": 4, "quantizer": {"kind": "gptq"}}
SMALL_ASER = aser(rank={"count": 29}, outliers=14, factor_bits=8)
SMOOTHED_W4A8: dict[str, Any] = {"weights": GPTQ4, "transforms": [{"kind": "smoothing"}]}

TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a4-llama": ("llama", ORDERING),
    "w4a4-outliers": ("llama-outliers", ORDERING),
    "w4a4-mixtral": ("mixtral", ORDERING),
    "w4a4-smoothed-llama": ("llama", SMOOTHED),
    "w4a4-smoothed-outliers": ("llama-outliers", SMOOTHED),
    "w4a4-beyond": (
        "llama",
        {
            "LRC 10 %, regressed target": w4a4(lrc(0.1), {"kind": "gptq", "target": "regressed"}),
            "LRC 10 %, mixed target": w4a4(lrc(0.1), {"kind": "gptq", "target": "mixed", "mix": 0.25}),
            "LRC 10 %, branch refitted to the weight": w4a4(lrc(0.1, refit="weight")),
            "LRC 10 %, 3 iterations": w4a4(lrc(0.1, iterations=3)),
            "LRC 10 %, propagated inputs": {"propagate": "compressed", **w4a4(lrc(0.1))},
            "LRC 20 %, factors in int8": w4a4(lrc(0.2, factor_bits=8)),
            "LRC, int8, ranks shared out": w4a4(BUDGETED),
        },
    ),
    "w4a8-outliers": (
        "llama-outliers",
        {
            "RTN": w4a8(),
            "+ plain SVD (LoRC), rank 64": w4a8({**svd(0.1, whitening="none"), "rank": {"count": 64}}),
            "+ L2QER, rank 64": w4a8({**svd(0.1, whitening="magnitude"), "rank": {"count": 64}}),
            "+ QERA-exact, rank 64": w4a8({**svd(0.1), "rank": {"count": 64}}),
            "ASER, rank 64": w4a8(aser()),
            "ASER without smoothing": w4a8(aser(smoothing=False)),
            "ASER, outliers by product": w4a8(aser(choose="product")),
            "SmoothQuant": w4a8(transforms=[{"kind": "smoothing"}]),
        },
    ),
    **{
        f"w4a4-int4-{size}{name}": (model, {f"LRC, int4, rank {100 * rank:.0f} %": int4(rank)})
        for size, rank in (("", 0.39), ("large-", 0.7))
        for name, model in {"llama": "llama", "outliers": "llama-outliers", "mixtral": "mixtral"}.items()
    },
    "w4a4-int4-beyond": (
        "llama",
        {
            "LRC, int8, rank 20 %": w4a4(lrc(0.2, factor_bits=8), transforms=SMOOTHING_TOO),
            "LRC, int8, ranks shared out": SMOOTHED["LRC, int8, ranks shared out"],
            "LRC, int8, rank 59 %": w4a4(lrc(0.59, factor_bits=8), transforms=SMOOTHING_TOO),
            "LRC, int4, rank 39 %": int4(0.39),
            "LRC, int4, rank 39 %, rounded last": w4a4(lrc(0.39, factor_bits=4), transforms=SMOOTHING_TOO),
            "LRC, int4, ranks shared out": w4a4(
                lrc(0.39, **INT4) | {"rank": {"budget_bits": 2.37}}, transforms=SMOOTHING_TOO
            ),
            "LRC, int4, rank 39 %, mixed target": w4a4(
                lrc(0.39, **INT4), {"kind": "gptq", "target": "mixed", "mix": 0.25}, transforms=SMOOTHING_TOO
            ),
            "LRC, int4, rank 39 %, clip searched": w4a4(
                lrc(0.39, **INT4), transforms=SMOOTHING_TOO, activations={"bits": 4, "clip": "search"}
            ),
            "LRC, int4, rank 39 %, not smoothed": w4a4(lrc(0.39, **INT4)),
            "SVD, int8, rank 20 %, anticipation 0.9": w4a4(
                svd(0.2, factor_bits=8, anticipation=0.9), transforms=SMOOTHING_TOO
            ),
        },
    ),
    "w4a8-outliers-small": (
        "llama-outliers",
        {
            "RTN": w4a8(),
            "ASER, int8, rank 29": w4a8(SMALL_ASER),
            "ASER, int8, rank 29, GPTQ": w4a8(SMALL_ASER, weights=GPTQ4),
            "SmoothQuant + GPTQ": w4a8(**SMOOTHED_W4A8),
            "+ LRC, int8, rank 29": w4a8(lrc(0.1, factor_bits=8) | {"rank": {"count": 29}}, **SMOOTHED_W4A8),
            "+ LRC, int4, rank 56": w4a8(lrc(0.1, **INT4) | {"rank": {"count": 56}}, **SMOOTHED_W4A8),
        },
    ),
    "qdec": (
        "llama",
        {
            **{f"QDEC, {k} of 1024 channels": qdec(channels_per_chunk=k) for k in (8, 32, 128, 512, 1024)},
            "DecDEC's buckets, 32": qdec(channels_per_chunk=32, selection="bucketed"),
            "exact top 32": qdec(channels_per_chunk=32, selection="exact"),
            "static 32": qdec(channels_per_chunk=32, selection="static"),
        },
    ),
    "tuning": (
        "llama",
        {
            **{f"W{bits}, LWC": tuned(bits, increments=False) for bits in (2, 3)},
            **{f"W{bits}, LSI + LWC": tuned(bits) for bits in (2, 3)},
            **{f"W{bits}, GPTQ": {"weights": {"bits": bits, "quantizer": {"kind": "gptq"}}} for bits in (2, 3)},
        },
    ),
    "tuning-propagated": (
        "llama",
        {
            "W2, LWC": {"propagate": "compressed", **tuned(2, increments=False)},
            "W2, LSI + LWC": {"propagate": "compressed", **tuned(2)},
        },
    ),
    "weight-only": (
        "llama",
        {
            "W3, AWQ (smoothing + RTN)": {
                "transforms": [{"kind": "smoothing"}],
                "weights": {"bits": 3, "quantizer": RTN_SEARCHED},
            },
            "W3, GPTQ, propagated": {
                "propagate": "compressed",
                "weights": {"bits": 3, "quantizer": {"kind": "gptq"}},
            },
            "W3, asymmetric calibration (GPTAQ)": {
                "propagate": "compressed",
                "weights": {"bits": 3, "quantizer": {"kind": "gptq", "target": "mixed"}},
            },
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sequences to calibrate on, windows to measure on, tokens of both."""

    sequences: int
    windows: int
    length: int


def run(pool: RayPool, recipe: dict[str, Any], model: Path, data: Path, output: Path, size: Size) -> Published:
    """One job to its end. recipe: the manifest's, and beside it `propagate` of the calibration and a `distillation`."""
    from counterweight.pipeline.events import EventLog
    from counterweight.pipeline.opening import open_job
    from counterweight.pipeline.orchestrator import Orchestrator

    own = {key: value for key, value in recipe.items() if key not in ("propagate", "distillation")}
    calibration = {
        "source": {"uri": (data / "wikitext2" / "wiki.valid.txt").as_uri()},
        "sequences": size.sequences,
        "sequence_length": size.length,
        "sampling": "consecutive",
        "propagate": recipe.get("propagate", "original"),
    }
    test = {"uri": (data / "wikitext2" / "wiki.test.raw").as_uri()}
    validation = {"text": test, "windows": size.windows, "sequence_length": size.length}
    manifest = {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionJob",
        "metadata": {"name": "recipes"},
        "spec": {
            "model": {"uri": model.as_uri()},
            "calibration": calibration,
            "recipe": own,
            **({"distillation": recipe["distillation"]} if "distillation" in recipe else {}),
            "validation": validation,
            "output": {"uri": output.as_uri()},
        },
    }
    job = parse_manifest(json.dumps(manifest), name="recipes.json", base=output.as_uri()).job
    with EventLog() as log:
        source, tokens = open_job(job, pool, log, here=True)
        return Orchestrator(job, source, tokens, pool, "cpu", log).run()


def seeded(recipe: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """The recipe with each seed of its rotation; itself when nothing in it is random."""
    transforms = recipe.get("transforms", [])
    if not any(transform["kind"] == "rotation" for transform in transforms):
        return [recipe]
    return [
        {**recipe, "transforms": [{**one, "seed": seed} if one["kind"] == "rotation" else one for one in transforms]}
        for seed in range(seeds)
    ]


def documentation(output: Path) -> str:
    """The second text as a file below `output`; its URI."""
    path = output / "documentation.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(text for _, text in sorted(topics.items())), encoding="utf-8")
    return path.as_uri()


def block_seconds(published: Published) -> float:
    """What the blocks took when the artifact was made, which may have been in an earlier run."""
    report = open_store(published.uri).read(REPORT)
    return float(json.loads(report)["stages"]["blocks"])


def row(name: str, published: list[Published], second: str | None) -> list[str]:
    """One line of the table. second: URI of a second text to measure on."""
    documents = [one.document for one in published]

    def mean(values: list[float]) -> str:
        spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    qualities = [document.compensated for document in documents if document.compensated is not None]
    bits = documents[0].bits_per_weight
    return [
        name,
        mean([quality.perplexity for quality in qualities]),
        f"{statistics.mean(quality.kl for quality in qualities):.4f}",
        *([] if second is None else [mean([second_perplexity(one, second) for one in published])]),
        f"{bits.total:.2f}",
        f"{bits.factors:.2f}",
        f"{bits.residual:.2f}",
        f"{statistics.mean(block_seconds(one) for one in published):.0f}",
    ]


def second_perplexity(published: Published, text: str) -> float:
    """Perplexity of a published artifact on 64 windows of another text."""
    found = evaluate_artifact(published.uri, against=None, text=text, windows=64, sequence_length=256, device="cpu")
    return (found.get("compensated") or found["quantized"]).perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=sorted(TABLES))
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "recipes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", nargs="+", default=[], help="rows to run, by name")
    parser.add_argument("--second", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers')}."
    cpus = threads_per_worker(None, arguments.workers, available=sorted(os.sched_getaffinity(0)))
    jobs = Size(sequences=arguments.sequences, windows=arguments.windows, length=arguments.length)
    size = PoolSize(workers=arguments.workers, cpus=cpus, gpus=0)
    models, data, output = (path.resolve() for path in (arguments.models, arguments.data, arguments.output))
    second = documentation(output) if arguments.second else None
    columns = ["perplexity", "KL", *([] if second is None else ["second text"])]
    header = ["recipe", *columns, "bits per weight", "factors", "residual", "seconds of blocks"]
    with cluster("local", size):
        pool = RayPool(size)
        pool.devices()
        for chosen in arguments.tables:
            model, recipes = TABLES[chosen]
            rows: list[list[str]] = []
            published: list[Published] = []
            for name, recipe in recipes.items():
                if arguments.only and name not in arguments.only:
                    continue
                published = [
                    run(pool, one, models / model, data, output, jobs) for one in seeded(recipe, arguments.seeds)
                ]
                rows.append(row(name, published, second))
                print(*rows[-1], sep="  ", flush=True)
            baseline = published[0].document.baseline
            body = table(header, rows)
            if baseline is not None:
                body += f"\n\nThe original `{model}`: {baseline.perplexity:.4f}."
            print(body, flush=True)
            if arguments.record:
                print(record(f"recipes-{chosen}", f"Recipes: {chosen}", body, about))


if __name__ == "__main__":
    main()
