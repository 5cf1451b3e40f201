"""Compiles every kernel for every architecture, without a GPU, and holds what comes out to a budget.

Nothing needs it at run time.
"""
