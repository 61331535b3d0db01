"""What proves the kernels right where there is no GPU, and the tables of `kernels/README.md`."""

from pathlib import Path

from visionattn_kernels.op import OPS

# Operators with kernels: those that have a launcher module of their name.
OPERATORS = tuple(name for name in OPS if (Path(__file__).parents[1] / f"{name}.py").exists())
