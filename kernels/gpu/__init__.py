"""Triton kernels, one a file: each means what its function in `kernels.reference` says.

Nothing here is imported unless a kernel is to run: where there is no triton, the rest of the package does without.
"""
