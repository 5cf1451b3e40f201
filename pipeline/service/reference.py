"""The API's reference as text, from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reference(openapi: Mapping[str, Any]) -> str:
    """A section for each group of routes: method and path, what it does, its parameters, its answers."""
    groups: dict[str, list[str]] = {}
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            groups.setdefault(operation["tags"][0], []).extend(_operation(method, path, operation))
    sections = [f"## {name.capitalize()}\n\n" + "\n".join(lines) for name, lines in groups.items()]
    return "\n".join(sections)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> list[str]:
    lines = [f"### `{method.upper()} {path}`", "", " ".join(operation["description"].split()), ""]
    for parameter in operation.get("parameters", ()):
        said = " ".join(parameter.get("description", "").split())
        lines.append(f"- {parameter['in']} `{parameter['name']}`{': ' if said else ''}{said}")
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]
        schema = next(iter(content.values()))["schema"]
        lines.append(f"- body, {' or '.join(f'`{kind}`' for kind in content)}: {schema['description']}")
    answers = [_answer(code, answer) for code, answer in operation["responses"].items() if not code.endswith("XX")]
    return [*lines, f"- answers {', '.join(answers)}", ""]


def _answer(code: str, answer: Mapping[str, Any]) -> str:
    kinds = [content["schema"].get("$ref", f"/{kind}") for kind, content in answer.get("content", {}).items()]
    names = [kind.rpartition("/schemas/")[2].removeprefix("/") for kind in kinds]
    return f"{code}{f' `{names[0]}`' if names else ''}"
