"""A text that every machine already has: the Python sources of the running interpreter's standard library.

The demo model is trained on one part of it, calibrated on a second and judged on a third, so the demo needs
neither a download nor a data set in the repository. The three parts are disjoint sets of files. A file's part
depends on its path alone, so a file never changes sides when other files come or go between Python versions.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from counterweight.workers.errors import RequestError

__all__ = ["Content", "Part", "standard_library_files", "standard_library_pieces", "standard_library_text"]

Part = Literal["train", "calibration", "evaluation"]
Content = Literal["sources", "docstrings"]

LEAST_PROSE = 200
"""Characters of a docstring that counts as prose: shorter ones name a thing and say little of it."""

# Buckets of the path digest: one of sixteen is about 0.5 MB of text, 200,000 tokens of the demo tokenizer.
_BUCKETS = 16
_HELD_OUT_BUCKETS: dict[int, Part] = {0: "evaluation", 1: "calibration"}

_SKIPPED_DIRECTORIES = frozenset(
    {
        # Not the standard library: what the owner of the machine installed.
        "site-packages",
        "dist-packages",
        # Tests: Debian ships them apart or not at all, so the text would depend on what is installed.
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        # Tables, not prose or code: of 3.11's 1.4 MB of codecs nearly all is generated character maps, and
        # pydoc_data is one 0.75 MB literal. In 12 MB of text they would be a sixth of all tokens.
        "encodings",
        "pydoc_data",
    }
)
_SKIPPED_FILES = frozenset(
    {
        # Tables again: character entities and Unicode ranges.
        "html/entities.py",
        "stringprep.py",
        # Written by the distribution or the owner of the machine, not by the Python project.
        "sitecustomize.py",
        "usercustomize.py",
    }
)
# Written when the interpreter was built: compiler flags and paths of the build machine.
_BUILD_FILE_PREFIX = "_sysconfigdata"
_BUILD_DIRECTORY_PREFIX = "config-"


def standard_library_files(part: Part, *, library: Path | None = None) -> list[Path]:
    """The `.py` files of one part, as absolute paths sorted by their path in the library.

    Left out are installed packages, tests, generated tables and files written when the interpreter was built.
    `library` is the folder of another interpreter's library; the default is that of the running one.

    Raises:
        RequestError: `part` is not a part, or the library has no source file in it (it is a zip file, or byte
            code only).
    """
    if part not in get_args(Part):
        raise RequestError(f"part: {part!r}: expected one of {', '.join(get_args(Part))}")
    root = (Path(sysconfig.get_path("stdlib")) if library is None else library).absolute()
    files = [root / name for name in _source_names(root) if _part_of(name) == part]
    if not files:
        raise RequestError(f"standard library: {root}: no .py file of the part {part!r}: expected one or more")
    return files


def standard_library_text(part: Part, content: Content = "sources", *, library: Path | None = None) -> str:
    """The files of one part, in the order of `standard_library_files`, each followed by a line end; or their docstrings of
    `LEAST_PROSE` characters and more, with a blank line between them.

    Line ends are `\\n` on every platform. The same interpreter gives the same text each time.

    Raises:
        RequestError: as `standard_library_files`, or a file is unreadable or is not UTF-8; for docstrings also when it is not
            Python, or no file has one.
    """
    return "".join(standard_library_pieces(part, content, library=library))


def standard_library_pieces(part: Part, content: Content = "sources", *, library: Path | None = None) -> Iterator[str]:
    """The text of `standard_library_text` file by file, each read when it is asked for."""
    files = standard_library_files(part, library=library)
    if content == "sources":
        yield from (_read(path) + "\n" for path in files)
        return
    found = (text for path in files for text in _docstrings(path) if len(text) >= LEAST_PROSE)
    first = next(found, None)
    if first is None:
        raise RequestError(
            f"standard library: part {part!r}: no docstring of {LEAST_PROSE} characters: expected one or more"
        )
    yield first
    yield from ("\n\n" + text for text in found)
    yield "\n"


def _source_names(root: Path) -> list[str]:
    """Paths of the sources below `root`, relative and with `/`, sorted."""
    names = []
    for directory, subdirectories, files in os.walk(root):
        # Pruned in place, so that os.walk does not descend: site-packages may hold far more than the library.
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in _SKIPPED_DIRECTORIES and not name.startswith(_BUILD_DIRECTORY_PREFIX)
        ]
        relative = Path(directory).relative_to(root)
        names += [
            (relative / name).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith(_BUILD_FILE_PREFIX)
        ]
    return sorted(name for name in names if name not in _SKIPPED_FILES)


def _part_of(name: str) -> Part:
    """The part of a file, from the sha256 of its relative path (`hash` differs between processes)."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _BUCKETS
    return _HELD_OUT_BUCKETS.get(bucket, "train")


def _docstrings(path: Path) -> list[str]:
    """Those of the module, its classes and functions, breadth first, without their indentation."""
    try:
        tree = ast.parse(_read(path))
    except SyntaxError as error:
        raise RequestError(f"standard library: {path}: expected Python: {error}") from error
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in texts if text is not None]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"standard library: {path}: expected a readable UTF-8 file: {error}") from error
