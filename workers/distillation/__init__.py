"""Branches of a whole model, trained together on the original's predictions."""
