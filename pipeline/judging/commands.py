"""The commands that measure models, alone and side by side. Imports that cost time are inside the command that needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterweight.pipeline.command_options import with_options
from counterweight.pipeline.judging.wanted import Wanted
from counterweight.pipeline.terminal import absolute, print_json, print_rows, print_table

if TYPE_CHECKING:
    from counterweight.pipeline.artifact.report import Judged, Quality
    from counterweight.pipeline.judging.compare import Row

AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


def measured_on(
    against: Annotated[
        str | None, typer.Option(help="Where the original model is; default: where it was.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="URI or path of a text; default: the report's.", show_default=False)
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows to measure; default: the report's, or all.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a window; default: the report's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> Wanted:
    """What the options say that both commands have."""
    return Wanted(
        against=None if against is None else absolute(against),
        text=None if text is None else absolute(text),
        windows=windows,
        sequence_length=sequence_length,
        device=device,
        note=told,
    )


def register(app: typer.Typer) -> None:
    """Adds the commands that measure to the application."""
    app.command("eval")(evaluate)
    app.command()(compare)


@with_options(measured_on)
def evaluate(
    artifact: Annotated[
        str,
        typer.Argument(
            help="URI of an artifact, or of a name for its latest artifact; or a checkpoint that transformers loads.",
            show_default=False,
        ),
    ],
    wanted: Wanted,
    as_json: AsJson = False,
) -> None:
    """Validate an artifact again: perplexity, KL and agreement, against the model it was made from."""
    from counterweight.pipeline.artifact.report import labelled
    from counterweight.pipeline.evaluate import evaluate_artifact
    from counterweight.pipeline.judging.foreign import is_ours

    if not is_ours(absolute(artifact)):
        _print_comparison([artifact], wanted, as_json=as_json)
        return
    found = evaluate_artifact(absolute(artifact), wanted)
    first, *further = found
    if as_json:
        texts = {name: _figures(found[name]) for name in further}
        print_json({**_figures(found[first]), **({"texts": texts} if texts else {})})
        return
    for name, judged in found.items():
        title = artifact if name == first else f"{artifact} on {name}"
        rows = [(label, "   ".join(figures_text(quality))) for label, quality in labelled(judged.qualities).items()]
        print_rows(title, rows)


@with_options(measured_on)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(help="Artifacts, and checkpoints of any kind that transformers loads.", show_default=False),
    ],
    wanted: Wanted,
    output: Annotated[
        Path | None, typer.Option(help="Folder for compare.json and compare.html.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure models side by side on the same tokens: bits per weight against perplexity, KL and agreement."""
    rows = _print_comparison(models, wanted, as_json=as_json)
    if output is not None:
        from counterweight.pipeline.judging.compare_page import write_comparison

        write_comparison(rows, output)


def _print_comparison(models: Sequence[str], wanted: Wanted, *, as_json: bool) -> tuple[Row, ...]:
    from counterweight.pipeline.judging.compare import compare as measured
    from counterweight.pipeline.judging.compare_page import table_rows

    rows = measured([absolute(model) for model in models], wanted)
    if as_json:
        print_json([row.facts() for row in rows])
        return rows
    for name in rows[0].texts:
        if len(rows[0].texts) > 1:
            typer.echo(name)
        print_table(table_rows(rows, name))
    return rows


def told(line: str) -> None:
    """What a command that takes a while is doing, on stderr."""
    typer.echo(line, err=True)


def figures_text(quality: Quality) -> list[str]:
    """Each metric with its number."""
    from counterweight.workers.metrics import METRICS

    found = [(metric, quality.of(metric)) for metric in METRICS]
    return [f"{metric.short} {value:{metric.digits}}" for metric, value in found if value is not None]


def _figures(judged: Judged) -> dict[str, object]:
    """Variant -> metrics."""
    return {name: quality.model_dump() for name, quality in judged.qualities.items()}
