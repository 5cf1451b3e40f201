"""Whether an answer is what the service's OpenAPI document says of its route."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import httpx
from jsonschema import Draft202012Validator

PROBLEM = "application/problem+json"


def check(openapi: Mapping[str, Any], method: str, path: str, answer: httpx.Response) -> None:
    """AssertionError, or ValidationError, where it is not. Of paths that are none of the API only problems are checked."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if kind == PROBLEM:
        validate(openapi, {"$ref": "#/components/schemas/Problem"}, answer.json())
        assert answer.json()["status"] == answer.status_code
    operation = _operation(openapi, method, path)
    if operation is None:
        assert kind == PROBLEM or not path.startswith("/v1") or path.endswith("openapi.json"), (path, answer.text)
        return
    code = answer.status_code
    described = operation["responses"].get(str(code)) or operation["responses"].get(f"{code // 100}XX")
    assert described is not None, f"{method} {path}: {code} is not described"
    if "content" in described:
        assert kind in described["content"], (method, path, kind)
        if kind == "application/json":
            validate(openapi, described["content"][kind]["schema"], answer.json())


def validate(openapi: Mapping[str, Any], schema: Mapping[str, Any], value: object) -> None:
    """The value against a schema of the document."""
    Draft202012Validator({**schema, "components": openapi["components"]}).validate(value)


def _operation(openapi: Mapping[str, Any], method: str, path: str) -> Any:
    for template, operations in openapi["paths"].items():
        pattern = re.sub(r"\\\{path\\\}", ".+", re.escape(template))
        pattern = re.sub(r"\\\{[a-z_]+\\\}", "[^/]+", pattern)
        if re.fullmatch(pattern, path.partition("?")[0]) and method.lower() in operations:
            return operations[method.lower()]
    return None
