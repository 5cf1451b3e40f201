"""The `counterweight` command. Every import that costs time is inside the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterweight.pipeline.jobs import commands as job_commands
from counterweight.pipeline.policies import Resume
from counterweight.pipeline.service import commands as service_commands
from counterweight.pipeline.signals import terminable
from counterweight.pipeline.terminal import absolute as _absolute
from counterweight.pipeline.terminal import print_json as _print_json
from counterweight.pipeline.terminal import print_rows as _print_rows
from counterweight.pipeline.units import bytes_text

if TYPE_CHECKING:
    from counterweight.pipeline.artifact import ArtifactDocument
    from counterweight.pipeline.artifact.report import Quality

app = typer.Typer(
    name="counterweight",
    help="Compress large language models to 2-8 bits, and put back what quantization takes away.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Manifest = Annotated[str, typer.Argument(help="Path or URI of a manifest (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: spec.recipe.weights.bits=3. Repeatable.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
ArtifactUri = Annotated[
    str, typer.Argument(help="URI of an artifact, or of a name for its latest artifact.", show_default=False)
]


INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a command that a SIGINT or SIGTERM ended, as shells have them."""

DEFECT = 70
"""Exit code for an error that nobody raised on purpose (EX_SOFTWARE of sysexits.h)."""

SHOWN = 20
"""Unknown objects that `prune` names; with --json it names all."""

USAGE_ERROR: Any = typer.BadParameter.__base__
"""What every misuse of the command line is. typer may bring its own copy of click, whose classes only it exports."""


@app.command()
def run(
    manifest: Manifest,
    set_: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Replaces spec.output.uri.", show_default=False)] = None,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="auto or ray://host:port: a Ray that runs; local: one of the job's own; none: no Ray, workers are forks of "
            "this process. Default: none for a single worker on a CPU, else local.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Resume,
        typer.Option(
            help="Of work that earlier runs have finished in this output: take over what is the same; refuse to begin "
            "without any; or do everything anew."
        ),
    ] = Resume.AUTO,
    as_json: AsJson = False,
) -> None:
    """Run a job to the end; the last line of stdout is the artifact's URI (with --json: its `uri`)."""
    from counterweight.workers.process import importing

    with importing():
        from counterweight.pipeline.manifest import load_manifest

    overrides = [*(set_ or []), *([] if output is None else [f"spec.output.uri={json.dumps(_absolute(output))}"])]
    job = load_manifest(manifest, overrides).job
    from counterweight.pipeline.events import Summary
    from counterweight.pipeline.progress import make_progress
    from counterweight.pipeline.run import run_job  # a wrong manifest need not wait for transformers and Ray

    with make_progress(sys.stderr) as progress:
        # Ray's threads print what they think of dead workers; stdout holds the result and nothing else.
        with redirect_stdout(sys.stderr):
            published = run_job(job, progress, address=address, resume=resume)
        progress.on(Summary(_summary(published.document, published.uri)))
    if as_json:
        _print_json({"uri": published.uri, **published.document.model_dump(mode="json")})
    else:
        typer.echo(published.uri)


