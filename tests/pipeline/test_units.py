"""Seconds and bytes as text."""

from __future__ import annotations

from datetime import timedelta

import pytest

from counterweight.pipeline.units import bytes_text, duration, seconds_text
from counterweight.workers.errors import RequestError


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (612 << 20, "612 MiB"),
        (1 << 30, "1.00 GiB"),
        ((1 << 30) - 1, "1.00 GiB"),
        (1525000000, "1.42 GiB"),
        (int(23.4 * 2**30), "23.4 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_bytes(size: int, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (400000, "111 h 07 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("0d", 0), ("90s", 90), ("5m", 300), ("1.5h", 5400), ("7d", 604800), ("2w", 1209600)],
)
def test_durations_as_people_write_them(text: str, seconds: float) -> None:
    assert duration(text, "--older-than") == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "7", "d", "-1d", "1e3d", "7 d", "7D", "7days", "nan", "infd", "٧d", "9" * 30 + "d", "9" * 400 + "w"]
)
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(RequestError, match=r"^--older-than: .*expected a number"):
        duration(text, "--older-than")
