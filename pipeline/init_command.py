"""`counterweight init`: a manifest to begin with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def init(
    model: Annotated[
        str, typer.Argument(help="Path or URI of a model: a folder, s3://..., hf:owner/name.", show_default=False)
    ],
    path: Annotated[Path, typer.Argument(help="Where the manifest goes; - for stdout.")] = Path("job.yaml"),
    text: Annotated[
        str | None, typer.Option(help="A text to calibrate on; default: WikiText-2 from the hub.", show_default=False)
    ] = None,
    held: Annotated[
        str | None, typer.Option("--validation", help="A text to validate on; likewise.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Where artifacts go; default: a folder out.", show_default=False)
    ] = None,
) -> None:
    """Write a commented manifest for a model, to be changed and run."""
    from counterweight.pipeline.manifest import load_manifest
    from counterweight.pipeline.starter import Choices, starter
    from counterweight.workers.errors import RequestError

    written = starter(
        model,
        _from(path, model) or model,
        Choices(text=_from(path, text), held=_from(path, held), output=_from(path, output)),
    )
    if str(path) == "-":
        typer.echo(written, nl=False)
        return
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(written)
    except FileExistsError as error:
        raise RequestError(f"{path}: there already: expected another path") from error
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror}") from error
    load_manifest(str(path))
    typer.echo(f"{path}: look it over, then: counterweight plan {path}", err=True)
    typer.echo(str(path))


def _from(manifest: Path, named: str | None) -> str | None:
    """A relative path, relative to the manifest instead of the working directory; a URI as it is."""
    if named is None or ":" in named or named.startswith("/"):
        return named
    return os.path.relpath(named, manifest.parent)


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(init)
