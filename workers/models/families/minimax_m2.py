"""MiniMax-M2: Mixtral with norms over all heads of queries and keys, partial rotary embeddings and a router with a bias."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.models.families import mixtral

FAMILY = replace(mixtral.FAMILY, model_types=("minimax_m2",), partial_rotary=True)
