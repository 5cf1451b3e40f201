"""Manifests that mean harm: each is refused within a second, with lines that name the place and cannot be
abused. Stock YAML takes the bombs, the duplicates, the dates and NaN: that was tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from counterweight.pipeline.manifest import load_manifest
from counterweight.pipeline.manifest.document import MAX_BYTES, MAX_DEPTH, MAX_VALUES
from counterweight.workers.errors import ManifestError
from tests.patience import cpu_seconds
from tests.pipeline.manifest_documents import FULL, MINIMAL, check_lines, job, refused

BOMB = """\
a: &a [x, x, x, x, x, x, x, x, x]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]
d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]
e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]
"""

JSON = job(MINIMAL).model_dump_json()


def within_a_second(refuse: Callable[[], str]) -> str:
    """The refusal. In CPU time: what other processes do on the machine is not the loader's fault."""
    found: list[str] = []
    assert cpu_seconds(lambda: found.append(refuse()), below=1.0) < 1.0
    return found[-1]


def nested(opening: str, closing: str, depth: int) -> str:
    return MINIMAL.replace("bits: 4", f"bits: {opening * depth}1{closing * depth}")


YAML_ATTACKS = {
    "alias bomb": (BOMB, "a: line 1: an anchor (&): expected none"),
    "alias bomb in a field": (MINIMAL + BOMB, "a: line 9: an anchor (&): expected none"),
    "alias": (
        MINIMAL.replace("{bits: 4}", "*w"),
        "spec.recipe.weights: line 7: an alias (*): expected the value",
    ),
    "endless alias": ("&a [*a]", "manifest: line 1: an anchor (&): expected none"),
    "anchor on a key": (MINIMAL.replace("bits:", "&a bits:"), "spec.recipe.weights: line 7: an anchor (&)"),
    "merge key": (MINIMAL.replace("{bits: 4}", "{<<: {bits: 4}}"), "spec.recipe.weights.'<<': unknown key"),
    "duplicate at the top": (MINIMAL + "spec: {}\n", "spec: line 9: key given twice"),
    "duplicate in a field": (
        MINIMAL.replace("bits: 4", "bits: 4, bits: 3"),
        "spec.recipe.weights.bits: line 7: key given twice",
    ),
    "duplicate spelled otherwise": (
        MINIMAL.replace("bits: 4", r'bits: 4, "\x62its": 3'),
        "spec.recipe.weights.bits: line 7: key given twice",
    ),
    "python object": (
        MINIMAL.replace("bits: 4", "bits: !!python/object/apply:os.system [ls]"),
        "spec.recipe.weights.bits: line 7: tag 'tag:yaml.org,2002:python/object/apply:os.",
    ),
    "harmless tag": (
        MINIMAL.replace("bits: 4", "bits: !!int '4'"),
        "spec.recipe.weights.bits: line 7: tag 'tag:yaml.org,2002:int': expected none",
    ),
    "local tag": (MINIMAL.replace("name: small", "name: !env HOME"), "metadata.name: line 3: tag '!env'"),
    "tag on a key": (MINIMAL.replace("bits:", "!!str bits:"), "spec.recipe.weights: line 7: tag "),
    "tag prefix": (
        "%TAG ! tag:x,2000:\n---\n" + MINIMAL.replace("bits: 4", "bits: !a 4"),
        "spec.recipe.weights.bits",
    ),
    "two documents": (MINIMAL + "---\n" + MINIMAL, "job.yaml: line 9: a second document, expected one"),
    "empty": ("", "job.yaml: empty, expected a manifest"),
    "only comments": ("# nothing\n", "job.yaml: empty, expected a manifest"),
    "null": ("---\n...\n", "manifest: null: expected a mapping with apiVersion, kind, metadata and spec"),
    "list": ("- a\n- b\n", "manifest: ['a', 'b']: expected a mapping"),
    "scalar": ("hello", "manifest: 'hello': expected a mapping"),
    "no YAML": ("a: b: c", "job.yaml: line 1, column 5: not YAML: mapping values are not allowed here"),
    "open bracket": (
        MINIMAL.replace("{bits: 4}", "{bits: 4"),
        "job.yaml: line 8, column 3: not YAML: while parsing a flow mapping",
    ),
    "tab": ("a:\n\tb: 1", "job.yaml: line 2, column 1: not YAML: "),
    "control character": (MINIMAL + "# \x07", "job.yaml: not YAML: unacceptable character #x0007"),
    "absurd version": (f"%YAML {'1' * 5000}.1\n---\na: b", "job.yaml: not YAML: "),
    "absurd escape": ('a: "\\U99999999"', "job.yaml: not YAML: "),
    "half a character": (
        MINIMAL.replace("name: small", r'name: "\ud800"'),
        r"metadata.name: '\ud800': half a surrogate pair",
    ),
    "number as a key": (
        MINIMAL.replace("bits: 4", "4: 4"),
        "spec.recipe.weights: line 7: key 4: expected a string",
    ),
    "boolean as a key": (
        MINIMAL.replace("bits: 4", "true: 4"),
        "spec.recipe.weights: line 7: key true: expected",
    ),
    "null as a key": (
        MINIMAL.replace("bits: 4", "~: 4"),
        "spec.recipe.weights: line 7: key null: expected a string",
    ),
    "list as a key": (
        MINIMAL.replace("bits: 4", "[a]: 4"),
        "spec.recipe.weights: line 7: a list or mapping as a key: ",
    ),
    "NaN": (
        MINIMAL.replace("bits: 4", "bits: .nan"),
        "spec.recipe.weights.bits: .nan: expected a finite number",
    ),
    "infinity": (
        MINIMAL.replace("bits: 4", "bits: -.inf"),
        "spec.recipe.weights.bits: -.inf: expected a finite",
    ),
    "overflow": (
        MINIMAL.replace("bits: 4", "bits: 1e999"),
        "spec.recipe.weights.bits: 1e999: expected a finite",
    ),
    "long integer": (
        MINIMAL.replace("bits: 4", f"bits: {'9' * 5000}"),
        f"spec.recipe.weights.bits: {'9' * 77}...: an integer of more than 40 digits",
    ),
    "bits 5": (MINIMAL.replace("bits: 4", "bits: 5"), "spec.recipe.weights.bits: 5: expected 2, 3, 4 or 8"),
    "bits 9": (MINIMAL.replace("bits: 4", "bits: 9"), "spec.recipe.weights.bits: 9: expected 2, 3, 4 or 8"),
    "quoted bits": (
        MINIMAL.replace("bits: 4", "bits: '4'"),
        "spec.recipe.weights.bits: '4': expected 2, 3, 4 or 8",
    ),
    "octal bits": (
        MINIMAL.replace("bits: 4", "bits: 010"),
        "spec.recipe.weights.bits: '010': expected 2, 3, 4 or 8",
    ),
    "boolean bits": (
        MINIMAL.replace("bits: 4", "bits: true"),
        "spec.recipe.weights.bits: true: expected 2, 3, 4 or 8",
    ),
    "deep lists": (nested("[", "]", 5000), f"spec.recipe.weights: nested deeper than {MAX_DEPTH} levels"),
    "deep mappings": (
        nested("{a: ", "}", 5000),
        f"spec.recipe.weights: nested deeper than {MAX_DEPTH} levels",
    ),
    "deep dashes": ("- " * 50_000, f"0.0.0: nested deeper than {MAX_DEPTH} levels"),
    "deep keys": ("? " * 50_000, "manifest: line 1: a list or mapping as a key: expected a string"),
    "many values": (
        "a: [" + "x, " * (MAX_VALUES + 1) + "]",
        f"a.{MAX_VALUES - 3}: more than {MAX_VALUES} values",
    ),
    "too large": ("#" * (MAX_BYTES + 1), "job.yaml: larger than 128 KiB"),
    "long comment": ("#" * MAX_BYTES, "job.yaml: empty"),
    "long folds": ("a: b\n" + "\n" * (MAX_BYTES - 10) + " c", "apiVersion: missing"),
    "many unknown keys": (
        MINIMAL + "".join(f"x{index}: 1\n" for index in range(2400)),
        "x0: unknown key; expected one of apiVersion, kind, metadata, spec",
    ),
    "huge unknown key": (MINIMAL + f"? {'x' * 100_000}\n: 1", f"'{'x' * 76}...: unknown key; "),
    "key with line breaks": (
        MINIMAL + '"a\\nspec.ok: fine": 1',
        r"'a\nspec.ok: fine': unknown key; expected one of",
    ),
    "path out of the bucket": (
        MINIMAL.replace("uri: out", "uri: s3://b/../a"),
        "spec.output.uri: 's3://b/../a': ",
    ),
    "NUL in a path": (
        MINIMAL.replace("uri: out", r'uri: "a\0b"'),
        r"spec.output.uri: 'a\x00b': expected 1 to 2000",
    ),
    "encoded NUL in a path": (
        MINIMAL.replace("uri: out", "uri: file:/a%00b"),
        "spec.output.uri: 'file:/a%00b': ",
    ),
}

