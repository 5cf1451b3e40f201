"""Every fenced block of the README and of the documents is run, or says why it is not.

A block that needs what no test has (a cluster, Docker, the internet) has `<!-- skip: next "reason" -->` before it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import SkipTest

import pytest
import torch

from tests.docs.blocks import Blocks
from tests.inprocess import local, run_job
from tests.models import Case, checkpoint, write_text
from tests.pipeline.tiny import write_job
from tests.servers import S3Server, moto_server

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *(ROOT / "infra").glob("**/*.md"))
)
LANGUAGES = {"python", "sh", "yaml", "text"}


def plain(place: Path) -> None:
    """Nothing but what all documents have: a job, its model and its texts."""


def artifact(place: Path) -> None:
    """A pulled artifact with a low-rank branch and the text that it was validated on; the README's manifest names two texts."""
    checkpoint(WIDE, place / "model", torch.bfloat16)
    made = local(run_job(place / "model", place / "made", {"weights": {"bits": 4}, "compensation": SVD}, validation={}))
    shutil.copytree(made, place / "artifact")
    shutil.copy(place / "made" / "text.txt", place / "validation.txt")
    (place / "data").mkdir()
    write_text(place / "data" / "wiki.train.raw", 300_000)
    write_text(place / "data" / "wiki.test.raw", 5000, seed=1)


def manifests(place: Path) -> None:
    """The manifests of the repository."""
    for path in (ROOT / "manifests").glob("*.yaml"):
        shutil.copy(path, place)


WIDE = Case("llama", {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048})
SVD = {"kind": "svd", "rank": {"count": 8}}
SCENES: dict[str, Callable[[Path], None]] = {"README.md": artifact, "docs/jobs.md": manifests}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server.with_bucket("bucket").with_bucket("counterweight")


@pytest.fixture
def place(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: `job.yaml` with its model and texts, two buckets, nothing in the environment."""
    write_job(tmp_path, layers=2)
    for name, value in (s3.environment() | {"TOKEN": "a-token", "RAY_ADDRESS": "none"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("COUNTERWEIGHT_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.end_to_end
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SCENES.get(page, plain)(place)
    capsys.readouterr()
    left_out: list[str] = []
    ran = 0
    for example in Blocks(place, monkeypatch, lambda: tuple(capsys.readouterr())).sybil.parse(ROOT / page).examples():
        try:
            example.evaluate()
            ran += 1
        except SkipTest as reason:
            left_out.append(f"line {example.line}: {reason}")
    if not ran:
        pytest.skip("; ".join(left_out) or "no blocks")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is_written_in(page: str) -> None:
    fences = re.findall(r"^[ \t]*```(.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES)
def test_what_is_left_out_has_a_reason(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(re.findall(r"skip: ", text)) == len(re.findall(r'^<!-- skip: next "[^"]{10,}" -->\n\n```', text, re.M))


@pytest.mark.parametrize(
    "block", ["```python\nassert 1 == 2\n```", "```sh\nfalse\n```", "```sh\ncounterweight plan no.yaml\n```"]
)
def test_a_block_that_fails_is_noticed(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.md").write_text(block + "\n")
    blocks = Blocks(tmp_path, monkeypatch, lambda: tuple(capsys.readouterr()))
    (example,) = blocks.sybil.parse(tmp_path / "page.md").examples()
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        example.evaluate()
