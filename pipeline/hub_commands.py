"""`counterweight push`: an artifact to Hugging Face's hub."""

from __future__ import annotations

from typing import Annotated

import typer

from counterweight.pipeline.terminal import absolute, print_json
from counterweight.pipeline.units import bytes_text


def push(
    artifact: Annotated[
        str, typer.Argument(help="URI of an artifact, or of a name for its latest.", show_default=False)
    ],
    repository: Annotated[str, typer.Argument(help="hf:owner/name, made where there is none.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Upload an artifact to Hugging Face's hub, in one commit, every byte checked before. The token is the hub client's own:
    HF_TOKEN, or what `hf auth login` keeps."""
    from counterweight.pipeline.artifact.hub import push as upload

    def each(path: str, size: int) -> None:
        if not as_json:
            typer.echo(f"{path}  {bytes_text(size)}", err=True)

    url = upload(absolute(artifact), repository, private=private, done=each)
    if as_json:
        print_json({"repository": repository, "url": url})
    else:
        typer.echo(url)


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(push)
