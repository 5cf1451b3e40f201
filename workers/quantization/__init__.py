"""Weights to integer codes: the uniform grid, and the algorithms that choose codes on it."""
