"""The `counterweight` command. Every import that costs time is inside the command that needs it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterweight.pipeline import artifact_commands, hub_commands, init_command
from counterweight.pipeline.jobs import commands as job_commands
from counterweight.pipeline.judging import commands as judging_commands
from counterweight.pipeline.judging.commands import figures_text
from counterweight.pipeline.log_format import Format, LogFormat
from counterweight.pipeline.policies import Resume
from counterweight.pipeline.service import commands as service_commands
from counterweight.pipeline.signals import terminable
from counterweight.pipeline.terminal import SET_HELP
from counterweight.pipeline.terminal import absolute as _absolute
from counterweight.pipeline.terminal import print_json as _print_json
from counterweight.pipeline.terminal import print_rows as _print_rows
from counterweight.pipeline.units import bytes_text

if TYPE_CHECKING:
    from counterweight.pipeline.artifact import ArtifactDocument

app = typer.Typer(
    name="counterweight",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Manifest = Annotated[str, typer.Argument(help="Path or URI of a manifest (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help=SET_HELP,
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
ArtifactUri = Annotated[
    str, typer.Argument(help="URI of an artifact; of a name, for its latest artifact; or NAME@TAG.", show_default=False)
]


INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a command that a SIGINT or SIGTERM ended, as shells have them."""

DEFECT = 70
"""Exit code for an error that nobody raised on purpose (EX_SOFTWARE of sysexits.h)."""

SHOWN = 20
"""Unknown objects that `prune` names; with --json it names all."""

USAGE_ERROR: Any = typer.BadParameter.__base__
"""What every misuse of the command line is. typer may bring its own copy of click, whose classes only it exports."""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"counterweight {version('counterweight')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compress large language models to 2-8 bits, and put back what quantization takes away."""


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
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MANIFEST",
            help="A job of the same sweep, whose blocks are compressed from this one's calibration; its own run finds them "
            "finished. Repeatable.",
            show_default=False,
        ),
    ] = None,
    log_format: Format = LogFormat.TEXT,
    as_json: AsJson = False,
    verbose: Annotated[
        bool | None,
        typer.Option(
            "--verbose/--quiet", "-v/-q", help="Show every event of the job with its time; or nothing but errors."
        ),
    ] = None,
) -> None:
    """Run a job to the end; the last line of stdout is the artifact's URI (with --json: its `uri`)."""
    from counterweight.workers.process import importing

    with importing():
        from counterweight.pipeline.manifest import load_manifest

    overrides = [*(set_ or []), *([] if output is None else [f"spec.output.uri={json.dumps(_absolute(output))}"])]
    job = load_manifest(manifest, overrides).job
    others = [load_manifest(other, []).job for other in beside or []]
    from counterweight.pipeline.events import Summary
    from counterweight.pipeline.progress import make_progress

    with make_progress(sys.stderr, verbose=verbose, json=log_format is LogFormat.JSON) as progress:
        from counterweight.pipeline.run import run_job

        # Ray's threads print what they think of dead workers; stdout holds the result and nothing else.
        with redirect_stdout(sys.stderr):
            published = run_job(job, progress, address=address, resume=resume, beside=others)
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
        from counterweight.pipeline.foresight import foresee
    found = foresee(job, device)
    if as_json:
        facts = {"reuse": list(found.reuse), "notes": list(found.notes)}
        _print_json({**found.plan.model_dump(mode="json"), **facts})
        return
    from counterweight.pipeline.plan_text import rows

    _print_rows(f"plan of {found.plan.name}", rows(found, job.spec.resources.gpus_per_worker))


@app.command()
def pull(uri: ArtifactUri, destination: str, as_json: AsJson = False) -> None:
    """Download an artifact, resuming where an earlier pull stopped; every byte is checked. From a service, with its token in
    COUNTERWEIGHT_TOKEN: https://host/v1/artifacts/NAME/ID."""
    from counterweight.pipeline.artifact import pull as fetch_artifact
    from counterweight.pipeline.artifact.hub import located
    from counterweight.pipeline.artifact.remote import is_remote

    place = uri if is_remote(uri) else located(_absolute(uri))
    document = fetch_artifact(place, _folder(destination), _nothing if as_json else _each_file)
    facts = {"id": document.id, "files": len(document.files), "bytes": sum(f.size for f in document.files.values())}
    if as_json:
        _print_json({**facts, "destination": destination})
        return
    _print_rows(f"pulled {document.name}", [(name, str(value)) for name, value in facts.items()])
    typer.echo(destination)


@app.command()
def verify(uri: ArtifactUri, as_json: AsJson = False) -> None:
    """Read every byte of an artifact and compare it with its digest."""
    from counterweight.pipeline.artifact import verify as check_artifact
    from counterweight.pipeline.artifact.hub import located

    document = check_artifact(located(_absolute(uri)), _nothing if as_json else _each_file)
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


@app.command()
def schema(
    kind: Annotated[
        str, typer.Option(help="manifest, or a document of an artifact: artifact, ledger, report.")
    ] = "manifest",
) -> None:
    """Print the JSON Schema of manifests, or of what an artifact holds."""
    from counterweight.pipeline.schemas import schema_of

    typer.echo(schema_of(kind), nl=False)


artifact_commands.register(app)
judging_commands.register(app)
job_commands.register(app)
service_commands.register(app)
hub_commands.register(app)
init_command.register(app)


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
        words = (word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("-"))
        resumable = next(words, None) == "run"
        kept = ": finished blocks are kept; run the same command again to resume" if resumable else ""
        typer.echo(f"{what}{kept}", err=True)
    return code if isinstance(code, int) else 0


def entry() -> None:
    """The console script."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left to do, but taking torch and transformers apart piece by piece would last more than a second.
    os._exit(code)


def _folder(destination: str) -> Path:
    """A folder on this machine; RequestError for a URI: `pull` does not upload."""
    from counterweight.workers.errors import RequestError

    if destination.startswith("file:"):
        from counterweight.workers.storage.names import file_root

        root = file_root(_absolute(destination))
        assert root is not None
        return root
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", destination):
        hint = "; `counterweight push` uploads to a hub" if destination.startswith("hf:") else ""
        raise RequestError(
            f"{destination}: expected a folder on this machine{hint}; ./{destination} for one of that name"
        )
    return Path(destination)


def _nothing(path: str, size: int) -> None:
    """With --json."""


def _each_file(path: str, size: int) -> None:
    typer.echo(f"{path}  {bytes_text(size)}", err=True)


def _summary(document: ArtifactDocument, uri: str) -> list[tuple[str, str]]:
    from counterweight.pipeline.artifact.report import labelled

    found = labelled(document.qualities)
    rows = [(label, "   ".join(figures_text(quality)[:2])) for label, quality in found.items()]
    bits = document.bits_per_weight
    parts = ", ".join(f"{value:.3f} {name}" for name, value in bits.parts.items())
    rows.append(("bits per weight", f"{bits.total:.3f} all in ({parts})"))
    rows.append(("report", f"{uri}/report/report.html"))
    return rows


if __name__ == "__main__":
    entry()
