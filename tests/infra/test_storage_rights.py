"""The bucket's policy against the code that uses the bucket: each request has its right, and no right is without a request."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import typer

from counterweight.pipeline.cli import app
from counterweight.pipeline.units import duration
from tests.infra.artefacts import INFRA, ROOT

TERRAFORM = INFRA / "terraform"
STORAGE = ROOT / "workers" / "storage"

ACTIONS = {
    "abort_multipart_upload": {"s3:AbortMultipartUpload"},
    "complete_multipart_upload": {"s3:PutObject"},
    # boto3's managed copy: HEAD, then a copy in one request or in parts.
    "copy": {"s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"},
    "create_multipart_upload": {"s3:PutObject"},
    "delete_object": {"s3:DeleteObject"},
    "generate_presigned_url": {"s3:GetObject"},  # of what it signs
    "get_object": {"s3:GetObject"},
    "head_bucket": {"s3:ListBucket"},
    "head_object": {"s3:GetObject"},
    "list_multipart_uploads": {"s3:ListBucketMultipartUploads"},
    "list_objects_v2": {"s3:ListBucket"},
    "list_parts": {"s3:ListMultipartUploadParts"},
    "put_object": {"s3:PutObject"},
    "upload_part": {"s3:PutObject"},
}
"""Which action each request needs, by boto3's name for it: AWS, Service Authorization Reference, "Actions for Amazon S3"."""

READS = {"get_object", "head_object", "head_bucket", "list_objects_v2"}


def requests(path: Path) -> set[str]:
    """Names of the client's methods and paginators that a module calls: `self._s3().NAME(...)`, `get_paginator("NAME")`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        client = node.func.value
        if isinstance(client, ast.Call) and isinstance(client.func, ast.Attribute) and client.func.attr == "_s3":
            name = node.func.attr
            found.add(ast.literal_eval(node.args[0]) if name == "get_paginator" else name)
    return found


def test_the_policy_allows_what_the_code_asks_for_and_nothing_else() -> None:
    asked = set().union(*(requests(path) for path in STORAGE.glob("s3*.py")))
    assert {"get_object", "put_object", "delete_object", "list_multipart_uploads"} <= asked
    roles = json.loads((TERRAFORM / "policy" / "actions.json").read_text())
    needed = set().union(*(ACTIONS[name] for name in asked))
    assert {*roles["worker"]["bucket"], *roles["worker"]["object"]} == needed
    assert {*roles["reader"]["bucket"], *roles["reader"]["object"]} == set().union(*(ACTIONS[name] for name in READS))
    for role in roles.values():
        assert all("Bucket" in action for action in role["bucket"])
        assert not [action for action in role["object"] if "Bucket" in action]


def test_nothing_else_talks_to_s3() -> None:
    sources = [path for part in ("pipeline", "workers", "kernels") for path in (ROOT / part).rglob("*.py")]
    using = {path.name for path in sources if re.search(r"\bimport boto3|from boto3", path.read_text())}
    assert using == {"s3.py", "s3_client.py"}


def test_the_lifecycle_removes_what_prune_would_and_no_object_that_is_current() -> None:
    text = (TERRAFORM / "main.tf").read_text() + (TERRAFORM / "policy" / "main.tf").read_text()
    prune = typer.main.get_command(app).commands["prune"]  # type: ignore[attr-defined]
    (default,) = [option.default for option in prune.params if option.name == "older_than"]
    assert f"abort_days = {duration(default, 'prune').days}," in text
    days = set(re.findall(r"^\s*(\w*days\w*) +=", text, re.M)) | set(re.findall(r"(\w+_days) =", text))
    assert days == {"abort_days", "noncurrent_days", "days_after_initiation"}
    assert re.findall(r"\bexpired_object_delete_marker\s*=\s*true", text)
