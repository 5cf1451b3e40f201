"""Figures in documents that come from a result file are what that file says.

    python -m tests.docs.test_figures        writes the tables that are made of result files

The quality tables of the README have a generator of their own (`benchmarks/quality.py --readme`, checked in
`tests/benchmarks`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

OPERATIONS = ROOT / "docs" / "operations.md"
PLANS = "2026-11-27-plans.md"
BLOCK = "2026-11-26-time-model-gpu.md"
DRAWING = "2026-11-26-drawing-mixtral.md"
HIDDEN = "2026-11-26-hidden-states.md"
SHARING = "2026-11-27-sharing.md"
SIZES = (
    ("Llama-3-8B", "W4A16 GPTQ g128", "1"),
    ("Llama-3-8B", "W4A4 LRC 10 %", "8"),
    ("Llama-3-70B", "W4A16 GPTQ g128", "8"),
    ("Llama-3-70B", "W4A4 LRC 10 %", "8"),
    ("Mixtral-8x7B", "W4A16 GPTQ g128", "8"),
    ("Mixtral-8x7B", "W4A4 LRC 10 %", "8"),
    ("DeepSeek-V3", "W4A4 LRC 10 %", "8"),
)
"""Model, recipe and workers of each row of the table of sizes."""

Row = dict[str, str]


def rows(file: str, section: str = "") -> Iterator[Row]:
    """Heading -> cell, of each row of the first table behind `section`."""
    text = (RESULTS / file).read_text()
    text = text[text.index(section) :]
    lines = re.split(r"\n(?!\|)", text[text.index("\n|") + 1 :])[0].splitlines()
    head, _, *body = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    head = [name if name not in head[:at] else f"{name} {head[:at].count(name) + 1}" for at, name in enumerate(head)]
    return (dict(zip(head, cells, strict=True)) for cells in body)


def row(file: str, label: str, section: str = "") -> Row:
    """The row whose first cell is `label`."""
    (found,) = [one for one in rows(file, section) if next(iter(one.values())) == label]
    return found


def column(file: str, name: str, kernel: str, tokens: set[str]) -> tuple[float, float]:
    """Least and largest number of a column among rows of a kernel and of numbers of tokens."""
    of_kernel = [one for one in rows(file) if one["kernel"] == kernel and one["tokens"] in tokens and one[name]]
    values = [float(one[name]) for one in of_kernel]
    return min(values), max(values)


def speed(file: str) -> list[float]:
    """Seconds from tokens to checkpoint of ours and of the peer, how many times faster, then of the whole process."""
    peer, ours = row(file, "llm-compressor"), row(file, "counterweight")
    begun, whole = ([float(one[name]) for one in (ours, peer)] for name in ("median", "median 2"))
    return [*begun, begun[1] / begun[0], *whole]


FIRST, SECOND = speed("2026-11-22-speed-earlier.md"), speed("2026-11-22-speed.md")
GENERATION, MEMORY, BRANCHES = "2026-11-22-generation-demo.md", "2026-11-22-memory.md", "2026-11-25-branches.md"
PEERS = "2026-11-27-peers.md"
DECODING, PROMPTS = "2026-11-26-kernels.md", "2026-11-26-kernels-prompts.md"


def floor(file: str) -> float:
    """Seconds of the forward pass and of the products, together."""
    found = re.search(r"one forward pass ([\d.]+) s, x\^T x in float32 ([\d.]+) s", (RESULTS / file).read_text())
    assert found is not None
    return float(found[1]) + float(found[2])


def kl(label: str, name: str = "KL") -> float:
    return float(row(BRANCHES, label)[name])


def against(kernel: str, tokens: set[str], *names: str, file: str = DECODING) -> list[float]:
    return [value for name in names for value in column(file, name, kernel, tokens)]


SHARE, TORCH, TINYGEMM = "share of floor", "times torch bf16", "times tinygemm"
W4, W4A8, W3, W2 = "W4A16, groups of 128", "W4A8 prompt, per channel", "W3A16, groups of 128", "W2A16, groups of 128"
LONG = {"1024", "4096"}


@dataclass(frozen=True)
class Said:
    """A sentence of the README: N stands for a figure, and `found` has them in order."""

    sentence: str
    found: Callable[[], list[float]]


def handed_on(out: str, back: str) -> float:
    """CPU seconds of a GB of hidden states on its way from block to block. out, back: rows of the result."""
    return sum(float(row(HIDDEN, label)["median"]) for label in (out, back))


def shared(model: str, workers: str, way: str) -> float:
    """Seconds of the blocks of a model in W4A4 with LRC. way: in which workers have blocks."""
    of_recipe = (one for one in rows(SHARING) if one["recipe"] == "W4A4 LRC 10 %" and one["workers"] == workers)
    (found,) = (one for one in of_recipe if one["model"] == model)
    return float(found[f"{way}, s"])


def beside(tool: str, name: str) -> float:
    """A median, or a number that stands alone, of one tool beside others."""
    (found,) = (one for one in rows(PEERS) if one["tool"] == tool)
    return float(found[name].split(" / ")[-1])


TOKENS, PROCESS, PEAK, PERPLEXITY = (
    "tokens to checkpoint, s",
    "whole process, s",
    "peak, MiB",
    "perplexity, loaded again",
)

SAID = (
    Said(
        "to checkpoint N s against N s of it (N times faster), whole processes N s against N s, N MiB against N MiB; "
        "perplexity N against N",
        lambda: [
            (ours := beside("counterweight", TOKENS)),
            (theirs := beside("llmcompressor", TOKENS)),
            theirs / ours,
            *(
                beside(tool, name)
                for name in (PROCESS, PEAK, PERPLEXITY)
                for tool in ("counterweight", "llmcompressor")
            ),
        ],
    ),
    Said("the process takes N s", lambda: [beside("whole", PROCESS)]),
    Said(
        "eight H100 take N s for Mixtral-8x7B's blocks in W4A4 with LRC, one at a time N s, a single GPU N s",
        lambda: [
            shared("Mixtral-8x7B", workers, way) for workers, way in (("8", "shared"), ("8", "apart"), ("1", "shared"))
        ],
    ),
    Said(
        "Llama-3-8B's take N s for N s: what is waited for",
        lambda: [shared("Llama-3-8B", "8", way) for way in ("shared", "apart")],
    ),
    Said(
        "takes N CPU s a GB through a file store, N in the object store and N in memory",
        lambda: [
            handed_on("hand on, through the store", "take over, from the store"),
            handed_on("hand on, in the object store", "take over, from the object store"),
            handed_on("hand on, in memory", "take over, from memory"),
        ],
    ),
    Said("takes N s and N s against N s and N s of llm-compressor", lambda: [FIRST[0], SECOND[0], FIRST[1], SECOND[1]]),
    Said("(N and N times faster)", lambda: [FIRST[2], SECOND[2]]),
    Said("took N s and N s against N s and N s: as long", lambda: [FIRST[3], SECOND[3], FIRST[4], SECOND[4]]),
    Said(
        "take N s and N s on these cores",
        lambda: [floor("2026-11-22-speed-earlier.md"), floor("2026-11-22-speed.md")],
    ),
    Said(
        "N ms per token of the compensated demo model against N ms of the original in bfloat16 (N times as long), without "
        "its branch N ms",
        lambda: [
            float(row(GENERATION, label)[name])
            for label, name in (
                ("compensated", "ms per token, median"),
                ("original, transformers", "ms per token, median"),
                ("compensated", "times the original"),
                ("quantized, without compensation", "ms per token, median"),
            )
        ],
    ),
    Said(
        "N MiB for N layers and N MiB for N layers of the same width",
        lambda: [value for depth in ("4", "16") for value in (float(row(MEMORY, depth)["highest"]), float(depth))],
    ),
    Said(
        "has a KL of N, SRR N, H-SVDQuant N, SERQ N, whitened SVD N;",
        lambda: [
            kl(label)
            for label in ("LRC, int4, codes last", "SRR, int4", "H-SVDQuant, bf16", "SERQ", "whitened SVD, int4")
        ],
    ),
    Said(
        "3 bits with a larger branch (N); a mixed target ties (N, and N for N on the second text)",
        lambda: [
            kl("LRC, int4, codes last, codes of 3 bits"),
            kl("LRC, int4, codes last, mixed target"),
            kl("LRC, int4, codes last, mixed target", "its KL"),
            kl("LRC, int4, codes last", "its KL"),
        ],
    ),
    Said("five layers of 8B and 70B | N to N | N to N | N to N |", lambda: against(W4, {"1"}, SHARE, TORCH, TINYGEMM)),
    Said("| 16 tokens | N to N | N to N | N to N |", lambda: against(W4, {"16"}, SHARE, TORCH, TINYGEMM)),
    Said("| one token, W3A16 | N to N | N to N |", lambda: against(W3, {"1"}, SHARE, TORCH)),
    Said("| one token, W2A16 | N to N | N to N |", lambda: against(W2, {"1"}, SHARE, TORCH)),
    Said(
        "1024 and 4096 tokens, W4A16 | N to N | N to N |",
        lambda: against("W4A16 prompt, groups of 128", LONG, SHARE, TORCH, file=PROMPTS),
    ),
    Said("| the same, W4A8 per channel | N to N | N to N |", lambda: against(W4A8, LONG, SHARE, TORCH, file=PROMPTS)),
    Said(
        "pinned host memory at up to N GB/s",
        lambda: [max(float(value) for value in re.findall(r"([\d.]+) GB/s", (RESULTS / PROMPTS).read_text()))],
    ),
)


def figures(said: Said) -> list[str]:
    """The figures of a sentence, as the README has them."""
    pattern = re.escape(said.sentence).replace(r"\ ", r"\s+").replace("N", r"(\d*\.?\d+)")
    found = re.findall(pattern, (ROOT / "README.md").read_text())
    assert len(found) == 1, f"the README does not say once: {said.sentence}"
    return list(found[0]) if isinstance(found[0], tuple) else found


def rounded(value: float, like: str) -> str:
    """The number with as many decimals as a figure has."""
    exact = Decimal(str(value)).quantize(Decimal(1).scaleb(-len(like.partition(".")[2])), ROUND_HALF_UP)
    return str(exact).removeprefix("0" if like.startswith(".") else "")


@pytest.mark.parametrize("said", SAID, ids=lambda said: said.sentence[:40])
def test_a_figure_is_that_of_its_result_file(said: Said) -> None:
    shown = figures(said)
    assert shown == [rounded(value, like) for value, like in zip(said.found(), shown, strict=True)]


def sizes() -> str:
    """The table of docs/operations.md."""
    lines = ["| model | recipe | workers | time | GPU-hours | peak of a GPU | read / written |", "|---" * 7 + "|"]
    for model, recipe, workers in SIZES:
        (found,) = [one for one in rows(PLANS, f"## {recipe}") if (one["model"], one["workers"]) == (model, workers)]
        cells = [
            model,
            recipe,
            *(found[name] for name in ("workers", "time", "GPU-hours", "peak of a GPU", "read / written")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_sizes(text: str) -> str:
    """The document with the table between its marks."""
    return re.sub(
        r"(<!-- sizes: python -m tests.docs.test_figures -->\n).*?(\n<!-- end -->)",
        lambda marks: marks[1] + sizes() + marks[2],
        text,
        flags=re.DOTALL,
    )


def test_the_table_of_sizes_is_that_of_the_plans() -> None:
    text = OPERATIONS.read_text()
    assert "<!-- sizes:" in text
    assert with_sizes(text) == text


def test_a_block_on_a_gpu_takes_what_was_measured() -> None:
    """Seconds of calibrating and of solving, now and before."""
    text = (RESULTS / BLOCK).read_text()
    sections = re.split("## The same block before|Before that, the same day", text)
    seconds = [
        sum(
            float(cell)
            for cell in re.findall(rf"^\| {name}[^|]+\| (?:calibrate|solve and store) \| \S+ \| (\S+) ", part, re.M)
        )
        for name, part in (("Mixtral", sections[0]), ("Qwen3", sections[0]), ("Mixtral", sections[-1]))
    ]
    solve, _ = [float(one["measured, s"]) for one in rows(BLOCK, "Where the seconds went") if one["phase"] == "solve"]
    readme = (ROOT / "README.md").read_text()
    assert f"on an H200 in {seconds[0]:.0f} s, {seconds[2]:.0f} s before" in readme
    assert f"{solve:.0f} s of them are the solves" in readme
    assert f"One of Qwen3-30B-A3B takes {seconds[1]:.0f} s" in readme


def test_what_drawn_sequences_cost() -> None:
    """CPU seconds of a run with three times the sequences against one with none."""
    cost = {one["drawn"]: float(one["CPU s"]) for one in rows(DRAWING, "128 sequences")}
    assert round(cost["384"] / cost["0"], 1) == 1.5
    assert "a run costs half of its CPU seconds again" in (ROOT / "README.md").read_text()


def test_every_result_file_that_the_readme_names_is_looked_at() -> None:
    """Or has a generator of its own."""
    named = set(re.findall(r"\(benchmarks/results/([^)]+)\)", (ROOT / "README.md").read_text()))
    looked = {
        "2026-11-22-speed-earlier.md",
        "2026-11-22-speed.md",
        GENERATION,
        MEMORY,
        BRANCHES,
        DECODING,
        PROMPTS,
        BLOCK,
        HIDDEN,
        SHARING,
        PEERS,
    }
    looked |= {DRAWING, "serving.json"}  # the latter in tests/stock/test_matrix.py
    assert named - looked == {"2026-11-26-quality.md"}


if __name__ == "__main__":
    OPERATIONS.write_text(with_sizes(OPERATIONS.read_text()))
