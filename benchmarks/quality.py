"""Every quality table of the README, from manifests: perplexity of reloaded artifacts on two texts, bits all in.

    python benchmarks/quality.py [TABLE[:ROW[:MODEL]] ...] [--record] [--readme] [--check]

`quality.yaml` says what the rows are: a manifest, what `--set` changes in it, the models and the seeds. Each job runs to its
end on one embedded Ray, or is found finished. The first text is the manifest's own, the second 64 windows of the standard
library's documentation (`pydoc_data.topics`). A row's figures are means over seeds, with half of their range.

--record  keeps the figures in `results/DATE-quality.json` (those of rows that did not run are taken over from the file
          before) and the tables, with the command of each row, in `results/DATE-quality.md`
--readme  writes the tables of the newest figures into the README, between their marks; nothing is run
--check   runs the rows and fails when a perplexity or the bits differ from the newest figures by more than 0.2 %
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from pydoc_data.topics import topics

import yaml
from common import RESULTS, ROOT, machine, record, revision, table, versions
from pydantic import Field

from counterweight.pipeline.artifact import Published
from counterweight.pipeline.cluster import cluster
from counterweight.pipeline.evaluate import evaluate_artifact
from counterweight.pipeline.events import EventLog
from counterweight.pipeline.judging.wanted import Wanted
from counterweight.pipeline.manifest import TEXT, CompressionJob, load_manifest
from counterweight.pipeline.pool import PoolSize, threads_per_worker
from counterweight.pipeline.ray_pool import RayPool
from counterweight.workers.config import Config

README = ROOT / "README.md"
TOLERANCE = 0.002
"""Largest relative difference at which a figure counts as reproduced."""
SECOND_WINDOWS = 64


class Row(Config):
    """manifest: file name below `manifests/`, the table's by default. set: what `--set` changes, after the table's."""

    manifest: str | None = None
    set: tuple[str, ...] = ()


class Table(Config):
    """models: folders of reference models that take the place of the manifest's; none: its own. against: the row whose distance
    to the original model the others close, but for rows with a manifest of their own."""

    title: str
    manifest: str | None = None
    set: tuple[str, ...] = ()
    models: tuple[str, ...] = ("",)
    seeds: int = 1
    against: str | None = None
    second_text: bool = True
    rows: Mapping[str, Row]

    def overrides(self, row: str, model: str, seed: int, models: Path) -> list[str]:
        """Of a job, in order."""
        own = [f"spec.model.uri={(models / model).as_uri()}"] if model else []
        seeded = [f"spec.recipe.transforms.0.seed={seed}"] if self.seeds > 1 else []
        return [*self.set, *self.rows[row].set, *seeded, *own]


class Figures(Config):
    """One job. second: of the second text. bits: per quantized weight, all in."""

    original: float
    perplexity: float
    kl: float
    second_original: float | None
    second: float | None
    bits: float
    factors: float
    residual: float


class Cell(Config):
    """A row of a table, on one model: the figures of each seed, the command of the first, and where it was run."""

    command: str
    revision: str
    figures: tuple[Figures, ...] = Field(min_length=1)

    def mean(self, name: str) -> float | None:
        """Of a figure, over the seeds."""
        values = [getattr(one, name) for one in self.figures]
        return None if None in values else statistics.mean(values)

    def told(self, name: str) -> str:
        """The mean, with half of the range."""
        values = [getattr(one, name) for one in self.figures]
        if None in values:
            return ""
        spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"


class Recorded(Config):
    """The newest figures: table -> row -> model -> cell."""

    tables: dict[str, dict[str, dict[str, Cell]]] = Field(default_factory=dict)

    def put(self, place: Place, cell: Cell) -> None:
        self.tables.setdefault(place.table, {}).setdefault(place.row, {})[place.model] = cell

    def get(self, place: Place) -> Cell | None:
        return self.tables.get(place.table, {}).get(place.row, {}).get(place.model)


@dataclass(frozen=True)
class Place:
    """Of a cell."""

    table: str
    row: str
    model: str


def described() -> dict[str, Table]:
    """`quality.yaml`."""
    text = (ROOT / "benchmarks" / "quality.yaml").read_text(encoding="utf-8")
    return {name: Table.model_validate(table) for name, table in yaml.safe_load(text)["tables"].items()}


def newest() -> Recorded:
    """The figures that were recorded last; none yet: empty."""
    files = sorted(RESULTS.glob("*-quality.json"))
    return Recorded.model_validate_json(files[-1].read_text()) if files else Recorded()


def chosen(tables: Mapping[str, Table], asked: Sequence[str]) -> Iterator[Place]:
    """The cells of the tables, or of `TABLE:ROW` or `TABLE:ROW:MODEL`, that were asked for; of all without any."""
    for name in asked or tables:
        table, row, only = (*name.split(":"), "", "")[:3]
        if (
            table not in tables
            or (row and row not in tables[table].rows)
            or (only and only not in tables[table].models)
        ):
            raise SystemExit(
                f"{name}: expected TABLE, TABLE:ROW or TABLE:ROW:MODEL of quality.yaml: {', '.join(tables)}"
            )
        for model in [only] if only else tables[table].models:
            for each in [row] if row else tables[table].rows:
                yield Place(table, each, model)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """models: folder of the reference models. extra: overrides of every job. second: URI of the second text."""

    pool: RayPool
    tables: Mapping[str, Table]
    models: Path
    extra: Sequence[str]
    second: str

    def cell(self, place: Place) -> Cell:
        """Runs the jobs of a row on one model."""
        table = self.tables[place.table]
        manifest = ROOT / "manifests" / (table.rows[place.row].manifest or table.manifest or "")
        figures, commands = [], []
        for seed in range(table.seeds):
            overrides = table.overrides(place.row, place.model, seed, self.models)
            job = load_manifest(str(manifest), [*overrides, *self.extra]).job
            figures.append(self.figures(job, self.run(job), second=table.second_text))
            commands.append(command(manifest, overrides))
        return Cell(command=commands[0], revision=revision(), figures=tuple(figures))

    def run(self, job: CompressionJob) -> Published:
        """One job to its end."""
        from counterweight.pipeline.opening import open_job
        from counterweight.pipeline.orchestrator import Orchestrator

        with EventLog() as log:
            opened = open_job(job, self.pool, log, here=True)
            return Orchestrator(job, opened, self.pool, "cpu", log).run()

    def figures(self, job: CompressionJob, published: Published, *, second: bool) -> Figures:
        """What the job's validation found on the first text, and what the artifact does on the second."""
        document = published.document
        assert document.baseline is not None
        assert document.compensated is not None
        other = self.on_second(published, job.spec.calibration.sequence_length) if second else (None, None)
        bits = document.bits_per_weight
        return Figures(
            original=document.baseline.perplexity,
            perplexity=document.compensated.perplexity,
            kl=document.compensated.kl,
            second_original=other[0],
            second=other[1],
            bits=bits.total,
            factors=bits.factors,
            residual=bits.residual,
        )

    def on_second(self, published: Published, length: int) -> tuple[float, float]:
        """Perplexity of original and artifact, in windows of `length` tokens."""
        wanted = Wanted(text=self.second, windows=SECOND_WINDOWS, sequence_length=length)
        found = evaluate_artifact(published.uri, wanted)[TEXT]
        return found.baseline.perplexity, found.compensated.perplexity


