"""Where in a manifest's text a field stands, so that what is wrong with it is shown there."""

from __future__ import annotations

import re

import yaml

from counterweight.pipeline.manifest.document import parse_yaml
from counterweight.pipeline.manifest.problems import Path, path_text
from counterweight.pipeline.service.problems import FieldProblem
from counterweight.workers.errors import ManifestError

_LINE = re.compile(r"\bline (?P<line>[0-9]{1,7})\b")


def placed(text: str, problems: list[FieldProblem]) -> dict[int, list[str]]:
    """Line of the text, from 1 -> what is wrong there; 0: of the text as a whole. A field that is missing is told at the
    mapping that should have it."""
    try:
        parse_yaml(text, name="manifest")
        lines = _lines(text)
    except ManifestError:  # which names a line itself
        lines = {}
    found: dict[int, list[str]] = {}
    for one in problems:
        said = f"{one.field}: {one.detail}" if one.field else one.detail
        found.setdefault(_line(one, lines), []).append(said)
    return found


def _line(one: FieldProblem, lines: dict[str, int]) -> int:
    steps = one.field.split(".")
    for count in range(len(steps), 0, -1):
        if (line := lines.get(".".join(steps[:count]))) is not None:
            return line
    match = _LINE.search(one.detail) or _LINE.search(one.field)
    return 0 if match is None else int(match["line"])


def _lines(text: str) -> dict[str, int]:
    """Path of each field -> its line. The text was read before, under the limits of manifests."""
    found: dict[str, int] = {}

    def walk(node: yaml.Node | None, path: Path) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                note(key, (*path, str(key.value)))
                walk(value, (*path, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                note(value, (*path, index))
                walk(value, (*path, index))

    def note(node: yaml.Node, path: Path) -> None:
        found[path_text(path)] = node.start_mark.line + 1

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return found
