"""The planner of range reads, against the definition: every byte once, whole elements, bounded requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterweight.workers.checkpoint.dtypes import U8
from counterweight.workers.checkpoint.header import TensorEntry
from counterweight.workers.checkpoint.ranges import plan_reads


def entry(name: str, start: int, length: int, file: str = "f") -> TensorEntry:
    return TensorEntry(name=name, dtype=U8, shape=(length,), file=file, start=start, length=length)


@st.composite
def layouts(draw: st.DrawFn) -> list[TensorEntry]:
    """Tensors of one or two files, without overlap, with gaps where a neighbour was not asked for."""
    entries = []
    for file in ("f", "g"):
        position = 100
        for number, (gap, length) in enumerate(
            draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 200)), max_size=8))
        ):
            entries.append(entry(f"{file}{number}", position + gap, length, file))
            position += gap + length
    return draw(st.permutations(entries))


@given(layouts(), st.sampled_from([8, 32, 64, 256]), st.sampled_from([0, 10, 1000]))
def test_every_wanted_byte_is_requested_once_in_bounded_pieces(
    entries: list[TensorEntry], max_read: int, max_gap: int
) -> None:
    got: dict[str, list[tuple[int, int]]] = {item.name: [] for item in entries}
    for group in plan_reads(entries, max_read=max_read, max_gap=max_gap):
        for read in group:
            assert read.length <= max_read
            for part in read.parts:
                assert part.entry.file == read.file
                assert read.start + part.position == part.entry.start + part.offset
                assert 0 <= part.position <= part.position + part.length <= read.length
                assert part.offset % 8 == 0
                got[part.entry.name].append((part.offset, part.length))
    for item in entries:
        position = 0
        for offset, length in got[item.name]:  # in order, so a digest can follow
            assert offset == position
            position += length
        assert position == item.length
        assert got[item.name]


@given(layouts(), st.sampled_from([0, 10]))
def test_unwanted_bytes_are_bounded_by_the_gap(entries: list[TensorEntry], max_gap: int) -> None:
    for group in plan_reads(entries, max_read=256, max_gap=max_gap):
        for read in group:
            wanted = sum(part.length for part in read.parts)
            assert read.length - wanted <= max_gap * (len(read.parts) - 1)


@pytest.mark.parametrize(("max_gap", "requests"), [(9, 2), (10, 1)])
def test_the_gap_decides_whether_neighbours_share_a_request(max_gap: int, requests: int) -> None:
    entries = [entry("a", 0, 10), entry("b", 20, 10)]
    assert len(plan_reads(entries, max_gap=max_gap)) == requests


@pytest.mark.parametrize(("max_read", "requests"), [(16, 2), (24, 1)])
def test_the_bound_decides_whether_neighbours_share_a_request(max_read: int, requests: int) -> None:
    entries = [entry("a", 0, 12), entry("b", 12, 12)]
    assert len(plan_reads(entries, max_read=max_read)) == requests


def test_a_large_tensor_is_a_group_of_its_own_in_order() -> None:
    groups = plan_reads([entry("small", 0, 8), entry("large", 8, 40), entry("last", 48, 8)], max_read=16)
    assert [[(read.start, read.length) for read in group] for group in groups] == [
        [(0, 8)],
        [(8, 16), (24, 16), (40, 8)],
        [(48, 8)],
    ]
