"""Windows of tokens: where they are cut, that they are the same everywhere, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from counterweight.workers.calibration.source import (
    DatasetSource,
    StandardLibrarySource,
    TextSource,
    TokenSource,
    TokensSource,
)
from counterweight.workers.calibration.tokens import TokenSet, token_set
from counterweight.workers.errors import RequestError
from tests.models import VOCABULARY, write_text, write_tokenizer

OPTIONS: dict[str, Any] = {
    "vocabulary": VOCABULARY,
    "length": 8,
    "sequences": 5,
    "sampling": "consecutive",
    "seed": 0,
    "field": "spec.calibration.source",
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> bytes:
    write_tokenizer(tmp_path)
    return (tmp_path / "tokenizer.json").read_bytes()


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    return TextSource(uri=write_text(tmp_path / "text.txt", 100).as_uri())


def stream(path: Path) -> list[int]:
    return [int(word[1:]) for word in path.read_text().split()]


def cut(source: TokenSource, tokenizer: bytes | None, **changes: Any) -> TokenSet:
    options = {**OPTIONS, **changes}
    vocabulary = options.pop("vocabulary")
    return token_set(source, tokenizer, **options).within(vocabulary, options["field"])


def test_consecutive_windows_lie_side_by_side(tmp_path: Path, text: TextSource, tokenizer: bytes) -> None:
    found = cut(text, tokenizer)
    assert found.ids.dtype is torch.int32
    assert found.ids.flatten().tolist() == stream(tmp_path / "text.txt")[:40]
    assert (found.sequences, found.length) == (5, 8)


def test_all_windows_leave_out_what_does_not_fill_one(text: TextSource, tokenizer: bytes) -> None:
    assert cut(text, tokenizer, sequences=None).sequences == 12


def test_random_windows_are_pieces_of_the_text(tmp_path: Path, text: TextSource, tokenizer: bytes) -> None:
    words = stream(tmp_path / "text.txt")
    pieces = [words[start : start + 8] for start in range(93)]
    ids = cut(text, tokenizer, sampling="random", sequences=12).ids.tolist()
    assert all(window in pieces for window in ids)
    assert any(pieces.index(window) % 8 for window in ids)


def test_the_seed_decides_random_windows_and_nothing_else(text: TextSource, tokenizer: bytes) -> None:
    first, again, other = (cut(text, tokenizer, sampling="random", seed=seed) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    assert cut(text, tokenizer, seed=1).digest == cut(text, tokenizer, seed=2).digest


def test_random_windows_are_those_of_every_python(tmp_path: Path, tokenizer: bytes) -> None:
    """Written down once: a platform or version that draws otherwise would not find finished work."""
    (tmp_path / "text.txt").write_text(" ".join(f"w{index}" for index in range(100)))
    source = TextSource(uri=(tmp_path / "text.txt").as_uri())
    found = cut(source, tokenizer, sampling="random", sequences=6, length=2, seed=7).ids
    assert found[:, 0].tolist() == [41, 19, 50, 83, 6, 9]


def test_the_digest_is_of_the_ids_not_of_their_source(tmp_path: Path, text: TextSource, tokenizer: bytes) -> None:
    found = cut(text, tokenizer)
    save_file({"input_ids": found.ids.long()}, tmp_path / "ids.safetensors")
    prepared = cut(TokensSource(uri=(tmp_path / "ids.safetensors").as_uri()), None)
    assert prepared.digest == found.digest
    assert cut(text, tokenizer, sequences=4).digest != found.digest


def test_line_ends_are_those_that_python_reads(tmp_path: Path, tokenizer: bytes) -> None:
    (tmp_path / "unix.txt").write_bytes(b"w1 w2\nw3 w4\n" * 10)
    (tmp_path / "dos.txt").write_bytes(b"w1 w2\r\nw3 w4\r\n" * 10)
    (tmp_path / "mac.txt").write_bytes(b"w1 w2\rw3 w4\r" * 10)
    digests = {cut(TextSource(uri=path.as_uri()), tokenizer).digest for path in tmp_path.glob("*.txt")}
    assert len(digests) == 1


def test_a_tokenizer_that_truncates_does_not(tmp_path: Path, text: TextSource, tokenizer: bytes) -> None:
    from tokenizers import Tokenizer

    short = Tokenizer.from_buffer(tokenizer)
    short.enable_truncation(16)
    short.enable_padding(length=400)
    found = cut(text, short.to_str().encode(), sequences=None)
    assert found.digest == cut(text, tokenizer, sequences=None).digest


def test_the_standard_library_is_a_source(tokenizer: bytes) -> None:
    found = cut(StandardLibrarySource(part="calibration"), tokenizer)
    assert found.ids.shape == (5, 8)


def test_a_dataset_is_joined_by_blank_lines(tmp_path: Path, tokenizer: bytes) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "w1 w2"}\n{"body": "w3 w4"}\n{"body": "w5"}\n')
    source = DatasetSource(path=str(folder), column="body")
    options: dict[str, Any] = {"length": 2, "sequences": None}
    assert cut(source, tokenizer, **options).ids.tolist() == [[1, 2], [3, 4]]
    assert cut(source.model_copy(update={"rows": 1}), tokenizer, **options).ids.tolist() == [[1, 2]]
    with pytest.raises(RequestError, match=r"spec\.calibration\.source\.column: 'text': expected one of body"):
        cut(source.model_copy(update={"column": "text"}), tokenizer, **options)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"text": [{"role": "user", "content": "w1"}]}\n' * 5, r"column: 'text': row 0 of dataset .*holds messages"),
        ('{"text": 5}\n' * 5, r"row 0 .*holds a int: expected text"),
        ('{"text": "w1"}\n{"text": null}\n', r"row 1 .*holds a NoneType: expected text"),
        ('{"text": "w1"}\n\n{"text": "w3"\n', r"dataset '.*': .*JSON parse error"),
        ('{"text": "\\ud800"}\n', r"dataset '.*'|row 0"),
    ],
)
def test_rows_that_are_no_text_are_refused_in_one_line(
    tmp_path: Path, tokenizer: bytes, capfd: pytest.CaptureFixture[str], rows: str, said: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(rows)
    with pytest.raises(RequestError, match=rf"^spec\.calibration\.source.*{said}") as caught:
        cut(DatasetSource(path=str(tmp_path / "data")), tokenizer)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_a_dataset_may_be_one_file(tmp_path: Path, tokenizer: bytes, name: str) -> None:
    text = {"rows.jsonl": '{"text": "w1 w2"}\n{"text": "w3 w4"}\n', "rows.csv": "text\nw1 w2\nw3 w4\n"}
    (tmp_path / name).write_text(text.get(name, "w1 w2\nw3 w4\n"))
    found = cut(DatasetSource(path=str(tmp_path / name)), tokenizer, length=2, sequences=None)
    assert found.ids.tolist() == [[1, 2], [3, 4]]


def test_a_long_text_costs_what_its_windows_cost(tmp_path: Path, tokenizer: bytes) -> None:
    import tracemalloc

    line = " ".join(f"w{index}" for index in range(100)) + "\n"
    with (tmp_path / "long.txt").open("w") as file:
        file.write(line * 2000)
        file.truncate(1 << 36)  # sparse: 64 GiB
    tracemalloc.start()
    try:
        found = cut(TextSource(uri=(tmp_path / "long.txt").as_uri()), tokenizer, length=100, sequences=20)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert found.ids.tolist() == [list(range(100))] * 20


def test_a_dataset_that_is_not_there_is_refused(tmp_path: Path, tokenizer: bytes) -> None:
    with pytest.raises(RequestError, match="dataset"):
        cut(DatasetSource(path=str(tmp_path / "nothing")), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": 13}, r"100 tokens make 12 windows of 8: expected at least 13"),
        ({"length": 101, "sequences": None}, r"100 tokens make 0 windows of 101: expected at least 1"),
        ({"sequences": 13, "sampling": "random"}, r"expected at least 13"),
        ({"vocabulary": 100}, r"token id \d+: expected ids from 0 to 99"),
    ],
)
def test_too_little_text_and_foreign_ids_are_refused(
    text: TextSource, tokenizer: bytes, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=rf"spec\.calibration\.source: .*{message}"):
        cut(text, tokenizer, **changes)


def test_no_tokenizer_and_a_broken_one_are_refused(text: TextSource) -> None:
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        cut(text, None)
    for broken in (b"{}", b"\xff", b"[1]"):
        with pytest.raises(RequestError, match=r"tokenizer\.json"):
            cut(text, broken)


def test_a_text_that_is_not_there_or_no_text_is_refused(tmp_path: Path, tokenizer: bytes) -> None:
    with pytest.raises(RequestError, match=r"no such file"):
        cut(TextSource(uri=(tmp_path / "nothing.txt").as_uri()), tokenizer)
    (tmp_path / "binary.txt").write_bytes(b"w1 w2 \xff\xfe")
    with pytest.raises(RequestError, match=r"not UTF-8 text at byte 6"):
        cut(TextSource(uri=(tmp_path / "binary.txt").as_uri()), tokenizer)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": torch.zeros(5, 8, dtype=torch.int64)}, "expected an int32 or int64 tensor input_ids"),
        ({"input_ids": torch.zeros(5, 8)}, "expected an int32 or int64 tensor input_ids"),
        ({"input_ids": torch.zeros(40, dtype=torch.int64)}, "expected an int32 or int64 tensor input_ids"),
        ({"input_ids": torch.zeros(4, 8, dtype=torch.int64)}, r"\[4, 8\]: expected \[5, 8\]"),
        ({"input_ids": torch.zeros(5, 9, dtype=torch.int64)}, r"\[5, 9\]: expected \[5, 8\]"),
        ({"input_ids": torch.full((5, 8), VOCABULARY)}, "token id 128: expected ids from 0 to 127"),
        ({"input_ids": torch.arange(-1, 39).view(5, 8)}, "token id -1: expected ids from 0 to 127"),
        ({"input_ids": torch.full((5, 8), 2**40)}, "expected ids that fit in 32 bits"),
        ({"input_ids": torch.full((5, 8), -(2**40))}, "expected ids that fit in 32 bits"),
    ],
)
def test_prepared_tokens_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(RequestError, match=message):
        cut(TokensSource(uri=(tmp_path / "ids.safetensors").as_uri()), None)


def test_prepared_tokens_that_are_not_there_or_no_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        cut(TokensSource(uri=(tmp_path / "nothing.safetensors").as_uri()), None)
    (tmp_path / "ids.safetensors").write_bytes(b"no header here")
    with pytest.raises(RequestError, match=r"spec\.calibration\.source"):
        cut(TokensSource(uri=(tmp_path / "ids.safetensors").as_uri()), None)


def test_datasets_is_imported_only_for_datasets() -> None:
    """It costs a second that other sources need not pay."""
    import subprocess

    code = "import sys, counterweight.workers.calibration.tokens; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("further", "there"), [(0, 0), (3, 3), (100, 7)])
def test_further_consecutive_windows_lie_behind_as_far_as_the_text_goes(
    further: int, there: int, tmp_path: Path, text: TextSource, tokenizer: bytes
) -> None:
    found = cut(text, tokenizer, further=(further,))
    assert found.sequences == 5 + there
    assert found.ids.flatten().tolist() == stream(tmp_path / "text.txt")[: 8 * found.sequences]


@pytest.mark.parametrize("further", [1, 2, 100])
def test_further_random_windows_share_no_token_with_the_others(further: int, tmp_path: Path, tokenizer: bytes) -> None:
    numbers = tmp_path / "numbers.txt"
    numbers.write_text(" ".join(f"w{number % VOCABULARY}" for number in range(100)))
    source = TextSource(uri=numbers.as_uri())
    plain = cut(source, tokenizer, sampling="random")
    found = cut(source, tokenizer, sampling="random", further=(further,))
    assert torch.equal(found.ids[:5], plain.ids)
    seen = {place for start in starts(plain.ids) for place in range(start, start + 8)}
    others = [{*range(start, start + 8)} for start in starts(found.ids[5:])]
    assert all(seen.isdisjoint(window) for window in others)
    assert sum(map(len, others)) == len(set().union(*others)), "nor with each other"
    assert 0 < len(others) <= further
    again = cut(source, tokenizer, sampling="random", further=(further, 2))
    assert torch.equal(again.ids[: len(found.ids)], found.ids), "of a kind behind them they do not depend"
    assert seen.union(*others).isdisjoint(
        place for start in starts(again.ids[len(found.ids) :]) for place in range(start, start + 8)
    )


def starts(ids: Tensor) -> list[int]:
    """Of windows of a text whose tokens count up."""
    return [int(first) for first in ids[:, 0]]


def test_a_text_without_more_windows_gives_none_further(tmp_path: Path, tokenizer: bytes) -> None:
    short = TextSource(uri=write_text(tmp_path / "short.txt", 43).as_uri())
    for sampling in ("consecutive", "random"):
        assert cut(short, tokenizer, sampling=sampling, further=(4,)).sequences in (
            (5,) if sampling == "consecutive" else range(5, 10)
        )


def test_prepared_tokens_go_on_too(tmp_path: Path) -> None:
    save_file({"input_ids": torch.arange(56).view(7, 8)}, tmp_path / "ids.safetensors")
    source = TokensSource(uri=(tmp_path / "ids.safetensors").as_uri())
    assert cut(source, None, further=(1,)).sequences == 6
    assert cut(source, None, further=(9,)).sequences == 7
