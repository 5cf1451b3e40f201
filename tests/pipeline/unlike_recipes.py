"""Two recipes that look at a block in ways that have little in common."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, Any] = {
    "W4A4, LRC": {
        "weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq"}},
        "activations": {"bits": 4, "clip": "search"},
        "compensation": {"kind": "lrc", "rank": {"count": 4}},
    },
    "smoothed, ranks shared out": {
        "transforms": [{"kind": "smoothing"}],
        "weights": {"bits": 3, "group_size": 32, "quantizer": {"kind": "rtn"}},
        "activations": {"bits": 8},
        "compensation": {"kind": "svd", "rank": {"budget_bits": 2.0}},
    },
}
