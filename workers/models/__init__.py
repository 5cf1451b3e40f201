"""Model knowledge: families as values, and the models that they describe, built and run block by block."""
