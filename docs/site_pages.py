"""What the site (`mkdocs.yml`) needs beside `docs/`: pages that lie elsewhere in the repository, and links to what is no page.

A link to a page becomes one to its place on the site. A link to another file of the repository becomes the file's path; one to
what is not there is left as it is, and fails the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"

ELSEWHERE = {
    "README.md": "overview.md",
    "benchmarks/README.md": "benchmarks.md",
    "infra/README.md": "infra.md",
    "infra/compose/README.md": "infra-compose.md",
    "infra/s3/README.md": "infra-s3.md",
    "manifests/demo/README.md": "demo.md",
}
"""Pages outside `docs/`: place in the repository -> on the site."""

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie elsewhere."""
    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links what they are on the site."""
    place = page.file.src_uri
    source = next((source for source, there in ELSEWHERE.items() if there == place), f"{DOCS}/{place}")
    return _LINK.sub(lambda match: linked(match, source), markdown)


def linked(match: re.Match[str], source: str) -> str:
    """A link of the page that lies at `source` in the repository."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
    place = ELSEWHERE.get(target) or ELSEWHERE.get(f"{target}/README.md")
    if place is None and target.startswith(f"{DOCS}/"):
        place = target.removeprefix(f"{DOCS}/")
    if place is not None:
        return f"[{match['text']}]({place}{match['anchor'] or ''})"
    if (ROOT / target).exists():
        text = match["text"]
        return text if target in text else f"{text} (`{target}`)"
    return match[0]
