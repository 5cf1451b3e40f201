"""Keys and URIs."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterweight.workers.errors import RequestError
from counterweight.workers.storage import check_key, open_store, split_uri
from counterweight.workers.storage.file import FileStore
from counterweight.workers.storage.names import check_prefix, file_root, is_key, s3_root
from counterweight.workers.storage.s3 import S3Store

segments = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/\\"), min_size=1, max_size=60)
good_keys = (
    st.lists(segments, min_size=1, max_size=4)
    .filter(lambda parts: not any(p in (".", "..") or p.startswith(".counterweight-tmp-") for p in parts))
    .map("/".join)
)
rough_text = st.text(st.sampled_from("/.\\\0\n\x7f\x85 aä~\ud800"), max_size=12)


@given(good_keys)
def test_ordinary_keys_are_accepted(key: str) -> None:
    assert check_key(key) == key


@given(rough_text)
def test_an_accepted_key_stays_below_its_root(text: str) -> None:
    if not is_key(text):
        with pytest.raises(RequestError, match=r"^object key [^\n]*$"):
            check_key(text)
        return
    key = check_key(text)
    root = PurePosixPath("/somewhere")
    path = root / key
    # Said independently of the rules: as a path, the key is exactly its segments, and none of them moves.
    assert path.parts[:2] == root.parts
    assert str(path) == f"/somewhere/{key}"
    assert ".." not in path.parts
    assert key.isprintable() or " " in key
    assert "\\" not in key


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("", "segment ''"),
        ("/absolute", "segment ''"),
        ("a//b", "segment ''"),
        ("a/", "segment ''"),
        ("..", "segment '..'"),
        ("a/../b", "segment '..'"),
        ("./a", "segment '.'"),
        ("a\\b", r"character '\\\\'"),
        ("a\0b", r"character '\\x00'"),
        ("a\x85b", r"character '\\x85'"),
        ("a\ud800", r"character '\\ud800'"),
        (".counterweight-tmp-1", "being written"),
        ("ä" * 128, "longer than 255 bytes"),
        ("/".join(["a" * 200] * 6), "longer than 1024 bytes"),
    ],
)
def test_a_refusal_says_why(key: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        check_key(key)


def test_names_that_only_look_dangerous_are_keys() -> None:
    for key in ("..a", "a..", "...", ".hidden", "a b", "~", "-rf", "%2e%2e", "C:", "a" * 255, "ä" * 127):
        assert check_key(key) == key


@given(good_keys, st.data())
def test_every_beginning_of_a_key_is_a_prefix(key: str, data: st.DataObject) -> None:
    prefix = key[: data.draw(st.integers(0, len(key)))]
    assert check_prefix(prefix) == prefix


def test_the_longest_key_counts_the_roots_prefix() -> None:
    key = "/".join(["a" * 101] * 10)  # 1019 bytes
    assert S3Store("s3://bucket").uri_of(key) == f"s3://bucket/{key}"
    with pytest.raises(RequestError, match="longer than 1024 bytes below s3://bucket/deep"):
        S3Store("s3://bucket/deep/prefix").uri_of(key)


@pytest.mark.parametrize("uri", ["file:/a/b", "file:///a/b", "file:////a/b", "file:///a/b/"])
def test_spellings_of_a_file_uri(uri: str) -> None:
    store = open_store(uri)
    assert isinstance(store, FileStore)
    assert store.uri == "file:///a/b"
    assert store.uri_of("c/d") == "file:///a/b/c/d"


@pytest.mark.parametrize("name", ["with space", "100%", "a#b", "a?b", "ü", "%41"])
def test_a_path_survives_its_uri(name: str) -> None:
    path = Path("/a") / name
    assert file_root(path.as_uri()) == path
    assert open_store(open_store(path.as_uri()).uri).uri == path.as_uri()


@pytest.mark.parametrize(
    ("uri", "root", "key"),
    [
        ("file:///a/b.json", "file:///a", "b.json"),
        ("file:/b", "file:///", "b"),
        ("file:///a/b%20c", "file:///a", "b c"),
        ("s3://bucket/a/b/c.json", "s3://bucket/a/b", "c.json"),
        ("s3://bucket/c%20d", "s3://bucket", "c%20d"),
    ],
)
def test_split_uri(uri: str, root: str, key: str) -> None:
    assert split_uri(uri) == (root, key)
    assert file_root(open_store(root).uri_of(key)) == file_root(uri)
    assert s3_root(open_store(root).uri_of(key)) == s3_root(uri)


@pytest.mark.parametrize("uri", ["file:///", "file:///a/", "s3://bucket", "s3://bucket/", "s3://bucket/a/", "hf:a/b"])
def test_split_uri_wants_an_object(uri: str) -> None:
    with pytest.raises(RequestError, match="expected"):
        split_uri(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/a/b",
        "a/b",
        "hf:meta-llama/Llama",
        "http://host/a",
        "file:a/b",
        "file:",
        "file://",
        "file://host/a",
        "file:///a%00b",
        "s3:bucket/a",
        "s3:///a",
        "s3://",
        "s3://key:secret@host/a",
        "s3://bucket//a",
        "s3://bucket/../a",
        "S3://bucket/a",
    ],
)
def test_other_uris_are_refused_with_what_is_expected(uri: str) -> None:
    with pytest.raises(RequestError, match="expected"):
        open_store(uri)