def command(manifest: Path, overrides: Sequence[str]) -> str:
    """That a reader runs for the same artifact; folders of this machine are left out."""
    told = [one.replace("file://", "").rpartition("=") for one in overrides]
    shown = [
        f"{path}=…/{Path(value).name}" if path == "spec.model.uri" else one
        for one, (path, _, value) in zip(overrides, told, strict=True)
    ]
    words = [f"--set {shlex.quote(one)}" for one in shown]
    return " ".join(["counterweight run", str(manifest.relative_to(ROOT)), *words])


def rendered(name: str, described: Table, recorded: Recorded) -> str:
    """The table in Markdown; rows and models without figures are left out."""
    cells_of = recorded.tables.get(name, {})
    models = [model for model in described.models if any(model in row for row in cells_of.values())]
    header = ["recipe"]
    for model in models:
        header += [f"`{model}`" if model else "perplexity"]
        header += ["gap closed"] if described.against else []
        header += ["second text"] if described.second_text else []
        header += ["bits"] if len(models) > 1 else ["KL", "bits"]  # the JSON file has the KL of every row
    rows = []
    for row in described.rows:
        cells = [recorded.get(Place(name, row, model)) for model in models]
        if all(cell is None for cell in cells):
            continue
        line = [row]
        for model, cell in zip(models, cells, strict=True):
            comparable = described.rows[row].manifest is None
            base = recorded.get(Place(name, described.against or "", model)) if comparable else None
            columns = _columns(cell, base, described)
            line += columns[:-2] + columns[-1:] if len(models) > 1 else columns
        rows.append(line)
    originals = []
    for model in models:
        first = next((cell for row in described.rows if (cell := recorded.get(Place(name, row, model)))), None)
        if first is not None:
            second = f", second text {first.told('second_original').partition(' ')[0]}" if described.second_text else ""
            label = f"`{model}` " if model else ""
            originals.append(f"{label}{first.mean('original'):.2f}{second}")
    return table(header, rows) + f"\n\nThe original: {'; '.join(originals)}."


