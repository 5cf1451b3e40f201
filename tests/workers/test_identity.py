"""Who a worker is, and whether it sees the job's storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterweight.workers.identity import PACKAGE, Identity, Token, code_digest, identity, report


def test_code_is_told_apart_by_bytes_names_and_places(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    first = code_digest(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("no code")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.py").write_text("no source")
    assert code_digest(tmp_path) == first
    (tmp_path / "a" / "x.py").write_text("2")
    second = code_digest(tmp_path)
    (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "y.py")
    assert len({first, second, code_digest(tmp_path)}) == 3


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.py").write_text("1")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "workers").symlink_to(tmp_path / "real")
    before = code_digest(tmp_path / "package")
    (tmp_path / "real" / "x.py").write_text("2")
    assert code_digest(tmp_path / "package") != before


def test_this_process_is_itself() -> None:
    assert identity().code == code_digest(PACKAGE)
    assert identity().differences(identity()) == []
    assert {"torch", "transformers"} <= identity().libraries.keys()


def test_differences_name_both_sides() -> None:
    own = Identity(code="a" * 64, libraries={"torch": "2.1", "x": "1"})
    other = Identity(code="b" * 64, libraries={"torch": "2.2"})
    assert own.differences(other) == [
        "code bbbbbbbbbbbb (the driver's is aaaaaaaaaaaa)",
        "torch 2.2 (the driver has 2.1)",
        "x none (the driver has 1)",
    ]


@pytest.mark.parametrize(
    ("written", "said"), [(b"seen", ""), (b"other", "holds other bytes"), (None, "no such object")]
)
def test_storage_is_seen_or_the_reason_is_told(tmp_path: Path, written: bytes | None, said: str) -> None:
    if written is not None:
        (tmp_path / "token").write_bytes(written)
    found = report("cpu", Token(uri=tmp_path.as_uri(), key="token", value=b"seen"))
    assert said in found.storage
    assert bool(found.storage) == bool(said)
    assert (found.device, report("cpu", None).storage) == ("cpu", "")
