"""One module for each of kernels.gpu, with a list CASES."""
