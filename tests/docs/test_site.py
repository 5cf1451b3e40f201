"""The documentation builds as a site, with links that lead somewhere and nothing that is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.tutorial import ROOT, script
from tests.infra.test_infra import parse

SPEC = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
assert SPEC is not None
assert SPEC.loader is not None
site_pages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site_pages)


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_it_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = sorted(path.name for path in (tmp_path / "site").glob("*.html"))
    assert {"index.html", "overview.html", "tutorial.html", "api.html", "infra.html"} <= set(pages)
    for path in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?:[^\" >]+)", path.read_text())
        assert not [url for url in loaded if "canonical" not in url], path.name


@pytest.mark.parametrize(
    ("link", "made"),
    [
        ("[jobs](jobs.md#drivers)", "[jobs](jobs.md#drivers)"),
        ("[README](../README.md)", "[README](overview.md)"),
        ("[infra](../infra)", "[infra](infra.md)"),
        ("[`pyproject.toml`](../pyproject.toml)", "`pyproject.toml`"),
        ("[queue](../pipeline/jobs/queue.py)", "queue (`pipeline/jobs/queue.py`)"),
        ("[lost](../nowhere.md)", "[lost](../nowhere.md)"),
    ],
)
def test_links_of_the_repository_are_those_of_the_site(link: str, made: str) -> None:
    match = site_pages._LINK.fullmatch(link)
    assert site_pages.linked(match, "docs/api.md") == made


def test_the_tutorials_commands_are_ours() -> None:
    found = re.findall(r"^(?:\w+=\$\()?counterweight ([^\n]*?)\)?$", script(), re.MULTILINE)
    assert len(found) >= 8
    for line in found:
        parse([part.strip('"') for part in re.split(r" 2>|\s&$", line)[0].split()])
