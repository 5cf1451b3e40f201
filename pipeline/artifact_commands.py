"""Commands about published artifacts. Every import that costs time is inside the command that needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from counterweight.pipeline.terminal import absolute, print_json, print_rows


def tag(
    uri: Annotated[
        str, typer.Argument(help="URI of an artifact, or of a name: then its latest artifact.", show_default=False)
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="TAG", help="Such as production; without one, all are listed.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Only where the tag is on this artifact now; none: on nothing.", show_default=False
        ),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the tag away.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Put a tag on an artifact, or list those of its name. OUTPUT/NAME@TAG is then the artifact's URI for every command."""
    from counterweight.pipeline.artifact.reader import resolve
    from counterweight.pipeline.artifact.tags import move, put, tags
    from counterweight.workers.errors import RequestError
    from counterweight.workers.storage import open_store

    if name is None and (delete or expect is not None):
        raise RequestError("--delete, --expect: expected a tag")
    store, document = resolve(absolute(uri))
    names = open_store(store.uri.rstrip("/").rpartition("/")[0])
    if name is not None:
        to = None if delete else document.id
        if expect is None:
            put(names, name, to)
        else:
            move(names, name, to, before=None if expect == "none" else expect)
    found = tags(names)
    if as_json:
        print_json({"name": document.name, "id": document.id, "tags": found})
    else:
        print_rows(f"tags of {names.uri}", list(found.items()) or [("none", "")])


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(tag)
