"""Every benchmark runs, on a tiny model: as its README has it, from the repository's root."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from counterweight.pipeline.manifest import load_manifest
from tests.inprocess import local, run_job
from tests.models import checkpoint
from tests.patience import PATIENCE, TRIES
from tests.pipeline.tiny import job_of, run_local, write_job, write_text

ROOT = Path(__file__).parent.parent.parent
NUMBER = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's model, texts and manifest; and a folder of texts, as the reference models have it beside them."""
    place = tmp_path_factory.mktemp("benchmarks")
    write_job(place / "job", layers=1)
    texts = place / "data" / "wikitext2"
    texts.mkdir(parents=True)
    write_text(texts / "wiki.valid.txt", 1000)
    write_text(texts / "wiki.test.raw", 500, seed=1)
    return place


def ran(script: str, *arguments: object) -> str:
    """What the benchmark printed."""
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(printed: str) -> Sequence[str]:
    """The lines of the tables in it, without their heads."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [line for line in lines if NUMBER.search(line)]


def test_all_are_here() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    scripts = {name for name, text in files.items() if "__main__" in text}
    tried = set(re.findall(r'ran\("(\w+)"', Path(__file__).read_text()))
    # The shapes have a file of tests of their own; exports want environments of 2 GB each: `make peers-test`.
    assert tried | {"true_shapes", "exports"} == scripts


def test_driver() -> None:
    """A job of two blocks of 128 experts, to its published artifact: a row for one worker and one for eight."""
    found = [row.strip("| ").split(" | ") for row in rows(ran("driver", "--layers", 2))]
    assert [cells[0] for cells in found] == ["1", "8"]
    few, many = (int(cells[1]) for cells in found)
    assert 20 < few < many, "eight workers take a block's shards in more stretches"
    for cells in found:
        assert 0 < float(cells[3]) < 20
        assert 0 < float(cells[-1].removesuffix("%")) < 20


def test_planning() -> None:
    """What a plan takes of a model of one block, a row for each recipe."""
    (one, two) = rows(ran("planning", "Llama-3-8B", "--repeats", 1, "--layers", 1))
    for row in (one, two):
        seconds, _, peak = (float(cell) for cell in row.strip("| ").split(" | ")[3:])
        assert 0.1 < seconds < 10
        assert 20 < peak < 150, "without torch"


def test_gram() -> None:
    assert len(rows(ran("gram", "--tokens", 128, "--widths", 64, 96))) == 2


def test_peers(place: Path) -> None:
    """Ours alone and without validation: peers have environments of their own."""
    texts = place / "data" / "wikitext2"
    sizes = ("--sequences", 8, "--windows", 0, "--length", 32, "--repeats", 1, "--recipe", "W3 per channel")
    given = (
        "--model",
        place / "job" / "model",
        "--calibration",
        texts / "wiki.valid.txt",
        "--test",
        texts / "wiki.test.raw",
    )
    ((recipe, tool, seconds, whole, _, peak),) = (
        row.strip("| ").split(" | ") for row in rows(ran("peers", *given, *sizes))
    )
    assert (recipe, tool) == ("W3 per channel", "counterweight")
    assert float(seconds.split(" / ")[0]) < float(whole.split(" / ")[0])
    assert float(peak) > 100  # MiB: torch alone takes more


def test_hidden_states(place: Path) -> None:
    printed = ran("hidden_states", "--manifest", place / "job" / "job.yaml", "--repeats", 1)
    found = {name: others for name, *others in (row.strip("| ").split(" | ") for row in rows(printed))}
    assert float(found["hand on, in memory"][0]) < float(found["hand on, through the store"][0])
    assert float(found["take over, from memory"][0]) < float(found["take over, from the store"][0])
    assert {"through the store", "memory, none written"} <= set(found)


def test_solvers() -> None:
    printed = ran("solvers", "--widths", 128, 256, "--experts", 4)
    # Experts, twice (as they are found, and in the whole); five solves at two widths and at those extrapolated; Mixtral.
    assert len(rows(printed)) >= 2 + 2 + 5 * 2 + 5 * 2
    assert "Mixtral-8x7B" in printed


def test_lrc_floor() -> None:
    printed = ran("lrc_floor", "--widths", 1024)
    assert [row.split(" | ")[0] for row in rows(printed)] == ["| one CPU thread", "| H200"]


def test_stock_floor(place: Path) -> None:
    assert '"products"' in ran("stock_floor", place / "job" / "model", 32, 16)


def test_tuning(place: Path) -> None:
    text = place / "data" / "wikitext2" / "wiki.valid.txt"
    sizes = ("--blocks", 1, "--sequences", 4, "--length", 16, "--bits", 3, "--set", "epochs=1")
    assert len(rows(ran("tuning", place / "job" / "model", text, *sizes))) == 8


def test_generation(place: Path) -> None:
    published = run_local(job_of(place / "job" / "job.yaml"))
    printed = ran("generation", "--artifact", published.uri, "--tokens", 2, "--prompt", 4, "--repeats", 1)
    assert len(rows(printed)) == 3


SMALL = (
    "spec.calibration.sequences=8",
    "spec.calibration.sequence_length=32",
    "spec.validation.windows=4",
    "spec.validation.sequence_length=32",
    "spec.validation.gates={}",
)


@pytest.mark.end_to_end
def test_quality(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    smaller = [argument for override in SMALL for argument in ("--set", override)]
    printed = ran("quality", "demo:W4 g128, GPTQ", "--output", place / "out", *smaller)
    recorded = importlib.import_module("quality").newest().tables["demo"]
    before = recorded["W4 g128, GPTQ"][""].told("perplexity")
    (row,) = [row for row in rows(printed) if row.startswith("| W4 g128, GPTQ |")]
    assert f"| {before} |" not in row  # of other calibration and windows


def test_every_row_is_a_job(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quality = importlib.import_module("quality")
    tables = quality.described()
    places = list(quality.chosen(tables, []))
    assert len(places) > 50
    for name, row, model in ((one.table, one.row, one.model) for one in places):
        manifest = ROOT / "manifests" / (tables[name].rows[row].manifest or tables[name].manifest)
        load_manifest(str(manifest), tables[name].overrides(row, model, 1, place / "models"))


def test_the_tables_of_the_readme_are_the_newest_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quality = importlib.import_module("quality")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- quality ([\w-]+) -->", readme)) == set(quality.newest().tables)
    assert quality.into_readme(readme, quality.described(), quality.newest()) == readme


def test_another_figure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quality = importlib.import_module("quality")
    name, cells = next(iter(quality.newest().tables.items()))
    row, models = next(iter(cells.items()))
    model, cell = next(iter(models.items()))
    place = quality.Place(name, row, model)
    assert quality.differences(place, cell, cell) == []
    for figure in ("perplexity", "bits"):
        changed = [one.model_copy(update={figure: getattr(one, figure) * 1.0025}) for one in cell.figures]
        (line,) = quality.differences(place, cell.model_copy(update={"figures": tuple(changed)}), cell)
        assert f"{figure} " in line
    assert "nothing was recorded" in quality.differences(place, cell, None)[0]


@pytest.mark.end_to_end
def test_memory() -> None:
    assert "deepest over shallowest" in ran("memory", "--hidden", 512, "--layers", 1)


def test_branches(place: Path) -> None:
    sizes = ("--sequences", 8, "--windows", 4, "--length", 16, "--second", write_text(place / "b.txt", 500, seed=4))
    kinds = ("", ", down factor shared", ", ranks predicted", ", ranks measured", ", propagated")
    chosen = ["SERQ", "SRR, int4", "H-SVDQuant, bf16", *(f"LRC, int4, codes last{kind}" for kind in kinds)]
    printed = ran("branches", place / "job" / "model", "--data", place / "data", *sizes, "--only", *chosen)
    found = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in rows(printed)}
    assert set(found) == set(chosen)
    bits = [float(cells[0]) for cells in found.values()]
    assert max(bits) - min(bits) < 0.8  # one rank of the tiny layers takes half a bit
    errors = {name: cells[1] for name, cells in found.items() if cells[1].strip()}
    assert len(set(errors.values())) == len(errors) == len(chosen) - 1


@pytest.mark.end_to_end
def test_speed(place: Path) -> None:
    """Our side; the peer wants an environment of several gigabytes."""
    text = place / "data" / "wikitext2" / "wiki.valid.txt"
    sizes = ("--sequences", 8, "--length", 16, "--set", "spec.recipe.weights.group_size=32")
    printed = ran("speed", "--alone", "--model", place / "job" / "model", "--text", text, *sizes)
    assert len(NUMBER.findall(printed)) == 3


@pytest.mark.end_to_end
def test_pairs(place: Path) -> None:
    sizes = ("--before", ROOT, "--manifest", place / "job" / "job.yaml", "--repeats", 1)
    assert "Median of the pairs' ratios" in ran("pairs", *sizes)


@pytest.mark.end_to_end
def test_workers(place: Path) -> None:
    printed = ran("workers", "--manifest", place / "job" / "job.yaml", "--repeats", 1)
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows(printed)][-1] == "all"
    assert "| blocks | " in printed


def test_gpu_kernels() -> None:
    printed = ran("gpu_kernels", "--smoke")
    assert len([line for line in printed.splitlines() if NUMBER.search(line)]) > 5
    assert printed.endswith("it runs\n")


def test_experts(tmp_path: Path) -> None:
    """On a model that it trains itself, whose experts have more tokens of their own than they may use."""
    checkpoint("mixtral", tmp_path, torch.bfloat16)  # for its tokenizer
    texts = [write_text(tmp_path / name, 2000, seed=seed) for seed, name in enumerate(("seen.txt", "test.txt"))]
    sizes = ("--sequences", 16, "--windows", 16, "--length", 16, "--strengths", 1, "--samples", 2)
    printed = ran("experts", tmp_path, *texts, *sizes, "--train", 2)
    assert "step 1: loss" in printed
    assert len(rows(printed)) == 2 * 4


@pytest.mark.end_to_end
def test_drawing(tmp_path: Path) -> None:
    """A line for the budget, and one for each linear of experts that are still starved then."""
    manifest = write_job(tmp_path, case="mixtral", layers=1)
    budget, *linears = rows(ran("drawing", manifest, "--sequences", 2, "--budgets", 1))
    assert budget.startswith("| 2 | 12 | ")
    assert len(linears) == 12


def test_routers(tmp_path: Path) -> None:
    checkpoint("mixtral", tmp_path / "model", torch.bfloat16)
    recipe = {"weights": {"bits": 3, "group_size": 32}}
    place = local(run_job(tmp_path / "model", tmp_path / "out", recipe))
    texts = [write_text(tmp_path / name, 2000, seed=seed) for seed, name in enumerate(("seen.txt", "test.txt"))]
    printed = ran("routers", *texts, place, "--sequences", 8, "--windows", 4, "--length", 16)
    assert [row.split(" | ")[1] for row in rows(printed)] == [
        "as they were",
        "routers by least squares",
        "routers by divergence",
    ]


def test_the_time_model_is_held_against_a_block() -> None:
    """In a small form, where what is not modelled (starting threads, Python) weighs most: the order of magnitude."""
    found = [line.split("  ") for line in ran("time_model", "tiny").splitlines() if line.startswith("tiny  ")]
    assert [what for _, what, *_ in found] == ["calibrate", "solve and store"]
    for _, _, predicted, measured, _ in found:
        assert 0 < float(predicted) < 3 * float(measured)


def test_rates_are_measured_for_a_plan(tmp_path: Path) -> None:
    from counterweight.pipeline.rates import START, rates_of

    def measured() -> bool:
        ran("time_model", "--rates", tmp_path / "rates.json")
        rates = rates_of(str(tmp_path / "rates.json"))
        assert rates is not None
        assert 0.5 < rates.start != START
        return rates.products32 > rates.products64 > rates.elementwise

    assert any(measured() for _ in range(TRIES)), "others share the processor's caches and cores, but not each time"


def test_plans_of_published_shapes_are_a_table() -> None:
    printed = ran("plans", "Llama-3-8B")
    assert len([row for row in rows(printed) if row.startswith("| Llama-3-8B |")]) == 2 * (
        2 + 1
    )  # plans, and what is in the way


def test_sharing() -> None:
    """By the model, workers that share blocks take less than those that wait for each other."""
    for _, _, workers, shared, apart, *_ in (row.split(" | ") for row in rows(ran("sharing", "Llama-3-8B"))):
        assert (float(shared) < float(apart)) == (workers != "1")


def test_lrc_job(place: Path) -> None:
    sizes = ("--sequences", 8, "--repeats", 1, "--set", "spec.recipe.activations={bits: 4}")
    plain, lrc = rows(ran("lrc_job", "--manifest", place / "job" / "job.yaml", *sizes))
    assert plain.split(" | ")[2].rstrip(" |") == "1.00"
    assert float(lrc.split(" | ")[1]) > 0


def test_small_blocks() -> None:
    (row,) = rows(ran("small_blocks", "--blocks", 1, 3, "--repeats", 1))
    assert len(NUMBER.findall(row)) == 4


def test_submissions_to_two_instances() -> None:
    assert rows(ran("submissions", "--jobs", 4, "--clients", 2))[0].startswith("| 4 | 2 |")
