"""`import counterweight.auto` makes artifacts known to transformers' Auto classes, whichever of the two is imported first."""

from counterweight.pipeline.artifact.auto import register

register()