def _columns(cell: Cell | None, base: Cell | None, described: Table) -> list[str]:
    """A row's columns of one model."""
    found = [] if cell is None else [cell.told("perplexity")]
    if cell is not None:
        found += [_closed(cell, base)] if described.against else []
        found += [cell.told("second")] if described.second_text else []
        found += [f"{cell.mean('kl'):.4f}", f"{cell.mean('bits'):.2f}"]
    width = 3 + (described.against is not None) + described.second_text
    return found or [""] * width


def _closed(cell: Cell, base: Cell | None) -> str:
    """How much of the distance between `base` and the original a row closes."""
    if base is None or cell == base:
        return ""
    worst, own, original = base.mean("perplexity"), cell.mean("perplexity"), cell.mean("original")
    assert worst is not None
    assert own is not None
    assert original is not None
    return f"{(worst - own) / (worst - original):.0%}".replace("%", " %") if worst > original else ""


def into_readme(text: str, tables: Mapping[str, Table], recorded: Recorded) -> str:
    """The README with the tables between their marks: `<!-- quality NAME -->` and `<!-- end -->`."""

    def replaced(found: re.Match[str]) -> str:
        name = found[1]
        if name not in tables:
            raise SystemExit(f"README.md: <!-- quality {name} -->: expected a table of quality.yaml")
        return f"<!-- quality {name} -->\n{rendered(name, tables[name], recorded)}\n<!-- end -->"

    return re.sub(r"<!-- quality ([\w-]+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def differences(place: Place, found: Cell, before: Cell | None) -> list[str]:
    """What is not as it was recorded."""
    name = f"{place.table}, {place.row}"
    if before is None:
        return [f"{name}: nothing was recorded: python benchmarks/quality.py {place.table} --record"]
    pairs = {figure: (found.mean(figure), before.mean(figure)) for figure in ("perplexity", "second", "bits")}
    return [
        f"{name}: {figure} {now:.4f}: recorded {then:.4f}, {now / then - 1:+.2%}: expected within {TOLERANCE:.1%}"
        for figure, (now, then) in pairs.items()
        if now is not None and then is not None and abs(now / then - 1) > TOLERANCE
    ]


def documentation(place: Path) -> str:
    """The second text as a file below `place`; its URI."""
    place.mkdir(parents=True, exist_ok=True)
    path = place / "documentation.txt"
    path.write_text("\n\n".join(text for _, text in sorted(topics.items())), encoding="utf-8")
    return path.as_uri()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="TABLE[:ROW[:MODEL]]")
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--set", action="append", default=[])
    for option in ("record", "readme", "check"):
        parser.add_argument(f"--{option}", action="store_true")
    arguments = parser.parse_args()
    tables, recorded = described(), newest()
    if arguments.readme:
        README.write_text(into_readme(README.read_text(encoding="utf-8"), tables, recorded), encoding="utf-8")
        return
    about = f"{machine()}. {versions('torch', 'transformers')}."
    cpus = threads_per_worker(None, arguments.workers, available=sorted(os.sched_getaffinity(0)))
    size = PoolSize(workers=arguments.workers, cpus=cpus, gpus=0)
    output = arguments.output.resolve()
    wrong: list[str] = []
    with cluster("local", size):
        pool = RayPool(size)
        pool.first()
        extra = [f"spec.output.uri={output.as_uri()}", *arguments.set]
        models = arguments.models.resolve()
        bench = Bench(pool=pool, tables=tables, models=models, extra=extra, second=documentation(output))
        for place in chosen(tables, arguments.rows):
            cell = bench.cell(place)
            wrong += differences(place, cell, recorded.get(place)) if arguments.check else []
            recorded.put(place, cell)
            print(place.table, place.row, place.model, cell.told("perplexity"), cell.told("second"), flush=True)
            if arguments.record:
                kept = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-quality.json"
                kept.write_text(recorded.model_dump_json(indent=1) + "\n")
        pool.close()
    names = dict.fromkeys(place.table for place in chosen(tables, arguments.rows))
    body = "\n\n".join(f"## {tables[name].title}\n\n{rendered(name, tables[name], recorded)}" for name in names)
    print(body)
    if arguments.record:
        print(record("quality", "Quality", f"{_all(tables, recorded)}", about))
    if wrong:
        sys.exit("\n".join(wrong))


def _all(tables: Mapping[str, Table], recorded: Recorded) -> str:
    """Every table that has figures, with the command of each row."""
    parts = []
    for name, described in tables.items():
        if name not in recorded.tables:
            continue
        cells = recorded.tables[name]
        commands = [
            f"- {row}{f', `{model}`' if model else ''} ({cell.revision}): `{cell.command}`"
            for row, own in cells.items()
            for model, cell in own.items()
        ]
        parts.append("\n\n".join([f"## {described.title}", rendered(name, described, recorded), "\n".join(commands)]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
