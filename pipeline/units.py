"""Seconds and bytes as people read and write them."""

from __future__ import annotations

import re
from datetime import timedelta

from counterweight.workers.errors import RequestError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_text(size: float) -> str:
    """Three figures or more and a binary unit: `612 MiB`, `1.42 GiB`."""
    unit = 0
    # 1023.5 would be written 1024, which is the next unit's 1.
    while size >= 1023.5 and unit < len(_BINARY) - 1:
        size /= 1024
        unit += 1
    decimals = 0 if unit == 0 or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{decimals}f} {_BINARY[unit]}"


def seconds_text(seconds: float) -> str:
    """A duration, with tenths below a minute: `0.4 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def duration(text: str, field: str) -> timedelta:
    """A duration as people write it: `7d`, `36h`, `1.5h`, `0`. RequestError naming `field` for anything else."""
    expected = f"{field}: {text!r}: expected a number and s, m, h, d or w, such as 7d or 36h, or 0"
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", "0s" if text == "0" else text)
    if match is None:
        raise RequestError(expected)
    try:
        return timedelta(seconds=float(match[1]) * _UNITS[match[2]])
    except OverflowError as error:
        raise RequestError(f"{expected}; at most {timedelta.max.days}d") from error