JSON_ATTACKS = {
    "duplicate": (JSON.replace('"bits":4', '"bits":4,"bits":3'), "spec.recipe.weights.bits: key given twice"),
    "NaN": (
        JSON.replace('"bits":4', '"bits":NaN'),
        "spec.recipe.weights.bits: NaN: expected a finite number",
    ),
    "infinity": (
        JSON.replace('"bits":4', '"bits":-Infinity'),
        "spec.recipe.weights.bits: -Infinity: expected",
    ),
    "overflow": (
        JSON.replace('"bits":4', '"bits":1e999'),
        "spec.recipe.weights.bits: 1e999: expected a finite",
    ),
    "long integer": (JSON.replace('"bits":4', f'"bits":{"9" * 5000}'), "spec.recipe.weights.bits: 9999"),
    "half a character": (
        JSON.replace('"small"', r'"\ud800"'),
        r"metadata.name: '\ud800': half a surrogate pair",
    ),
    "half a character in a key": (
        JSON.replace('"bits"', r'"\udfff"'),
        r"spec.recipe.weights: '\udfff': half a",
    ),
    "a little deep": (
        JSON.replace('"bits":4', '"bits":' + "[" * 60 + "]" * 60),
        f"spec.recipe.weights: nested deeper than {MAX_DEPTH} levels",
    ),
    "very deep": ("[" * MAX_BYTES, f"manifest: nested deeper than {MAX_DEPTH} levels"),
    "trailing": (JSON + "{}", f"job.json: line 1, column {len(JSON) + 1}: not JSON: Extra data"),
    "comment": ("// none\n" + JSON, "job.json: line 1, column 1: not JSON: "),
    "empty": ("", "job.json: line 1, column 1: not JSON: "),
    "list": ("[1]", "manifest: [1]: expected a mapping"),
    "many values": (f"[{'0,' * MAX_VALUES}0]", f"{MAX_VALUES - 1}: more than {MAX_VALUES} values"),
    "too large": (" " * (MAX_BYTES + 1), "job.json: larger than 128 KiB"),
}


