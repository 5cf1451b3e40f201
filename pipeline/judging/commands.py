"""The command that measures an artifact again. Every import that costs time is inside the command that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from counterweight.pipeline.terminal import absolute, print_json, print_rows

if TYPE_CHECKING:
    from counterweight.pipeline.artifact.report import Judged, Quality

Text = Annotated[str | None, typer.Option(help="URI or path of a text; default: the report's.", show_default=False)]
Windows = Annotated[int | None, typer.Option(help="Windows to measure; default: the report's, or all.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a window; default: the report's.")]
DeviceName = Annotated[str, typer.Option(help="cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the commands that measure to the application."""
    app.command("eval")(evaluate)


def evaluate(
    artifact: Annotated[
        str, typer.Argument(help="URI of an artifact, or of a name for its latest artifact.", show_default=False)
    ],
    against: Annotated[
        str | None, typer.Option(help="Where the original model is; default: where it was.", show_default=False)
    ] = None,
    text: Text = None,
    windows: Windows = None,
    sequence_length: Length = None,
    device: DeviceName = "cpu",
    as_json: AsJson = False,
) -> None:
    """Validate an artifact again: perplexity, KL and agreement, against the model it was made from."""
    from counterweight.pipeline.artifact.report import labelled
    from counterweight.pipeline.evaluate import Wanted, evaluate_artifact

    wanted = Wanted(
        text=None if text is None else absolute(text),
        windows=windows,
        sequence_length=sequence_length,
        device=device,
        note=told,
    )
    found = evaluate_artifact(absolute(artifact), against=None if against is None else absolute(against), wanted=wanted)
    first, *further = found
    if as_json:
        texts = {name: _figures(found[name]) for name in further}
        print_json({**_figures(found[first]), **({"texts": texts} if texts else {})})
        return
    for name, judged in found.items():
        title = artifact if name == first else f"{artifact} on {name}"
        rows = [(label, "   ".join(figures_text(quality))) for label, quality in labelled(judged.qualities).items()]
        print_rows(title, rows)


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
