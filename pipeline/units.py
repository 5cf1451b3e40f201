"""Seconds and bytes as people read them."""

from __future__ import annotations

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