@app.command()
def plan(
    manifest: Manifest,
    set_: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="The workers' GPU, such as H100-80G, or a file of measured rates: does it fit, and how long does it take?",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Replaces spec.resources.workers.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a job would do and need, from headers alone."""
    from counterweight.workers.process import importing

    with importing():
        from counterweight.pipeline.manifest import load_manifest

    overrides = [*(set_ or []), *([] if workers is None else [f"spec.resources.workers={workers}"])]
    job = load_manifest(manifest, overrides).job
    with importing():
        from counterweight.pipeline.model_source import open_model
        from counterweight.pipeline.plan import make_plan
        from counterweight.pipeline.preflight import check_apart
        from counterweight.pipeline.resume import foreseen

        source = open_model(job.spec.model.uri)  # which imports transformers
    check_apart(job.spec.output.uri, source.uri)
    made = make_plan(job, source, device)
    reused = foreseen(job, source, made)
    unknown = job.spec.resources.gpus_per_worker > 0 and device is None
    fits = "not known: name the workers' GPU with --device" if unknown else "nothing"
    if as_json:
        _print_json({**made.model_dump(mode="json"), "reuse": reused})
        return
    peak = f"{bytes_text(made.peak_bytes_per_worker)} ({made.largest})"
    sums = {name: sum(block.phases[name] for block in made.blocks) for name in made.blocks[0].phases}
    phases = ", ".join(f"{name} {count / made.flops:.0%}" for name, count in sums.items() if count)
    if job.spec.resources.gpus_per_worker:
        peak = f"{peak} on its GPU, {bytes_text(made.host_bytes_per_worker)} on the host"
    _print_rows(
        f"plan of {made.name}",
        [
            ("model", f"{made.model_type}, {made.parameters:,} parameters, {bytes_text(made.source_bytes)}"),
            ("quantized", f"{made.quantized:,} weights in {len(made.blocks)} blocks"),
            (
                "calibration",
                f"{made.tokens:,} tokens" + (f", {made.drawn_tokens:,} drawn" if made.drawn_tokens else ""),
            ),
            ("peak per worker", peak),
            ("arithmetic", f"{made.flops / 1e12:.3g} TFLOP ({phases})"),
            (
                "storage",
                f"{bytes_text(made.storage_read_bytes)} read, {bytes_text(made.storage_written_bytes)} written",
            ),
            *([] if made.estimate is None else made.estimate.rows()),
            ("headers read", bytes_text(made.header_bytes_read)),
            ("divided", "; ".join(made.divided) or "nothing"),
            *(("reuse", line) for line in reused),
            ("does not fit", "; ".join(made.problems) or fits),
        ],
    )


@app.command()
def pull(uri: ArtifactUri, destination: Path, as_json: AsJson = False) -> None:
    """Download an artifact, resuming where an earlier pull stopped; every byte is checked."""
    from counterweight.pipeline.artifact import pull as fetch_artifact

    document = fetch_artifact(_absolute(uri), destination, _each_file)
    facts = {"id": document.id, "files": len(document.files), "bytes": sum(f.size for f in document.files.values())}
    if as_json:
        _print_json({**facts, "destination": str(destination)})
        return
    _print_rows(f"pulled {document.name}", [(name, str(value)) for name, value in facts.items()])
    typer.echo(str(destination))


@app.command()
def verify(uri: ArtifactUri, as_json: AsJson = False) -> None:
    """Read every byte of an artifact and compare it with its digest."""
    from counterweight.pipeline.artifact import verify as check_artifact

    document = check_artifact(_absolute(uri), _each_file)
    facts = {"id": document.id, "files": len(document.files), "bytes": sum(f.size for f in document.files.values())}
    if as_json:
        _print_json(facts)
    else:
        _print_rows(f"{document.name} is whole", [(name, str(value)) for name, value in facts.items()])


@app.command()
def prune(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT_URI", help="URI of the output that jobs write to.", show_default=False)
    ],
    older_than: Annotated[
        str,
        typer.Option(
            help="Spare what is younger: 36h, 7d, 2w. It must exceed the longest run of a job by an hour; 0 is for an "
            "output that no job writes to now."
        ),
    ] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove from an output what nothing refers to and nobody used for a while; published artifacts stay."""
    from counterweight.pipeline.units import duration

    age = duration(older_than, "--older-than")
    from counterweight.pipeline.prune import prune as prune_output

    pruned = prune_output(_absolute(output), age, dry_run=dry_run)
    if as_json:
        _print_json(pruned.facts())
        return
    for key in pruned.left[:SHOWN]:
        typer.echo(f"left alone, not of our making: {key}", err=True)
    if len(pruned.left) > SHOWN:
        typer.echo(f"left alone, not of our making: {len(pruned.left) - SHOWN} more (all with --json)", err=True)
    rows = [(kind, f"{tally.objects} objects, {bytes_text(tally.bytes)}") for kind, tally in pruned.removed.items()]
    total = ("total", f"{pruned.total.objects} objects, {bytes_text(pruned.total.bytes)}")
    _print_rows(f"{'would be removed' if dry_run else 'removed'} from {pruned.uri}", [*rows, total])


@app.command("eval")
def evaluate(
    artifact: ArtifactUri,
    against: Annotated[
        str | None, typer.Option(help="Where the original model is; default: where it was.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="URI or path of a text; default: the report's.", show_default=False)
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows to measure; default: the report's, or all.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a window; default: the report's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Validate an artifact again: perplexity, KL and agreement, against the model it was made from."""
    from counterweight.pipeline.artifact.report import labelled
    from counterweight.pipeline.evaluate import evaluate_artifact

    found = evaluate_artifact(
        _absolute(artifact),
        against=None if against is None else _absolute(against),
        text=None if text is None else _absolute(text),
        windows=windows,
        sequence_length=sequence_length,
        device=device,
    )
    if as_json:
        _print_json({name: quality.model_dump() for name, quality in found.items()})
        return
    _print_rows(
        f"{artifact}",
        [(label, "   ".join(_measured(quality))) for label, quality in labelled(found).items()],
    )


@app.command()
def schema() -> None:
    """Print the manifest's JSON Schema."""
    from counterweight.pipeline.manifest import schema_text

    typer.echo(schema_text(), nl=False)


job_commands.register(app)
service_commands.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done; 2 the request is wrong; 3 a gate failed; 4 the surroundings
    failed and a retry makes sense; 70 a defect of ours; 130 interrupted, 143 terminated. Errors are lines on stderr, without a
    traceback: that of a defect is in a file that the line names."""
    from counterweight.workers.errors import CounterweightError

    with terminable() as received:
        try:
            code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        except CounterweightError as error:
            for line in str(error).splitlines():
                typer.echo(f"error: {line}", err=True)
            return error.exit_code
        except USAGE_ERROR as error:
            # Without any command typer has printed the help by now, and there is nothing left to say.
            for line in error.format_message().splitlines():
                typer.echo(f"error: {line}", err=True)
            return 2
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001  the last net: a panic of a library in Rust is no Exception
            from counterweight.pipeline.crash import report_crash

            typer.echo(f"error: {report_crash(error, sys.argv[1:] if arguments is None else arguments)}", err=True)
            return DEFECT
    if code == INTERRUPTED:  # some versions of typer return it, others raise
        what, code = ("terminated", TERMINATED) if received.terminated else ("interrupted", INTERRUPTED)
        typer.echo(f"{what}: finished blocks are kept; run the same command again to resume", err=True)
    return code if isinstance(code, int) else 0


def entry() -> None:
    """The console script."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left to do, but taking torch and transformers apart piece by piece would last more than a second.
    os._exit(code)


def _each_file(path: str, size: int) -> None:
    typer.echo(f"{path}  {bytes_text(size)}", err=True)


def _measured(quality: Quality) -> list[str]:
    """Each metric with its number."""
    from counterweight.workers.metrics import METRICS

    found = [(metric, quality.of(metric)) for metric in METRICS]
    return [f"{metric.short} {value:{metric.digits}}" for metric, value in found if value is not None]


def _summary(document: ArtifactDocument, uri: str) -> list[tuple[str, str]]:
    from counterweight.pipeline.artifact.report import labelled

    found = labelled(document.qualities)
    rows = [(label, "   ".join(_measured(quality)[:2])) for label, quality in found.items()]
    bits = document.bits_per_weight
    parts = ", ".join(f"{value:.3f} {name}" for name, value in bits.parts.items())
    rows.append(("bits per weight", f"{bits.total:.3f} all in ({parts})"))
    rows.append(("report", f"{uri}/report/report.html"))
    return rows


if __name__ == "__main__":
    entry()