@pytest.mark.parametrize(("text", "start"), YAML_ATTACKS.values(), ids=YAML_ATTACKS)
def test_hostile_yaml(text: str, start: str) -> None:
    found = within_a_second(lambda: refused(text))
    assert found.startswith(start)
    check_lines(found)


@pytest.mark.parametrize(("text", "start"), JSON_ATTACKS.values(), ids=JSON_ATTACKS)
def test_hostile_json(text: str, start: str) -> None:
    found = within_a_second(lambda: refused(text, name="job.json"))
    assert found.startswith(start)
    check_lines(found)


def test_thousands_of_problems_are_counted() -> None:
    many = JSON.replace('["lm_head"]', f"[{'0,' * 4000}0]")
    found = within_a_second(lambda: refused(many, name="job.json"))
    assert found.startswith("spec.recipe.keep.0: 0: expected a string of 1 to 200 characters\n")
    assert found.endswith("\n... and 3982 more problems")


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\0\0", bytes(range(0, 256, 4)) + b"\xff", MINIMAL.encode("utf-16")]
)
@pytest.mark.parametrize("name", ["job.yaml", "job.json"])
def test_binary_files(data: bytes, name: str) -> None:
    found = refused(data, name=name)
    assert found.startswith(f"{name}: byte ")
    assert found.endswith(" is not UTF-8, expected a text")


class TestFiles:
    def test_a_file_of_100_mb(self, tmp_path: Path) -> None:
        path = tmp_path / "job.yaml"
        with path.open("wb") as file:
            file.truncate(100 << 20)

        def load() -> str:
            with pytest.raises(ManifestError) as caught:
                load_manifest(str(path))
            return str(caught.value)

        assert within_a_second(load) == f"{path}: larger than 128 KiB, expected a manifest of a few KiB"

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError) as caught:
            load_manifest(str(tmp_path / "none.yaml"))
        assert str(caught.value) == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"

    def test_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError) as caught:
            load_manifest(str(tmp_path))
        assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"

    def test_a_pipe_that_nobody_writes_to(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "job.yaml")
        with pytest.raises(ManifestError, match="not a regular file"):
            load_manifest(str(tmp_path / "job.yaml"))

    def test_a_device_without_end(self) -> None:
        with pytest.raises(ManifestError, match=r"^/dev/zero: not a regular file"):
            load_manifest("/dev/zero")

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "job.yaml").symlink_to("job.yaml")
        with pytest.raises(ManifestError, match="Too many levels of symbolic links"):
            load_manifest(str(tmp_path / "job.yaml"))

    @pytest.mark.parametrize(
        "location",
        [
            "",
            "a\0b",
            "x" * 5000,
            "http://host/job.yaml",
            "hf:owner/name",
            "file://host/a",
            "file:",
            "s3:",
            "s3://",
        ],
    )
    def test_a_place_that_is_none(self, location: str) -> None:
        with pytest.raises(ManifestError) as caught:
            load_manifest(location)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600

    def test_a_name_that_would_break_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a\nb.yaml"
        path.write_text("")
        with pytest.raises(ManifestError) as caught:
            load_manifest(str(path))
        assert str(caught.value).isprintable()


class TestOverrides:
    @pytest.mark.parametrize(
        "override",
        [
            "spec.recipe.weights=*a",
            "spec.recipe.weights=&a {bits: 4}",
            "spec.recipe.weights=!!python/none",
            "spec.recipe.weights.bits=" + "[" * 10_000,
            "spec.recipe.weights.bits=" + "9" * 10_000,
            "spec.recipe.weights.bits=4\n---\n5",
            "spec.recipe.weights.bits=" + "#" * (MAX_BYTES + 1),
            "spec.unknown.path.of.many.steps=1",
            ".".join("a" * 50_000) + "=1",
            "spec.recipe.keep." + "9" * 10_000 + "=a",
            "spec.recipe.keep.\N{SUPERSCRIPT TWO}=a",
            "spec.recipe.overrides.0.\n=1",
            "",
            "=",
        ],
        ids=range(14),
    )
    def test_hostile_overrides(self, override: str) -> None:
        found = within_a_second(lambda: refused(FULL, override))
        check_lines(found)
