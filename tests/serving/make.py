"""Makes the artifacts of `tests.serving.cases` and of `adapters`, and pulls one from an S3 server:
`python -m tests.serving.make FOLDER`, in the project's own environment."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from counterweight.pipeline.cli import main
from counterweight.workers.storage import open_store
from tests.inprocess import local, run_job
from tests.models import checkpoint
from tests.servers import moto_server
from tests.serving.adapters import ADAPTED
from tests.serving.cases import SERVED, folder_of

PULLED = "W4A4 LRC, rotated"


def make(folder: Path) -> None:
    """One artifact a case; those that are there stay."""
    for name, case in {**SERVED, **ADAPTED}.items():
        place = folder / folder_of(name)
        if (place / "artifact" / "artifact.json").exists():
            continue
        shutil.rmtree(place, ignore_errors=True)
        checkpoint(case.model, place / "model", torch.float32)
        shutil.copytree(local(run_job(place / "model", place / "output", case.recipe)), place / "artifact")
        print(name, flush=True)


def pull(folder: Path) -> None:
    """Puts an artifact into a bucket and pulls it from there, as users do, into `pulled`."""
    artifact = folder / folder_of(PULLED) / "artifact"
    id = json.loads((artifact / "artifact.json").read_text())["id"]
    shutil.rmtree(folder / "pulled", ignore_errors=True)
    with moto_server() as server:
        os.environ.update(server.with_bucket("artifacts").environment())
        place = f"s3://artifacts/served/{id}"
        store = open_store(place)
        for path in sorted(path for path in artifact.rglob("*") if path.is_file()):
            store.write(path.relative_to(artifact).as_posix(), path.read_bytes())
        assert main(["pull", place, str(folder / "pulled")]) == 0


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
    pull(Path(sys.argv[1]).resolve())
