"""Sequences drawn for experts that see too few tokens (`calibration.drawn`): what they win, and what they cost.

    python benchmarks/drawing.py MANIFEST [--sequences 128 16] [--budgets 0 1 3] [--together 1] [--set ...] [--record NAME]

Whole `counterweight run` processes into empty places, with budgets as multiples of the calibration's sequences. Compared
are the linears of experts that are below their floor where nothing is drawn, by the report's errors on windows that nothing is
solved on, which are the same whatever is drawn: ||(W - Q) x||^2 / ||W x||^2, of an expert that sees fewer than 32 of their
tokens on tokens of its layer. Seconds are of the CPU, of all processes of a run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from common import machine, record, table, versions

from counterweight.pipeline.artifact.report import Report
from counterweight.workers.tasks.records import STARVED, ModuleReport

HEAD = ["drawn", "starved linears", "tokens, median", "own tokens, mean", "worst", "layer's, mean", "worst"]
HEAD += ["all linears, mean", "perplexity", "KL", "CPU s"]


def run(manifest: Path, overrides: Sequence[str]) -> tuple[Report, float]:
    """The report of a run into an empty place, and its CPU seconds, its workers' included."""
    with tempfile.TemporaryDirectory() as output:
        chosen = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "counterweight.pipeline.cli", "run", str(manifest), "--output", output]
        process = subprocess.Popen([*command, *chosen], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: {process.returncode}")
        (report,) = Path(output).glob("*/*/report/report.json")
        return Report.model_validate_json(report.read_text(encoding="utf-8")), used.ru_utime + used.ru_stime


def starved(report: Report) -> list[ModuleReport]:
    """Linears that were solved on tokens of their layer too."""
    return [module for module in report.modules if any(item.step == STARVED for item in module.fallbacks)]


def figures(report: Report, names: set[str]) -> Iterator[str]:
    """A row of `HEAD`, from the second column to the last but one, errors in thousandths. names: linears that are compared."""
    compared = [module for module in report.modules if module.name in names]
    yield f"{len(starved(report))}"
    tokens = sorted(module.tokens for module in compared)
    yield f"{tokens[len(tokens) // 2]:,}" if tokens else ""
    for of_layer in (False, True):
        errors = [
            module.held_out.compensated
            for module in compared
            if module.held_out is not None and module.held_out.of_layer == of_layer
        ]
        known = [1000 * error for error in errors if error is not None]
        yield from (f"{mean(known):.3f}", f"{max(known):.3f}") if known else ("", "")
    whole = [1000 * module.error_after for module in report.modules if module.error_after is not None]
    yield f"{mean(whole):.3f}"
    quality = report.compensated
    yield from ("", "") if quality is None else (f"{quality.perplexity:.3f}", f"{quality.kl:.5f}")


def by_expert(reports: dict[int, Report], names: set[str]) -> str:
    """Tokens and held-out error of each linear that is compared, for every budget."""
    found = {budget: {module.name: module for module in report.modules} for budget, report in reports.items()}
    rows = []
    for name in sorted(names):
        modules = [own[name] for own in found.values()]
        errors = [None if module.held_out is None else module.held_out.compensated for module in modules]
        judged = modules[0].held_out
        rows.append(
            [
                f"`{name}`",
                "" if judged is None else f"{judged.tokens}" + (" of the layer" if judged.of_layer else ""),
                " / ".join(f"{module.tokens:,}" for module in modules),
                " / ".join("" if error is None else f"{1000 * error:.3f}" for error in errors),
            ]
        )
    budgets = " / ".join(f"{budget}x" for budget in reports)
    return table(["linear", "held-out tokens", f"tokens at {budgets}", "error, thousandths"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--sequences", type=int, nargs="+", default=[128])
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--together", type=int, default=1, help="runs at a time")
    parser.add_argument("--set", action="append", default=[], help="a field of the manifest, as for `run`")
    parser.add_argument("--record", help="name of a result file")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers')}."
    body: list[str] = []

    def measured(sequences: int, budget: int) -> tuple[Report, float]:
        asked = [f"spec.calibration.sequences={sequences}", f"spec.calibration.drawn={budget * sequences}"]
        found = run(arguments.manifest.resolve(), [*asked, *arguments.set])
        print(f"{sequences} sequences, {budget * sequences} drawn: {found[1]:.0f} s", flush=True)
        return found

    pairs = [(sequences, budget) for sequences in arguments.sequences for budget in arguments.budgets]
    with ThreadPoolExecutor(arguments.together) as threads:
        runs = dict(zip(pairs, threads.map(lambda pair: measured(*pair), pairs), strict=True))
    for sequences in arguments.sequences:
        reports = {budget: runs[sequences, budget][0] for budget in arguments.budgets}
        names = {module.name for module in starved(reports[arguments.budgets[0]])}
        rows = [
            [f"{budget * sequences}", *figures(report, names), f"{runs[sequences, budget][1]:.0f}"]
            for budget, report in reports.items()
        ]
        blocks = Counter(int(name.split("layers.")[1].split(".")[0]) for name in names)
        where = ", ".join(f"block {block}: {count}" for block, count in sorted(blocks.items()))
        head = f"{sequences} sequences; compared are {len(names)} linears ({where}); errors in thousandths:"
        body += [head, "", table(HEAD, rows), "", by_expert(reports, names) if len(names) <= 24 else "", ""]
    text = "\n".join(body)
    print(text)
    if arguments.record:
        print(record(f"drawing-{arguments.record}", "Sequences drawn for experts", text, about))


if __name__ == "__main__":
    main()
