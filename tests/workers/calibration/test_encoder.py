"""Texts in pieces have the tokens of the whole; a tokenizer that takes all memory, all time, or panics is one line."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from counterweight.workers.calibration.encoder import FIRST, Encoder
from counterweight.workers.calibration.encoder_process import Stream
from counterweight.workers.errors import RequestError
from tests.patience import MAX_CPU, cpu_seconds, of_children

ROOT = Path(__file__).parents[3]
PROSE = (ROOT / "README.md").read_text()


def text(size: int, seed: int = 0) -> str:
    """Prose, with runs of spaces, blank lines and characters of several bytes in it."""
    draw = random.Random(seed)
    found: list[str] = []
    length = 0
    while length < size:
        start = draw.randrange(len(PROSE) - 400)
        piece = PROSE[start : start + draw.randrange(400)] + draw.choice(
            ["", "\n\n\n", "    ", "é漢😀", "\t \n", "e\u0301"]
        )
        found.append(piece)
        length += len(piece)
    return "".join(found)


def byte_level() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "manifests" / "demo" / "model" / "tokenizer.json"))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


def without_words() -> Tokenizer:
    """As Llama 2 has it: byte fallback, no pre-tokenizer, a space put before the text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.pre_tokenizer = words
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False))
    found = json.loads(tokenizer.to_str())
    found["pre_tokenizer"] = None
    found["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    tokenizer = Tokenizer.from_str(json.dumps(found))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"]))


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained(tokenizer, trainers.WordPieceTrainer(vocab_size=700, special_tokens=["[UNK]", "[CLS]", "[SEP]"]))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "no words": without_words,
    "unigram": unigram,
    "word piece": word_piece,
}


def pieces(whole: str, *cuts: int) -> Iterator[str]:
    for begin, end in zip((0, *cuts), (*cuts, len(whole)), strict=True):
        yield whole[begin:end]


def streamed(tokenizer: Tokenizer, whole: str, *cuts: int) -> list[int]:
    stream = Stream(tokenizer, whole=False)
    return [token for piece in pieces(whole, *cuts) for token in stream.add(piece)] + stream.end()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_pieces_have_the_tokens_of_the_whole(kind: str, seed: int) -> None:
    tokenizer, whole = KINDS[kind](), text(60_000, seed)
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(12_000, len(whole)), 5))
    assert streamed(tokenizer, whole, *cuts) == tokenizer.encode(whole).ids


