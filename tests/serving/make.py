"""Makes the artifacts of `tests.serving.cases`: `python -m tests.serving.make FOLDER`, in the project's own environment."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from tests.inprocess import local, run_job
from tests.models import checkpoint
from tests.serving.cases import SERVED, folder_of


def make(folder: Path) -> None:
    """One artifact a case; those that are there stay."""
    for name, case in SERVED.items():
        place = folder / folder_of(name)
        if (place / "artifact" / "artifact.json").exists():
            continue
        shutil.rmtree(place, ignore_errors=True)
        checkpoint(case.model, place / "model", torch.float32)
        shutil.copytree(local(run_job(place / "model", place / "output", case.recipe)), place / "artifact")
        print(name, flush=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
