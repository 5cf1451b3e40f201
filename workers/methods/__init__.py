"""Steps of a recipe, one file each: what a manifest can ask, and what is computed. torch is imported where it computes, so
that a manifest is checked without it."""
