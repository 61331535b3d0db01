"""The Triton kernels of the operators and their launchers, imported when a CUDA tensor arrives."""
