"""What proves the kernels right where there is no GPU, and the tables of `kernels/README.md`."""
