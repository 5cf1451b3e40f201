"""How long tests wait for what has to happen: such a limit is there for what hangs, never for what is merely slow."""

from __future__ import annotations

PATIENCE = 900.0
"""Seconds of wall time; what is waited for takes at most 60 of them on two idle cores. pyproject.toml gives a whole test twice
as long."""