@settings(max_examples=25, deadline=None)
@given(
    st.integers(8_000, 30_000),
    st.lists(st.sampled_from(["\n", " ", "a", "\n\n", "é", "\u0301", "'s", "1"]), max_size=40),
)
def test_wherever_the_cut_is_and_whatever_is_there(cut: int, there: list[str]) -> None:
    tokenizer, base = byte_level(), text(40_000)
    whole = base[:cut] + "".join(there) + base[cut:]
    assert streamed(tokenizer, whole, cut + len(there) // 2) == tokenizer.encode(whole).ids


def same(kind: str, found: list[int], expected: list[int]) -> bool:
    """The same ids. A unigram model adds scores from where its text begins: of two ways with equal scores (a, b and b, a) sums
    that begin elsewhere may choose the other."""
    if kind != "unigram":
        return found == expected
    apart = sum(one != other for one, other in zip(found, expected, strict=True))
    return apart <= len(expected) // 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_gives_the_ids_of_the_library_and_stops_where_it_may(kind: str) -> None:
    tokenizer, whole = KINDS[kind](), text(8 * FIRST)
    asked = 0

    def begin() -> Iterator[str]:
        nonlocal asked
        for start in range(0, len(whole), 5000):
            asked = start
            yield whole[start : start + 5000]

    expected = tokenizer.encode(whole).ids
    with Encoder(tokenizer.to_str().encode()) as running:
        assert same(kind, running.ids(begin, None, "field").tolist(), expected)
        few = running.ids(begin, 1000, "field").tolist()
        assert asked < 4 * FIRST
        assert len(few) >= 1000
        assert same(kind, few, expected[: len(few)])
        assert running.ids(lambda: iter(["a b"]), None, "field").tolist() == tokenizer.encode("a b").ids
        assert running.ids(lambda: iter(()), None, "field").tolist() == tokenizer.encode("").ids


def test_a_tokenizer_that_cannot_be_given_parts_is_given_the_whole() -> None:
    """Without words the whole text is one, and no two windows have a token in common."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    whole = text(3 * FIRST)
    with Encoder(tokenizer.to_str().encode()) as running:
        assert running.ids(lambda: iter([whole]), None, "field").tolist() == tokenizer.encode(whole).ids == [0]


def tokenizer_json(**parts: Any) -> bytes:
    found = json.loads(byte_level().to_str())
    return json.dumps({**found, **parts}).encode()


def model(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


EXPANDING = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 200_000}
BACKTRACKING = {
    "type": "Split",
    "pattern": {"Regex": "(([a-z])+.)+[A-Z]([a-z])+$"},
    "behavior": "Isolated",
    "invert": False,
}
GHOST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "ghost", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}
HOSTILE: dict[str, bytes] = {
    "no JSON": b"{",
    "empty": b"{}",
    "words without unk": tokenizer_json(model=model("WordLevel", vocab={"a": 0}, unk_token="<none>")),
    "pieces without unk": tokenizer_json(
        model=model(
            "WordPiece", vocab={"a": 0}, unk_token="<none>", continuing_subword_prefix="#", max_input_chars_per_word=9
        )
    ),
    "unigram without unk": tokenizer_json(model=model("Unigram", vocab=[["a", 0.0]], unk_id=None, byte_fallback=False)),
    "a template's ghost": tokenizer_json(post_processor=GHOST),
    "precompiled": tokenizer_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a bomb": tokenizer_json(normalizer=EXPANDING),
    "backtracking": tokenizer_json(pre_tokenizer=BACKTRACKING),
    "deep": b'{"version":"1.0","normalizer":' + b'{"type":"Sequence","normalizers":[' * 20_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_is_one_line_and_costs_little(case: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = None

    def meet() -> None:
        nonlocal said
        try:
            with Encoder(HOSTILE[case]) as running:
                running.ids(lambda: iter(["abcde" * FIRST]), 10, "spec.validation.text")
        except RequestError as error:
            said = str(error)

    spent = cpu_seconds(meet, below=MAX_CPU, clock=of_children)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if said is not None:
        assert said.startswith("tokenizer.json: ")
        assert said.isprintable()
        assert len(said) < 500
    else:
        assert case in ("backtracking", "pieces without unk", "precompiled", "unigram without unk")
    assert spent < MAX_CPU
    assert after.ru_maxrss < max(2 << 20, before.ru_maxrss + 1)  # KiB; an earlier child may have had more


def test_a_tokenizer_of_great_size_is_not_even_given() -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.json: \d+ bytes, expected at most"):
        Encoder(bytes((64 << 20) + 1))


def test_the_process_ends_with_its_owner() -> None:
    running = Encoder(tokenizer_json())
    running.close()
    with pytest.raises(Exception, match=r"exit code|closed"):
        running.ids(lambda: iter(["abc"]), None, "field")


@pytest.mark.parametrize(
    ("kind", "around"), [("byte level", ([], [])), ("no words", ([1], [2])), ("word piece", ([1], [2]))]
)
def test_what_stands_around_a_text_is_told_and_can_be_left_out(kind: str, around: tuple[list[int], list[int]]) -> None:
    tokenizer = KINDS[kind]()
    with Encoder(tokenizer.to_str().encode()) as running:
        before, behind = running.specials()
        assert (before.tolist(), behind.tolist()) == around
        ids = running.ids(lambda: iter(["a b"]), None, "field", framed=False).tolist()
        assert ids == tokenizer.encode("a b", add_special_tokens=False).ids
        assert running.ids(lambda: iter(()), None, "field", framed=False).tolist() == []
