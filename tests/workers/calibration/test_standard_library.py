"""The text of the standard library: three disjoint parts, the same in every process, library code only."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import cast, get_args

import pytest

from counterweight.workers.calibration.standard_library import Part, standard_library_files, standard_library_text
from counterweight.workers.errors import RequestError

PARTS: tuple[Part, ...] = get_args(Part)
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
# 64 file names, so that each of sixteen buckets is met (the names are fixed, so this is no matter of luck).
NAMES = [f"module_{number}.py" for number in range(64)]


def write_library(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n", encoding="utf-8")
    return root


def names_of(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for part in PARTS for p in standard_library_files(part, library=root)}


def test_parts_are_disjoint_and_of_the_promised_share() -> None:
    files = {part: standard_library_files(part) for part in PARTS}
    everything = [path for part in PARTS for path in files[part]]
    assert len(everything) == len(set(everything))
    assert len(files["train"]) > 300
    for part in PARTS[1:]:
        # One sixteenth of the files is expected; the digest does not make it exact.
        assert 1 / 32 < len(files[part]) / len(everything) < 1 / 8


@pytest.mark.parametrize("part", ["evaluation", "calibration"])
def test_held_out_text_is_large_enough_to_judge_by(part: Part) -> None:
    assert len(standard_library_text(part)) > 250_000


def test_part_follows_the_digest_of_the_path(tmp_path: Path) -> None:
    library = write_library(tmp_path, NAMES)
    for part in PARTS:
        for path in standard_library_files(part, library=library):
            # The last hexadecimal digit of eight bytes, big end first, is the number modulo 16.
            digit = hashlib.sha256(path.name.encode()).hexdigest()[15]
            assert part == {"0": "evaluation", "1": "calibration"}.get(digit, "train")
    assert names_of(library) == set(NAMES)


def test_new_file_moves_no_other_file(tmp_path: Path) -> None:
    library = write_library(tmp_path, NAMES)
    before = {part: set(standard_library_files(part, library=library)) for part in PARTS}
    write_library(tmp_path, ["added.py", "package/__init__.py"])
    for part in PARTS:
        assert before[part] <= set(standard_library_files(part, library=library))


def test_text_is_the_same_in_another_process() -> None:
    script = (
        "import hashlib\n"
        "from counterweight.workers.calibration.standard_library import standard_library_text\n"
        "print(hashlib.sha256(standard_library_text('evaluation').encode()).hexdigest())\n"
    )
    repository = Path(__file__).parents[3]
    # A set or dict order that leaked into the text would differ with the hash seed.
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=repository,
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {hashlib.sha256(standard_library_text("evaluation").encode()).hexdigest()}


def test_text_joins_the_files_in_sorted_order(tmp_path: Path) -> None:
    # As strings, "a.py" comes before "a/b.py"; as paths it would come after.
    library = write_library(tmp_path, [*NAMES, *(f"module_{number}/part.py" for number in range(64))])
    for part in PARTS:
        files = standard_library_files(part, library=library)
        names = [path.relative_to(library).as_posix() for path in files]
        assert names == sorted(names)
        assert standard_library_text(part, library=library) == "".join(f"# {name}\n\n" for name in names)


def test_real_library_has_no_tests_tables_or_installed_packages() -> None:
    names = {p.relative_to(STANDARD_LIBRARY).as_posix() for part in PARTS for p in standard_library_files(part)}
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
    assert not [name for name in names if unwanted & set(name.split("/"))]
    assert not names & {"pydoc_data/topics.py", "stringprep.py", "html/entities.py", "sitecustomize.py"}
    assert not [name for name in names if "_sysconfigdata" in name]
    assert {"ast.py", "json/decoder.py", "unittest/case.py"} <= names


@pytest.mark.parametrize(
    "name",
    [
        "test/test_json.py",
        "unittest/test/test_case.py",
        "lib2to3/tests/data/py2_grammar.py",
        "idlelib/idle_test/test_editor.py",
        "site-packages/numpy/core.py",
        "dist-packages/apt/cache.py",
        "json/__pycache__/decoder.py",
        "encodings/cp037.py",
        "pydoc_data/topics.py",
        "html/entities.py",
        "stringprep.py",
        "sitecustomize.py",
        "usercustomize.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "json/decoder.pyc",
    ],
)
def test_left_out(tmp_path: Path, name: str) -> None:
    assert names_of(write_library(tmp_path, [*NAMES, name])) == set(NAMES)


@pytest.mark.parametrize("name", ["testing.py", "html/parser.py", "unittest/case.py", "tests.py"])
def test_kept(tmp_path: Path, name: str) -> None:
    assert names_of(write_library(tmp_path, [*NAMES, name])) == {*NAMES, name}


def test_empty_part_is_an_error(tmp_path: Path) -> None:
    library = write_library(tmp_path, ["notes.txt"])
    with pytest.raises(RequestError, match=r"no \.py file of the part 'evaluation'"):
        standard_library_text("evaluation", library=library)


def test_missing_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="absent"):
        standard_library_files("train", library=tmp_path / "absent")


def test_unknown_part_is_an_error() -> None:
    with pytest.raises(RequestError, match="'validation': expected one of train, calibration, evaluation"):
        standard_library_files(cast(Part, "validation"))


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    library = write_library(tmp_path, NAMES)
    for name in NAMES:
        (library / name).write_bytes(b"# caf\xe9\n")
    with pytest.raises(RequestError, match=r"module_\d+\.py: expected a readable UTF-8 file"):
        standard_library_text("train", library=library)


def test_line_ends_are_unix_ones(tmp_path: Path) -> None:
    library = write_library(tmp_path, NAMES)
    for name in NAMES:
        (library / name).write_bytes(b"a = 1\r\nb = 2\r\n")
    assert "\r" not in standard_library_text("train", library=library)


def test_docstrings_are_the_longer_ones_without_the_code(tmp_path: Path) -> None:
    library = write_library(tmp_path, NAMES)
    long = " ".join(["what", "it", "says"] * 20)
    for name in NAMES:
        code = f'"""short"""\nclass A:\n    """{long}\n\n    at {name}\n    """\n\n    async def f():\n        """{long}"""\n'
        (library / name).write_text(code)
    names = [path.relative_to(library).as_posix() for path in standard_library_files("train", library=library)]
    expected = "\n\n".join(f"{long}\n\nat {name}\n\n{long}" for name in names) + "\n"
    assert standard_library_text("train", "docstrings", library=library) == expected


def test_docstrings_of_the_real_library_are_prose_of_the_part() -> None:
    train, evaluation = (standard_library_text(part, "docstrings") for part in ("train", "evaluation"))
    assert len(train) > 300_000
    assert "def __init__(self" not in evaluation


@pytest.mark.parametrize(("text", "said"), [("x = 1\n", "no docstring of 200"), ("def f(:\n", "expected Python")])
def test_without_docstrings(tmp_path: Path, text: str, said: str) -> None:
    library = write_library(tmp_path, NAMES)
    for name in NAMES:
        (library / name).write_text(text)
    with pytest.raises(RequestError, match=said):
        standard_library_text("train", "docstrings", library=library)
